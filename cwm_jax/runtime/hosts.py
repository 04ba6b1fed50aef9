"""Several processes as one run: finding each other, and making sure that all want the same.

JAX ends a process that waits too long for the others without saying for whom it waited. So the
processes first meet at a roll call of our own, at the address where JAX's coordinator will
listen: process 0 hears the numbers of all others, then tells everybody to go on, or who is
missing.
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

# Our names for what JAX can read the environment of.
_METHODS = {"slurm": "slurm", "openmpi": "ompi", "kubernetes": "k8s"}
# A variable that each sets, and JAX looks for.
_SIGNS = {
    "slurm": "SLURM_STEP_NODELIST",
    "openmpi": "OMPI_MCA_orte_hnp_uri",
    "kubernetes": "KUBERNETES_SERVICE_HOST",
}
LAUNCHERS = ("none", *_METHODS, "flags")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One process's place among the others."""

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
    """This process's place as told by the environment of slurm, openmpi or kubernetes.

    A process that has its host to itself uses all of its GPUs; of several each has one.

    Raises:
        UserError: where that environment is not here, or does not tell.
    """
    # JAX offers its reading of these environments only from within `initialize`, which is too
    # late for a roll call.
    from jax._src.clusters import ClusterEnv

    method, sign = _METHODS[launcher], _SIGNS[launcher]
    if launcher == "kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "--launcher=kubernetes asks the cluster by the Python package kubernetes, which is not "
            "installed: pip install kubernetes, or use --launcher=flags as launch/ does"
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
            f"--launcher={launcher} does not tell this process's place: {error}"
        ) from None
    if _has_host_to_itself(launcher):
        devices = None
    return Place(coordinator=coordinator, count=count, index=index, local_devices=devices)


def _has_host_to_itself(launcher: str) -> bool:
    """Whether slurm or openmpi, for which JAX takes one GPU a process, started one on each host."""
    if launcher == "slurm":
        return os.environ["SLURM_NTASKS"] == os.environ.get("SLURM_STEP_NUM_NODES")
    return launcher == "openmpi" and os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def join(place: Place, *, wait_seconds: int = 300) -> None:
    """Makes this process one of `place.count`; `jax.devices()` then shows the devices of all.

    Must come before anything is computed.

    Raises:
        UserError: where a process does not come in time; it names the missing ones.
    """
    _call_roll(place, wait_seconds)
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=wait_seconds,
    )


def _call_roll(place: Place, wait_seconds: float) -> None:
    host, _, port = place.coordinator.rpartition(":")
    call = _hear_all if place.index == 0 else _report
    if wrong := call(host, int(port), place, wait_seconds):
        raise UserError(wrong)


def _hear_all(host: str, port: int, place: Place, wait_seconds: float) -> str:
    """At process 0: hears all others, tells them what is wrong, if anything, and returns it."""
    deadline = time.monotonic() + wait_seconds
    heard: dict[int, socket.socket] = {}
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    wrong = ""
    with contextlib.ExitStack() as open_sockets:
        try:
            server = open_sockets.enter_context(socket.create_server(("", port), family=family))
        except OSError as error:
            raise UserError(
                f"--coordinator={place.coordinator}: cannot listen there: {error.strerror}"
            ) from None
        while len(heard) < place.count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(TimeoutError, ValueError, OSError):
                peer = open_sockets.enter_context(server.accept()[0])
                peer.settimeout(5)
                index, count = map(int, peer.recv(32).split())
                heard[index] = peer
                if count != place.count:
                    wrong = (
                        f"--num_processes is {place.count} at process 0, {count} at process {index}"
                    )
                    break
        missing = sorted(set(range(1, place.count)) - set(heard))
        wrong = wrong or _told_missing(place, missing, wait_seconds)
        for peer in heard.values():
            with contextlib.suppress(OSError):  # it has gone; JAX will miss it
                peer.sendall(json.dumps(wrong).encode())
    return wrong


def _report(host: str, port: int, place: Place, wait_seconds: float) -> str:
    """At the others: reports to process 0 and hears from it what is wrong, if anything."""
    deadline = time.monotonic() + wait_seconds
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host, port), left) as peer:
            peer.sendall(f"{place.index} {place.count}".encode())
            # Process 0 may have started later, and waits as long as we do.
            peer.settimeout(left + 60)
            if answer := peer.recv(1 << 16):
                return json.loads(answer)
        time.sleep(0.2)
    return _told_missing(place, [0], wait_seconds)


def _told_missing(place: Place, missing: list[int], wait_seconds: float) -> str:
    if not missing:
        return ""
    return (
        f"waited {wait_seconds:g} s for {place.count} processes at {place.coordinator}; "
        f"missing: {', '.join(f'process {index}' for index in missing)}. Look at the logs of "
        f"their hosts; --join_timeout says how many seconds to wait"
    )


def check_same(told: dict) -> None:
    """Compares what this process has with what all others have, which must call it too.

    Args:
        told: plain values, also in dicts within; the outermost key says what they are.

    Raises:
        UserError: at every process, naming the first key that differs and who has what.
    """
    if jax.process_count() == 1:
        return
    text = np.frombuffer(json.dumps(_flat(told), sort_keys=True).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.pad(text, (0, int(sizes.max()) - len(text)))
    texts = multihost_utils.process_allgather(padded)
    all_told = [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]
    for key in sorted(set().union(*all_told)):
        values = [flat.get(key) for flat in all_told]
        if odd := next((i for i, value in enumerate(values) if value != values[0]), None):
            raise UserError(
                f"all processes must have the same, but {key} is {values[0]!r} at process 0 and "
                f"{values[odd]!r} at process {odd}"
            )


def _flat(told: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in told.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
