"""JAX's device, queried in another process, since a query allocates the memory of a GPU."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

from cwm_jax.errors import UserError
from cwm_jax.runtime import subprograms

_PROBE = """
import jax, json
from cwm_jax.runtime import devices
if fault := devices.missing():
    raise SystemExit(fault)
d = jax.local_devices()[0]
limit = (d.memory_stats() or {}).get("bytes_limit", 0)
print(json.dumps([d.platform, d.device_kind, limit, getattr(d, "compute_capability", "")]))
"""


class Device(NamedTuple):
    """The device of training."""

    platform: str  # of JAX: cpu, gpu, …
    kind: str
    memory: int  # bytes, 0 if the device does not report it
    capability: str  # compute capability of an NVIDIA GPU

    @property
    def is_gpu(self) -> bool:
        return self.platform == "gpu"

    @property
    def has_kernels(self) -> bool:
        """Whether the kernels of attention and norm were measured on this GPU type."""
        return self.is_gpu and self.capability == "9.0"


def find() -> Device:
    """The first device.

    Raises:
        UserError: JAX finds no usable device.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return Device("cpu", "cpu", 0, "")
    found = subprocess.run(
        [sys.executable, "-c", _PROBE],
        env=subprograms.environment(),
        capture_output=True,
        text=True,
        errors="replace",
    )
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"JAX finds no device: {reason}\nJAX_PLATFORMS=cpu trains on the CPU.")
    return Device(*json.loads(found.stdout.splitlines()[-1]))
