"""Agreement of drift measures with a visual ranking of twenty rollouts by contact sheets.

    python -m benchmarks.drift_by_eye sheets --data data/pocket-field --output eye
    python -m benchmarks.drift_by_eye agree --data data/pocket-field --output eye

The first generates rollouts of the repository's model under random actions, in one, two or four
denoising steps, and writes a contact sheet of each. Their numbers do not reveal the setting. A
judge (a vision-language model) ranked them by these sheets only, from the one that is most similar
to the game for longest to the least similar one; that ranking is `drift_by_eye.json`, recorded
before any measurement. The second measures the rollouts and
prints each measure's rank correlation with the order, with the interval of resampled rollouts.

The data: python -m cwm_jax.tools.collect --output data/pocket-field --train 140 --val 0 --test 80
--policy random=1,sticky=3 --seed 2
"""

import argparse
import json
from pathlib import Path

import numpy as np

from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.data.config import DataConfig
from cwm_jax.evaluation import (
    bootstrap,
    controllability,
    generation,
    held_out,
    lpips_weights,
    nearest_real,
    uncertainty,
)
from cwm_jax.evaluation.drift import (
    REFERENCE,
    STRIDE,
    beyond,
    fit_features,
    frames_to_collapse,
    limits_of,
    moments,
    signs,
)
from cwm_jax.files import path_flag
from cwm_jax.rendering import patch_overlay, video
from cwm_jax.sampling import sampler

ORDER = Path(__file__).parent / "drift_by_eye.json"
_CLIPS, _FRAMES, _GIVEN, _SEED = 20, 160, 4, 0
_STEPS = (1, 2, 4)
_SHOWN, _PER_ROW = 24, 8  # frames of a sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=("sheets", "agree"))
    parser.add_argument("--data", type=path_flag, required=True)
    parser.add_argument("--output", type=path_flag, required=True)
    args = parser.parse_args()
    real, generated = rollouts(args.data, args.output)
    if args.job == "sheets":
        for number, frames in enumerate(generated, start=1):
            video.write_png(args.output / f"{number:02}.png", sheet(frames))
        return
    order = json.loads(ORDER.read_text())["from_best_to_worst"]
    place = np.empty(_CLIPS)
    place[np.array(order) - 1] = np.arange(_CLIPS)
    for name, values in measures(generated, real).items():
        found = bootstrap.of_statistic(uncertainty.spearman, place, values)
        print(f"{name:40} {found}")


def measures(generated: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    """One number for each rollout, the higher the worse."""
    lpips = lpips_weights.available()
    half = real.shape[1] // 2
    references = real[:, :half:REFERENCE]
    nearest = [
        nearest_real.distances(lpips, mine[::STRIDE], theirs)
        for mine, theirs in zip(generated, references, strict=True)
    ]
    features = fit_features(real)
    start = moments(real[:, :half], features)
    found = signs(moments(generated, features), start)
    of_real = signs(moments(real[:, half:], features), start)
    limits = {name: limits_of(name, values) for name, values in of_real._asdict().items()}
    lasted = frames_to_collapse(beyond(found, limits), generated.shape[1])
    return {
        "LPIPS to the nearest real frame": np.array([x.frame.mean() for x in nearest]),
        "the same place by place": np.array([x.places.mean() for x in nearest]),
        "patch distance": found.patch_distance.mean(1),
        "sharpness, how far from 1": np.abs(np.log(found.sharpness)).mean(1),
        "shift of mean colour": found.colour_shift.mean(1),
        "frames to collapse (fewer is worse)": -lasted,
    }


def rollouts(data: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Real clips and rollouts from them, uint8 [20, T, H, W, C]; generated once for a folder."""
    clips = held_out.load(
        DataConfig(dir=str(data), clip_len=12), "test", frames=_FRAMES, clips=_CLIPS
    )
    kept = folder / "rollouts.npy"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(kept, _generated(clips))
    mixed = np.random.default_rng(_SEED).permutation(_CLIPS)
    return clips.frames[mixed], np.load(kept)[mixed]


def _generated(clips: held_out.HeldOut) -> np.ndarray:
    actions = controllability.random_actions(
        clips.actions, n_prompt=_GIVEN, frames=_FRAMES, seed=_SEED
    )
    frames = np.empty((_CLIPS, _FRAMES, *clips.frames.shape[2:]), np.uint8)
    for turn, steps in enumerate(_STEPS):
        mine = slice(turn, None, len(_STEPS))
        how = dict(levels=sampler.ddim_levels(steps), window="hop")
        opened = formats.open_sampler(pretrained.FOLDER, step=None, **how)
        prompt = clips.frames[mine, :_GIVEN]
        generate = generation.by_sampler(opened.sampler)
        settings = dict(seed=_SEED, batch_size=len(prompt))
        frames[mine] = generation.in_batches(generate, prompt, actions[mine], **settings)
    return frames


def sheet(frames: np.ndarray) -> np.ndarray:
    """Frames at even distances, from the first to the last."""
    shown = frames[np.linspace(0, len(frames) - 1, _SHOWN).astype(int)]
    return patch_overlay.rows([shown[i : i + _PER_ROW] for i in range(0, _SHOWN, _PER_ROW)])


if __name__ == "__main__":
    main()
