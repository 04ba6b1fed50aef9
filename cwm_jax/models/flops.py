"""How much arithmetic the network asks for, counted from its sizes.

One multiply-add is two operations. Counted are the matrix products that the model needs, and no
more: adaLN once for a frame, causal attention over the frames that are seen, nothing that is
computed again to save memory. (The common 6 · parameters · tokens would count adaLN, a third of
the parameters, for every token.) A backward pass takes two products for each one of the forward
pass, but for the first layers, whose inputs want no gradient.
"""

from typing import NamedTuple

from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import MLP_RATIO, SINUSOID


class Flops(NamedTuple):
    """Floating point operations by part of the network."""

    linears: float  # of the tokens: qkv, out and MLP of each half block
    attention: float  # scores and sums, in space and time
    conditioning: float  # adaLN, noise label and action of each frame
    patches: float  # pixels to tokens and back, and moved

    @property
    def total(self) -> float:
        return sum(self)

    def __mul__(self, factor: float) -> "Flops":
        return Flops(*(factor * part for part in self))


def frame(config: DiTConfig, *, in_view: float) -> Flops:
    """Of one pass over one frame that looks on `in_view` frames in time, itself included."""
    size, halves, tokens = config.hidden_size, 2 * config.depth, config.tokens
    patch = config.patch_size
    pixels, taps = 3 * patch**2, config.taps
    filtered = 2 * taps * 3 * patch * (patch + config.warp_reach)  # down, then across
    moved = config.warp_reach and size * (2 * taps + 1) + filtered
    return Flops(
        linears=2 * (3 + 1 + 2 * MLP_RATIO) * size**2 * halves * tokens,
        attention=4 * size * (tokens + in_view) * config.depth * tokens,
        conditioning=2 * size * ((6 * halves + 2) * size + SINUSOID + size + config.num_actions),
        patches=2 * ((2 + config.history) * pixels * size + moved) * tokens,
    )


def forward(config: DiTConfig, *, clips: int, frames: int) -> Flops:
    """Of one pass over clips of so many frames, each of which sees those before it."""
    return frame(config, in_view=(frames + 1) / 2) * (clips * frames)


def train_step(config: DiTConfig, *, clips: int, frames: int, more_passes: int = 0) -> Flops:
    """Of a forward and a backward pass; the optimizer's are too few to count.

    `more_passes`: forward passes beside the one that is learned from.
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
