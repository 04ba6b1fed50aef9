"""The loss of training examples.

The plain objective is the original's, the mean square error of velocities. With a `Teacher`, its
velocities are the targets instead of the data's; with discrete displacements their cross-entropy is
added, and with heads those of reward and end of the episode.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cwm_jax.coinrun import to_model
from cwm_jax.diffusion import displacement, schedule
from cwm_jax.diffusion.denoiser import alpha_bar, bind
from cwm_jax.models.config import DiTConfig, Reach
from cwm_jax.models.heads import Outcomes
from cwm_jax.training import distillation, self_generated
from cwm_jax.training.config import ExampleConfig
from cwm_jax.training.examples import Example, Targets, Teacher

_PLAIN = ExampleConfig()
_LEAST_WEIGHT = 1.0  # of a batch's outcomes: few noisy frames must not count like many clear ones


def clip_loss(
    params,
    example: Example,
    *,
    network: DiTConfig,
    remat="none",
    config: ExampleConfig = _PLAIN,
    teacher: Teacher | None = None,
):
    """Diffusion loss of clips, float32 [].

    With history the first frame of a clip, which has no residual, does not count. With a
    `middle_weight` other than 1 the pixels of the middle have that weight. With the `weighting`
    "ramp" each frame is weighted by its noise level, see `schedule.ramp`. With a `teacher` the
    targets are its velocities. With discrete displacements their cross-entropy is added, and in
    half of the clips the last frame is warped by the best displacements instead of the likeliest,
    so that the residual is learned for both; not with a teacher, whose velocities belong to its
    own likeliest ones.
    """
    denoiser, frames = bind(network, params), to_model(jnp.asarray(example.frames_BTHWC))
    context_frames, t_BT, actions_BT = frames, example.t_BT, example.actions_BT
    if example.context is not None:
        given = frames, actions_BT, t_BT, example.context, config.context
        context_frames, t_BT = self_generated.with_generated(params, network, *given)
    earlier, errors = denoiser.earlier(context_frames), None
    if network.reach:
        errors = displacement.errors(earlier[..., :3], frames, network.reach)
        if example.context is not None and config.context.persist_above:
            which = self_generated.places(len(frames), config.context.share)
            free = ~self_generated.middle(errors.shape[2])
            part = frames[which], earlier[which], errors[which], free, config.context.persist_above
            targets, found = self_generated.persistent(denoiser, *part)
            frames, errors = frames.at[which].set(targets), errors.at[which].set(found)
    sample = schedule.noised(denoiser.to_sample(frames, earlier), t_BT, example.noise_BTHWC)
    outputs, stream = denoiser.net.outputs_and_stream(
        sample.x, t_BT, actions_BT, earlier, remat=remat
    )
    counted, middle, chosen, added = denoiser.counted, config.loss.middle_weight, None, 0.0
    if errors is not None:
        logits = denoiser.logits(outputs)
        # Noise of the first frame, which is unused otherwise: the same on any device.
        is_best = (example.noise_BTHWC[:, 0, 0, 0, 0] > 0) & (teacher is None)
        chosen = _chosen(logits, errors, is_best, network.reach)
        entropy = _cross_entropy(logits, errors, network.reach)[:, counted]
        weights = _weights(errors.shape[2], middle)[..., 0]
        added = config.loss.displacement_weight * (weights * entropy).mean()
    if example.targets is not None:
        outcomes = denoiser.net.outcomes(denoiser.net.scene(stream), example.targets.pressed_BT)
        of_outcomes = outcome_loss(outcomes, example.targets, alpha_bar(t_BT))
        added += config.loss.outcome_weight * of_outcomes
    predicted = denoiser.velocity(outputs, sample.x, alpha_bar(t_BT), earlier, chosen)
    target = sample.velocity
    if teacher is not None:
        taught = bind(network, teacher.params)
        predict = lambda x, t: taught(x, t, actions_BT, earlier)
        target = distillation.velocity(predict, sample.x, t_BT, teacher.steps)
    weights = 1.0 if middle == 1 else _weights(network.image_size, middle)
    if config.loss.weighting == "ramp":
        weights = weights * schedule.ramp(alpha_bar(t_BT))[:, counted, None, None, None]
    return schedule.loss(predicted[:, counted], target[:, counted], weights) + added


def outcome_loss(predicted: Outcomes, targets: Targets, weights_BT: jax.Array) -> jax.Array:
    """Cross-entropies of the reward's sign and of the episode's end, float32 [].

    A mean over the frames of which they are known, weighted by `weights_BT`: in training the share
    of signal, since the heads read frames with as little noise as context frames have.
    """
    known_BT = ~(jnp.isnan(targets.rewards_BT) | jnp.isnan(targets.ends_BT))
    sign_BT = jnp.sign(jnp.nan_to_num(targets.rewards_BT)).astype(jnp.int32) + 1
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(predicted.reward, sign_BT)
    losses_BT += optax.sigmoid_binary_cross_entropy(predicted.end, jnp.nan_to_num(targets.ends_BT))
    weights_BT = weights_BT * known_BT
    return (weights_BT * losses_BT).sum() / jnp.maximum(weights_BT.sum(), _LEAST_WEIGHT)


def _chosen(logits_BThwK, errors_BThwK, is_best_B, reach: Reach) -> jax.Array:
    """The displacements to warp the last frame by, int32 [B, T, h, w]."""
    likeliest, best = jnp.argmax(logits_BThwK, -1), displacement.best(errors_BThwK, reach)
    return jnp.where(is_best_B[:, None, None, None], best, likeliest)


def _cross_entropy(logits_BThwK, errors_BThwK, reach: Reach) -> jax.Array:
    """Of each patch's displacement, float32 [B, T, h, w]."""
    log_probs = jax.nn.log_softmax(logits_BThwK, axis=-1)
    return -(displacement.targets(errors_BThwK, reach) * log_probs).sum(-1)


def _weights(size: int, middle_weight: float) -> np.ndarray:
    """The weight of each pixel or patch, float32 [size, size, 1], with mean 1."""
    inside = self_generated.middle(size)[..., None]
    weights = np.where(inside, middle_weight, 1.0).astype(np.float32)
    return weights / weights.mean()
