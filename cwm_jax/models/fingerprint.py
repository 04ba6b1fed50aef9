"""Identifies a trained network, in share codes and in measurements."""

import hashlib

import numpy as np

from cwm_jax.models import heads
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params

# Fields that are not in a network's text, and that its parameters do not show.
_LATER = ("warp_sharpness", "still_threshold", "prediction")


def fingerprint(network: DiTConfig, params: Params) -> bytes:
    """8 bytes that identify a trained network by what its frames depend on."""
    digest = hashlib.blake2b(repr(network).encode(), digest_size=8)
    for name in _LATER:
        value = getattr(network, name)
        if value != getattr(DiTConfig, name):  # the default
            digest.update(f"{name}={value}".encode())
    for name in sorted(name for name in params if not name.startswith(heads.PREFIX)):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(params[name]).tobytes())
    return digest.digest()
