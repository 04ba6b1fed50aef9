"""One training step: make examples, find their gradients, update parameters and their average.

AdamW: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101. Everything that a step needs is
in its arguments: noise levels and noise come from a key and the step's number, so a resumed run
has the examples that an uninterrupted one would have had, on any number of devices.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cwm_jax.config_group import group
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params
from cwm_jax.runtime import sharding
from cwm_jax.training import examples, objective
from cwm_jax.training.config import ComputeConfig, ExampleConfig, OptimizerConfig
from cwm_jax.training.examples import Example, Teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSetup:
    """What a compiled training step is made for; hashable, a static argument of `jax.jit`."""

    network: DiTConfig
    optim: OptimizerConfig
    compute: ComputeConfig = group(ComputeConfig)
    examples: ExampleConfig = group(ExampleConfig)
    max_steps: int = 0  # updates of the whole run, of which `optim.decay_steps` are the last
    mesh: Mesh | None = None  # where state and batch lie, as `sharding` places them; None: 1 device


class TrainState(NamedTuple):
    """What a run is, but for its place in the data."""

    step: jax.Array  # int32 [], updates so far
    params: Params
    opt_state: optax.OptState
    ema: Params | None  # moving average of params
    epoch_loss: jax.Array  # float32 [2], sum and number of this epoch's losses
    skipped: jax.Array  # int32 [], updates passed over so far, as `update` says


def learning_rate(config: OptimizerConfig, max_steps: int = 0):
    """lr · (1/W + (1 − 1/W) · min(k/W, 1)) for update k = 0, 1, …; constant where W is 0.

    The last `decay_steps` of `max_steps` updates multiply it by what is left of them: warm-up,
    stable, decay (Hägele et al. 2024, https://arxiv.org/abs/2405.18392), so a run can be
    lengthened before its decay begins.
    """
    warmed = lambda count: config.lr
    if config.warmup_steps:
        first = 1 / config.warmup_steps  # summed up from it: optax's own schedule cancels digits
        warmed = lambda count: (
            config.lr * (first + (1 - first) * jnp.minimum(count / config.warmup_steps, 1))
        )
    if not config.decay_steps:
        return warmed
    last = min(config.decay_steps, max_steps)
    left = lambda count: jnp.clip((max_steps - count) / last, 0, 1)
    return lambda count: warmed(count) * left(count)


def optimizer(config: OptimizerConfig, max_steps: int = 0) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (0.9, 0.999, 1e-8) with warm-up."""
    return optax.chain(
        optax.stateless(lambda grads, _: _clip(grads, config.grad_clip)),
        optax.adamw(learning_rate(config, max_steps), weight_decay=config.weight_decay),
    )


def _clip(grads, most: float):
    """Gradients whose norm is at most so much."""
    norm = _norm(grads)
    return jax.tree.map(lambda x: jnp.where(norm < most, x, x / norm * most), grads)


def _norm(tree) -> jax.Array:
    """Euclidean norm of all numbers of a tree.

    First over all axes of an array but its last, then over what is left of all arrays at once: on
    a GPU about one kernel an array, where a sum for each array by itself takes two or three.
    """
    parts = [jnp.square(x).reshape(-1, x.shape[-1]).sum(0) for x in jax.tree.leaves(tree)]
    # Else XLA would turn the sum of what is joined into a sum for each part again.
    joined = jax.lax.optimization_barrier(jnp.concatenate(parts))
    return jnp.sqrt(joined.sum())


def init_state(
    network: DiTConfig, optim: OptimizerConfig, seed: int, params: Params | None = None
) -> TrainState:
    """A run's state before its first update, from float32 parameters; random without them."""
    params = dit.init(network, seed) if params is None else params
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer(optim).init(params),
        ema=jax.tree.map(jnp.copy, params) if optim.ema_decay else None,
        epoch_loss=jnp.zeros(2),
        skipped=jnp.zeros((), jnp.int32),
    )


def init_teacher(network: DiTConfig, params: Params, steps: int) -> Teacher:
    """A teacher for a student of so many steps: never updated, so in the compute dtype for good."""
    return Teacher(_cast(params, network), jnp.int32(steps))


def _cast(params: Params, network: DiTConfig) -> Params:
    return jax.tree.map(lambda x: x.astype(network.compute_dtype), params)


def _value_and_grad(params, teacher, example: Example, *, setup: TrainSetup):
    """Loss and gradients of clips, means over them; the gradients of parts are added in float32."""
    loss = functools.partial(
        objective.clip_loss,
        network=setup.network,
        remat=setup.compute.remat,
        config=setup.examples,
        teacher=teacher,
    )
    parts = setup.compute.accumulate_steps
    if parts == 1:
        return jax.value_and_grad(loss)(params, example)

    def add(total, part):
        found = jax.value_and_grad(loss)(params, part)
        return jax.tree.map(lambda a, b: a + b / parts, total, found), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    divided = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), example)
    return jax.lax.scan(add, (jnp.zeros(()), zeros), divided)[0]


def gradients(params, example: Example, setup: TrainSetup, teacher: Teacher | None = None):
    """Loss and float32 gradients of examples: (loss, gradients).

    Parameters are cast to the compute dtype once, here, and not again by each matmul.
    """
    function = functools.partial(_value_and_grad, setup=setup)
    if setup.mesh is not None:
        function = sharding.mean_over_devices(function, setup.mesh)
    loss, grads = function(_cast(params, setup.network), teacher, example)
    return loss, jax.tree.map(lambda x: x.astype(jnp.float32), grads)


def update(
    state: TrainState,
    example: Example,
    setup: TrainSetup,
    teacher: Teacher | None = None,
    rate: jax.Array | None = None,
):
    """One AdamW update on given examples: (next state, metrics).

    Where the loss or the gradient is not finite, the update is passed over: only `step` and
    `skipped` count on, so no state is ever poisoned, however late somebody looks at the metrics.
    `rate` multiplies the learning rate: AdamW's update is proportional to it, decay included.
    """
    optim = setup.optim
    loss, grads = gradients(state.params, example, setup, teacher)
    updates, opt_state = optimizer(optim, setup.max_steps).update(
        grads, state.opt_state, state.params
    )
    lr = learning_rate(optim, setup.max_steps)(state.step - state.skipped)
    if rate is not None:
        lr, updates = lr * rate, jax.tree.map(lambda x: x * rate, updates)
    params = optax.apply_updates(state.params, updates)
    grad_norm = _norm(grads)  # before clipping
    sound = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    following = TrainState(
        state.step + 1,
        params,
        opt_state,
        _average(state, params, optim.ema_decay),
        state.epoch_loss + jnp.array([1.0, 0.0]) * loss + jnp.array([0.0, 1.0]),
        state.skipped,
    )
    passed_over = state._replace(step=state.step + 1, skipped=state.skipped + 1)
    following = jax.tree.map(functools.partial(jnp.where, sound), following, passed_over)
    metrics = {
        "train/loss": loss,
        "train/grad_norm": grad_norm,
        "train/lr": lr,
        "train/skipped": following.skipped,
    }
    return following, metrics


def _average(state: TrainState, params: Params, decay: float) -> Params | None:
    """Moving average whose first steps forget faster, so that it soon leaves the random start."""
    if state.ema is None:
        return None
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="state")
def train_step(
    state: TrainState,
    batch,
    key,
    setup: TrainSetup,
    *,
    teacher: Teacher | None = None,
    rate: jax.Array | None = None,
):
    """One update on a batch of uint8 clips: (next state, metrics as device scalars).

    Args:
        state: used up; its memory becomes the next state's.
        batch: `{"frames": uint8 [B, T, H, W, 3], "actions": int32 [B, T]}`.
        key: the run's PRNG key; the step's number is folded in here.
        teacher: whose generation is learned, from `init_teacher`; it lies as the state does.
        rate: float32 [], multiplies the learning rate of `setup.optim`; None: 1.
    """
    # Made as one array over all devices, so that no clip's noise depends on where it lies.
    example = examples.make(jax.random.fold_in(key, state.step), batch, setup.examples, teacher)
    following, metrics = update(state, example, setup, teacher, rate)
    if setup.mesh is not None:
        placement = sharding.placement(following, setup.mesh)
        following = jax.lax.with_sharding_constraint(following, placement)
    return following, metrics


def weights_to_sample(state: TrainState) -> Params:
    """The moving average where there is one, else the parameters."""
    return state.params if state.ema is None else state.ema
