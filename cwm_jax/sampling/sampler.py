"""Generating frames: DDIM on one frame, a step of a world, a rollout by `lax.scan`.

DDIM: Song et al. 2021, https://arxiv.org/abs/2010.02502, equations 12 and 16. Context frames stay
clean and get a small noise level ("stabilisation", Chen et al. 2024,
https://arxiv.org/abs/2407.01392). A frame starts as N(0, 1) clipped to ±20 and stays unclamped as
context; returned frames are clamped to [-1, 1]. With history, residuals are generated
(`cwm_jax.diffusion.residual`), whose frames are clamped at once.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax.coinrun import NO_ACTION, to_model, to_pixels
from cwm_jax.diffusion import schedule
from cwm_jax.diffusion.denoiser import Denoiser, bind
from cwm_jax.errors import UserError
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Modulations, Params
from cwm_jax.runtime import random_numbers
from cwm_jax.sampling import kv_cache, prompt
from cwm_jax.sampling.kv_cache import Window, World

NOISE_CLIP = 20.0
WINDOWS = ("exact", "cached", "hop")


def ddim_levels(steps: int) -> tuple[int, ...]:
    """Noise levels of S steps, falling: linspace(−1, 999, S + 1) without its −1, truncated.

    Raises:
        UserError: `steps` is not a whole number 1…1000.
    """
    if not isinstance(steps, int) or not 1 <= steps <= schedule.NUM_LEVELS:
        raise UserError(f"ddim_steps must be 1…{schedule.NUM_LEVELS}, not {steps!r}")
    return tuple(schedule.step_level(number, steps) for number in range(steps, 0, -1))


def check_seed(seed: int) -> None:
    """Raises `UserError` for a seed that is not 0…2³² − 1: JAX would truncate it."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed}: must be 0…{2**32 - 1}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How frames are generated."""

    levels: tuple[int, ...] = ddim_levels(
        10
    )  # falling noise levels, 0…999; one denoising step for each
    window: Window = "exact"  # how the window slides, see `cwm_jax.sampling.kv_cache`
    eta: float = 0.0  # 0: deterministic DDIM, 1: as random as DDPM
    context_level: int = 14  # noise level of the clean context frames

    def __post_init__(self):
        levels = tuple(self.levels)
        if not levels or any(a <= b for a, b in itertools.pairwise(levels)):
            raise UserError(f"noise levels must fall from step to step, not {levels}")
        for level in (*levels, self.context_level):
            if not 0 <= level < schedule.NUM_LEVELS:
                raise UserError(f"a noise level must be 0…{schedule.NUM_LEVELS - 1}, not {level}")
        if self.window not in WINDOWS:
            raise UserError(f"window must be one of {', '.join(WINDOWS)}, not {self.window!r}")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta must be 0…1, not {self.eta}")


class Tables(NamedTuple):
    """Modulations of all (noise level, action) pairs, see `tabulate`."""

    steps: Modulations  # [steps, A + 1, ...]
    context: Modulations  # [A + 1, ...]


def tabulate(denoiser: Denoiser, config: SamplerConfig) -> Tables:
    """The modulations for each noise level of `config` and each action; the last is NO_ACTION.

    A frame's conditioning depends on nothing else, so this is exact, and removes a third of the
    weights from every forward pass.
    """
    actions_A = jnp.array([*range(denoiser.config.action_values), NO_ACTION])
    levels_S = jnp.array([*config.levels, config.context_level])
    shape = len(levels_S), len(actions_A)
    table = denoiser.net.modulations(
        jnp.broadcast_to(levels_S[:, None], shape), jnp.broadcast_to(actions_A, shape)
    )
    return Tables(jax.tree.map(lambda x: x[:-1], table), jax.tree.map(lambda x: x[-1], table))


class _Step(NamedTuple):
    """One DDIM step: x ← √ᾱ′ x0 + √(1 − ᾱ′ − σ²) ε + σ z."""

    modulations: Modulations  # [A + 1, ...]
    alpha_bar: jax.Array
    alpha_bar_next: jax.Array  # 1 after the last step, which then returns x0
    sigma: jax.Array


def _steps(tables: Tables, config: SamplerConfig) -> _Step:
    now = schedule.alpha_bars()[np.array(config.levels)]
    after = np.append(now[1:], np.float32(1))
    sigma = config.eta * np.sqrt((1 - after) / (1 - now) * (1 - now / after))
    return _Step(tables.steps, *map(jnp.asarray, (now, after, sigma.astype(np.float32))))


class _Denoised(NamedTuple):
    """A denoised frame."""

    frame_BHWC: jax.Array  # float32, unclamped
    clean_SBHWC: jax.Array | None  # the clean sample that each step predicted, where watched
    state: World  # the world before the frame, all encoded


def generate_frame(
    denoiser: Denoiser, tables: Tables, state: World, action_B, noise_BHWC, key, config
):
    """The next frame, float32 [B, H, W, C], unclamped.

    Args:
        state: all its frames are encoded, as `kv_cache.advance` leaves it.
        action_B: the action that leads into the frame, int32.
        noise_BHWC: the initial noise, N(0, 1).
        key: PRNG key for the noise of stochastic steps; unused where `config.eta` is 0.
    """
    return _denoised(denoiser, tables, state, action_B, noise_BHWC, key, config).frame_BHWC


def generate_watched_frame(
    denoiser: Denoiser, tables: Tables, state: World, action_B, noise_BHWC, key, config
) -> tuple[jax.Array, jax.Array]:
    """As `generate_frame`, and how unstable its denoising was, by patch: float32 [B, h, w].

    That is how far the predicted clean frame moves from one denoising step to the next, the root
    mean square over pixels and steps in colours of 0…255 (Hansen & Wang 2026,
    https://arxiv.org/abs/2606.27326). It is 0 where there is a single step.
    """
    args = denoiser, tables, state, action_B, noise_BHWC, key, config
    found = _denoised(*args, watched=True)
    return found.frame_BHWC, _instability(denoiser, found)


def _instability(denoiser: Denoiser, found: _Denoised) -> jax.Array:
    """The instability of a watched frame, see `generate_watched_frame`."""
    earlier = kv_cache.earlier(denoiser, found.state)
    frames = denoiser.to_frame(found.clean_SBHWC, earlier)
    moved = jnp.square(jnp.diff(frames, axis=0)).sum(0) / max(len(frames) - 1, 1)
    grid, patch = denoiser.config.grid, denoiser.config.patch_size
    by_patch = moved.reshape(-1, grid, patch, grid, patch, 3).mean((2, 4, 5))
    return 127.5 * jnp.sqrt(by_patch)


def _denoised(
    denoiser: Denoiser,
    tables: Tables,
    state: World,
    action_B,
    noise_BHWC,
    key,
    config,
    *,
    entered: bool = False,
    watched: bool = False,
) -> _Denoised:
    """Denoises the next frame.

    `entered`: the state is as `kv_cache.enter` leaves it, so the first step encodes its newest
    frame too.
    """
    earlier, steps = kv_cache.earlier(denoiser, state), _steps(tables, config)
    beside = None if earlier is None else earlier[:, None]

    def after(x_BHWC, outputs, step: _Step, index):
        """The sample after a step, from its outputs; and the clean one that they predict."""
        velocity = denoiser.velocity(outputs, x_BHWC[:, None], step.alpha_bar, beside)[:, 0]
        x0 = schedule.clean(x_BHWC, velocity, step.alpha_bar)
        noise = schedule.epsilon(x_BHWC, x0, step.alpha_bar)
        spread = jnp.sqrt(1 - step.alpha_bar_next - jnp.square(step.sigma))
        x = jnp.sqrt(step.alpha_bar_next) * x0 + spread * noise
        if config.eta:
            x += step.sigma * random_numbers.normal(jax.random.fold_in(key, index), x.shape)
        return x, x0 if watched else None

    def denoise(x_BHWC, step_and_index):
        step, index = step_and_index
        modulations = jax.tree.map(lambda table: table[action_B][:, None], step.modulations)
        outputs = denoiser.net.frame_outputs(x_BHWC[:, None], modulations, past, beside)
        return after(x_BHWC, outputs, step, index)

    x_BHWC, done, clean = noise_BHWC.clip(-NOISE_CLIP, NOISE_CLIP), 0, []
    if entered:
        first, done = jax.tree.map(lambda x: x[0], steps), 1
        modulations = jax.tree.map(lambda table: table[action_B], first.modulations)
        state, past, outputs = kv_cache.encode_newest(
            denoiser, tables.context, state, x_BHWC, modulations, config.window
        )
        x_BHWC, x0 = after(x_BHWC, outputs, first, 0)
        clean = [x0[None]] if watched else []
    else:
        past = kv_cache.past(denoiser, state)
    if done < len(config.levels):
        rest = jax.tree.map(lambda x: x[done:], (steps, jnp.arange(len(config.levels))))
        x_BHWC, x0 = jax.lax.scan(denoise, x_BHWC, rest)
        clean.append(x0)
    clean_SBHWC = jnp.concatenate(clean) if watched else None
    return _Denoised(denoiser.finished(x_BHWC, earlier), clean_SBHWC, state)


def step(denoiser: Denoiser, tables: Tables, state: World, action_B, noise_BHWC, key, config):
    """Generates one frame: (the next world, the frame, float32 [B, H, W, C], unclamped).

    Both worlds are as `kv_cache.enter` leaves them.
    """
    args = denoiser, tables, state, action_B, noise_BHWC, key, config
    return _entered(denoiser, tables, _denoised(*args, entered=True), action_B, config)


def _entered(denoiser, tables, found: _Denoised, action_B, config) -> tuple[World, jax.Array]:
    """The world after a denoised frame, and the frame."""
    args = denoiser, tables.context, found.state, found.frame_BHWC, action_B, config.window
    return kv_cache.enter(*args), found.frame_BHWC


def frame_noise(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The initial noise of a frame, and a key for its stochastic steps."""
    start_key, step_key = jax.random.split(key)
    return random_numbers.normal(start_key, shape), step_key


def rollout(
    denoiser: Denoiser, tables: Tables, state: World, actions_BF, key, config: SamplerConfig
):
    """Generates F frames: (the next world, uint8 frames [B, F, H, W, C]).

    Each frame's noise depends on `key` and the frame's number alone, so splitting a rollout does
    not change it.
    """
    return _frame_by_frame(denoiser, tables, state, actions_BF, key, config, watched=False)[:2]


def watched_rollout(
    denoiser: Denoiser, tables: Tables, state: World, actions_BF, key, config: SamplerConfig
):
    """As `rollout`, and how unstable each frame's denoising was: float32 [B, F, h, w]."""
    return _frame_by_frame(denoiser, tables, state, actions_BF, key, config, watched=True)


def _frame_by_frame(denoiser, tables, state: World, actions_BF, key, config, *, watched: bool):
    shape = state.frames_BMHWC[:, 0].shape

    def one_frame(state, action_B):
        noise, step_key = frame_noise(jax.random.fold_in(key, state.count), shape)
        args = denoiser, tables, state, action_B, noise, step_key, config
        found = _denoised(*args, entered=True, watched=watched)
        state, frame = _entered(denoiser, tables, found, action_B, config)
        return state, (to_pixels(frame), _instability(denoiser, found) if watched else None)

    state, by_frame = jax.lax.scan(one_frame, state, actions_BF.T)
    return state, *jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), by_frame)


_STATIC = ("network", "config")


@functools.partial(jax.jit, static_argnames=_STATIC)
def tables(params, *, network, config):
    """`tabulate` as a compiled program."""
    return tabulate(bind(network, params), config)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _start(params, tables, frames_u8_BMHWC, actions_BM, count, *, network, config):
    denoiser = bind(network, params)
    return kv_cache.start(denoiser, tables.context, to_model(frames_u8_BMHWC), actions_BM, count)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def _rollout(params, tables, state, actions_BF, key, *, network, config):
    return rollout(bind(network, params), tables, state, actions_BF, key, config)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def _step(params, tables, state, action_B, key, *, network, config):
    # One program: a slice of the frames outside of it would be dispatched on its own.
    following, frames_BFHWC = rollout(
        bind(network, params), tables, state, action_B[:, None], key, config
    )
    return following, frames_BFHWC[:, 0]


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def _watched_rollout(params, tables, state, actions_BF, key, *, network, config):
    return watched_rollout(bind(network, params), tables, state, actions_BF, key, config)


class Sampler:
    """A trained network, ready to generate: with tables, cast parameters and compiled programs.

    Prompts of any length share one compiled program, as do all steps of a world; only another
    number of worlds or of frames per call needs another compilation.
    """

    def __init__(self, network: DiTConfig, params: Params, config: SamplerConfig):
        if network.max_frames < 2:
            raise UserError(f"max_frames={network.max_frames}: a world needs a window of 2 or more")
        self.network, self.config = network, config
        self._static = dict(network=network, config=config)
        self._tables = tables(params, **self._static)
        self._params = jax.tree.map(lambda x: x.astype(network.compute_dtype), params)

    def start(self, frames_BPHWC, actions_BP) -> World:
        """B worlds that begin with these P prompt frames, 1 ≤ P ≤ `max_frames`.

        Args:
            frames_BPHWC: uint8.
            actions_BP: the action that led into each frame; the first may be −1 (none).

        Raises:
            UserError: for a prompt that does not fit the network, naming the value.
        """
        padded = prompt.padded(self.network, frames_BPHWC, actions_BP)
        args = self._params, self._tables, *padded
        return _start(*args, **self._static)

    def rollout(self, state: World, actions_BF, key: jax.Array) -> tuple[World, jax.Array]:
        """Generates one frame for each action: (the next world, uint8 frames [B, F, H, W, C]).

        `state` is donated: its buffers become the next world's.

        Raises:
            UserError: for an action outside 0…A − 1, or a wrong number of worlds.
        """
        actions_BF = prompt.next_actions(self.network, actions_BF, len(state.actions_BM))
        args = self._params, self._tables, state, actions_BF, key
        return _rollout(*args, **self._static)

    def watched_rollout(self, state: World, actions_BF, key: jax.Array):
        """As `rollout`: (the older world, frames, their instability float32 [B, F, h, w])."""
        actions_BF = prompt.next_actions(self.network, actions_BF, len(state.actions_BM))
        args = self._params, self._tables, state, actions_BF, key
        return _watched_rollout(*args, **self._static)

    def step(self, state: World, action_B, key: jax.Array) -> tuple[World, jax.Array]:
        """Generates one frame: (the next world, uint8 [B, H, W, C]). `state` is donated."""
        action_BF = np.asarray(action_B)[:, None]
        action_BF = prompt.next_actions(self.network, action_BF, len(state.actions_BM))
        args = self._params, self._tables, state, action_BF[:, 0], key
        return _step(*args, **self._static)
