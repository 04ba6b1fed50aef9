"""Every program that needs a device reports a missing one in one line."""

import sys

import jax
import pytest

from cwm_jax.errors import UserError
from cwm_jax.programs import evaluate, sample
from cwm_jax.runtime import devices
from cwm_jax.tools import convert_torch, export


@pytest.fixture(params=[AssertionError(), RuntimeError("Backend 'x' is not known\nmore")])
def no_device(request, monkeypatch):
    def fail(*_):
        raise request.param

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", fail)


def test_an_available_device_is_accepted():
    assert devices.missing() == ""
    devices.check()


def test_a_platform_without_a_device_is_named(no_device):
    with pytest.raises(UserError, match=r"no device for JAX_PLATFORMS=cuda .*unset JAX_PLATFORMS"):
        devices.check()


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (sample.main, "--frames 3"),
        (evaluate.main, ""),
        (evaluate.main, "closed-loop"),
        (evaluate.main, "settings"),
        (evaluate.main, "outcomes --data x"),
        (export.main, "checkpoints/pocket --format safetensors --output /dev/null"),
        (convert_torch.main, "a.pt b"),
    ],
)
def test_programs_end_with_one_line(no_device, monkeypatch, capsys, main, words):
    monkeypatch.setattr(sys, "argv", ["program", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "error: JAX has no device for JAX_PLATFORMS=cuda" in capsys.readouterr().err
