"""How a process takes memory; to be said before JAX starts its devices and before data is read."""

import ctypes
import os

SHARE_OF_GPU = 0.92  # that JAX may take
_SHARE = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # JAX's own, new and old
_MALLOC = (  # glibc's own, see mallopt(3)
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
)
_HIDE = "xla_gpu_enable_latency_hiding_scheduler"
_TRITON_PRODUCTS = "xla_gpu_enable_triton_gemm"
_AUTOTUNE = "xla_gpu_autotune_level"
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # its numbers for them


def claim_gpu(share: float = SHARE_OF_GPU) -> None:
    """Lets JAX take this share of each GPU, unless the environment says another.

    Its own default of 75 % is hardly enough for 128 clips of the small network on an 80 GB card.
    """
    if not any(name in os.environ for name in _SHARE):
        os.environ[_SHARE[0]] = str(share)


def schedule_for_memory() -> None:
    """Tells XLA not to hide sums over GPUs behind other work, unless `XLA_FLAGS` says whether to.

    For that it begins work early, whose results must be kept: 16.6 GB more within a step on 128
    clips of the small network (60.0 → 76.6, compiled for H200s), which fills an 80 GB card, to
    hide what takes a hundredth of the step over NVLink.
    """
    _disable(_HIDE)


def multiply_by_library() -> None:
    """Lets cuBLAS compute matrix products, not Triton, unless `XLA_FLAGS` says whether to.

    Only then does XLA let the product add the bias and take the GELU: of 128 clips of the small
    network, 17 of 337 GB less to move in a step. On an H100 the step was no faster beyond the
    spread of the measurement (167.1 and 167.8 ms), so `train.py` does not call this.
    """
    _disable(_TRITON_PRODUCTS)


def skip_autotuning() -> None:
    """Lets XLA take its kernels untimed, unless `XLA_FLAGS` says otherwise: compiles sooner.

    For programs whose results count, and not their speed.
    """
    _set(_AUTOTUNE, "0")


def _disable(flag: str) -> None:
    _set(flag, "false")


def _set(flag: str, value: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{flag}={value}".strip()


def keep_freed() -> bool:
    """Makes the C library keep what is freed, for this process, instead of handing it back.

    Decoding takes 2 MB for each record, and a step on a CPU takes all its activations at once, up
    to some GB; handed back each time, every page of them is asked for and zeroed anew, and threads
    wait for each other at it. False where nothing was changed: the library is not glibc, or the
    environment says how it is to behave (`MALLOC_TRIM_THRESHOLD_=131072`, or `GLIBC_TUNABLES`).
    """
    if any(name in os.environ for name in _MALLOC):
        return False
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One heap for all threads, which holds blocks of any size, is never trimmed, grows by 64 MB.
    wanted = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 1 << 26}
    return all(mallopt(option, size) for option, size in wanted.items())


def release_freed() -> None:
    """Hands back what was kept, once: after something rare, such as a look at validation clips.

    What it took and freed may not fit what comes next, and so would be kept for nothing.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
