"""Memory settings of a process, to apply before JAX starts its devices and data is read."""

import ctypes
import os

SHARE_OF_GPU = 0.92  # that JAX may use
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
    """Lets JAX use this share of each GPU, unless the environment sets another.

    JAX's default of 75 % barely suffices for 128 clips of the small network on an 80 GB card.
    """
    if not any(name in os.environ for name in _SHARE):
        os.environ[_SHARE[0]] = str(share)


def schedule_for_memory() -> None:
    """Stops XLA from overlapping sums over GPUs with other work, unless `XLA_FLAGS` sets it.

    The overlap starts work early, whose results must be kept: 16.6 GB more in a step on 128 clips
    of the small network (60.0 → 76.6, compiled for H200s), which fills an 80 GB card, to hide a
    hundredth of the step over NVLink.
    """
    _disable(_HIDE)


def multiply_by_library() -> None:
    """Lets cuBLAS instead of Triton compute matrix products, unless `XLA_FLAGS` sets it.

    XLA then fuses bias and GELU into the product, which saves 17 of the 337 GB of memory traffic
    in a step on 128 clips of the small network. On an H100 the step was not faster beyond the
    spread of the measurement (167.1 and 167.8 ms), so `train.py` does not call this.
    """
    _disable(_TRITON_PRODUCTS)


def skip_autotuning() -> None:
    """Lets XLA choose kernels without timing them, unless `XLA_FLAGS` sets it: faster compilation.

    For programs whose speed does not matter.
    """
    _set(_AUTOTUNE, "0")


def _disable(flag: str) -> None:
    _set(flag, "false")


def _set(flag: str, value: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{flag}={value}".strip()


def keep_freed() -> bool:
    """Makes the C library keep freed memory for this process instead of returning it.

    Decoding allocates 2 MB for each record, and a step on a CPU up to some GB of activations. If
    this is returned each time, every page is requested and zeroed again, and threads wait for each
    other. Returns False where nothing was changed: the library is not glibc, or the environment
    sets its behaviour (`MALLOC_TRIM_THRESHOLD_=131072`, or `GLIBC_TUNABLES`).
    """
    if any(name in os.environ for name in _MALLOC):
        return False
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One heap for all threads, for blocks of any size, never trimmed, growing by 64 MB.
    wanted = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 1 << 26}
    return all(mallopt(option, size) for option, size in wanted.items())


def release_freed() -> None:
    """Returns kept memory once, after rare work such as validation.

    Blocks freed by it may not fit later allocations, and would be kept without use.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
