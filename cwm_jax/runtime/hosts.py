"""Several processes as one run: joining them, and checking that their settings are equal.

Where processes are missing, JAX ends the waiting ones without naming the missing ones. So the
processes first connect at the address where JAX's coordinator will listen: process 0 receives the
numbers of all others, then sends everyone an empty message, or an error that names the missing
ones.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import socket
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from cwm_jax.errors import UserError

# Our names of the launchers whose environment JAX can read.
_METHODS = {"slurm": "slurm", "openmpi": "ompi", "kubernetes": "k8s"}
# A variable that each sets and JAX checks.
_SIGNS = {
    "slurm": "SLURM_STEP_NODELIST",
    "openmpi": "OMPI_MCA_orte_hnp_uri",
    "kubernetes": "KUBERNETES_SERVICE_HOST",
}
LAUNCHERS = ("none", *_METHODS, "flags")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One process's number among all processes."""

    coordinator: str  # host:port of process 0
    count: int  # processes
    index: int  # of this one, from 0
    local_devices: list[int] | None = None  # numbers of the GPUs it uses; None: all of its host

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator={self.coordinator!r}: must be HOST:PORT of process 0")
        if not 0 <= self.index < self.count:
            raise UserError(
                f"--process_id={self.index}: must be 0…{self.count - 1} with "
                f"--num_processes={self.count}"
            )


def find_place(launcher: str, *, wait_seconds: int = 300) -> Place:
    """This process's place, read from the environment of slurm, openmpi or kubernetes.

    A process that is alone on its host uses all GPUs of it; of several, each uses one.

    Raises:
        UserError: where that environment is absent or incomplete.
    """
    # JAX reads these environments only within `initialize`, after `_check_joined` needs them.
    from jax._src.clusters import ClusterEnv

    method, sign = _METHODS[launcher], _SIGNS[launcher]
    if launcher == "kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "--launcher=kubernetes needs the Python package kubernetes, which is not installed: "
            "pip install kubernetes, or use --launcher=flags as launch/ does"
        )
    [environment] = [env for env in ClusterEnv._cluster_types if env.name == method]
    if not environment.is_env_present():
        raise UserError(
            f"--launcher={launcher}, but this process was not started by it (its variables, such "
            f"as {sign}, are not in the environment); use --launcher=flags, or none for a single "
            f"process"
        )
    try:
        coordinator, count, index, devices = environment.auto_detect_unset_distributed_params(
            None, None, None, None, method, wait_seconds
        )
    except (RuntimeError, KeyError, ValueError, OSError) as error:
        raise UserError(
            f"--launcher={launcher} does not give this process's number: {error}"
        ) from None
    if _is_alone_on_host(launcher):
        devices = None
    return Place(coordinator=coordinator, count=count, index=index, local_devices=devices)


def _is_alone_on_host(launcher: str) -> bool:
    """Whether slurm or openmpi, where JAX uses one GPU per process, started one on each host."""
    if launcher == "slurm":
        return os.environ["SLURM_NTASKS"] == os.environ.get("SLURM_STEP_NUM_NODES")
    return launcher == "openmpi" and os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def join(place: Place, *, wait_seconds: int = 300) -> None:
    """Makes this process one of `place.count`; `jax.devices()` then lists the devices of all.

    Call it before any computation.

    Raises:
        UserError: naming the processes that did not join in time.
    """
    _check_joined(place, wait_seconds)
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=wait_seconds,
    )


def _check_joined(place: Place, wait_seconds: float) -> None:
    host, _, port = place.coordinator.rpartition(":")
    exchange = _collect_all if place.index == 0 else _report
    if wrong := exchange(host, int(port), place, wait_seconds):
        raise UserError(wrong)


def _collect_all(host: str, port: int, place: Place, wait_seconds: float) -> str:
    """In process 0: waits for all others, sends them an error message or "", and returns it."""
    deadline = time.monotonic() + wait_seconds
    peers: dict[int, socket.socket] = {}
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    wrong = ""
    with contextlib.ExitStack() as open_sockets:
        try:
            server = open_sockets.enter_context(socket.create_server(("", port), family=family))
        except OSError as error:
            raise UserError(
                f"--coordinator={place.coordinator}: cannot listen there: {error.strerror}"
            ) from None
        while len(peers) < place.count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(TimeoutError, ValueError, OSError):
                peer = open_sockets.enter_context(server.accept()[0])
                peer.settimeout(5)
                index, count = map(int, peer.recv(32).split())
                peers[index] = peer
                if count != place.count:
                    wrong = (
                        f"--num_processes is {place.count} at process 0, {count} at process {index}"
                    )
                    break
        missing = sorted(set(range(1, place.count)) - set(peers))
        wrong = wrong or _missing_message(place, missing, wait_seconds)
        for peer in peers.values():
            with contextlib.suppress(OSError):  # it has ended; JAX reports that
                peer.sendall(json.dumps(wrong).encode())
    return wrong


def _report(host: str, port: int, place: Place, wait_seconds: float) -> str:
    """In the other processes: reports to process 0; returns its error message or ""."""
    deadline = time.monotonic() + wait_seconds
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host, port), left) as peer:
            peer.sendall(f"{place.index} {place.count}".encode())
            # Process 0 may have started later, and waits as long.
            peer.settimeout(left + 60)
            if answer := peer.recv(1 << 16):
                return json.loads(answer)
        time.sleep(0.2)
    return _missing_message(place, [0], wait_seconds)


def _missing_message(place: Place, missing: list[int], wait_seconds: float) -> str:
    if not missing:
        return ""
    return (
        f"waited {wait_seconds:g} s for {place.count} processes at {place.coordinator}; "
        f"missing: {', '.join(f'process {index}' for index in missing)}. Check the logs of "
        f"their hosts; --join_timeout sets the seconds to wait"
    )


def check_same(values: dict) -> None:
    """Compares values of this process with those of all others, which must call it too.

    Args:
        values: plain values, also in nested dicts; errors name them by their keys.

    Raises:
        UserError: in every process, naming the first key that differs and both values.
    """
    if jax.process_count() == 1:
        return
    text = np.frombuffer(json.dumps(_flat(values), sort_keys=True).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.pad(text, (0, int(sizes.max()) - len(text)))
    texts = multihost_utils.process_allgather(padded)
    everyone = [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]
    for key in sorted(set().union(*everyone)):
        found = [flat.get(key) for flat in everyone]
        if odd := next((i for i, value in enumerate(found) if value != found[0]), None):
            raise UserError(
                f"all processes must have the same {key}, but it is {found[0]!r} in process 0 and "
                f"{found[odd]!r} in process {odd}"
            )


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
