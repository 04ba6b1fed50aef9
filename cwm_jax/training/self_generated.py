"""Self-generated context: clips whose context frames the network has generated itself.

A network trained on real context only does not correct its own errors in a rollout. So a share of
the clips gets context frames that the network generates with its current parameters, without
gradients. `in_rounds` generates all frames of a clip at once, several times; `rollout` frame by
frame, exactly as the sampler does (Self Forcing, Huang et al. 2025,
https://arxiv.org/abs/2506.08009), so that errors accumulate over the whole clip, and with
`context.lead` over frames before it.

The right target after self-generated frames is not always the real frame: where their content
differs from the game, such as terrain that came into view, `persistent` makes the target that
content, displaced as in the game.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax.coinrun import to_model
from cwm_jax.diffusion import displacement, schedule
from cwm_jax.diffusion.denoiser import Denoiser, bind
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params
from cwm_jax.sampling import kv_cache, sampler
from cwm_jax.training.config import ContextConfig

_TOP = schedule.NUM_LEVELS - 1
_OFF_COURSE = 0.35  # root mean square error of the middle, colours in [-1, 1]


class Context(NamedTuple):
    """How the context frames of clips are generated."""

    clips_B: jax.Array  # bool, the clips with self-generated context
    top_B: jax.Array  # bool, those of them whose noise levels are all the highest
    t_BPT: jax.Array  # noise levels that frames are generated from, in each of P rounds
    noise_BRHWC: jax.Array  # the noise that R = lead + T frames are generated from, in all rounds
    start_noise_B: jax.Array  # standard deviation of the noise added to the first frame
    lead: "Lead | None" = None  # None: the generated frames begin with the clip's first


class Lead(NamedTuple):
    """Frames that are generated before those of a clip; arrays begin with the earliest."""

    count_B: jax.Array  # int32, frames before the clip, the same for all clips
    start_BHWC: jax.Array  # uint8, the first of them, which is real
    actions_BR: jax.Array  # int32, those of the lead and of the clip, R = most + T


def clips(count: int, share: float) -> np.ndarray:
    """Which of so many clips get self-generated context, bool [count], evenly spread.

    A part of a batch has the pattern of the whole if the share is a whole number of its clips.
    """
    edges = np.floor(np.arange(count + 1) * share + 1e-6)
    return np.diff(edges) > 0


def places(count: int, share: float) -> np.ndarray:
    """The indices in a batch of the clips that `clips` selects, int [n]; all if unknown.

    They are known if the share is a whole number of clips: then each part of a batch is like the
    whole.
    """
    wanted = count * share
    is_whole = abs(wanted - round(wanted)) < 1e-6
    return np.flatnonzero(clips(count, share)) if is_whole else np.arange(count)


@jax.named_scope("context")
def with_generated(
    params: Params,
    network: DiTConfig,
    frames,
    actions_BT,
    t_BT,
    context: Context,
    config: ContextConfig,
) -> tuple[jax.Array, jax.Array]:
    """The frames with self-generated ones in the clips of `context`, and the noise levels to train.

    Where the indices of these clips are known, frames are generated for no other clip.

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
        generated = in_rounds(bind(network, fixed), *given, part, renoised=config.renoised)
    if part.lead is not None:
        part = part._replace(clips_B=part.clips_B & _on_course(generated[:, 0], given[0][:, 0]))
    is_generated = part.clips_B[:, None, None, None, None]
    seen = frames.at[which].set(jnp.where(is_generated, generated, frames[which]))
    is_top = (part.clips_B & part.top_B)[:, None]
    return seen, t_BT.at[which].set(jnp.where(is_top, _TOP, t_BT[which]))


def in_rounds(
    denoiser: Denoiser, frames_BTHWC, actions_BT, context: Context, *, renoised: bool = False
) -> jax.Array:
    """The first frame, and the others as the network generates them, float32 [B, T, H, W, 3].

    Scheduled sampling (Bengio et al. 2015, https://arxiv.org/abs/1506.03099) of all frames at
    once (Duckworth et al. 2019, https://arxiv.org/abs/1906.04331). A round generates each frame in
    one step after the last round's frames (at first the real ones), so errors accumulate as in a
    rollout of as many frames as there are rounds. It starts at any noise level, so that errors of
    all steps of a sampler occur. Where all levels are the highest (`context.top_share`), the noisy
    frame reveals nothing of the real one, as in a rollout with one step.
    """

    def one_round(seen, t_BT):
        earlier = denoiser.earlier(seen)
        x0 = denoiser.to_sample(seen if renoised else frames_BTHWC, earlier)
        noised = schedule.noised(x0, t_BT, context.noise_BRHWC).x
        frames = denoiser.frames(noised, t_BT, actions_BT, earlier)
        return frames.at[:, 0].set(frames_BTHWC[:, 0]), None

    return jax.lax.scan(one_round, frames_BTHWC, jnp.moveaxis(context.t_BPT, 1, 0))[0]


def rollout(
    params: Params, network: DiTConfig, frames_BTHWC, actions_BT, context: Context, *, steps: int
) -> jax.Array:
    """The frames of a clip as a rollout generates them, float32 [B, T, H, W, 3].

    The rollout begins with a real frame with noise: the clip's first, or with `Context.lead` one
    before it. It takes `steps` denoising steps per frame with the KV cache of the sampler. Noise on
    its first frame, after many displacements, resembles the errors of long rollouts, so the network
    learns to remove them.
    """
    start_BHWC, actions_BR, before = frames_BTHWC[:, 0], actions_BT, 0
    if context.lead is not None:
        start_BHWC, actions_BR = to_model(context.lead.start_BHWC), context.lead.actions_BR
        before = context.lead.count_B[0]
    config = sampler.SamplerConfig(levels=sampler.ddim_levels(steps), window="cached")
    tables = sampler.tabulate(bind(network, params), config)
    denoiser = bind(network, jax.tree.map(lambda x: x.astype(network.compute_dtype), params))
    sigma = context.start_noise_B[:, None, None, None]
    first = (start_BHWC + sigma * context.noise_BRHWC[:, 0]).clip(-1, 1)
    by_frame = lambda x: jnp.moveaxis(x, 1, 0)
    actions_RB, noise_RBHWC = by_frame(actions_BR), by_frame(context.noise_BRHWC)

    def add(number, carry):
        """Adds frame `number`."""
        world, frames_TBHWC = carry
        args = denoiser, tables, world, actions_RB[number], noise_RBHWC[number], None, config
        world, frame = sampler.step(*args)
        # Until the clip's first frame, each frame replaces the one before.
        return world, frames_TBHWC.at[jnp.maximum(number - before, 0)].set(frame)

    length = actions_BT.shape[1]
    frames_TBHWC = jnp.zeros((length, *first.shape)).at[0].set(first)
    carry = kv_cache.first_frame(denoiser, first, actions_RB[0]), frames_TBHWC
    return by_frame(jax.lax.fori_loop(1, before + length, add, carry)[-1])


def _on_course(generated_BHWC: jax.Array, real_BHWC: jax.Array) -> jax.Array:
    """Whether the middle of generated frames, where the player is, resembles the game's, bool [B].

    Elsewhere content may differ (`persistent`), but a player in another place moves differently.
    """
    error = jnp.square(generated_BHWC - real_BHWC).mean(-1)
    inside = middle(error.shape[1])
    return (error * inside).sum((1, 2)) < _OFF_COURSE**2 * inside.sum()


def middle(size: int) -> np.ndarray:
    """Which of size × size pixels or patches are the middle, bool: a quarter of each side.

    CoinRun shows the player there, who has a tenth of the frame's height and width.
    """
    inside = np.zeros((size, size), bool)
    inside[3 * size // 8 : 5 * size // 8, 3 * size // 8 : 5 * size // 8] = True
    return inside


def persistent(
    denoiser: Denoiser, frames_BTHWC, earlier_BTHWC, errors_BThwK, is_free_hw, above: float
) -> tuple[jax.Array, jax.Array]:
    """Targets in which self-generated content persists, and errors of all displacements.

    A patch persists where no displacement of the context explains the real frame to a root mean
    square error of `above`, but a displacement of the last real frame does: there the content of
    the context differs from the game. Its target is the context, displaced as in the game.

    Args:
        frames_BTHWC: the real frames.
        earlier_BTHWC: the context, see `Denoiser.earlier`.
        errors_BThwK: of the context's displacements against the real frames.
        is_free_hw: bool, patches where content may persist.

    Returns:
        The targets [B, T, H, W, 3], and the errors, those of real frames where content persists.
    """
    reach = denoiser.config.reach
    real = displacement.errors(denoiser.earlier(frames_BTHWC)[..., :3], frames_BTHWC, reach)
    limit = 3 * reach.patch**2 * above**2
    persists = (errors_BThwK.min(-1) > limit) & (real.min(-1) < limit) & is_free_hw
    errors = jnp.where(persists[..., None], real, errors_BThwK)
    kept = displacement.warp(earlier_BTHWC[..., :3], displacement.best(errors, reach), reach)
    of_pixels = persists.repeat(reach.patch, axis=2).repeat(reach.patch, axis=3)[..., None]
    return jnp.where(of_pixels, kept, frames_BTHWC), errors
