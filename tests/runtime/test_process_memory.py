"""Memory settings of a process: set by default, unless the environment sets them."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cwm_jax.runtime import process_memory


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_the_share_of_a_gpu_is_claimed_unless_another_is_named(monkeypatch, name):
    monkeypatch.setattr(os, "environ", {})
    process_memory.claim_gpu()
    assert os.environ == {"XLA_CLIENT_MEM_FRACTION": "0.92"}
    monkeypatch.setattr(os, "environ", {name: "0.5"})
    process_memory.claim_gpu()
    assert os.environ == {name: "0.5"}


def test_sums_over_gpus_are_not_overlapped_unless_the_environment_sets_it(monkeypatch):
    flag = "--xla_gpu_enable_latency_hiding_scheduler"
    monkeypatch.setattr(os, "environ", {})
    process_memory.schedule_for_memory()
    assert os.environ == {"XLA_FLAGS": f"{flag}=false"}
    others = "--xla_force_host_platform_device_count=2"
    for given, kept in ((others, f"{others} {flag}=false"), (f"{flag}=true", f"{flag}=true")):
        monkeypatch.setattr(os, "environ", {"XLA_FLAGS": given})
        process_memory.schedule_for_memory()
        assert os.environ == {"XLA_FLAGS": kept}


def test_products_use_cublas_unless_the_environment_sets_it(monkeypatch):
    flag = "--xla_gpu_enable_triton_gemm"
    for given, kept in (("", f"{flag}=false"), (f"{flag}=true", f"{flag}=true")):
        monkeypatch.setattr(os, "environ", {"XLA_FLAGS": given})
        process_memory.multiply_by_library()
        assert os.environ == {"XLA_FLAGS": kept}


def test_freed_memory_is_kept_unless_the_environment_sets_it(monkeypatch):
    given = {}
    library = SimpleNamespace(mallopt=lambda option, size: given.update({option: size}) or 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    for name, value in (
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072"),
    ):
        monkeypatch.setattr(os, "environ", {name: value})
        assert not process_memory.keep_freed()
        assert not given
    monkeypatch.setattr(os, "environ", {})
    assert process_memory.keep_freed()
    # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX
    assert given == {-1: -1, -2: 2**26, -4: 0, -8: 1}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())  # not glibc
    assert not process_memory.keep_freed()


PROGRAM = """
import ctypes, resource, sys, threading
from cwm_jax.runtime import process_memory

library, size = ctypes.CDLL(None), 1 << 30
library.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE, or fewer pages might be huge ones
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def allocate():
    block = library.malloc(size)
    ctypes.memset(block, 1, size)
    library.free(block)

def faults(of):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=of)  # as XLA does: not the first thread, whose heap is another
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    assert process_memory.keep_freed()
allocate()
again = faults(allocate)
process_memory.release_freed()
print(again, faults(allocate))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_kept_memory_is_reused_without_page_faults_until_it_is_released():
    pages = 2**30 // os.sysconf("SC_PAGE_SIZE")
    silent = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def faults(how):
        command = [sys.executable, "-c", PROGRAM, how]
        done = subprocess.run(command, env=silent, capture_output=True, text=True, check=True)
        return [int(number) for number in done.stdout.split()]

    again, released = faults("kept")
    assert again < pages / 100
    assert released > pages / 2
    again, _ = faults("returned")
    assert again > pages / 2
