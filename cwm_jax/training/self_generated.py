"""Self-generated context: clips whose context frames the network has generated itself.

A network that has only seen real context does not recognise its own errors in a rollout. So a
share of the clips is shown context frames that the network generates with its present parameters;
no gradient goes through them. `passes` generates all frames of a clip at once, over and over;
`rollout` frame by frame, exactly as the sampler does (Self Forcing, Huang et al. 2025,
https://arxiv.org/abs/2506.08009), so that errors add up over the whole clip.

What a clip should be after self-generated frames is not always the real frame: where they show
something else than the game did, such as terrain that came into view, `persistent` makes the
target what they show, displaced as in the game.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax.diffusion import displacement, schedule
from cwm_jax.diffusion.denoiser import Denoiser, bind
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params
from cwm_jax.sampling import kv_cache, sampler
from cwm_jax.training.config import ContextConfig

_TOP = schedule.NUM_LEVELS - 1


class Context(NamedTuple):
    """How the context frames of clips are generated."""

    clips_B: jax.Array  # bool, the clips that are shown self-generated context
    top_B: jax.Array  # bool, those of them in which all noise levels are the highest
    t_BPT: jax.Array  # noise levels that frames are generated from, in each of P passes
    noise_BTHWC: jax.Array  # the noise that they are generated from, the same in all passes
    start_noise_B: jax.Array  # standard deviation of the noise added to the first frame


def clips(count: int, share: float) -> np.ndarray:
    """Which of so many clips are shown self-generated context, bool [count], evenly spread.

    A part of a batch in which the share is a whole number of clips has the pattern of the whole.
    """
    edges = np.floor(np.arange(count + 1) * share + 1e-6)
    return np.diff(edges) > 0


def places(count: int, share: float) -> np.ndarray:
    """Where in a batch of so many clips those of `clips` stand, int [n]; all, if it is not known.

    It is known where their share is a whole number: only then is a part of a batch like the whole.
    """
    wanted = count * share
    is_whole = abs(wanted - round(wanted)) < 1e-6
    return np.flatnonzero(clips(count, share)) if is_whole else np.arange(count)


def shown(
    params: Params,
    network: DiTConfig,
    frames,
    actions_BT,
    t_BT,
    context: Context,
    config: ContextConfig,
) -> tuple[jax.Array, jax.Array]:
    """The frames with self-generated ones in the clips of `context`, and noise levels to learn.

    Where the places of these clips are known, no other clip pays for the generation.

    Args:
        frames: float32 [B, T, H, W, 3] in [-1, 1].
    """
    frames, t_BT = jnp.asarray(frames), jnp.asarray(t_BT)
    which = places(len(frames), config.share)
    part = jax.tree.map(lambda x: x[which], context)
    given = frames[which], actions_BT[which]
    fixed = jax.lax.stop_gradient(params)
    if config.steps:
        generated = rollout(fixed, network, *given, part, steps=config.steps)
    else:
        generated = passes(bind(network, fixed), *given, part, renoised=config.renoised)
    is_own = part.clips_B[:, None, None, None, None]
    seen = frames.at[which].set(jnp.where(is_own, generated, frames[which]))
    is_top = (part.clips_B & part.top_B)[:, None]
    return seen, t_BT.at[which].set(jnp.where(is_top, _TOP, t_BT[which]))


def passes(
    denoiser: Denoiser, frames_BTHWC, actions_BT, context: Context, *, renoised: bool = False
) -> jax.Array:
    """The first frame, and the others as the network generates them, float32 [B, T, H, W, 3].

    Scheduled sampling (Bengio et al. 2015, https://arxiv.org/abs/1506.03099) of all frames at
    once (Duckworth et al. 2019, https://arxiv.org/abs/1906.04331). A pass generates each frame in
    one step after the last pass's frames (at first the real ones), so errors add up as in a
    rollout of as many frames as there are passes. It starts at any noise level, so that the errors
    of all of a sampler's steps are met. Where all levels are the highest (`context.top_share`), the
    real frame cannot be read off the noisy one, as in a rollout with one step.
    """

    def again(seen, t_BT):
        earlier = denoiser.earlier(seen)
        x0 = denoiser.to_sample(seen if renoised else frames_BTHWC, earlier)
        noised = schedule.noised(x0, t_BT, context.noise_BTHWC).x
        frames = denoiser.frames(noised, t_BT, actions_BT, earlier)
        return frames.at[:, 0].set(frames_BTHWC[:, 0]), None

    return jax.lax.scan(again, frames_BTHWC, jnp.moveaxis(context.t_BPT, 1, 0))[0]


def rollout(
    params: Params, network: DiTConfig, frames_BTHWC, actions_BT, context: Context, *, steps: int
) -> jax.Array:
    """The first frame with noise, and the others as a rollout, float32 [B, T, H, W, 3].

    The rollout takes `steps` denoising steps a frame with the KV cache of the sampler. What noise
    on its first frame looks like after many displacements is what errors of long rollouts look
    like, and the network learns to remove it.
    """
    config = sampler.SamplerConfig(levels=sampler.ddim_levels(steps), window="cached")
    tables = sampler.tabulate(bind(network, params), config)
    denoiser = bind(network, jax.tree.map(lambda x: x.astype(network.compute_dtype), params))
    sigma = context.start_noise_B[:, None, None, None]
    first = (frames_BTHWC[:, 0] + sigma * context.noise_BTHWC[:, 0]).clip(-1, 1)
    slots = len(first), network.max_frames - 1
    begin = lambda: kv_cache.start(
        denoiser,
        tables.context,
        jnp.zeros((*slots, *first.shape[1:])),
        jnp.zeros(slots, jnp.int32),
        0,
    )
    # Of a world without frames no slot is visible, so nothing has to be encoded for it.
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(begin))
    world = kv_cache.advance(denoiser, tables.context, empty, first, actions_BT[:, 0], "cached")

    def next_frame(world, action_and_noise):
        return sampler.step(denoiser, tables, world, *action_and_noise, None, config)

    later = lambda x: jnp.moveaxis(x[:, 1:], 1, 0)
    given = later(actions_BT), later(context.noise_BTHWC)
    _, frames_TBHWC = jax.lax.scan(next_frame, world, given)
    return jnp.concatenate([first[:, None], jnp.moveaxis(frames_TBHWC, 0, 1)], axis=1)


def persistent(
    denoiser: Denoiser, frames_BTHWC, earlier_BTHWC, errors_BThwK, is_free_hw, above: float
) -> tuple[jax.Array, jax.Array]:
    """Targets in which content of the network's own persists, and errors of all displacements.

    A patch persists where no displacement of the context explains the real frame to a root mean
    square error of `above`, though a displacement of the last real frame does: there the context
    shows something else than the game. Its target is the context, displaced as in the game.

    Args:
        frames_BTHWC: the real frames.
        earlier_BTHWC: the context, see `Denoiser.earlier`.
        errors_BThwK: of the context's displacements against the real frames.
        is_free_hw: bool, patches in which content may persist.

    Returns:
        The targets [B, T, H, W, 3], and errors with those of real frames where content persists.
    """
    reach = denoiser.config.reach
    real = displacement.errors(denoiser.earlier(frames_BTHWC)[..., :3], frames_BTHWC, reach)
    limit = 3 * reach.patch**2 * above**2
    persists = (errors_BThwK.min(-1) > limit) & (real.min(-1) < limit) & is_free_hw
    errors = jnp.where(persists[..., None], real, errors_BThwK)
    kept = displacement.warp(earlier_BTHWC[..., :3], displacement.best(errors, reach), reach)
    of_pixels = persists.repeat(reach.patch, axis=2).repeat(reach.patch, axis=3)[..., None]
    return jnp.where(of_pixels, kept, frames_BTHWC), errors
