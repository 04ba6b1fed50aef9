"""A rollout as an animated PNG: what the page shows while it loads, and where it cannot play."""

import io

import jax
import numpy as np
from PIL import Image

from cwm_jax.checkpoints import formats
from cwm_jax.checkpoints.run_checkpoint import Trained
from cwm_jax.coinrun import FPS, JUMP_RIGHT, NOOP, RIGHT
from cwm_jax.play.session.prompt_sources import USUAL_PROMPT, ClipPrompts, ClipSource
from cwm_jax.runtime import random_numbers
from cwm_jax.sampling.sampler import Sampler, SamplerConfig, ddim_levels

FRAMES = 48
_HELD = ((RIGHT, 14), (JUMP_RIGHT, 10), (RIGHT, 8), (NOOP, 4))  # over and over


def picture(trained: Trained, prompts: ClipPrompts, clip: int) -> bytes:
    """The rollout from a clip with the keys of a player who runs and jumps."""
    given = prompts.load(ClipSource(clip, USUAL_PROMPT))
    levels = ddim_levels(formats.usual_steps(trained))
    generator = Sampler(trained.network, trained.params, SamplerConfig(levels=levels, window="hop"))
    pattern = [action for action, frames in _HELD for _ in range(frames)]
    actions = np.resize(np.array(pattern), (1, FRAMES - USUAL_PROMPT))
    state = generator.start(given.frames_PHWC[None], given.actions_P[None])
    _, made = generator.rollout(state, actions, random_numbers.key(0))
    frames = [*given.frames_PHWC, *np.asarray(jax.device_get(made))[0]]
    out = io.BytesIO()
    first, *others = map(Image.fromarray, frames)
    first.save(out, "PNG", save_all=True, append_images=others, duration=round(1000 / FPS), loop=0)
    return out.getvalue()
