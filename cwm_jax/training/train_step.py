"""One training step: examples, their gradients, and the update of parameters and their average.

AdamW: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101. A step depends only on its
arguments: noise levels and noise are computed from a key and the step's number, so a resumed run
has the same examples as an uninterrupted one, on any number of devices.
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
    """Everything that a compiled training step depends on; a static argument of `jax.jit`."""

    network: DiTConfig
    optim: OptimizerConfig
    compute: ComputeConfig = group(ComputeConfig)
    examples: ExampleConfig = group(ExampleConfig)
    max_steps: int = 0  # updates of the whole run; the last `optim.decay_steps` decay
    mesh: Mesh | None = None  # of the shardings of state and batch; None: 1 device


class TrainState(NamedTuple):
    """The state of a run, except its position in the data."""

    step: jax.Array  # int32 [], updates so far
    params: Params
    opt_state: optax.OptState
    ema: Params | None  # moving average of params
    epoch_loss: jax.Array  # float32 [2], sum and number of this epoch's losses
    skipped: jax.Array  # int32 [], updates skipped so far, see `update`


def learning_rate(config: OptimizerConfig, max_steps: int = 0):
    """lr · (1/W + (1 − 1/W) · min(k/W, 1)) for update k = 0, 1, …; constant where W is 0.

    In the last `decay_steps` of `max_steps` updates it falls linearly to 0: warm-up, stable, decay
    (Hägele et al. 2024, https://arxiv.org/abs/2405.18392), so a run can be extended before its
    decay begins.
    """
    warmed = lambda count: config.lr
    if config.warmup_steps:
        first = 1 / config.warmup_steps  # added to it: optax's own schedule cancels digits
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
    """Gradients scaled to a norm of at most `most`."""
    norm = _norm(grads)
    return jax.tree.map(lambda x: jnp.where(norm < most, x, x / norm * most), grads)


def _norm(tree) -> jax.Array:
    """Euclidean norm of all numbers of a tree.

    Summed over all axes of each array but its last, then over all arrays at once: on a GPU about
    one kernel per array, where a separate sum for each array takes two or three.
    """
    parts = [jnp.square(x).reshape(-1, x.shape[-1]).sum(0) for x in jax.tree.leaves(tree)]
    # Otherwise XLA would split the sum of the concatenation into sums of its parts again.
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
    """A teacher for a student of so many steps; never updated, so kept in the compute dtype."""
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

    Parameters are cast to the compute dtype once, here, instead of in each matmul.
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

    Where the loss or the gradient is not finite, the update is skipped: only `step` and `skipped`
    increase, so the state stays finite, however late the metrics are read. `rate` multiplies the
    learning rate: AdamW's update is proportional to it, decay included.
    """
    loss, grads = gradients(state.params, example, setup, teacher)
    with jax.named_scope("optimizer"):
        return _updated(state, loss, grads, setup, rate)


def _updated(state: TrainState, loss, grads, setup: TrainSetup, rate: jax.Array | None):
    """The next state and the metrics, from a step's loss and gradients."""
    optim = setup.optim
    updates, opt_state = optimizer(optim, setup.max_steps).update(
        grads, state.opt_state, state.params
    )
    lr = learning_rate(optim, setup.max_steps)(state.step - state.skipped)
    if rate is not None:
        lr, updates = lr * rate, jax.tree.map(lambda x: x * rate, updates)
    params = optax.apply_updates(state.params, updates)
    grad_norm = _norm(grads)  # before clipping
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    following = TrainState(
        state.step + 1,
        params,
        opt_state,
        _average(state, params, optim.ema_decay),
        state.epoch_loss + jnp.array([1.0, 0.0]) * loss + jnp.array([0.0, 1.0]),
        state.skipped,
    )
    unchanged = state._replace(step=state.step + 1, skipped=state.skipped + 1)
    following = jax.tree.map(functools.partial(jnp.where, is_finite), following, unchanged)
    metrics = {
        "train/loss": loss,
        "train/grad_norm": grad_norm,
        "train/lr": lr,
        "train/skipped": following.skipped,
    }
    return following, metrics


def _average(state: TrainState, params: Params, decay: float) -> Params | None:
    """Moving average with faster decay in the first steps, to soon forget the random start."""
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
        state: donated; its buffers become the next state's.
        batch: `{"frames": uint8 [B, T, H, W, 3], "actions": int32 [B, T]}`.
        key: the run's PRNG key; the step's number is folded in here.
        teacher: to be distilled, from `init_teacher`; sharded like the state.
        rate: float32 [], multiplies the learning rate of `setup.optim`; None: 1.
    """
    # Created as one array over all devices, so that noise does not depend on the sharding.
    example = examples.make(jax.random.fold_in(key, state.step), batch, setup.examples, teacher)
    following, metrics = update(state, example, setup, teacher, rate)
    if setup.mesh is not None:
        placement = sharding.placement(following, setup.mesh)
        following = jax.lax.with_sharding_constraint(following, placement)
    return following, metrics


def weights_to_sample(state: TrainState) -> Params:
    """The moving average where there is one, else the parameters."""
    return state.params if state.ema is None else state.ema
