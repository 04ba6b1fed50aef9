"""The page's kernels compute what the exported graphs do; they are built from their source."""

import base64
import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cwm_jax.checkpoints.run_checkpoint import Trained
from cwm_jax.coinrun import to_model
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cwm_jax.onnx import folder
from cwm_jax.onnx.runtime import OnnxGenerator

NODE = shutil.which("node")
ROOT = Path(__file__).parents[2]
ACTIONS = [-1, 7, 4, 1, 5, 14, 0]
GIVEN = 2
PLAIN = DiTConfig(
    hidden_size=32,
    depth=2,
    num_heads=2,
    patch_size=16,
    image_size=64,
    max_frames=8,
    dtype="float32",
)
NETWORKS = {
    "plain": PLAIN,  # as `configs/small.py`
    "clean": dataclasses.replace(PLAIN, history=1, prediction="clean"),
    "displacement": dataclasses.replace(  # as `configs/pocket.py`
        PLAIN,
        history=3,
        displacement_down=3,
        displacement_across=2,
        displacement_patch=8,
        qk_norm=True,
    ),
}
NETWORKS["still"] = dataclasses.replace(NETWORKS["displacement"], still_threshold=80.0)


def export(kind, out):
    """A network of random numbers whose gates are open, so that every part of it counts."""
    network, rng = NETWORKS[kind], np.random.default_rng(0)
    params = {
        name: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)
        for name, leaf in sorted(dit.shapes(network).items())
    }
    config = {"model": dataclasses.asdict(network), "sampler": {"ddim_steps": 2}}
    folder.write(Trained(network, params, config, 7, None), out, steps=(1, 2), dtype="float32")


def node_frames(path, clip, threads=1):
    job = {"steps": 2, "threads": threads, "clips": [clip]}
    (path / "job.json").write_text(json.dumps(job))
    script = ROOT / "benchmarks" / "web_rollout.mjs"
    command = [NODE, script, path, path / "job.json", path / "frames.f32"]
    subprocess.run(command, check=True, timeout=150)
    return np.fromfile(path / "frames.f32", np.float32).reshape(-1, 64, 64, 3)


def text(array):
    return base64.b64encode(array.tobytes()).decode()


@pytest.mark.skipif(not NODE, reason="Node.js is not installed")
@pytest.mark.parametrize("kind", NETWORKS)
def test_kernels_compute_the_graphs_of_the_network(kind, tmp_path):
    export(kind, tmp_path)
    prompt = np.random.default_rng(2).integers(0, 256, (GIVEN, 64, 64, 3), dtype=np.uint8)
    noises = _noises(tmp_path)
    generator = OnnxGenerator(tmp_path, steps=2, threads=1)
    world, wanted = generator.start(to_model(prompt), np.array(ACTIONS[:GIVEN])), []
    for action, noise in zip(ACTIONS[GIVEN:], noises, strict=True):
        world, frame = generator.step(world, action, noise)
        wanted.append(frame)
    clip = {"frames": text(prompt), "given": GIVEN, "actions": ACTIONS, "seed": 5}
    clip["teacher"] = text(np.stack(wanted))
    found = node_frames(tmp_path, clip)
    error = np.abs(found - np.stack(wanted))
    print("largest", error.max(), "root mean square", np.sqrt((error**2).mean()))
    assert np.quantile(error, 0.99) < 0.01  # of 2; of near ties the other displacement may win
    assert np.abs(np.diff(wanted, axis=0)).max() > 0.1  # the picture moves
    kept = (np.diff(wanted, axis=0) == 0).mean((1, 2, 3))
    assert (kept.max() > 0.8) == (kind == "still")
    assert kept.min() < 0.5


@pytest.mark.skipif(not NODE, reason="Node.js is not installed")
def test_threads_compute_the_same_bits(tmp_path):
    export("displacement", tmp_path)
    prompt = np.random.default_rng(2).integers(0, 256, (GIVEN, 64, 64, 3), dtype=np.uint8)
    clip = {"frames": text(prompt), "given": GIVEN, "actions": ACTIONS, "seed": 5}
    frames = [node_frames(tmp_path, clip, threads) for threads in (1, 3)]
    assert (frames[0] == frames[1]).all()


@pytest.mark.skipif(not NODE, reason="Node.js is not installed")
def test_a_lost_thread_changes_no_frame(tmp_path):
    export("displacement", tmp_path)
    script = tmp_path / "lost.mjs"
    script.write_text(_LOST % {"root": ROOT, "export": tmp_path})
    done = subprocess.run([NODE, script], check=True, timeout=60, capture_output=True, text=True)
    assert json.loads(done.stdout) == {"before": 2, "after": 1, "same": True}
    assert "one thread is used" in done.stderr


_LOST = """
    import fs from "node:fs";
    import "%(root)s/benchmarks/node_workers.mjs";
    import {Generator} from "%(root)s/web/generator.js";
    import {kernelsFile, KernelNetwork} from "%(root)s/web/kernel_network.js";
    const about = JSON.parse(fs.readFileSync("%(export)s/model.json"));
    const weights = new Uint8Array(fs.readFileSync("%(export)s/weights.bin"));
    const generators = [];
    for (const threads of [1, 2]) {
      const kernels = fs.readFileSync(`%(root)s/web/${kernelsFile(threads)}`);
      const network = await KernelNetwork.create(kernels, about, weights, threads);
      generators.push(new Generator(about, network));
    }
    const [, {network}] = generators, frames = [[], []], counts = [];
    const first = new Float32Array(12288);
    const caches = await Promise.all(generators.map((one) => one.cacheOf([first], [4])));
    for (let number = 1; number < 9; number++) {
      if (number === 4) {
        counts.push(network.threads);
        await network.team.helpers[0].terminate();
      }
      for (const [i, generator] of generators.entries()) {
        const frame = await generator.frame(caches[i], 7, {seed: 1, number, steps: 2});
        await generator.append(caches[i], frame, 7);
        frames[i].push(...frame);
      }
    }
    const same = frames[0].every((value, i) => value === frames[1][i]);
    console.log(JSON.stringify({before: counts[0], after: network.threads, same}));
"""


def _noises(tmp_path):
    script = tmp_path / "noise.mjs"
    script.write_text(
        f"""import fs from "node:fs";
        import {{frameNoise}} from "{ROOT}/web/noise.js";
        const all = [];
        for (let n = {GIVEN}; n < {len(ACTIONS)}; n++) all.push(...frameNoise(5, n, 12288));
        fs.writeFileSync("{tmp_path}/noise.f32", new Uint8Array(Float32Array.from(all).buffer));"""
    )
    subprocess.run([NODE, script], check=True, timeout=60)
    return np.fromfile(tmp_path / "noise.f32", np.float32).reshape(-1, 64, 64, 3)


@pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="ziglang is not installed")
def test_the_kernels_are_built_from_their_source(tmp_path):
    command = ["make", "kernels", f"ZIG={sys.executable} -m ziglang", f"KERNELS={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=150)
    for name in ("kernels.wasm", "kernels-shared.wasm"):
        assert (tmp_path / name).read_bytes() == (ROOT / "web" / name).read_bytes()
