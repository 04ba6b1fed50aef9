"""The network that most tests use."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from cwm_jax.coinrun import NUM_ACTIONS
from cwm_jax.models.config import DiTConfig

TINY = DiTConfig(
    hidden_size=24,
    depth=2,
    num_heads=3,
    patch_size=16,
    image_size=64,
    num_actions=NUM_ACTIONS,
    max_frames=5,
    dtype="float32",
)


def of_one_block(network: DiTConfig, params: Mapping[str, Any]) -> tuple[DiTConfig, dict[str, Any]]:
    """The first block alone, which compiles in half of the time, where depth is not the matter."""
    kept = {name: leaf for name, leaf in params.items() if not re.match(r"blocks\.[1-9]", name)}
    return dataclasses.replace(network, depth=1), kept
