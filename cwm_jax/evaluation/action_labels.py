"""Labels recordings of CoinRun without logged keys, by the inverse-dynamics probe.

Three frames determine the action between the last two (`cwm_jax.evaluation.probe`). So a recording
of T frames gives labels of its frames 1 … T − 2: no frame precedes the first, and no frame follows
the last. How often labels are right is measured on clips of levels that the probe was not trained
on.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cwm_jax import controls
from cwm_jax.coinrun import MEANINGFUL_ACTIONS
from cwm_jax.data import splits
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError
from cwm_jax.evaluation import held_out, probe, probe_accuracy
from cwm_jax.evaluation.probe import Probe
from cwm_jax.runtime import user_cache

LOST = 2  # frames of a recording without a label: its first and its last
_BLOCK = 160  # frames read in one call


def label(reader: Probe, frames: Iterable[np.ndarray]) -> np.ndarray:
    """The actions pressed at frames 1 … T − 2 of a recording, int32 [T − 2].

    Args:
        frames: uint8 [64, 64, 3] each, one a step of the game.
    """
    found = [_read(reader, block) for block in _blocks(frames)]
    groups = np.concatenate(found) if found else np.zeros(0, int)
    return np.array(MEANINGFUL_ACTIONS, np.int32)[groups]


def _blocks(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Blocks of neighbouring frames, each beginning with the last two of the one before."""
    block: list[np.ndarray] = []
    for frame in frames:
        block.append(frame)
        if len(block) == _BLOCK:
            yield np.stack(block)
            block = block[-LOST:]
    if len(block) > LOST:
        yield np.stack(block)


def _read(reader: Probe, block: np.ndarray) -> np.ndarray:
    """The groups of a block's frames; blocks are filled up, so that all share one program."""
    padded = np.concatenate([block, np.repeat(block[-1:], _BLOCK - len(block), axis=0)])
    return probe.read(reader, padded[None])[0, : len(block) - LOST]


def trained(config: DataConfig) -> tuple[Probe, dict]:
    """The probe of a data folder, and how often it is right on the folder's test split.

    Raises:
        UserError: the folder lacks one of the two splits, or is of another game.
    """
    known = controls.read(config.dir)
    if not (known.is_procgen and "coinrun" in known.game.lower()):
        raise UserError(
            f"--infer-actions {config.dir}: its data is of {known.game}; actions can be inferred "
            "for CoinRun only, from a data folder of CoinRun"
        )
    reader = probe.cached(config, user_cache.folder())
    lengths = splits.open_episodes(config, "test").lengths
    clips = held_out.load(config, "test", frames=int(np.median(lengths)))
    return reader, accuracy(reader, clips.frames, clips.actions)


def accuracy(reader: Probe, frames_BTHWC: np.ndarray, actions_BT: np.ndarray) -> dict:
    """How often the probe reads the pressed action from real frames.

    `accuracy` with its interval over clips; `balanced` over the six groups of actions; of each
    key how often it is `read` where it was pressed, and where it was not (`false`). The floors of
    both accuracies are those of a constant answer, the most common group.
    """
    found = probe_accuracy.of_real(reader, frames_BTHWC, actions_BT)
    groups = probe.GROUPS[actions_BT[:, 2:]]
    counts = np.bincount(groups.ravel(), minlength=len(probe.GROUP_NAMES))
    return {
        "accuracy": found["accuracy"],
        "accuracy_floor": float(counts.max() / counts.sum()),
        "balanced": found["balanced"],
        "balanced_floor": 1 / int((counts > 0).sum()),
        "keys": found["keys"],
        "measured_on": {"clips": len(frames_BTHWC), "actions": int(counts.sum())},
    }


def metadata(reader: Probe, config: DataConfig, measured: dict) -> dict:
    """What `metadata.json` of a folder with inferred actions records about them."""
    return {
        "probe": reader.name,
        "trained_on": Path(config.dir).resolve().name,
        "groups": list(probe.GROUP_NAMES),
        **measured,
    }
