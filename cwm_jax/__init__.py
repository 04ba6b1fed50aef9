"""A playable CoinRun world model in JAX.

Array names carry their axes. The letters:

    B  batch (clips, or players)      T  frames in time
    H  image rows                     W  image columns
    C  channels (red, green, blue)    S  tokens of one frame (8 × 8 patches)
    D  hidden size                    N  attention heads
    K  size of one head (D / N)       P  pixels of one patch (rows · columns · channels)
    M  slots of the temporal cache    F  frames of a rollout

so `x_BTSD` is a tensor of token vectors, `t_BT` a noise level for each frame of each clip.
"""

import importlib

__version__ = "0.2.0"


def __getattr__(name: str):
    """`cwm_jax.WorldModel`, imported when it is first asked for: JAX takes seconds to load."""
    if name == "WorldModel":
        return importlib.import_module("cwm_jax.world_model").WorldModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
