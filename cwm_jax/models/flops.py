"""The network's floating point operations, counted from its sizes.

One multiply-add is two operations. Counted are only the matrix products that the model needs: adaLN
once per frame, causal attention over the visible frames, no recomputation to save memory. (The
common 6 · parameters · tokens would count adaLN, a third of the parameters, for every token.) A
backward pass takes two products for each one of the forward pass, except in the first layers, whose
inputs need no gradient.
"""

from typing import NamedTuple

from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import MLP_RATIO, SINUSOID


class Flops(NamedTuple):
    """Floating point operations by part of the network."""

    linears: float  # of the tokens: qkv, out and MLP of each half block
    attention: float  # scores and sums, in space and time
    conditioning: float  # adaLN, noise level and action of each frame
    patches: float  # pixels to tokens and back, and their warp

    @property
    def total(self) -> float:
        return sum(self)

    def __mul__(self, factor: float) -> "Flops":
        return Flops(*(factor * part for part in self))


def frame(config: DiTConfig, *, in_view: float) -> Flops:
    """Of one forward pass over one frame that attends to `in_view` frames, itself included."""
    size, halves, tokens = config.hidden_size, 2 * config.depth, config.tokens
    patch = config.patch_size
    pixels, taps = 3 * patch**2, config.taps
    filtered = 2 * taps * 3 * patch * (patch + config.warp_reach)  # down, then across
    warp = config.warp_reach and size * (2 * taps + 1) + filtered
    return Flops(
        linears=2 * (3 + 1 + 2 * MLP_RATIO) * size**2 * halves * tokens,
        attention=4 * size * (tokens + in_view) * config.depth * tokens,
        conditioning=2 * size * ((6 * halves + 2) * size + SINUSOID + size + config.num_actions),
        patches=2 * ((2 + config.history) * pixels * size + warp) * tokens,
    )


def forward(config: DiTConfig, *, clips: int, frames: int) -> Flops:
    """Of one forward pass over clips of so many frames, with causal attention."""
    return frame(config, in_view=(frames + 1) / 2) * (clips * frames)


def train_step(config: DiTConfig, *, clips: int, frames: int, more_passes: float = 0) -> Flops:
    """Of a forward and a backward pass; the optimizer's are negligible.

    `more_passes`: forward passes besides the one with gradients.
    """
    once = forward(config, clips=clips, frames=frames)
    first = 2 * config.hidden_size * clips * frames
    pixels = 3 * config.patch_size**2 * (1 + config.history)
    inputs = pixels * config.tokens, SINUSOID + config.num_actions
    whole = once * (3 + more_passes)
    return whole._replace(
        patches=whole.patches - first * inputs[0],
        conditioning=whole.conditioning - first * inputs[1],
    )
