"""Whether frames of the page's kernels are as good as those of float32: LPIPS and keys.

    python -m benchmarks.web_quality [--clips 20] [--frames 24] [--seeds 2] [--steps 2]

Clips of the split `test`, four real frames each, then frames under the recorded actions, generated
in Node.js with the page's modules: once by `web/kernels.wasm`, once by onnxruntime-web in float32,
from the same noise. A Markdown table has the LPIPS to the real frames, and what the
inverse-dynamics probe reads of the keys, as `evaluate.py` has them. Needs npm and Node.js.
"""

import argparse
import base64
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import machine
from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import shown_to_user
from cwm_jax.evaluation import held_out, lpips, lpips_weights, probe, probe_accuracy
from cwm_jax.evaluation.held_out import HeldOut
from cwm_jax.files import model_flag, path_flag
from cwm_jax.onnx import folder
from cwm_jax.runtime import user_cache
from cwm_jax.static_page import npm_package

PROMPT = 4
_SCRIPT = Path(__file__).with_name("web_rollout.mjs")


def generated(export: Path, clips: HeldOut, *, steps: int, package: Path | None) -> np.ndarray:
    """Frames after the prompts, uint8 [B, T − PROMPT, H, W, C]; without a package, of kernels."""
    text = lambda array: base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    job = {
        "steps": steps,
        "clips": [
            {"frames": text(frames[:PROMPT]), "given": PROMPT, "actions": actions, "seed": seed}
            for seed, (frames, actions) in enumerate(
                zip(clips.frames, clips.actions.tolist(), strict=True)
            )
        ],
    }
    job |= {"package": str(package)} if package else {}
    (export / "job.json").write_text(json.dumps(job), encoding="utf-8")
    output = export / "frames.f32"
    node = shutil.which("node") or "node"
    subprocess.run([node, _SCRIPT, export, export / "job.json", output], check=True)
    batch, length, *picture = clips.frames.shape
    frames = np.fromfile(output, np.float32).reshape(batch, length - PROMPT, *picture)
    return np.rint((np.clip(frames, -1, 1) + 1) * 127.5).astype(np.uint8)


def measures(frames: np.ndarray, clips: HeldOut, eyes: lpips.Lpips, reader: probe.Probe) -> dict:
    """LPIPS of all generated frames and of the last quarter; keys as shares of real ones."""
    real = clips.frames[:, PROMPT:]
    distance = lpips.distances(eyes, frames, real)
    whole = lambda x: np.concatenate([clips.frames[:, PROMPT - 1 : PROMPT], x], axis=1)
    read = probe_accuracy.summary(
        reader, whole(frames), whole(real), clips.actions[:, PROMPT - 1 :]
    )
    return {
        "LPIPS": round(float(distance.mean()), 4),
        "LPIPS, last quarter": round(float(distance[:, -(distance.shape[1] // 4) :].mean()), 4),
        "control": round(read["control"], 3),
        **{key: round(share, 3) for key, share in read["keys_of_real"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=model_flag, help="the model (checkpoints/pocket)")
    add("--data", type=path_flag, default="assets/coinrun", help="(%(default)s)")
    add("--clips", type=int, default=0, help="0: all that are long enough")
    add("--frames", type=int, default=24, help="generated of each (%(default)s)")
    add("--seeds", type=int, default=2, help="times that each clip is continued (%(default)s)")
    add("--steps", type=int, default=2, help="denoising steps (%(default)s)")
    args = parser.parse_args()
    with shown_to_user(), tempfile.TemporaryDirectory(prefix="cwm_jax_") as temporary:
        print(machine.described(machine.description()), flush=True)
        export = Path(temporary)
        trained = formats.load(pretrained.unless(args.checkpoint))
        folder.write(trained, export, steps=(args.steps,), dtype="float16")
        with tarfile.open(npm_package.checked()) as tar:
            tar.extractall(export, filter="data")
        config = DataConfig(dir=str(args.data))
        clips = held_out.load(config, "test", frames=PROMPT + args.frames, clips=args.clips)
        often = lambda array: np.concatenate([array] * args.seeds)
        repeated = {"frames": often(clips.frames), "actions": often(clips.actions)}
        clips = HeldOut(**clips._asdict() | repeated)
        eyes, reader = lpips_weights.available(), probe.cached(config, user_cache.folder())
        rows = []
        for name, package in (("kernels", None), ("onnxruntime", export / "package")):
            frames = generated(export, clips, steps=args.steps, package=package)
            rows.append({"frames of": name} | measures(frames, clips, eyes, reader))
            print(machine.described(rows[-1]), flush=True)
        print(machine.table(rows))


if __name__ == "__main__":
    main()
