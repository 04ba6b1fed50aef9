"""Benchmarks run on small sizes, count correctly, and have the configs' sizes."""

import collections
import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_network import TINY

from benchmarks import (
    check_gpu,
    data,
    gpu,
    gpu_kernels,
    hlo,
    idle,
    kernel_cases,
    network,
    original,
    report,
    sample,
    sizes,
    trace,
    train,
)
from cwm_jax.data.config import DataConfig
from cwm_jax.models import attention, flops
from cwm_jax.models.kernels import gelu_product, norm
from cwm_jax.training import train_step
from cwm_jax.training.config import ComputeConfig
from cwm_jax.training.train_step import TrainSetup

SMALL = dataclasses.replace(TINY, depth=1)  # what is measured is the same for any depth
PROGRAM = """HloModule made_up

%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %n = f32[8,4]{1,0} negate(%p)
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %loop_fusion = f32[8,4]{1,0} fusion(%x), calls=%fused, metadata={op_name="transpose(jvp(norm))/a"}
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %loop_fusion)
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %w = bf16[4,4]{1,0} parameter(1)
  %g = (f32[8,4]{1,0}, s8[4096]{0}) custom-call(%a, %w), custom_call_target="__cublas$gemm"
  %c = (s32[], f32[8,4]{1,0}) tuple(%z, %a)
  %l = (s32[], /*i=1*/f32[8,4]) while(%c), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %copy.1 = f32[8,4]{1,0} copy(%a)
}
"""


@pytest.mark.parametrize("name", ["debug", "pocket", "small", "large"])
def test_sizes_are_those_of_the_configs(name):
    config = importlib.import_module(f"configs.{name}").get_config().model
    known = dataclasses.asdict(sizes.network(name))
    assert {k: config[k] for k in known} == known


def test_changes_of_an_idle_world_count_once_it_has_settled(monkeypatch):
    monkeypatch.setattr(idle.lpips_weights, "available", lambda: None)
    frames = np.full((2, idle.FRAMES, 8, 8, 3), 100, np.uint8)
    frames[:, : idle.SETTLED - 1] = 7
    frames[1, -1, :4] = 90
    found = idle.changes(frames)
    np.testing.assert_allclose(found["colours"], [0, 10 * 0.5**0.5], rtol=1e-6)


def test_operations_of_a_forward_pass():
    """By hand, for one block: 24 D² per token and half, attention over space and time, patches."""
    config = sizes.network("small")
    tokens, size = 64, 512
    linears = tokens * 6 * 2 * 24 * size**2
    patches = tokens * 2 * 2 * size * 192
    attention = tokens * 6 * 4 * size * (64 + 32)
    assert sample.forward_flops(config, 32) == linears + patches + attention
    plain = sample.frame_flops(config, 10, "plain", 32)
    cached = sample.frame_flops(config, 10, "cached", 32)
    assert 28 < plain / cached < 30  # 320 forward passes against 11, minus the attention of each


def test_the_sampling_benchmark_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sizes, "network", lambda size, dtype: SMALL)
    out = tmp_path / "sample.json"
    words = f"--size tiny --batch 2 --steps 2 --context 5 --dtype float32 --json {out}"
    monkeypatch.setattr(sys, "argv", ["sample", *words.split()])
    sample.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(r["window"], r["context"]) for r in rows] == [
        (window, 5) for window in ("plain", "exact", "cached", "hop")
    ]
    assert all(r["ms/frame"] > 0 and r["frames/s"] > 0 for r in rows)
    assert "filled compilation cache" in capsys.readouterr().out
    words = f"--size tiny --steps 2 --long 20 --window cached,hop --dtype float32 --json {out}"
    monkeypatch.setattr(sys, "argv", ["sample", *words.split()])
    sample.main()
    rows = json.loads(out.read_text())["long"]
    assert [(r["window"], r["after frames"]) for r in rows] == [
        (window, frames) for window in ("cached", "hop") for frames in range(2, 21, 2)
    ]
    assert all(r["ms/frame"] > 0 and r["resident MB"] > 10 for r in rows)


def test_the_network_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "network", lambda size, dtype, attention: SMALL)
    one = network.variants(on_gpu=False)[:1]
    monkeypatch.setattr(network, "variants", lambda on_gpu: one)
    # What it computes is in the check of a GPU below.
    monkeypatch.setattr(network, "parity", lambda dtype, kernel: {"within": kernel == "xla"})
    out = tmp_path / "network.json"
    words = f"network --size tiny --batch 2 --output {out}"
    monkeypatch.setattr(sys, "argv", words.split())
    network.main()
    report = json.loads(out.read_text())
    rows = [row for section in report.values() for row in section]
    assert [row for row in rows if "failed" in row] == []
    assert {name: len(section) for name, section in report.items()} == {
        **dict(machine=1, parity=2, step=1, attention=2)
    }
    assert all(row["within"] for row in report["parity"])
    assert all(row["step_s"] > 0 for row in report["step"])


def test_the_kernels_are_checked_and_timed(tmp_path, monkeypatch, capsys):
    impossible, wrong = norm.Tiling(0, 1), norm.Tiling(3, 1)  # the last of 16 tokens is left out
    monkeypatch.setattr(kernel_cases, "FORWARD", [norm.Tiling(8, 8), impossible, wrong])
    monkeypatch.setattr(kernel_cases, "BACKWARD", kernel_cases.BACKWARD[3:4])
    monkeypatch.setattr(kernel_cases, "GELU", kernel_cases.GELU[1:2])
    operands, timed = [], gpu_kernels.timed
    counted = lambda program, arrays, least: (
        operands.append(arrays) or timed(program, arrays, least)
    )
    monkeypatch.setattr(gpu_kernels, "timed", counted)
    out = tmp_path / "kernels.json"
    monkeypatch.setattr(sys, "argv", ["gpu_kernels", "--tiny", "--output", str(out)])
    gpu_kernels.main()
    rows = collections.defaultdict(list)
    for row in json.loads(out.read_text())["kernels"]:
        rows[row.get("tiling") if row["kernel"] == "norm" else row["how"]].append(row)
    (failed, _), (off, _) = (rows.pop(f"rows {n}, warps 1") for n in (0, 3))
    assert "ZeroDivisionError" in failed["failed"]
    assert not off["right"]
    counts = {name: len(some) for name, some in rows.items()}
    assert counts == {"xla": 3, "kernel": 3, None: 2, "rows 8, warps 8": 2}
    fine = [row for some in rows.values() for row in some]
    assert all(row["ms"] > 0 and row["gb_s"] > 0 and row["of_copy"] > 0 for row in fine)
    assert all(row["right"] for row in fine if row["how"] == "kernel")
    assert all(row["error"] < 0.05 for row in fine)
    for arrays in operands:
        assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("14 rows, 2 failed, 2 wrong;")
    assert not any("rows 3, warps 1" in line for line in lines if line.startswith("|"))


def test_the_first_tilings_are_the_defaults():
    assert kernel_cases.FORWARD[0] == norm._FORWARD
    assert kernel_cases.GELU[0] == gelu_product.Tiling()


def test_one_wrong_number_is_a_large_error():
    right = np.ones((100, 100), np.float32)
    wrong, lost = right.copy(), right.copy()
    wrong[3, 4], lost[3, 4] = 0, np.nan
    assert gpu_kernels.largest_error([right, right], [right, right]) == 0
    assert gpu_kernels.largest_error([right, wrong], [right, right]) == 0.5
    assert np.isinf(gpu_kernels.largest_error([lost, right], [right, right]))


def test_a_report_keeps_rows_that_fail_and_stops_in_time(tmp_path):
    def raises():
        raise RuntimeError("no such card")

    path = tmp_path / "rows.json"
    rows = report.Report(path, 60)
    for number, measure in enumerate((lambda: {"ms": 1.0}, raises, lambda: {"ms": 2.0})):
        rows.add("times", {"number": number}, measure)
        assert len(json.loads(path.read_text())["times"]) == number + 1
    assert json.loads(path.read_text())["times"] == [
        {"number": 0, "ms": 1.0},
        {"number": 1, "failed": "RuntimeError: no such card"},
        {"number": 2, "ms": 2.0},
    ]
    late = report.Report(path, 0).add("times", {"number": 3}, raises)
    assert late == {"number": 3, "failed": "no time left"}


def test_the_check_of_a_gpu_runs_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(check_gpu, "ROLLOUTS", check_gpu.ROLLOUTS[2:3])
    for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE"):  # which the program sets
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(sys, "argv", ["check_gpu", "--parts", "original,tiny", "--frames", "2"])
    assert check_gpu.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        *["ok"] * 3,
        "3",
        *["ok"] * 2,
        *["--"] * 8,
        "10",
    ]
    assert all("no GPU" in line for line in lines[6:14])
    assert lines[3] == "3 of 3 lines without a failure"


def test_parts_of_a_check_are_processes_whose_lines_come_in_order(capfd):
    python = lambda code: [sys.executable, "-uc", code]
    fine = {
        "late": python("import time; time.sleep(0.3); print('late')"),
        "b": python("print('b')"),
    }
    assert check_gpu.run_processes(fine, 60)
    assert capfd.readouterr().out == "late\nb\n"
    wrong = {
        "failed": python("print('FAIL  x'); raise SystemExit(1)"),
        "killed": python("import os; os.kill(os.getpid(), 9)"),
        "endless": python("print('so far'); import time; time.sleep(60)"),
    }
    assert not check_gpu.run_processes(wrong, 2)
    lines = capfd.readouterr().out.splitlines()
    assert lines[:3] == ["FAIL  x", "FAIL  killed: ended with code -9", "so far"]
    assert lines[3].startswith("FAIL  endless")


def test_a_check_that_fails_or_raises_or_takes_too_long_is_counted(capsys):
    def raises():
        raise RuntimeError("no such card")

    right, wrong = check_gpu.Verdict(True, "near"), check_gpu.Verdict(False, "far")
    parts = [("a", lambda: right), ("b", lambda: wrong), ("c", raises), ("d", lambda: right)]
    assert not check_gpu.run(parts, None)
    assert capsys.readouterr().out.splitlines() == [
        "ok    a: near",
        "FAIL  b: far",
        "FAIL  c: RuntimeError: no such card",
        "ok    d: near",
        "2 of 4 lines without a failure",
    ]
    assert check_gpu.run(parts[:1], None)
    assert not check_gpu.run([("slow", lambda: time.sleep(0.5) or right)], 0.01)


def test_a_kernel_is_checked_as_a_run_would(monkeypatch):
    known = sizes.network("tiny", dtype="bfloat16")
    monkeypatch.setattr(attention, "fuses", lambda: True)  # the fused one is a formula on a CPU
    for setting, axis in (("attention", "space"), ("time_attention", "time")):
        verdict = check_gpu.kernel(known, setting, "fused", 3)
        assert verdict.right, verdict
        assert f"extreme scores over {axis}" in verdict.text
    assert check_gpu.kernel(known, "attention", "cudnn", 3).right is None  # no run would try it


def test_updates_that_differ_are_wrong():
    numbers = {name: np.ones(3) for name in ("losses", "norms", "gradients")}
    for name in numbers:
        far = numbers | {name: np.array([1, 1, 1.5])}
        assert not check_gpu.compare(far, numbers, "bfloat16").right
        lost = numbers | {name: np.array([1, 1, np.nan])}
        assert not check_gpu.compare(lost, numbers, "bfloat16").right
    assert check_gpu.compare(numbers, numbers, "float32").right


BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from benchmarks import check_gpu, gpu, network, original, sample
"""


def test_the_benchmarks_of_a_gpu_need_few_packages():
    """A bare machine has JAX, Flax, Optax, Orbax and what these need."""
    absent = {
        *("einops", "grain", "array_record", "ml_collections", "av", "PIL", "matplotlib", "gradio"),
        *("wandb", "safetensors", "skimage", "huggingface_hub", "tqdm", "torch"),
    }
    code = BARE.format(absent=sorted(absent))
    root = Path(gpu.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


def test_the_parts_of_a_gpu_benchmark():
    parts = gpu.parts("small", 128, "somewhere")
    assert [part.name for part in parts] == [
        *("network", "sampler-one", "sampler-ways", "sampler-many", "original")
    ]
    for part in parts[1:4]:
        args = sample._flags().parse_args([*part.words.split(), "numbers.json"])
        assert args.rows_only
        assert args.context == [32]
        assert str(args.json) == "numbers.json"


def test_parts_that_fail_or_are_cut_off_leave_their_rows(tmp_path, monkeypatch):
    write = "import sys, pathlib, time; pathlib.Path(sys.argv[1]).write_text({!r}); {}"
    parity = json.dumps({"parity": [{"dtype": "float32", "worst_v": 4e-6}, {"failed": "a | b"}]})
    printed = json.dumps({"rows": [{"B": 1, "ms/frame": 5.0}]})
    (tmp_path / "short.py").write_text(write.format(parity, "raise SystemExit('no such card')"))
    (tmp_path / "endless.py").write_text(write.format(printed, "time.sleep(60)"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ended = {
        "network": gpu.run(gpu.Part("network", 1, "short", ""), 60, tmp_path),
        "sampler-one": gpu.run(gpu.Part("sampler-one", 1, "endless", ""), 2, tmp_path),
        "original": "never begun",
    }
    assert ended["network"].startswith("failed")
    assert "no such card" in ended["network"]
    assert ended["sampler-one"].startswith("stopped after 2 s")
    gpu.keep(tmp_path, ended)
    assert json.loads((tmp_path / "results.json").read_text())["sampler"] == [
        {"B": 1, "ms/frame": 5.0}
    ]
    lines = (tmp_path / "results.md").read_text().split("\n")
    table = lines[lines.index("## parity") + 2 :][:4]
    assert table == [
        "| dtype | worst_v | failed |",
        "| --- | --- | --- |",
        "| float32 | 4e-06 |  |",
        "|  |  | a / b |",
    ]
    assert "| 1 | 5 |" in lines
    assert "| original | never begun |" in lines


def test_episodes_of_a_batch(make_data):
    config = DataConfig(
        num_workers=0, dir=str(make_data(train=[[40, 32], [32]]))
    )  # 2 clips, 1 and 1
    assert data.episodes_per_batch(config, 4) == 3
    assert data.episodes_per_batch(config, 1) == 1


def test_kernels_of_a_program():
    found = hlo.kernels(PROGRAM)
    assert found.count == {"matmul (cuBLAS)": 1, "fusion": 5, "copy or transpose": 1}
    assert found.bytes == {
        "matmul (cuBLAS)": 128 + 32 + 128,  # its workspace not counted
        "fusion": 5 * 256,
        "copy or transpose": 256,
    }


def test_the_roles_of_kernels():
    """The scope of a kernel and its direction; of products their kind."""
    assert {kernel.name: kernel.role for kernel in hlo.each(PROGRAM)} == {
        "g": "matmul (cuBLAS)",
        "loop_fusion": "norm, backward",
        "copy.1": hlo.OTHER,
    }
    in_graph = functools.partial(trace.Event, on_gpu=True, op="command_buffer_1")
    events = [
        in_graph("loop_fusion", 4e-9),
        in_graph("nvjet_sm90_tst_128x160_64x5_2x1_v_bz_TNT", 1e-9),
    ]
    found = {role.role: role for role in trace.by_role(events, PROGRAM)}
    assert list(found) == ["norm, backward", "matmul (cuBLAS)", hlo.OTHER]
    assert found["norm, backward"][1:] == (5, 4e-9, 5 * 256e-9, pytest.approx(320))
    assert found["matmul (cuBLAS)"].gbytes == 288e-9
    assert found[hlo.OTHER][1:] == (1, 0.0, 256e-9, 0.0)


def test_the_projects_kernels_are_found_by_their_own_names():
    """A profiler sees these, numbered, and not the instruction's."""
    path = "jit(step)/transpose(jvp(norm))/norm_backward/pallas_call"
    program = f"""ENTRY %main (a: f32[8,4]) -> f32[8,4] {{
  %a = f32[8,4]{{1,0}} parameter(0)
  ROOT %pallas_call.9 = f32[8,4]{{1,0}} custom-call(%a), custom_call_target="triton", \
metadata={{op_name="{path}"}}
}}
"""
    in_graph = functools.partial(trace.Event, on_gpu=True, op="command_buffer_1")
    events = [in_graph("norm_backward__3", 2.0), in_graph("norm_backward", 1.0)]
    events.append(in_graph("norm_forward__3", 0.5))
    assert trace.by_kind(events, program) == {"other kernel": 3.0, "other": 0.5}
    found = {role.role: role.seconds for role in trace.by_role(events, program)}
    assert found == {"norm, backward": 3.0, "other": 0.5}


def test_the_parts_of_a_training_step_are_roles():
    """All that a step computes outside of products belongs to a part, but for few bytes."""
    setup = TrainSetup(network=TINY, optim=train.OPTIM, compute=ComputeConfig())
    state = train_step.init_state(TINY, train.OPTIM, 0)
    args = state, train.random_batch(2, 5), jax.random.key(0), setup
    known = hlo.each(train_step.train_step.lower(*args).compile().as_text())
    size = collections.Counter()
    for kernel in known:
        size[kernel.role] += kernel.bytes
    named = {role.removesuffix(", backward") for role in size}
    assert named >= {
        "examples",
        "conditioning",
        "patches",
        "norm",
        "attention",
        "gelu",
        "optimizer",
    }
    assert {"norm, backward", "attention, backward", "gelu, backward"} <= set(size)
    assert size[hlo.OTHER] < 0.3 * size.total()


def test_the_kinds_of_a_gpus_kernels():
    """Within a CUDA graph an event has its kernel's own name, and the operation of the graph."""
    in_graph = functools.partial(trace.Event, on_gpu=True, op="command_buffer_1")
    events = [
        in_graph("loop_fusion", 4.0),
        in_graph("copy_1", 0.5),
        in_graph("nvjet_sm90_tst_128x160_64x5_2x1_v_bz_TNT", 3.0),
        in_graph("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", 2.0),
        in_graph("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*)", 1.0),
        trace.Event("a_kernel_of_another_name", 1.0, True, "loop_fusion"),
        in_graph("MemcpyD2D", 0.25),
        in_graph("unheard_of", 0.125),
    ]
    assert trace.by_kind(events, PROGRAM) == {
        "fusion": 5.0,
        "matmul (cuBLAS)": 3.0,
        "attention (cuDNN)": 3.0,
        "copy or transpose": 0.75,
        "other": 0.125,
    }


def test_the_kinds_of_a_cpus_kernels():
    """There an event has its instruction's name; what has another is the host's own work."""
    events = [trace.Event("loop_fusion", 2.0, False), trace.Event("gemm of the host", 9.0, False)]
    assert trace.by_kind(events, PROGRAM) == {"fusion": 2.0}


@pytest.mark.parametrize("installed", ["nothing", "without write_video", "with it"])
def test_the_originals_sampler_finds_write_video(monkeypatch, installed):
    torchvision, io = types.ModuleType("torchvision"), types.ModuleType("torchvision.io")
    torchvision.io = io
    if installed == "with it":
        io.write_video = "its own"
    for name, module in (("torchvision", torchvision), ("torchvision.io", io)):
        monkeypatch.setitem(sys.modules, name, module)
        if installed == "nothing":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(original, "_missing", lambda name: name not in sys.modules)
    original.stand_in_for_write_video()
    found = importlib.import_module("torchvision.io").write_video
    assert found == ("its own" if installed == "with it" else None)


THEIRS = {  # as much of the original as a training step takes
    "model/dit.py": """
import torch
class DiT(torch.nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
    def forward(self, x, t, held):
        return self.scale * x
""",
    "training/noise_scheduler.py": """
class NoiseScheduler:
    def __init__(self, levels, device):
        pass
    def noised_sample_and_velocity_target(self, x, t, noise):
        return x + noise, noise - x
""",
    "training/rollout_sampler.py": "from torchvision.io import write_video",
}


def test_the_originals_step_is_timed_where_its_frames_are(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    for name, text in THEIRS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(original, "_missing", lambda name: name not in {*sys.modules, "einops"})
    words = ["--folder", str(tmp_path), "--size", "tiny", "--frames", "2", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["original", *words, "--output", str(tmp_path / "found")])
    before = set(sys.modules)
    try:
        original.main()
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("model", "training", "timm", "torchvision"):
                del sys.modules[name]
    (row,) = json.loads((tmp_path / "found").read_text()).values()
    assert row["frames"] == "on the device"
    assert row["step_s"] > 0


def test_arithmetic_of_a_step():
    """61 TFLOP for 128 clips of the small network, nearly all in the linears of its tokens."""
    found = flops.train_step(sizes.network("small", dtype="float32"), clips=128, frames=32)
    assert found.total == pytest.approx(60.9e12, rel=1e-3)
    assert found.linears == 3 * 24 * 512**2 * 12 * 64 * 128 * 32
    assert found.conditioning < 0.01 * found.total


def test_every_part_of_a_step_counts():
    """XLA counts the body of the loop over the parts once."""
    rates = {"matmul_flops": 1e12, "copy_bytes": 1e9}
    whole, parts = (
        train.measure(
            SMALL,
            clips=4,
            frames=5,
            step=ComputeConfig(accumulate_steps=n),
            steps=1,
            rates=rates,
        )
        for n in (1, 4)
    )
    for name in ("xla_tflop", "xla_gbytes", "floor_copy_s"):
        assert parts[name] >= whole[name], name
    assert parts["model_tflop"] == whole["model_tflop"]
