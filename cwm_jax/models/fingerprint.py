"""Tells one trained network from another, in share codes and in measurements."""

import hashlib

import numpy as np

from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params


def fingerprint(network: DiTConfig, params: Params) -> bytes:
    """8 bytes that identify a trained network."""
    digest = hashlib.blake2b(repr(network).encode(), digest_size=8)
    for name in sorted(params):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(params[name]).tobytes())
    return digest.digest()
