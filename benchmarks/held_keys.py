"""A contact sheet of held-out levels under held keys, to inspect long rollouts by eye.

    python -m benchmarks.held_keys --output held_keys.png

Eight clips of the split `test`, four real frames each, then 120 generated frames while keys are
held: RIGHT in three, LEFT in two, a jump to the right in two, and jumps on the spot in one. Every
12th frame is shown, a level in each row, the last real frame first.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from cwm_jax import coinrun
from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.data import splits
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import shown_to_user
from cwm_jax.files import model_flag, path_flag
from cwm_jax.rendering import video
from cwm_jax.rendering.contact_sheet import enlarged

PROMPT, FRAMES, EVERY = 4, 120, 12
RIGHT, LEFT, UP, STAY = 7, 1, 5, 4
HELD = (
    *((RIGHT,), (RIGHT,), (LEFT,), (LEFT,), (coinrun.JUMP_RIGHT,)),
    *((UP,) * 2 + (STAY,) * 14, (RIGHT,), (coinrun.JUMP_RIGHT,)),
)


def contact_sheet(prompt_BPHWC: np.ndarray, frames_BFHWC: np.ndarray) -> np.ndarray:
    """uint8 [rows · (64 + gap), columns · (64 + gap), 3]."""
    shown = np.concatenate([prompt_BPHWC[:, -1:], frames_BFHWC[:, EVERY - 1 :: EVERY]], axis=1)
    edge = [(0, 0), (0, 0), (0, 2), (0, 2), (0, 0)]
    rows = np.pad(shown, edge, constant_values=255).swapaxes(1, 2)
    return rows.reshape(rows.shape[0] * rows.shape[1], -1, 3)


def rollouts(
    opened: formats.Opened, data: Path, actions_BF: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Real frames of levels of the split `test`, and those generated after them, uint8 both.

    Args:
        actions_BF: the keys held in each level.
        seed: of levels and noise.
    """
    episodes = splits.open_episodes(DataConfig(dir=str(data)), "test")
    numbers = splits.pick_episodes(episodes, count=len(actions_BF), length=PROMPT, seed=seed)
    given = splits.load_clips(episodes, numbers, length=PROMPT)
    state = opened.sampler.start(given["frames"], given["actions"])
    _, frames = opened.sampler.rollout(state, actions_BF, jax.random.key(seed))
    return given["frames"], np.asarray(frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint", type=model_flag, help="a run, or an export (checkpoints/pocket)"
    )
    parser.add_argument("--data", type=path_flag, default="assets/coinrun", help="(%(default)s)")
    parser.add_argument("--ddim-steps", type=int, help="denoising steps (the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="of levels and noise (%(default)s)")
    parser.add_argument("--scale", type=int, default=2, help="pixels for each pixel (%(default)s)")
    parser.add_argument("--output", type=path_flag, required=True)
    with shown_to_user():
        args = parser.parse_args()
        steps = {}
        if args.ddim_steps is not None:
            steps["levels"] = formats.ddim_levels(args.ddim_steps)
        opened = formats.open_sampler(pretrained.unless(args.checkpoint), window="hop", **steps)
        actions = np.array([(keys * FRAMES)[:FRAMES] for keys in HELD], np.int32)
        picture = contact_sheet(*rollouts(opened, args.data, actions, args.seed))
        video.write_png(args.output, enlarged(picture, args.scale))
        print(f"step {opened.step} → {args.output}")


if __name__ == "__main__":
    main()
