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
from cwm_jax.runtime import hosts, sharding
port, count, index, shards, folder, restore_from = sys.argv[1:]
if int(count) > 1:
    hosts.join(hosts.Place(coordinator="localhost:" + port, count=int(count), index=int(index)))
from tiny_network import TINY
from test_train_step import KEY, batch_of, settings
hosts.check_same({"config": {"a": {"b": 1}}})
try:
    hosts.check_same({"config": {"a": {"b": jax.process_index()}}})
except Exception as error:
    print("refused", error)
optim = settings(ema_decay=0.5)
network = dataclasses.replace(TINY, depth=1)
batch, mine = batch_of(4), 4 // jax.process_count()
mine = {k: v[jax.process_index() * mine :][:mine] for k, v in batch.items()}
fresh = lambda: train_step.init_state(network, optim, 0)
shapes = jax.eval_shape(fresh)
last = run_checkpoint.Retention(1)

def train(state, mesh, setup):
    losses = []
    for _ in range(3):
        state, metrics = train_step.train_step(state, sharding.to_devices(mine, mesh), KEY, setup)
        losses.append([float(metrics[k]) for k in ("train/loss", "train/grad_norm")])
    print(json.dumps(losses))
    return state

for fsdp in shards.split(","):
    mesh = sharding.make_mesh(int(fsdp))
    setup = train_step.TrainSetup(network=network, optim=optim, mesh=mesh)
    make = jax.jit(fresh, out_shardings=sharding.placement(shapes, mesh))
    state = train(make(), mesh, setup)
    kept = state.params["blocks.0.spatial.qkv.kernel"].addressable_shards[0].data.size
    if jax.device_count() > jax.process_count() == 1:
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


def launch(folder, *, processes, devices, fsdp=1, restore_from=""):
    """The lines that each of `processes` processes, of `devices` devices each, prints."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-c", SCRIPT, str(free_port()), str(processes)]
    started = [
        subprocess.Popen(
            [*command, str(i), str(fsdp), str(folder), str(restore_from)],
            env=os.environ
            | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}", "JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    outputs = [process.communicate(timeout=200) for process in started]
    for process, (_, error) in zip(started, outputs, strict=True):
        assert process.returncode == 0, error
    ours = ("[[", "part", "refused", "sums")  # gloo prints too
    return [[line for line in out.splitlines() if line.startswith(ours)] for out, _ in outputs]


def test_one_device_four_devices_and_two_processes_train_alike(tmp_path):
    """With replicated or sharded parameters; and each resumes from another's checkpoint.

    With bfloat16 matmuls, sums over devices are still in float32.
    """
    one, four, two = tmp_path / "1x1", tmp_path / "1x4", tmp_path / "2x2"
    [alone] = launch(one, processes=1, devices=1)
    [both] = launch(four, processes=1, devices=4, fsdp="1,4", restore_from=one)
    whole, shared = both[:3], both[3:]  # losses, sums, part
    hosts = launch(two, processes=2, devices=2, fsdp=2, restore_from=four)
    expected = json.loads(alone[0])
    assert alone[1:] == ["part 1.0"]
    assert whole[1:] == ["sums f32", "part 1.0"]
    assert shared[1:3] == ["sums f32", "part 0.25"]
    assert hosts[0][1:] == hosts[1][1:]  # both processes report the same
    assert "the same config.a.b, but it is 0 in process 0 and 1 in process 1" in hosts[0][0]
    np.testing.assert_allclose(json.loads(whole[0]), expected, rtol=2e-5)
    np.testing.assert_allclose(json.loads(shared[0]), expected, rtol=2e-5)
    np.testing.assert_allclose(json.loads(hosts[0][1]), expected, rtol=2e-5)
    assert hosts[0][2] == "part 0.5"
    later = json.loads(shared[3])
    assert later[0] != expected[0]
    np.testing.assert_allclose(json.loads(hosts[0][3]), later, rtol=2e-5)


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
        hosts.join(Place(coordinator=coordinator, count=3, index=index), wait_seconds=5)
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
