"""The device mesh, how batches and parameters are sharded over it, and how gradients are summed.

A batch is split over two axes: along `data` parameters and optimizer state are replicated, along
`fsdp` they are sharded ("fully sharded data parallel", after ZeRO, Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cwm_jax.errors import UserError

AXES = ("data", "fsdp")


def make_mesh(fsdp: int = 1) -> Mesh:
    """All devices of all processes; `fsdp` neighbours share one copy of the parameters.

    Raises:
        UserError: where `fsdp` does not divide the number of devices.
    """
    devices = jax.device_count()
    if devices % fsdp:
        raise UserError(
            f"config.compute.fsdp={fsdp} does not divide the {devices} devices: use "
            f"one of {[n for n in range(1, devices + 1) if devices % n == 0]}"
        )
    # Neighbours are on one host: `fsdp` has more traffic, which is fast there.
    return jax.make_mesh((devices // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def global_batch_size(per_device: int, total: int, *, parts: int = 1) -> int:
    """Clips a step over all devices: `per_device` on each, or `total` where that is not 0.

    Raises:
        UserError: where the clips cannot be split evenly over devices, or those of a device not
            into `parts` equal parts.
    """
    devices = jax.device_count()
    if total and total % devices:
        raise UserError(
            f"config.data.global_batch_size={total} cannot be split over {devices} devices: "
            f"use a multiple of {devices}, or config.data.batch_size (clips per device)"
        )
    share = total // devices if total else per_device
    if share % parts:
        raise UserError(
            f"config.compute.accumulate_steps={parts} does not divide the {share} clips of a "
            f"device: use a divisor of {share}"
        )
    return share * devices


def _spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Shards an array for `fsdp` along its longest divisible axis; without one it is replicated."""
    parts = mesh.shape["fsdp"]
    cuttable = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not cuttable:
        return P()
    longest = max(cuttable, key=lambda axis: shape[axis])
    return P(*(None,) * longest, "fsdp")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def by_clip(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: by clip over all devices."""
    return NamedSharding(mesh, P(AXES))


def placement(shapes, mesh: Mesh):
    """The sharding of each array of a training state, for a tree of arrays or shapes."""
    return jax.tree.map(lambda x: NamedSharding(mesh, _spec(x.shape, mesh)), shapes)


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a global batch, as arrays split over all devices by clip.

    Returns at once; copying overlaps with the step before. A batch that is on the devices is
    returned unchanged.
    """
    if all(isinstance(v, jax.Array) for v in batch.values()):
        return batch
    sharding = by_clip(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def abstract(shapes, mesh: Mesh):
    """Shapes with their shardings, for restoring a checkpoint onto the mesh."""
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, shapes, placement(shapes, mesh))


def whole(tree, mesh: Mesh):
    """The arrays replicated on every device; all processes must call it."""
    if mesh.shape["fsdp"] == 1:
        return tree
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)


def local(tree):
    """This process's own copy of replicated arrays, on its first device; nothing is copied."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def mean_over_devices(value_and_grad: Callable, mesh: Mesh) -> Callable:
    """Computes `value_and_grad(params, teacher, example)` on all devices, each on its own clips.

    All arrays of `example` have the clips as their first axis.

    Parameters, and those of a teacher if any, are gathered first, in their own dtype; losses and
    gradients, which must be means over clips, are summed in float32, and each device keeps its
    shard of the gradients. By default XLA would sum bfloat16 gradients in bfloat16, with an error
    that grows with the number of devices.
    """

    def everywhere(params, teacher, example):
        specs, of_teacher = jax.tree.map(lambda x: _spec(x.shape, mesh), (params, teacher))

        def on_a_device(params, teacher, example):
            whole = jax.tree.map(_gather, (params, teacher), (specs, of_teacher))
            loss, grads = value_and_grad(*whole, example)
            mean = lambda x, spec: _sum(x.astype(jnp.float32), spec) / mesh.size
            return mean(loss, P()), jax.tree.map(mean, grads, specs)

        return jax.shard_map(
            on_a_device,
            mesh=mesh,
            in_specs=(specs, of_teacher, P(AXES)),
            out_specs=(P(), specs),
            check_vma=False,  # otherwise autodiff adds sums of gradients that are not yet float32
        )(params, teacher, example)

    return everywhere


def _gather(x: jax.Array, spec: P) -> jax.Array:
    return jax.lax.all_gather(x, "fsdp", axis=len(spec) - 1, tiled=True) if spec else x


def _sum(x: jax.Array, spec: P) -> jax.Array:
    if not spec:
        return jax.lax.psum(x, AXES)
    # Reduce-scatter among neighbours first, so that only a shard of each is sent between hosts.
    part = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=len(spec) - 1, tiled=True)
    return jax.lax.psum(part, "data")
