"""The loss of training examples: how wrong the predicted velocities are.

The plain objective is the original's, the mean square error of velocities. With a `Teacher`, its
velocities are learned instead of the data's; with discrete displacements their cross-entropy is
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
from cwm_jax.training.examples import Example, NoiseConfig, Targets, Teacher

_PLAIN = NoiseConfig()
_LEAST_WEIGHT = 1.0  # of a batch's outcomes: few noisy frames must not count like many clear ones


def clip_loss(
    params,
    example: Example,
    *,
    network: DiTConfig,
    remat="none",
    noise: NoiseConfig = _PLAIN,
    teacher: Teacher | None = None,
):
    """Diffusion loss of clips, float32 [].

    With history the first frame of a clip, of which there is no residual, does not count. With
    `middle_weight` other than 1 it is a mean in which the pixels of the middle weigh so much. A
    `teacher` says what is learned instead of the clips' own velocities. With discrete
    displacements their cross-entropy is added, and in half of the clips the last frame is warped
    by the best of them instead of the likeliest, so that the residual is learned from both.
    """
    denoiser, frames = bind(network, params), to_model(jnp.asarray(example.frames_BTHWC))
    seen, t_BT, actions_BT = frames, example.t_BT, example.actions_BT
    if example.context is not None:
        given = frames, actions_BT, t_BT, example.context, noise
        seen, t_BT = self_generated.shown(params, network, *given)
    earlier, errors = denoiser.earlier(seen), None
    if network.reach:
        errors = displacement.errors(earlier[..., :3], frames, network.reach)
        if example.context is not None and noise.persist_above:
            which = self_generated.places(len(frames), noise.own_share)
            free = ~_middle(errors.shape[2])
            part = frames[which], earlier[which], errors[which], free, noise.persist_above
            targets, found = self_generated.persistent(denoiser, *part)
            frames, errors = frames.at[which].set(targets), errors.at[which].set(found)
    sample = schedule.noised(denoiser.to_sample(frames, earlier), t_BT, example.noise_BTHWC)
    outputs, stream = denoiser.net.outputs_and_stream(
        sample.x, t_BT, actions_BT, earlier, remat=remat
    )
    counted, middle, chosen, added = denoiser.counted, noise.middle_weight, None, 0.0
    if errors is not None:
        logits = denoiser.logits(outputs)
        # Noise of the first frame, which does not count: the same whatever device has the clip.
        is_best = example.noise_BTHWC[:, 0, 0, 0, 0] > 0
        chosen = _chosen(logits, errors, is_best, network.reach)
        entropy = _cross_entropy(logits, errors, network.reach)[:, counted]
        weights = _weights(errors.shape[2], middle)[..., 0]
        added = noise.displacement_weight * (weights * entropy).mean()
    if example.targets is not None:
        predicted = denoiser.net.outcomes(denoiser.net.scene(stream), example.targets.pressed_BT)
        added += noise.outcome_weight * outcome_loss(predicted, example.targets, alpha_bar(t_BT))
    predicted = denoiser.velocity(outputs, sample.x, alpha_bar(t_BT), earlier, chosen)
    wanted = sample.velocity
    if teacher is not None:
        taught = bind(network, teacher.params)
        predict = lambda x, t: taught(x, t, actions_BT, earlier)
        wanted = distillation.velocity(predict, sample.x, t_BT, teacher.steps)
    weights = 1.0 if middle == 1 else _weights(network.image_size, middle)
    return schedule.loss(predicted[:, counted], wanted[:, counted], weights) + added


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
    """Displacements that the last frame is warped by, int32 [B, T, h, w]."""
    likeliest, best = jnp.argmax(logits_BThwK, -1), displacement.best(errors_BThwK, reach)
    return jnp.where(is_best_B[:, None, None, None], best, likeliest)


def _cross_entropy(logits_BThwK, errors_BThwK, reach: Reach) -> jax.Array:
    """Of each patch's displacement, float32 [B, T, h, w]."""
    log_probs = jax.nn.log_softmax(logits_BThwK, axis=-1)
    return -(displacement.targets(errors_BThwK, reach) * log_probs).sum(-1)


def _middle(size: int) -> np.ndarray:
    """Which of size × size pixels or patches are the middle, bool: a quarter of each side.

    CoinRun keeps the player there, who is a tenth of the picture's height and width.
    """
    inside = np.zeros((size, size), bool)
    inside[3 * size // 8 : 5 * size // 8, 3 * size // 8 : 5 * size // 8] = True
    return inside


def _weights(size: int, middle_weight: float) -> np.ndarray:
    """What each pixel or patch counts, float32 [size, size, 1], 1 on the mean."""
    weights = np.where(_middle(size), middle_weight, 1.0).astype(np.float32)[..., None]
    return weights / weights.mean()
