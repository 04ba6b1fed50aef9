"""Under which conditions something was measured, and which conditions differ."""

import dataclasses
import hashlib
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

import cwm_jax
from cwm_jax.checkpoints.bundle import Generation
from cwm_jax.evaluation import rollout_quality
from cwm_jax.evaluation.held_out import HeldOut
from cwm_jax.runtime import random_numbers
from cwm_jax.sampling.sampler import SamplerConfig

VERSION = 2  # of the definitions: raised whenever a number of the same name would mean another


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """What two measurements must share to be set side by side."""

    version: int
    split: str
    clips: int
    records: str  # digest of the clips themselves
    horizons: tuple[int, ...]
    n_prompt: tuple[int, ...]
    drift_frames: int
    levels: tuple[int, ...]  # noise labels of the sampler's S steps
    window: str
    eta: float
    context_level: int
    seed: int
    batch_size: int  # noise is drawn for a batch at a time
    psnr_cap: float
    probe: str  # digest of what the probe has learnt from
    sharpness: float = 1.0  # power of the warp's softmax filters; 1 where there are none
    noise: str = ""  # digest of what the generator gives for a seed; empty: not recorded

    def as_dict(self) -> dict:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}


def of(clips: HeldOut, sampler: SamplerConfig | Generation, **others) -> Protocol:
    """The protocol of a measurement; `others` are the fields that neither argument knows."""
    return Protocol(
        version=VERSION,
        clips=len(clips),
        records=clips.digest,
        levels=sampler.levels,
        window=sampler.window,
        eta=sampler.eta,
        context_level=sampler.context_level,
        psnr_cap=rollout_quality.PSNR_CAP,
        noise=_noise_digest(),
        **others,
    )


def _noise_digest() -> str:
    """Tells generators apart that give other noise for the same seed, as settings of JAX choose."""
    noise = random_numbers.normal(random_numbers.key(0), (64,))
    return hashlib.sha256(np.asarray(noise).tobytes()).hexdigest()[:16]


# What may be compared when asked: how the same clips were drawn.
VARIABLE = ("levels", "window", "sharpness", "eta", "context_level", "seed")
_LATER = {"sharpness": 1.0}  # what an older measurement, which does not record it, had


def differences(a: Mapping, b: Mapping, *, across: Collection[str] = ()) -> list[str]:
    """The conditions that two protocols (as dicts) do not share, each with both values.

    Args:
        across: conditions that may differ.
    """
    return [
        f"{name}: {value_a} and {value_b}"
        for name in sorted(set(a) | set(b))
        for value_a, value_b in [[x.get(name, _LATER.get(name)) for x in (a, b)]]
        if value_a != value_b and name not in across and not _unknown(name, a, b)
    ]


def _unknown(name: str, a: Mapping, b: Mapping) -> bool:
    """Whether it is a condition that an older measurement does not record."""
    return name == "noise" and not (a.get(name) and b.get(name))


def code_version() -> str:
    """The package's version and, in a checkout, the commit and whether it was changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return cwm_jax.__version__
    return f"{cwm_jax.__version__}+{commit}"
