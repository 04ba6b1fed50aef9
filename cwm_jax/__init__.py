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

__version__ = "0.2.0"
