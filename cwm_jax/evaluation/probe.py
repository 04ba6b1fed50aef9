"""An inverse-dynamics probe: a small network that reads the action from three frames.

Trained on real clips of the train split, it measures whether frames generated under an action show
that action. It reads one of six groups of actions: nine of the 15 have the same effect as another.
Not every action is visible: a jump starts only on the ground, and in the air a key to the side
shows only if it turns the player round. So its accuracy on the real frames of the same clips is
the ceiling, and its accuracy on shuffled actions the floor.
"""

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from tqdm import tqdm

from cwm_jax.coinrun import CHANNELS, MEANINGFUL_ACTIONS, NUM_ACTIONS, action_keys, to_model
from cwm_jax.data import npz, splits
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError, echo
from cwm_jax.evaluation import held_out, probe_features
from cwm_jax.evaluation.held_out import HeldOut
from cwm_jax.evaluation.probe_features import Sight
from cwm_jax.runtime import random_numbers

_VERSION = 2  # of the code below: a cached probe of another version is not used
_EPOCHS, _BATCH, _RATE, _DECAY = 8, 128, 1e-3, 1e-3
_CLIPS = 1000  # training records at most, of median length or longer
_READ_AT_ONCE = 512  # frames


def _group(action: int) -> int:
    """Which of `MEANINGFUL_ACTIONS` has the same effect as an action."""
    keys = action_keys(action)._replace(down=False)
    same = [i for i, a in enumerate(MEANINGFUL_ACTIONS) if action_keys(a) == keys]
    return same[0]


GROUP_NAMES = ("left", "jump left", "stand", "jump", "right", "jump right")
GROUPS = np.array([_group(action) for action in range(NUM_ACTIONS)])
KEYS = {"left": (0, 1), "right": (4, 5), "jump": (1, 3, 5)}  # in which groups a key is pressed
_MIRRORED = np.array([4, 5, 2, 3, 0, 1])


class Reader(nnx.Module):
    """Logits of the six groups that led into the last of three frames, [B, 6]."""

    def __init__(self, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.near = conv(2 * CHANNELS, 16, strides=2)
        self.far = conv(16, 32)
        seen = 2 * probe_features.SHIFTS + 32 * (probe_features.MIDDLE // 2) ** 2
        self.hidden = nnx.Linear(seen, 192, rngs=rngs)
        self.last = nnx.Linear(192, 96, rngs=rngs)
        self.out = nnx.Linear(96, len(GROUP_NAMES), rngs=rngs)

    def __call__(self, seen: Sight) -> jax.Array:
        x = rearrange(to_model(seen.middle), "b t h w c -> b h w (t c)")
        for layer in (self.near, self.far):
            x = jax.nn.relu(layer(x))
        motion = rearrange(seen.motion, "b t s -> b (t s)")
        x = jnp.concatenate([motion, rearrange(x, "b h w c -> b (h w c)")], axis=-1)
        return self.out(jax.nn.relu(self.last(jax.nn.relu(self.hidden(x)))))


@functools.lru_cache
def _skeleton() -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Reader(rngs=nnx.Rngs(random_numbers.key(0)))))


class Probe(NamedTuple):
    """A trained probe."""

    params: nnx.State
    name: str  # digest of the training data: equal for equal probes


def read(probe: Probe, frames_BTHWC: np.ndarray) -> np.ndarray:
    """The group of the action that led into each of the frames 2 … T − 1: int [B, T − 2].

    Args:
        frames_BTHWC: uint8, T ≥ 3.
    """
    clips, length = frames_BTHWC.shape[:2]
    whole, total = probe_features.look(frames_BTHWC), clips * (length - 2)
    found = []
    for first in range(0, total, _READ_AT_ONCE):
        places = np.minimum(np.arange(first, first + _READ_AT_ONCE), total - 1)
        found.append(np.asarray(_read(probe.params, probe_features.at(whole, places))))
    return np.concatenate(found)[:total].reshape(clips, length - 2)


@jax.jit
def _read(params, seen: Sight) -> jax.Array:
    return nnx.merge(_skeleton()[0], params)(seen).argmax(-1)


def train(frames_BTHWC: np.ndarray, actions_BT: np.ndarray, *, name: str = "", seed: int = 0):
    """A probe trained on real clips.

    Augmentation: half of its clips are mirrored, and the colour channels of all are permuted at
    random, since there are few levels and they differ in scenery.

    Args:
        frames_BTHWC: uint8.
        actions_BT: the action that led into each frame; those of a clip's first two are not used.
        name: stored with the probe.
    """
    groups, whole = GROUPS[actions_BT[:, 2:].ravel()], probe_features.look(frames_BTHWC)
    batch = min(_BATCH, len(groups))
    per_epoch = len(groups) // batch
    steps = _EPOCHS * per_epoch
    params = nnx.state(Reader(rngs=nnx.Rngs(random_numbers.key(seed))))
    state = _optimizer(steps).init(params)
    rng = np.random.default_rng(seed)
    for step in tqdm(range(steps), desc="training the probe", unit="step", disable=None):
        place = step % per_epoch
        if place == 0:
            order = rng.permutation(len(groups))
        rows = order[place * batch : (place + 1) * batch]
        colours = rng.permuted(np.tile(np.arange(CHANNELS), (batch, 1)), axis=1)
        examples = probe_features.at(whole, rows), groups[rows], rng.random(batch) < 0.5, colours
        params, state = _learn(params, state, examples, steps=steps)
    return Probe(params, name)


@functools.lru_cache
def _optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adamw(optax.cosine_decay_schedule(_RATE, steps), weight_decay=_DECAY)


@functools.partial(jax.jit, static_argnames="steps", donate_argnums=(0, 1))
def _learn(params, state, examples, *, steps: int):
    seen, groups, mirror_B, colours_BC = examples
    chosen = lambda a, b: jnp.where(mirror_B.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    seen = jax.tree.map(chosen, probe_features.mirrored(seen), seen)
    middle = jnp.take_along_axis(seen.middle, colours_BC[:, None, None, None], axis=-1)
    groups = jnp.where(mirror_B, jnp.asarray(_MIRRORED)[groups], groups)

    def loss(params):
        logits = nnx.merge(_skeleton()[0], params)(seen._replace(middle=middle))
        return optax.softmax_cross_entropy_with_integer_labels(logits, groups).mean()

    updates, state = _optimizer(steps).update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def cached(config: DataConfig, folder: Path | None) -> Probe:
    """The probe of this data's train split, from `folder`, or trained and stored there.

    If the folder is None or cannot be used, the probe is trained.

    Raises:
        UserError: there is no train split.
    """
    lengths = splits.open_episodes(config, "train").lengths
    length = int(np.median(lengths))
    clips = min(_CLIPS, int((lengths >= length).sum()))
    return cached_on(held_out.load(config, "train", frames=length, clips=clips), folder)


def cached_on(clips: HeldOut, folder: Path | None) -> Probe:
    """As `cached`, of given clips."""
    settings = repr((_VERSION, _EPOCHS, _BATCH, _RATE, _DECAY, clips.digest))
    name = hashlib.sha256(settings.encode()).hexdigest()[:16]
    path = folder and folder / f"probe_{name}.npz"
    if path and (kept := _kept(path)) is not None:
        return Probe(kept, name)
    probe = train(clips.frames, clips.actions, name=name)
    if path:
        _keep(probe, path)
    return probe


def _kept(path: Path) -> nnx.State | None:
    """The parameters in a file; None if there is no usable one."""
    flat = nnx.to_flat_state(_skeleton()[1])
    try:
        if not path.exists():
            return None
        saved = npz.read(path, [_key(at) for at, _ in flat])
        if any(saved[_key(at)].shape != leaf.shape for at, leaf in flat):
            raise UserError(f"cannot read {path}: its arrays have other shapes")
    except (UserError, OSError) as error:
        echo(f"warning: {error}; the probe is trained again")
        return None
    leaves = [(at, leaf.replace(jnp.asarray(saved[_key(at)]))) for at, leaf in flat]
    return nnx.from_flat_state(leaves)


def _keep(probe: Probe, path: Path) -> None:
    flat = nnx.to_flat_state(probe.params)
    try:
        npz.write(path, {_key(at): np.asarray(leaf[...]) for at, leaf in flat})
    except (UserError, OSError) as error:
        echo(f"warning: the probe is not stored, and the next call trains it again: {error}")


def _key(path: tuple) -> str:
    return ".".join(map(str, path))
