"""What is learned from clips: which noise, which context, and how wrong the prediction is.

The plain objective is the original's: each frame at a noise label of its own (Diffusion Forcing,
Chen et al. 2024, https://arxiv.org/abs/2407.01392), its velocity predicted, mean squares counted.
`NoiseConfig` can shift it to what a rollout meets, the first pass and frames of its own drawing,
and to what a player looks at. With a `Teacher`, its velocities are learned instead of the data's.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax import coinrun
from cwm_jax.coinrun import NO_ACTION, to_model
from cwm_jax.diffusion import displacement, schedule
from cwm_jax.diffusion.denoiser import Denoiser, alpha_bar, bind
from cwm_jax.errors import UserError
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params
from cwm_jax.runtime import random_numbers
from cwm_jax.training import distillation

_TOP = schedule.NUM_LEVELS - 1
_RENOISED_STEPS = np.array([1, 2, 4, 4], np.int32)  # of 4, chosen among


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Which examples are made of clips, and what counts in them; `config.noise` of a config."""

    top_share: float = 0.0  # of frames, that get the highest noise label: a frame's first pass
    own_share: float = 0.0  # of clips, shown their earlier frames as the network itself draws them
    own_passes: int = 1  # how often these are drawn, each time from the ones before
    own_top_share: float = 0.0  # of those clips, in which all labels are the highest
    own_renoised: bool = False  # passes after the first renoise the network's frames, not real ones
    displacement_weight: float = 0.1  # of the cross-entropy of discrete displacements in the loss
    mirror_share: float = 0.0  # of clips, in which left and right are exchanged
    middle_weight: float = 1.0  # of pixels in the middle, where CoinRun keeps the player

    def __post_init__(self):
        names = ("top_share", "own_share", "own_top_share", "mirror_share")
        shares = [(name, 0, 1) for name in names]
        for name, low, high in (*shares, ("own_passes", 1, 16), ("middle_weight", 0, 1000)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"config.noise.{name}={getattr(self, name)}: must be {low}…{high}")


class Own(NamedTuple):
    """How the network draws the earlier frames that it is shown."""

    clips_B: jax.Array  # bool, the clips in which it is shown them
    blind_B: jax.Array  # bool, those of them in which all noise levels are the highest
    t_BPT: jax.Array  # the labels that they are drawn from, in each of P passes
    noise_BTHWC: jax.Array  # and the noise, the same in all: nothing is learned in them


class Teacher(NamedTuple):
    """A model from which a student of the same network learns to draw in fewer steps."""

    params: Params
    steps: jax.Array | int  # the student's; the teacher takes twice as many


def draw(
    key, shape: tuple[int, ...], noise: NoiseConfig, teacher: Teacher | None = None
) -> tuple[jax.Array, ...]:
    """Labels and noise of a batch, followed by an `Own` where the config asks for it."""
    t_BT, noise_BTHWC = schedule.draw(key, shape)
    top_key, clips_key, own_key, label_key = jax.random.split(jax.random.fold_in(key, 1), 4)
    if noise.top_share:
        t_BT = _with_top(top_key, t_BT, noise.top_share)
    if teacher is not None:
        t_BT = distillation.draw(jax.random.fold_in(key, 3), t_BT, teacher.steps)
    if not noise.own_share:
        return t_BT, noise_BTHWC
    own_key, own_top_key = jax.random.split(own_key)
    blind_key = jax.random.fold_in(clips_key, 1)
    passes = shape[0], noise.own_passes, shape[1]
    if noise.own_renoised:  # the first pass starts from noise alone, so nothing real leaks
        places = random_numbers.integers(label_key, passes[:2], 0, len(_RENOISED_STEPS))
        numbers = jnp.asarray(_RENOISED_STEPS)[places]
        t_BPT = jnp.broadcast_to(schedule.step_label(numbers, 4)[..., None], passes)
        t_BPT = t_BPT.at[:, 0].set(_TOP)
    else:
        t_BPT = random_numbers.integers(label_key, passes, 0, schedule.NUM_LEVELS)
        t_BPT = _with_top(own_top_key, t_BPT, noise.top_share)
    blind_B = random_numbers.happens(blind_key, shape[:1], noise.own_top_share)
    t_BPT = jnp.where(blind_B[:, None, None], _TOP, t_BPT)
    clips_B = jnp.asarray(generated_clips(shape[0], noise.own_share))
    own_noise = random_numbers.normal(own_key, shape)
    return t_BT, noise_BTHWC, *Own(clips_B, blind_B, t_BPT, own_noise)


def mirrored(key, batch: dict[str, jax.Array], share: float) -> dict[str, jax.Array]:
    """A batch of CoinRun clips, a share of them seen in a mirror: frames, and what was pressed.

    Args:
        batch: `{"frames": [B, T, H, W, C], "actions": int32 [B, T]}`.
    """
    frames, actions = batch["frames"], batch["actions"]
    mirror_B = random_numbers.happens(jax.random.fold_in(key, 2), frames.shape[:1], share)
    # Last stands what becomes of −1, no action.
    other = jnp.array([coinrun.mirrored(a) for a in (*range(coinrun.NUM_ACTIONS), NO_ACTION)])
    return {
        "frames": jnp.where(mirror_B[:, None, None, None, None], frames[:, :, :, ::-1], frames),
        "actions": jnp.where(mirror_B[:, None], other[actions], actions),
    }


def _with_top(key, t: jax.Array, share: float) -> jax.Array:
    top = random_numbers.happens(key, t.shape, share)
    return jnp.where(top, _TOP, t)


def clip_loss(
    params,
    frames_BTHWC,
    actions_BT,
    t_BT,
    noise_BTHWC,
    *own,
    network: DiTConfig,
    remat="none",
    noise: NoiseConfig = NoiseConfig(),
    teacher: Teacher | None = None,
):
    """Diffusion loss of clips, float32 []; frames are uint8, t and noise as `schedule.draw`.

    With history the first frame of a clip, of which there is no change to draw, does not count.
    With `middle_weight` other than 1 it is a mean in which the pixels of the middle weigh so much.
    `own`, nothing or an `Own`, says which clips are shown self-generated context.
    A `teacher` says what is learned instead of the clips' own velocities. With discrete
    displacements their cross-entropy is added, and in half of the clips the last frame is warped
    by the best of them instead of the likeliest, so that the residual is learned from both.
    """
    denoiser, frames = bind(network, params), to_model(frames_BTHWC)
    shown = frames
    if own:
        fixed = bind(network, jax.lax.stop_gradient(params))
        shown, t_BT = _shown(fixed, frames, actions_BT, t_BT, Own(*own), noise)
    earlier = denoiser.earlier(shown)
    x0 = denoiser.to_sample(frames, earlier)
    sample = schedule.noised(x0, t_BT, noise_BTHWC)
    outputs = denoiser.net(sample.x, t_BT, actions_BT, earlier, remat=remat)
    counted = denoiser.counted
    middle = noise.middle_weight
    chosen, added = None, 0.0
    if network.reach:
        reach = network.reach
        errors = displacement.errors(earlier[..., :3], frames, reach)
        logits = denoiser.logits(outputs)
        likeliest = jnp.argmax(logits, -1)
        # Noise of the first frame, which does not count, is a coin that no device sees otherwise.
        is_best = (noise_BTHWC[:, 0, 0, 0, 0] > 0)[:, None, None, None]
        chosen = jnp.where(is_best, displacement.best(errors, reach), likeliest)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        entropy = -(displacement.targets(errors, reach) * log_probs).sum(-1)[:, counted]
        weights = _weights(network.image_size // reach.patch, middle)[..., 0]
        added = noise.displacement_weight * (weights * entropy).mean()
    predicted = denoiser.velocity(outputs, sample.x, alpha_bar(t_BT), earlier, chosen)
    wanted = sample.velocity
    if teacher is not None:
        taught = bind(network, teacher.params)
        predict = lambda x, t: taught(x, t, actions_BT, earlier)
        wanted = distillation.velocity(predict, sample.x, t_BT, teacher.steps)
    weights = 1.0 if middle == 1 else _weights(network.image_size, middle)
    return schedule.loss(predicted[:, counted], wanted[:, counted], weights) + added


def _shown(denoiser: Denoiser, frames, actions_BT, t_BT, own: Own, noise: NoiseConfig):
    """The frames with self-generated ones in the clips of `own`, and the noise levels to train at.

    Where the share of these clips is a whole number they stand at known places (see
    `generated_clips`), whatever part of the batch this is, and no other clip pays for the passes.
    """
    frames, t_BT = jnp.asarray(frames), jnp.asarray(t_BT)
    count = len(frames) * noise.own_share
    which = np.arange(len(frames))
    if abs(count - round(count)) < 1e-6:
        which = np.flatnonzero(generated_clips(len(frames), noise.own_share))
    part = jax.tree.map(lambda x: x[which], own)
    given = frames[which], actions_BT[which]
    generated = own_frames(denoiser, *given, part, renoised=noise.own_renoised)
    is_own = part.clips_B[:, None, None, None, None]
    shown = frames.at[which].set(jnp.where(is_own, generated, frames[which]))
    is_blind = (part.clips_B & part.blind_B)[:, None]
    return shown, t_BT.at[which].set(jnp.where(is_blind, _TOP, t_BT[which]))


def generated_clips(count: int, share: float) -> np.ndarray:
    """Which of so many clips are shown self-generated context, bool [count], evenly spread.

    A part of a batch in which the share is a whole number of clips has the pattern of the whole.
    """
    edges = np.floor(np.arange(count + 1) * share + 1e-6)
    return np.diff(edges) > 0


def _weights(size: int, middle_weight: float) -> np.ndarray:
    """What each pixel counts, float32 [H, W, 1], 1 on the mean.

    The middle is a quarter of the height and of the width: the player, who is a tenth of each.
    """
    weights, middle = np.ones((size, size, 1), np.float32), slice(3 * size // 8, 5 * size // 8)
    weights[middle, middle] = middle_weight
    return weights / weights.mean()


def own_frames(
    denoiser: Denoiser, frames_BTHWC, actions_BT, own: Own, *, renoised: bool = False
) -> jax.Array:
    """The first frame, and the others as the network draws them, float32 [B, T, H, W, 3].

    Scheduled sampling (Bengio et al. 2015, https://arxiv.org/abs/1506.03099) of all frames at
    once (Duckworth et al. 2019, https://arxiv.org/abs/1906.04331); no gradient goes through it.
    A pass draws each frame in one step after the last pass's frames (at first the real ones), so
    that faults add up as they do in a rollout. It starts at any noise label, so that the faults
    of all of a sampler's steps are seen: guesses from nothing, and noise that is left over. Where
    all labels are the highest (`own_top_share`), no noised frame betrays the real one that it was
    made of, to itself or to the next: that is as a rollout in one step is, and as hard.
    """

    def again(shown, t_BT):
        earlier = denoiser.earlier(shown)
        x0 = denoiser.to_sample(shown if renoised else frames_BTHWC, earlier)
        noised = schedule.noised(x0, t_BT, own.noise_BTHWC).x
        frames = denoiser.frames(noised, t_BT, actions_BT, earlier)
        return frames.at[:, 0].set(frames_BTHWC[:, 0]), None

    return jax.lax.scan(again, frames_BTHWC, jnp.moveaxis(own.t_BPT, 1, 0))[0]
