"""The doctor finds each problem, prints its fix, and sets the exit code."""

import importlib.metadata
import os
import sys
from types import SimpleNamespace

import huggingface_hub
import jax
import pytest
import wandb

from cwm_jax.tools import doctor
from cwm_jax.tools.doctor import BAD, NOTE, OK


def test_a_healthy_machine_passes(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "devices", lambda: doctor.Finding(OK, "1 × gpu"))
    doctor.main([])
    printed = capsys.readouterr().out
    assert printed.endswith("all well\n")
    assert "ok  python" in printed
    assert "BAD" not in printed


def test_bad_findings_set_the_exit_code(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--data", str(tmp_path / "none")])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "not well: data" in printed
    assert f"→ python -m cwm_jax.tools.hub download --to {tmp_path / 'none'}" in printed


def test_old_pythons_and_packages_are_bad():
    assert doctor.python((3, 10, 4)).status == BAD
    assert doctor.python((3, 12, 1)).status == OK
    found = doctor.packages(["numpy>=99", "no-such-package-at-all", "jax>=0.1"])
    assert found.status == BAD
    assert "numpy>=99 is" in found.what
    assert "no-such-package-at-all is missing" in found.what
    assert "jax" not in found.what
    assert len(doctor.requirements()) > 15
    assert doctor.packages(doctor.requirements()).status == OK


def test_a_gpu_that_jax_does_not_use_is_bad(monkeypatch):
    cpu = SimpleNamespace(platform="cpu", device_kind="cpu", memory_stats=lambda: None)
    gpu = SimpleNamespace(
        platform="gpu", device_kind="H", memory_stats=lambda: {"bytes_limit": 72e9}
    )
    monkeypatch.setattr(jax, "devices", lambda: [cpu])
    for driver, status, mend in (
        ("", NOTE, ""),
        ("570.1", BAD, "cuda12"),
        ("580.2", BAD, "cuda13"),
        ("470.42", BAD, "525 or newer"),
    ):
        monkeypatch.setattr(doctor, "nvidia_driver", lambda driver=driver: driver)
        found = doctor.devices()
        assert found.status == status
        assert mend in found.mend
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert doctor.devices() == (OK, "1 × gpu H (72 GB for JAX)", "")

    def broken():
        raise RuntimeError("no driver\nmore")

    monkeypatch.setattr(jax, "devices", broken)
    assert doctor.devices().status == BAD


def test_processes_that_hold_a_gpus_memory_are_named(monkeypatch, tmp_path):
    answers = tmp_path / "answers"
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncase "$1" in --query-compute-apps=*) cat {answers};; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    answers.write_text("")
    assert doctor.gpu_memory().status == OK
    answers.write_text("4711, python3, 61234 MiB\n")
    found = doctor.gpu_memory()
    assert (found.status, "python3 (process 4711, 61234 MiB)" in found.what) == (NOTE, True)
    assert "CUDA_VISIBLE_DEVICES" in found.mend
    program.write_text("#!/bin/sh\nexit 9\n")
    assert doctor.gpu_memory().status == OK


def test_the_other_checks_run(monkeypatch, tmp_path):
    assert doctor.codecs(["h264"]).status == BAD
    assert "libx264" in doctor.codecs(["h264"]).what
    usage = lambda free: lambda _: SimpleNamespace(free=free)
    for free, status in ((5e8, BAD), (5e9, NOTE), (5e10, OK)):
        monkeypatch.setattr(doctor.shutil, "disk_usage", usage(free))
        assert doctor.disk().status == status
    monkeypatch.setattr(doctor.shutil, "disk_usage", usage(6e7))
    assert doctor.shared_memory(tmp_path).status == NOTE
    assert doctor.open_files(1024).status == NOTE
    assert doctor.open_files(-1).status == OK
    assert doctor.simulator(tmp_path).status == NOTE

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    assert doctor.cudnn(absent).status == OK  # there is no GPU in the tests
    assert doctor.cudnn(lambda name: "9.1").what == "cuDNN 9.1"


def test_logins_are_found_and_not_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value, status in (("", "", NOTE), ("k" * 40, "hf_" + "x" * 30, OK)):
        monkeypatch.setenv("WANDB_API_KEY", name)
        monkeypatch.setenv("HF_TOKEN", value)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda value=value: value or None)
        found = [doctor.wandb_login(), doctor.hub_login()]
        assert [f.status for f in found] == [status, status]
        assert not any(secret and secret in str(found) for secret in (name, value))


def test_a_check_that_fails_is_a_finding(monkeypatch, capsys):
    def hang(*_, **__):
        raise doctor.subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", hang)
    monkeypatch.setitem(sys.modules, "av", None)  # as where a library is missing

    def broken(*_):
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", broken)
    with pytest.raises(SystemExit) as ended:
        doctor.main([])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "BAD  devices        JAX has no device for JAX_PLATFORMS=cuda" in printed
    assert "→ unset JAX_PLATFORMS" in printed
    assert "BAD  video          cannot be checked" in printed
    assert "not well: devices, video" in printed


def test_a_machine_without_a_home_or_with_a_bad_proxy(monkeypatch, tmp_path):
    def nobody(*_):
        raise KeyError("uid not found")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert doctor.caches().status == OK
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert "cannot be written" in doctor.caches().what
    for name in ("HOME", "XDG_CACHE_HOME", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    wandb.teardown()
    assert doctor.wandb_login().status == NOTE
    assert doctor.caches().status == NOTE
    monkeypatch.setenv("HTTPS_PROXY", "http://user:p#ss@h:1")
    assert doctor.proxies().status == BAD
    assert "p#ss" not in str(doctor.proxies())
