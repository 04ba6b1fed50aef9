"""Measures an exported model on a few held-out clips, and writes its card beside it."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cwm_jax.checkpoints import weights
from cwm_jax.errors import echo
from cwm_jax.evaluation import comparison
from cwm_jax.experiment import model_card
from cwm_jax.files import written_whole
from cwm_jax.runtime import subprograms

CARD = "card.md"
STEPS = (2, 1, 4)  # denoising steps that are measured, the most useful first
ON_GPU = {"clips": 24, "horizon": 32, "drift-frames": 128}
ON_CPU = {"clips": 12, "horizon": 16, "drift-frames": 48}


class Attempt(NamedTuple):
    """What was measured in the time, and what was not."""

    measured: Mapping[int, Mapping]  # a metrics.json by number of denoising steps
    notes: Sequence[str]


def write(export: Path, workdir: Path, device: str, *, minutes: float, clips: Mapping) -> None:
    """Writes `card.md`: at once, and again after each measurement. A failure is logged.

    Args:
        export: the model's `.safetensors` file.
        workdir: the run's; it gets the measurements.
        device: in words, the device of training.
        minutes: for all measurements; 0: none are made.
        clips: flags of `evaluate.py`, such as `ON_GPU`.
    """
    card = export.with_name(CARD)
    try:
        shapes, meta = weights.describe(export)
        facts = model_card.training(shapes, meta, workdir / "metrics.jsonl", device)
        data = Path(meta["config"]["data"]["dir"])
        for attempt in _attempts(export, data, workdir / "card", minutes, clips):
            with written_whole(card) as temporary:
                temporary.write_text(model_card.text(facts, *attempt), encoding="utf-8")
        print(f"card → {card}")
    except Exception as error:  # the export is what matters
        echo(f"WARNING: {card} is not complete: {type(error).__name__}: {error}")


def _attempts(export: Path, data: Path, folder: Path, minutes: float, clips: Mapping):
    """Yields an `Attempt` before the first measurement, and after each."""
    measured: dict[int, dict] = {}
    notes: list[str] = []
    end = time.monotonic() + 60 * minutes
    yield Attempt(measured, notes)
    for steps in STEPS if minutes else ():
        output, left = folder / f"s{steps}.json", end - time.monotonic()
        output.unlink(missing_ok=True)
        words = measure_words(export, data, output, steps, clips)
        code = subprograms.run(words, seconds=left) if left > 0 else subprograms.TOO_LONG
        if code == 0:
            measured[steps] = comparison.read(output)
        else:
            late = f"its {minutes:g} minutes were over"
            why = late if code == subprograms.TOO_LONG else f"evaluate.py ended with {code}"
            notes.append(f"S = {steps} was not measured: {why}.")
            echo(notes[-1])
        yield Attempt(measured, notes)


def measure_words(export: Path, data: Path, output: Path, steps: int, clips: Mapping) -> list[str]:
    """The arguments of Python that measure a model with so many denoising steps."""
    split = "test" if (data / "test").is_dir() else "val"
    flags = {"checkpoint": export, "data": data, "split": split, "output": output}
    flags |= {"ddim-steps": steps, "window": "hop", "n-prompt": 4, "seeds": 0}
    flags |= {**clips, "batch-size": clips["clips"]}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["-m", "cwm_jax.programs.evaluate", *words, "--no-single-step", "--no-report"]
