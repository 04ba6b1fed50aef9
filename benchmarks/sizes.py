"""The networks of `configs/`, repeated for machines without ml_collections (tested)."""

from cwm_jax.models.config import DiTConfig

SIZES = {
    "tiny": dict(hidden_size=64, depth=2, num_heads=2),  # to try the benchmarks themselves
    "debug": dict(
        hidden_size=256,
        depth=2,
        num_heads=4,
        max_frames=16,
        history=2,
        displacement_down=8,
        displacement_across=4,
        qk_norm=True,
    ),
    "pocket": dict(
        hidden_size=256,
        depth=4,
        num_heads=4,
        max_frames=12,
        history=4,
        displacement_down=8,
        displacement_across=4,
        qk_norm=True,
        still_threshold=1.0,
    ),
    "small": dict(hidden_size=512, depth=6, num_heads=8),
    "large": dict(hidden_size=640, depth=8, num_heads=8),
    "1b": dict(hidden_size=1536, depth=14, num_heads=16),  # no config yet; for docs/scaling.md
}
ORIGINALS = [name for name, sizes in SIZES.items() if not sizes.get("history")]
_SAME = dict(patch_size=8, image_size=64, num_actions=15, max_frames=32)


def network(size: str, *, dtype: str = "auto", attention: str = "auto") -> DiTConfig:
    return DiTConfig(**(_SAME | SIZES[size]), dtype=dtype, attention=attention)
