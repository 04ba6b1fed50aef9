"""How a process takes memory: set by default, and left to the environment where that speaks."""

import ctypes
import os
from types import SimpleNamespace

import pytest

from cwm_jax import memory


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_the_share_of_a_gpu_is_claimed_unless_another_is_named(monkeypatch, name):
    monkeypatch.setattr(os, "environ", {})
    memory.claim_gpu()
    assert os.environ == {"XLA_CLIENT_MEM_FRACTION": "0.92"}
    monkeypatch.setattr(os, "environ", {name: "0.5"})
    memory.claim_gpu()
    assert os.environ == {name: "0.5"}


def test_freed_memory_is_kept_unless_the_environment_speaks(monkeypatch):
    said = {}
    library = SimpleNamespace(mallopt=lambda option, size: said.update({option: size}) or 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(os, "environ", {"MALLOC_TRIM_THRESHOLD_": "131072"})
    assert not memory.keep_freed()
    assert not said
    monkeypatch.setattr(os, "environ", {})
    assert memory.keep_freed()
    assert said == {
        -1: 2**30,
        -2: 2**26,
        -3: 2**30,
    }  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())  # not glibc
    assert not memory.keep_freed()
