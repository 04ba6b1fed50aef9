"""Identifies a trained network, in share codes and in measurements."""

import hashlib

import numpy as np

from cwm_jax.models import heads
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params


def fingerprint(network: DiTConfig, params: Params) -> bytes:
    """8 bytes that identify a trained network by what its frames depend on."""
    digest = hashlib.blake2b(repr(network).encode(), digest_size=8)
    if network.warp_sharpness != 1:
        digest.update(f"warp_sharpness={network.warp_sharpness}".encode())
    if network.still_threshold:
        digest.update(f"still_threshold={network.still_threshold}".encode())
    if network.prediction != "velocity":
        digest.update(f"prediction={network.prediction}".encode())
    for name in sorted(name for name in params if not name.startswith(heads.PREFIX)):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(params[name]).tobytes())
    return digest.digest()
