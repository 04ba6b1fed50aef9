"""The network that most tests use."""

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
