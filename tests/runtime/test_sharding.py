"""Devices and processes: a batch gives the same losses on any number of them."""

import concurrent.futures
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from cwm_jax.errors import UserError
from cwm_jax.runtime import hosts, sharding
from cwm_jax.runtime.hosts import Place

ROOT = Path(__file__).parents[2]

# Trains three steps, saves, and resumes from `restore_from`; prints a line of losses for each.
# Several numbers of shards, separated by commas, are trained one after the other.
SCRIPT = """
import dataclasses, json, re, sys
from pathlib import Path
import jax
sys.path[:0] = [".", "tests", "tests/training"]
from cwm_jax.checkpoints import run_checkpoint
from cwm_jax.training import train_step
from cwm_jax.runtime import sharding
shards, folder, restore_from = sys.argv[1:]
from tiny_network import TINY
from test_train_step import KEY, batch_of, settings
optim = settings(ema_decay=0.5)
network = dataclasses.replace(TINY, depth=1)
batch = batch_of(4)
fresh = lambda: train_step.init_state(network, optim, 0)
shapes = jax.eval_shape(fresh)
last = run_checkpoint.Retention(1)

def train(state, mesh, setup):
    losses = []
    for _ in range(3):
        state, metrics = train_step.train_step(state, sharding.to_devices(batch, mesh), KEY, setup)
        losses.append([float(metrics[k]) for k in ("train/loss", "train/grad_norm")])
    print(json.dumps(losses))
    return state

for fsdp in shards.split(","):
    mesh = sharding.make_mesh(int(fsdp))
    setup = train_step.TrainSetup(network=network, optim=optim, mesh=mesh)
    make = jax.jit(fresh, out_shardings=sharding.placement(shapes, mesh))
    state = train(make(), mesh, setup)
    kept = state.params["blocks.0.spatial.qkv.kernel"].addressable_shards[0].data.size
    if jax.device_count() > 1:
        fast = dataclasses.replace(network, dtype="bfloat16")
        lowered = train_step.train_step.lower(
            state, batch, KEY, dataclasses.replace(setup, network=fast)
        ).as_text()
        over_devices = r'stablehlo.(?:all_reduce|reduce_scatter)".*?\\^bb0\\(%\\w+: tensor<(\\w+)>'
        print("sums", *sorted(set(re.findall(over_devices, lowered, re.DOTALL))))
    print("part", kept / state.params["blocks.0.spatial.qkv.kernel"].size)
with run_checkpoint.Checkpoints(Path(folder), retention=last) as kept_in:
    kept_in.save(state, data_position="", config={})
if restore_from:
    with run_checkpoint.Checkpoints(Path(restore_from), retention=last) as kept_in:
        state = kept_in.restore(sharding.abstract(shapes, mesh))
    train(state, mesh, setup)
"""


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def launch(folder, *, devices, fsdp, restore_from=""):
    """The lines that a process with so many devices prints."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, fsdp, str(folder), str(restore_from)],
        env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}", "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(("[[", "part", "sums"))]


def test_four_devices_train_like_one(tmp_path):
    """With replicated or sharded parameters; and they resume from the one's checkpoint.

    With bfloat16 matmuls, sums over devices are still in float32. Several processes:
    `test_hosts.py`.
    """
    one, four = tmp_path / "one", tmp_path / "four"
    alone = launch(one, devices=1, fsdp="1", restore_from=one)
    both = launch(four, devices=4, fsdp="1,4", restore_from=one)
    whole, shared, resumed = both[:3], both[3:6], both[6]
    expected, later = json.loads(alone[0]), json.loads(alone[2])
    assert alone[1] == "part 1.0"
    assert whole[1:] == ["sums f32", "part 1.0"]
    assert shared[1:] == ["sums f32", "part 0.25"]
    np.testing.assert_allclose(json.loads(whole[0]), expected, rtol=2e-5)
    np.testing.assert_allclose(json.loads(shared[0]), expected, rtol=2e-5)
    assert later[0] != expected[0]
    np.testing.assert_allclose(json.loads(resumed), later, rtol=2e-5)


@pytest.mark.parametrize("index", [0, 2])
def test_a_missing_process_is_named(index):
    """Of three processes the second never joins; both others report it and stop waiting."""
    coordinator = f"localhost:{free_port()}"
    code = (
        "import sys; from cwm_jax.runtime import hosts\n"
        f"place = hosts.Place(coordinator='{coordinator}', count=3, index={2 - index})\n"
        "try: hosts.join(place, wait_seconds=2)\n"
        "except hosts.UserError as error: print(error)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    start = time.monotonic()
    with pytest.raises(UserError, match="process 1"):
        hosts.join(Place(coordinator=coordinator, count=3, index=index), wait_seconds=4)
    assert time.monotonic() - start < 60
    assert b"process" in other.communicate(timeout=60)[0]


def test_a_missing_coordinator_is_reported():
    place = Place(coordinator=f"localhost:{free_port()}", count=2, index=1)
    with pytest.raises(UserError, match="missing: process 0"):
        hosts.join(place, wait_seconds=0.5)


def test_different_numbers_of_processes_are_reported():
    coordinator = f"localhost:{free_port()}"
    counts = [3, 2]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        places = [
            Place(coordinator=coordinator, count=count, index=i) for i, count in enumerate(counts)
        ]
        joining = [pool.submit(hosts.join, place, wait_seconds=30) for place in places]
        for joined in joining:
            with pytest.raises(
                UserError, match="--num_processes is 3 at process 0, 2 at process 1"
            ):
                joined.result()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(coordinator="here"), "--coordinator"),
        (dict(index=2), "--process_id"),
    ],
)
def test_an_invalid_place_is_named(wrong, message):
    with pytest.raises(UserError, match=message):
        Place(**(dict(coordinator="here:1", count=2, index=0) | wrong))


@pytest.mark.parametrize(("tasks", "local_devices"), [(2, None), (4, [1])])
def test_the_place_is_read_from_slurm(monkeypatch, tasks, local_devices):
    """A task that is alone on its node uses all of its GPUs; of two on a node, each uses one."""
    with pytest.raises(UserError, match=r"--launcher=slurm.*SLURM_STEP_NODELIST"):
        hosts.find_place("slurm")
    variables = dict(
        JOB_ID=4097, STEP_NODELIST="node[03-04]", STEP_NUM_NODES=2, NTASKS=tasks, PROCID=1
    )
    for name, value in (variables | dict(LOCALID=tasks // 2 - 1)).items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    place = hosts.find_place("slurm")
    expected = dict(coordinator="node03:61441", count=tasks, index=1)
    assert place == Place(**expected, local_devices=local_devices)


@pytest.mark.parametrize(("on_this_host", "local_devices"), [(1, None), (2, [0])])
def test_the_place_is_read_from_open_mpi(monkeypatch, on_this_host, local_devices):
    variables = dict(SIZE=2, RANK=1, LOCAL_RANK=0, LOCAL_SIZE=on_this_host)
    for name, value in variables.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    # Open MPI 5 does not set the variable below; JAX 0.11 then needs mpi4py.
    with pytest.raises(UserError, match=r"--launcher=openmpi.*(OMPI_MCA_orte_hnp_uri|mpi4py)"):
        hosts.find_place("openmpi")
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    expected = dict(coordinator="10.96.0.1:62624", count=2, index=1)
    assert hosts.find_place("openmpi") == Place(**expected, local_devices=local_devices)


def test_kubernetes_names_its_package():
    with pytest.raises(UserError, match="pip install kubernetes"):
        hosts.find_place("kubernetes")


def test_batches_that_cannot_be_split_are_refused():
    assert sharding.global_batch_size(6, 0, parts=3) == 6
    with pytest.raises(UserError, match="accumulate_steps=4 does not divide the 6 clips"):
        sharding.global_batch_size(6, 0, parts=4)
    with pytest.raises(UserError, match="fsdp=3 does not divide"):
        sharding.make_mesh(3)


def test_arrays_are_sharded_along_their_longest_divisible_axis():
    mesh = jax.sharding.AbstractMesh((2, 3), sharding.AXES)
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((6, 9), (12, 9), (7, 5), ())]
    specs = [tuple(place.spec) for place in sharding.placement(shapes, mesh)]
    assert specs == [(None, "fsdp"), ("fsdp",), (), ()]
