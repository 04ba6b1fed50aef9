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

from cwm_jax import change, coinrun, diffusion, distillation, model
from cwm_jax.coinrun import NO_ACTION, to_model
from cwm_jax.errors import UserError
from cwm_jax.model import Params
from cwm_jax.network import DiTConfig

_TOP = diffusion.NUM_LEVELS - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Which examples are made of clips, and what counts in them; `config.noise` of a config."""

    top_share: float = 0.0  # of frames, that get the highest noise label: a frame's first pass
    own_share: float = 0.0  # of clips, shown their earlier frames as the network itself draws them
    own_passes: int = 1  # how often these are drawn, each time from the ones before
    own_top_share: float = 0.0  # of those clips, in which all labels are the highest
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
    t_BT, noise_BTHWC = diffusion.draw(key, shape)
    top_key, clips_key, own_key, label_key = jax.random.split(jax.random.fold_in(key, 1), 4)
    if noise.top_share:
        t_BT = _with_top(top_key, t_BT, noise.top_share)
    if teacher is not None:
        t_BT = distillation.draw(jax.random.fold_in(key, 3), t_BT, teacher.steps)
    if not noise.own_share:
        return t_BT, noise_BTHWC
    clips_B = jax.random.bernoulli(clips_key, noise.own_share, shape[:1])
    own_key, own_top_key = jax.random.split(own_key)
    blind_key = jax.random.fold_in(clips_key, 1)
    passes = shape[0], noise.own_passes, shape[1]
    t_BPT = jax.random.randint(label_key, passes, 0, diffusion.NUM_LEVELS)
    t_BPT = _with_top(own_top_key, t_BPT, noise.top_share)
    if noise.own_top_share:
        blind_B = jax.random.bernoulli(blind_key, noise.own_top_share, shape[:1])
        t_BPT = jnp.where(blind_B[:, None, None], _TOP, t_BPT)
        t_BT = jnp.where((clips_B & blind_B)[:, None], _TOP, t_BT)
    return t_BT, noise_BTHWC, *Own(clips_B, t_BPT, jax.random.normal(own_key, shape))


def mirrored(key, batch: dict[str, jax.Array], share: float) -> dict[str, jax.Array]:
    """A batch of CoinRun clips, a share of them seen in a mirror: frames, and what was pressed.

    Args:
        batch: `{"frames": [B, T, H, W, C], "actions": int32 [B, T]}`.
    """
    frames, actions = batch["frames"], batch["actions"]
    mirror_B = jax.random.bernoulli(jax.random.fold_in(key, 2), share, frames.shape[:1])
    # Last stands what becomes of −1, no action.
    other = jnp.array([coinrun.mirrored(a) for a in (*range(coinrun.NUM_ACTIONS), NO_ACTION)])
    return {
        "frames": jnp.where(mirror_B[:, None, None, None, None], frames[:, :, :, ::-1], frames),
        "actions": jnp.where(mirror_B[:, None], other[actions], actions),
    }


def _with_top(key, t: jax.Array, share: float) -> jax.Array:
    top = jax.random.bernoulli(key, share, t.shape)
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
    middle_weight: float = 1.0,
    teacher: Teacher | None = None,
):
    """Diffusion loss of clips, float32 []; frames are uint8, t and noise as `diffusion.draw`.

    With history the first frame of a clip, of which there is no change to draw, does not count.
    With `middle_weight` other than 1 it is a mean in which the pixels of the middle weigh so much.
    `own`, nothing or an `Own`, says which clips are shown earlier frames of the network's drawing.
    A `teacher` says what is learned instead of the clips' own velocities.
    """
    net, frames = model.bind(network, params), to_model(frames_BTHWC)
    earlier = change.earlier(network, frames)
    if own:
        own = Own(*own)
        drawn = own_frames(net, frames, actions_BT, own)
        shown = jnp.where(own.clips_B[:, None, None, None, None], drawn, frames)
        earlier = change.earlier(network, shown)
    x0 = change.to_sample(network, frames, earlier)
    sample = diffusion.noised(x0, t_BT, noise_BTHWC)
    predicted = net(sample.x, t_BT, actions_BT, earlier, remat=remat)
    wanted = sample.velocity
    if teacher is not None:
        taught = model.bind(network, teacher.params)
        predict = lambda x, t: taught(x, t, actions_BT, earlier)
        wanted = distillation.velocity(predict, sample.x, t_BT, teacher.steps)
    counted = change.counted(network)
    weights = 1.0 if middle_weight == 1 else _weights(network.image_size, middle_weight)
    return diffusion.loss(predicted[:, counted], wanted[:, counted], weights)


def _weights(size: int, middle_weight: float) -> np.ndarray:
    """What each pixel counts, float32 [H, W, 1], 1 on the mean.

    The middle is a quarter of the height and of the width: the player, who is a tenth of each.
    """
    weights, middle = np.ones((size, size, 1), np.float32), slice(3 * size // 8, 5 * size // 8)
    weights[middle, middle] = middle_weight
    return weights / weights.mean()


def own_frames(net, frames_BTHWC, actions_BT, own: Own) -> jax.Array:
    """The first frame, and the others as the network draws them, float32 [B, T, H, W, 3].

    Scheduled sampling (Bengio et al. 2015, https://arxiv.org/abs/1506.03099) of all frames at
    once (Duckworth et al. 2019, https://arxiv.org/abs/1906.04331); no gradient goes through it.
    A pass draws each frame in one step after the last pass's frames (at first the real ones), so
    that faults add up as they do in a rollout. It starts at any noise label, so that the faults
    of all of a sampler's steps are seen: guesses from nothing, and noise that is left over. Where
    all labels are the highest (`own_top_share`), no noised frame betrays the real one that it was
    made of, to itself or to the next: that is as a rollout in one step is, and as hard.
    """
    shown = frames_BTHWC
    for t_BT in jnp.moveaxis(own.t_BPT, 1, 0):
        earlier = change.earlier(net.config, shown)
        x0 = change.to_sample(net.config, frames_BTHWC, earlier)
        noised = diffusion.noised(x0, t_BT, own.noise_BTHWC).x
        velocity = net(noised, t_BT, actions_BT, earlier)
        sample = diffusion.predict_clean(noised, velocity, t_BT)
        shown = change.to_frame(net.config, sample, earlier).at[:, 0].set(frames_BTHWC[:, 0])
    return jax.lax.stop_gradient(shown)
