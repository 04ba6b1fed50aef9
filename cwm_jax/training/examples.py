"""Training examples: clips with noise levels, noise, and how their context frames are made.

The plain examples are the original's: each frame has a noise level of its own (Diffusion Forcing,
Chen et al. 2024, https://arxiv.org/abs/2407.01392). `ExampleConfig` can shift them to the
conditions of rollouts: the highest noise level, and self-generated context.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax import coinrun
from cwm_jax.coinrun import NO_ACTION
from cwm_jax.diffusion import schedule
from cwm_jax.models.dit import Params
from cwm_jax.runtime import random_numbers
from cwm_jax.training import distillation, self_generated
from cwm_jax.training.config import ExampleConfig
from cwm_jax.training.self_generated import Context, Lead

_TOP = schedule.NUM_LEVELS - 1
_RENOISED_STEPS = np.array([1, 2, 4, 4], np.int32)  # of 4; one is chosen uniformly


class Targets(NamedTuple):
    """What the heads learn of each frame."""

    pressed_BT: jax.Array  # int32, the action pressed at the frame
    rewards_BT: jax.Array  # float32, what it earned; NaN where that is not known
    ends_BT: jax.Array  # float32, 1 where it ended the episode; NaN where that is not known


class Example(NamedTuple):
    """Clips with all random inputs of their loss."""

    frames_BTHWC: jax.Array  # uint8
    actions_BT: jax.Array  # int32, the action that led into each frame, −1 for none
    t_BT: jax.Array  # int32, noise levels 0…999
    noise_BTHWC: jax.Array  # float32, N(0, 1)
    context: Context | None = None  # None: all context frames are real
    targets: Targets | None = None  # of the heads; None: there are none


class Teacher(NamedTuple):
    """A model that is distilled into a student of the same network with fewer steps."""

    params: Params
    steps: jax.Array | int  # the student's; the teacher takes twice as many


@jax.named_scope("examples")
def make(
    key, batch: dict[str, jax.Array], config: ExampleConfig, teacher: Teacher | None = None
) -> Example:
    """Examples of a batch `{"frames": uint8 [B, T, H, W, 3], "actions": int32 [B, T]}`.

    With outcomes (`clips.cut`) they have the heads' targets too. With `config.context.lead` the
    batch has so many frames more than the examples, whose lead is a random number of them.
    """
    if config.augment.mirror_share:
        batch = mirrored(key, batch, config.augment.mirror_share)
    lead = None
    if config.context.lead:
        batch, lead = _parted(jax.random.fold_in(key, 4), batch, config.context.lead)
    frames = batch["frames"]
    t_BT, noise_BTHWC = schedule.sample(key, frames.shape)
    top_key, clips_key, own_key, level_key = jax.random.split(jax.random.fold_in(key, 1), 4)
    if config.noise_levels.top_share:
        t_BT = _with_top(top_key, t_BT, config.noise_levels.top_share)
    if teacher is not None:
        t_BT = distillation.sample_levels(jax.random.fold_in(key, 3), t_BT, teacher.steps)
    context = None
    if config.context.share:
        context = _context((clips_key, own_key, level_key), frames.shape, config, lead)
    targets = None
    if "pressed" in batch:
        targets = Targets(batch["pressed"], batch["rewards"], batch["ends"])
    return Example(frames, batch["actions"], t_BT, noise_BTHWC, context, targets)


def _context(keys, shape: tuple[int, ...], config: ExampleConfig, lead: Lead | None) -> Context:
    how = config.context
    clips_key, own_key, level_key = keys
    own_key, own_top_key = jax.random.split(own_key)
    levels = shape[0], how.rounds, shape[1]
    if how.renoised:  # the first round starts from noise alone, so no real frame leaks
        places = random_numbers.integers(level_key, levels[:2], 0, len(_RENOISED_STEPS))
        numbers = jnp.asarray(_RENOISED_STEPS)[places]
        t_BPT = jnp.broadcast_to(schedule.step_level(numbers, 4)[..., None], levels)
        t_BPT = t_BPT.at[:, 0].set(_TOP)
    else:
        t_BPT = random_numbers.integers(level_key, levels, 0, schedule.NUM_LEVELS)
        t_BPT = _with_top(own_top_key, t_BPT, config.noise_levels.top_share)
    top_key, scale_key = (jax.random.fold_in(clips_key, number) for number in (1, 2))
    top_B = random_numbers.happens(top_key, shape[:1], how.top_share)
    scale_B = jnp.abs(random_numbers.normal(scale_key, shape[:1]))
    return Context(
        clips_B=jnp.asarray(self_generated.clips(shape[0], how.share)),
        top_B=top_B,
        t_BPT=jnp.where(top_B[:, None, None], _TOP, t_BPT),
        noise_BRHWC=random_numbers.normal(own_key, (shape[0], how.lead + shape[1], *shape[2:])),
        start_noise_B=how.start_noise * scale_B,
        lead=lead,
    )


def mirrored(key, batch: dict[str, jax.Array], share: float) -> dict[str, jax.Array]:
    """A batch of CoinRun clips, a share of them mirrored: frames and actions.

    Args:
        batch: `{"frames": [B, T, H, W, C], "actions": int32 [B, T]}`, perhaps with outcomes.
    """
    frames = batch["frames"]
    mirror_B = random_numbers.happens(jax.random.fold_in(key, 2), frames.shape[:1], share)
    # The last entry is for −1, no action.
    other = jnp.array([coinrun.mirrored(a) for a in (*range(coinrun.NUM_ACTIONS), NO_ACTION)])
    turned = lambda actions: jnp.where(mirror_B[:, None], other[actions], actions)
    return batch | {
        "frames": jnp.where(mirror_B[:, None, None, None, None], frames[:, :, :, ::-1], frames),
        **{key: turned(batch[key]) for key in ("actions", "pressed") if key in batch},
    }


def _parted(key, batch: dict[str, jax.Array], most: int) -> tuple[dict[str, jax.Array], Lead]:
    """The clips after a lead of a random number of at most `most` frames, and the lead."""
    count = random_numbers.integers(key, (), 0, most + 1)
    clip = lambda x_BR: jax.lax.dynamic_slice_in_dim(x_BR, count, x_BR.shape[1] - most, axis=1)
    frames, actions = batch["frames"], batch["actions"]
    lead = Lead(jnp.broadcast_to(count, frames.shape[:1]), frames[:, 0], actions)
    return {name: clip(x) for name, x in batch.items()}, lead


def _with_top(key, t: jax.Array, share: float) -> jax.Array:
    top = random_numbers.happens(key, t.shape, share)
    return jnp.where(top, _TOP, t)
