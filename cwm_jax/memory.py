"""How a process takes memory; to be said before JAX starts its devices and before data is read."""

import ctypes
import os

_SHARE = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # JAX's own, new and old
_MALLOC = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")  # glibc's own
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's numbers, see mallopt(3)


def claim_gpu(share: float = 0.92) -> None:
    """Lets JAX take this share of each GPU, unless the environment says another.

    Its own default of 75 % is hardly enough for 128 clips of the small network on an 80 GB card.
    """
    if not any(name in os.environ for name in _SHARE):
        os.environ[_SHARE[0]] = str(share)


def keep_freed() -> bool:
    """Makes the C library keep what is freed, for this process, instead of handing it back.

    Decoding takes 2 MB for each record; handed back each time, every page of them is asked for and
    zeroed anew, and threads wait for each other at it. False where nothing was changed: the library
    is not glibc, or the environment says how it is to behave (`MALLOC_TRIM_THRESHOLD_=131072`).
    """
    if any(name in os.environ for name in _MALLOC):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: 1 << 30, _TOP_PAD: 1 << 26}
    return all(mallopt(option, size) for option, size in wanted.items())
