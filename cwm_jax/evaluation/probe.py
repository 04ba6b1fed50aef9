"""An inverse-dynamics probe: a small network that reads the action back from three frames.

Trained on real clips of the train split, it tells whether frames drawn under an action look as if
that action had been taken. It cannot know everything: nine of the 15 actions do what another one
does, and in the air or against a wall a key changes nothing. So its accuracy on the real frames
of the same clips is the ceiling, its accuracy on shuffled actions the floor, and six groups of
actions that can be told apart are the fair count.
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from tqdm import tqdm

from cwm_jax import data
from cwm_jax.coinrun import MEANINGFUL_ACTIONS, NUM_ACTIONS, action_keys, to_model
from cwm_jax.data import DataConfig
from cwm_jax.errors import UserError
from cwm_jax.evaluation import held_out
from cwm_jax.evaluation.held_out import HeldOut
from cwm_jax.files import written_whole

_VERSION = 1  # of all that follows: a cached probe of another version is not used
_EPOCHS, _BATCH, _RATE = 8, 128, 1e-3
_CLIPS = 1000  # at most so many records are learnt from, those of median length or longer
_REACH = 4  # pixels; the game moves by less from frame to frame
_MIDDLE = 32  # pixels on a side
_READ_AT_ONCE = 256  # triples of frames


def _group(action: int) -> int:
    """Which of `MEANINGFUL_ACTIONS` an action does the same as."""
    keys = action_keys(action)._replace(down=False)
    same = [i for i, a in enumerate(MEANINGFUL_ACTIONS) if action_keys(a) == keys]
    return same[0]


GROUP_NAMES = ("left", "jump left", "stand", "jump", "right", "jump right")
GROUPS = np.array([_group(action) for action in range(NUM_ACTIONS)])
_MIRRORED = np.array([6, 7, 8, 3, 4, 5, 0, 1, 2, *range(9, NUM_ACTIONS)])


class Reader(nnx.Module):
    """Logits of the 15 actions that led into the last of three frames, [B, 3, H, W, C] in [-1, 1].

    Keys change velocities, and the player stands in the middle of the picture while the level
    moves past. So the network is given how well each frame fits the one before under every small
    shift (a cost volume, as in PWC-Net, Sun et al. 2018, https://arxiv.org/abs/1709.02371), for
    both steps, and the middle of the picture, where it can see the player.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, rngs=rngs)
        self.near = conv(9, 32, kernel_size=(3, 3), strides=2)
        self.far = conv(32, 64, kernel_size=(3, 3), strides=2)
        costs, seen = 2 * (2 * _REACH + 1) ** 2, 64 * (_MIDDLE // 4) ** 2
        self.hidden = nnx.Linear(costs + seen, 192, rngs=rngs)
        self.last = nnx.Linear(192, 96, rngs=rngs)
        self.out = nnx.Linear(96, NUM_ACTIONS, rngs=rngs)

    def __call__(self, frames_B3HWC) -> jax.Array:
        grey = frames_B3HWC.mean(-1)
        motion = [_shift_costs(grey[:, i], grey[:, i + 1]) for i in range(2)]
        cut = (frames_B3HWC.shape[2] - _MIDDLE) // 2
        x = frames_B3HWC[:, :, cut : cut + _MIDDLE, cut : cut + _MIDDLE]
        x = rearrange(x, "b t h w c -> b h w (t c)")
        for layer in (self.near, self.far):
            x = jax.nn.relu(layer(x))
        x = jnp.concatenate([*motion, rearrange(x, "b h w c -> b (h w c)")], axis=-1)
        return self.out(jax.nn.relu(self.last(jax.nn.relu(self.hidden(x)))))


def _shift_costs(before_BHW, after_BHW) -> jax.Array:
    """How badly `after` fits `before` under each shift of up to `_REACH` pixels, [B, shifts].

    Logarithms of mean squared differences, less their mean: a still picture and a flat one look
    alike, whatever their contrast.
    """
    height, width = (side - 2 * _REACH for side in before_BHW.shape[1:])
    middle = after_BHW[:, _REACH:-_REACH, _REACH:-_REACH]

    def cost(shift):
        y, x = jnp.divmod(shift, 2 * _REACH + 1)
        shifted = jax.lax.dynamic_slice(before_BHW, (0, y, x), (len(before_BHW), height, width))
        # Every other row and column is enough to see where a level moves.
        return jnp.square(shifted - middle)[:, ::2, ::2].mean((1, 2))

    costs = jax.lax.map(cost, jnp.arange((2 * _REACH + 1) ** 2)).T
    logs = jnp.log(costs + 1e-4)
    return logs - logs.mean(-1, keepdims=True)


@functools.lru_cache
def _skeleton() -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Reader(rngs=nnx.Rngs(0))))


class Probe(NamedTuple):
    """A trained reader."""

    params: nnx.State
    name: str  # of what it has learnt from: equal for equal probes


def read(probe: Probe, frames_BTHWC: np.ndarray) -> np.ndarray:
    """Probabilities of the actions that led into frames 2 … T − 1: float32 [B, T − 2, 15].

    Args:
        frames_BTHWC: uint8, T ≥ 3.
    """
    clips, length = frames_BTHWC.shape[:2]
    results = []
    total = clips * (length - 2)
    for first in range(0, total, _READ_AT_ONCE):
        places = np.minimum(np.arange(first, first + _READ_AT_ONCE), total - 1)
        results.append(np.asarray(_read(probe.params, _triples(frames_BTHWC, places))))
    return np.concatenate(results)[:total].reshape(clips, length - 2, NUM_ACTIONS)


def _triples(frames_BTHWC: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Three neighbouring frames from each place, counted through all clips: [n, 3, H, W, C]."""
    clip, start = np.divmod(places, frames_BTHWC.shape[1] - 2)
    return frames_BTHWC[clip[:, None], start[:, None] + np.arange(3)]


@jax.jit
def _read(params, frames_B3HWC):
    return jax.nn.softmax(nnx.merge(_skeleton()[0], params)(to_model(frames_B3HWC)))


def train(frames_BTHWC: np.ndarray, actions_BT: np.ndarray, *, name: str = "", seed: int = 0):
    """A probe that has learnt from real clips; half of what it sees is mirrored.

    Args:
        frames_BTHWC: uint8.
        actions_BT: the action that led into each frame; that of a clip's first is not used.
        name: kept with the probe.
    """
    labels = actions_BT[:, 2:].ravel()
    batch = min(_BATCH, len(labels))
    per_epoch = len(labels) // batch
    steps = _EPOCHS * per_epoch
    params = nnx.state(Reader(rngs=nnx.Rngs(seed)))
    state = _optimizer(steps).init(params)
    rng = np.random.default_rng(seed)
    for step in tqdm(range(steps), desc="training the probe", unit="step", disable=None):
        place = step % per_epoch
        if place == 0:
            order = rng.permutation(len(labels))
        rows = order[place * batch : (place + 1) * batch]
        examples = _triples(frames_BTHWC, rows), labels[rows], rng.random(batch) < 0.5
        params, state = _learn(params, state, examples, steps=steps)
    return Probe(params, name)


@functools.lru_cache
def _optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adamw(optax.cosine_decay_schedule(_RATE, steps), weight_decay=1e-3)


@functools.partial(jax.jit, static_argnames="steps", donate_argnums=(0, 1))
def _learn(params, state, examples, *, steps: int):
    frames, actions, mirror = examples
    frames = jnp.where(mirror[:, None, None, None, None], frames[:, :, :, ::-1], frames)
    labels = jnp.where(mirror, jnp.asarray(_MIRRORED)[actions], actions)

    def loss(params):
        logits = nnx.merge(_skeleton()[0], params)(to_model(frames))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, state = _optimizer(steps).update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def cached(config: DataConfig, folder: Path) -> Probe:
    """The probe of this data's train split, from `folder` or trained and put there.

    Raises:
        UserError: where there is no train split, or the folder cannot be written.
    """
    lengths = data.open_episodes(config, "train").lengths
    length = int(np.median(lengths))
    clips = min(_CLIPS, int((lengths >= length).sum()))
    return cached_on(held_out.load(config, "train", frames=length, clips=clips), folder)


def cached_on(clips: HeldOut, folder: Path) -> Probe:
    """As `cached`, of given clips."""
    settings = repr((_VERSION, _EPOCHS, _BATCH, _RATE, clips.digest))
    name = hashlib.sha256(settings.encode()).hexdigest()[:16]
    path = folder / f"probe_{name}.npz"
    if path.exists():
        return Probe(_load(path), name)
    probe = train(clips.frames, clips.actions, name=name)
    flat = nnx.to_flat_state(probe.params)
    with written_whole(path) as temporary:
        np.savez(temporary, **{_key(at): np.asarray(leaf[...]) for at, leaf in flat})
    return probe


def cache_folder() -> Path:
    """Where probes are kept by default: the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "cwm_jax"


def _load(path: Path) -> nnx.State:
    flat = nnx.to_flat_state(_skeleton()[1])
    try:
        with np.load(path) as saved:
            leaves = [(at, leaf.replace(jnp.asarray(saved[_key(at)]))) for at, leaf in flat]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the cached probe {path} cannot be read ({error}); remove it") from None
    return nnx.from_flat_state(leaves)


def _key(path: tuple) -> str:
    return ".".join(map(str, path))
