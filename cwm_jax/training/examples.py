"""Training examples: clips with noise levels, noise, and how their context frames are made.

The plain examples are the original's: each frame has a noise level of its own (Diffusion Forcing,
Chen et al. 2024, https://arxiv.org/abs/2407.01392). `NoiseConfig` can shift them to what a rollout
meets: the highest noise level, and context frames that the network has generated itself.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax import coinrun
from cwm_jax.coinrun import NO_ACTION
from cwm_jax.diffusion import schedule
from cwm_jax.errors import UserError
from cwm_jax.models.dit import Params
from cwm_jax.runtime import random_numbers
from cwm_jax.training import distillation, self_generated
from cwm_jax.training.self_generated import Context

_TOP = schedule.NUM_LEVELS - 1
_RENOISED_STEPS = np.array([1, 2, 4, 4], np.int32)  # of 4, chosen among


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Which examples are made of clips, and what counts in them; `config.noise` of a config."""

    top_share: float = 0.0  # of frames, that get the highest noise level: a frame's first step
    own_share: float = 0.0  # of clips, whose context frames the network generates itself
    own_passes: int = 1  # how often they are generated all at once, each time from the ones before
    own_steps: int = 0  # instead: frame by frame, as the sampler does, in so many steps; 0: not so
    own_top_share: float = 0.0  # of those clips, in which all noise levels are the highest
    own_renoised: bool = False  # passes after the first renoise the network's frames, not real ones
    own_start_noise: float = 0.0  # scale of the noise added to the frame that they begin with
    # Patches of self-generated context that differ more than so much (root mean square, colours in
    # [-1, 1]) from what they should be are learned to stay as they are; 0: none.
    persist_above: float = 0.0
    displacement_weight: float = 0.1  # of the cross-entropy of discrete displacements in the loss
    outcome_weight: float = 0.1  # of the cross-entropies of reward and end in the loss
    mirror_share: float = 0.0  # of clips, in which left and right are exchanged
    middle_weight: float = 1.0  # of pixels in the middle, where CoinRun keeps the player

    def __post_init__(self):
        shares = "top_share", "own_share", "own_top_share", "mirror_share", "own_start_noise"
        limits = [(name, 0, 1) for name in shares]
        limits += [("own_passes", 1, 16), ("own_steps", 0, 16), ("persist_above", 0, 2)]
        limits += [("outcome_weight", 0, 1000)]
        for name, low, high in (*limits, ("middle_weight", 0, 1000)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"config.noise.{name}={getattr(self, name)}: must be {low}…{high}")


class Targets(NamedTuple):
    """What the heads learn of each frame."""

    pressed_BT: jax.Array  # int32, the action pressed at the frame
    rewards_BT: jax.Array  # float32, what it earned; NaN where that is not known
    ends_BT: jax.Array  # float32, 1 where it ended the episode; NaN where that is not known


class Example(NamedTuple):
    """Clips with all that is random about how they are learned from."""

    frames_BTHWC: jax.Array  # uint8
    actions_BT: jax.Array  # int32, the action that led into each frame, −1 for none
    t_BT: jax.Array  # int32, noise levels 0…999
    noise_BTHWC: jax.Array  # float32, N(0, 1)
    context: Context | None = None  # None: all context frames are real
    targets: Targets | None = None  # of the heads; None: there are none


class Teacher(NamedTuple):
    """A model from which a student of the same network learns to generate in fewer steps."""

    params: Params
    steps: jax.Array | int  # the student's; the teacher takes twice as many


def make(
    key, batch: dict[str, jax.Array], noise: NoiseConfig, teacher: Teacher | None = None
) -> Example:
    """Examples of a batch `{"frames": uint8 [B, T, H, W, 3], "actions": int32 [B, T]}`.

    With outcomes (`clips.cut`) they have the heads' targets too.
    """
    if noise.mirror_share:
        batch = mirrored(key, batch, noise.mirror_share)
    frames = batch["frames"]
    t_BT, noise_BTHWC = schedule.draw(key, frames.shape)
    top_key, clips_key, own_key, level_key = jax.random.split(jax.random.fold_in(key, 1), 4)
    if noise.top_share:
        t_BT = _with_top(top_key, t_BT, noise.top_share)
    if teacher is not None:
        t_BT = distillation.draw(jax.random.fold_in(key, 3), t_BT, teacher.steps)
    context = None
    if noise.own_share:
        context = _context((clips_key, own_key, level_key), frames.shape, noise)
    targets = None
    if "pressed" in batch:
        targets = Targets(batch["pressed"], batch["rewards"], batch["ends"])
    return Example(frames, batch["actions"], t_BT, noise_BTHWC, context, targets)


def _context(keys, shape: tuple[int, ...], noise: NoiseConfig) -> Context:
    clips_key, own_key, level_key = keys
    own_key, own_top_key = jax.random.split(own_key)
    passes = shape[0], noise.own_passes, shape[1]
    if noise.own_renoised:  # the first pass starts from noise alone, so nothing real leaks
        places = random_numbers.integers(level_key, passes[:2], 0, len(_RENOISED_STEPS))
        numbers = jnp.asarray(_RENOISED_STEPS)[places]
        t_BPT = jnp.broadcast_to(schedule.step_label(numbers, 4)[..., None], passes)
        t_BPT = t_BPT.at[:, 0].set(_TOP)
    else:
        t_BPT = random_numbers.integers(level_key, passes, 0, schedule.NUM_LEVELS)
        t_BPT = _with_top(own_top_key, t_BPT, noise.top_share)
    top_key, scale_key = (jax.random.fold_in(clips_key, number) for number in (1, 2))
    top_B = random_numbers.happens(top_key, shape[:1], noise.own_top_share)
    scale_B = jnp.abs(random_numbers.normal(scale_key, shape[:1]))
    return Context(
        clips_B=jnp.asarray(self_generated.clips(shape[0], noise.own_share)),
        top_B=top_B,
        t_BPT=jnp.where(top_B[:, None, None], _TOP, t_BPT),
        noise_BTHWC=random_numbers.normal(own_key, shape),
        start_noise_B=noise.own_start_noise * scale_B,
    )


def mirrored(key, batch: dict[str, jax.Array], share: float) -> dict[str, jax.Array]:
    """A batch of CoinRun clips, a share of them mirrored: frames, and what was pressed.

    Args:
        batch: `{"frames": [B, T, H, W, C], "actions": int32 [B, T]}`, perhaps with outcomes.
    """
    frames = batch["frames"]
    mirror_B = random_numbers.happens(jax.random.fold_in(key, 2), frames.shape[:1], share)
    # The last entry is what becomes of −1, no action.
    other = jnp.array([coinrun.mirrored(a) for a in (*range(coinrun.NUM_ACTIONS), NO_ACTION)])
    turned = lambda actions: jnp.where(mirror_B[:, None], other[actions], actions)
    return batch | {
        "frames": jnp.where(mirror_B[:, None, None, None, None], frames[:, :, :, ::-1], frames),
        **{key: turned(batch[key]) for key in ("actions", "pressed") if key in batch},
    }


def _with_top(key, t: jax.Array, share: float) -> jax.Array:
    top = random_numbers.happens(key, t.shape, share)
    return jnp.where(top, _TOP, t)
