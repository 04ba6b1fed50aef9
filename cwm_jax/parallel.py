"""Devices: the mesh, and where batches and parameters lie on it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cwm_jax.errors import UserError


def make_mesh() -> Mesh:
    """All devices of all processes on one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def global_batch_size(per_device: int, total: int) -> int:
    """Clips a step over all devices: `per_device` on each, or `total` where that is not 0.

    Raises:
        UserError: where `total` cannot be shared out evenly.
    """
    devices = jax.device_count()
    if total and total % devices:
        raise UserError(
            f"config.global_batch_size={total} cannot be shared out over {devices} devices: "
            f"use a multiple of {devices}, or config.batch_size (clips per device)"
        )
    return total or per_device * devices


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a global batch, as arrays split over the `data` axis by clip."""
    sharding = NamedSharding(mesh, P("data"))
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def abstract(shapes, mesh: Mesh):
    """Shapes with their place on the mesh, for restoring a checkpoint onto it."""
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))
    return jax.tree.map(place, shapes)


def local(tree):
    """This process's own copy of replicated arrays, on its first device; nothing is moved."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)
