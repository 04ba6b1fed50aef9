"""How well a probe reads actions back: from drawn frames, real ones, and with shuffled actions."""

import numpy as np

from cwm_jax.coinrun import NUM_ACTIONS
from cwm_jax.evaluation import intervals, probe, quality
from cwm_jax.evaluation.probe import GROUP_NAMES, GROUPS, Probe

_SEED = 0


def summary(
    reader: Probe, drawn_BTHWC: np.ndarray, real_BTHWC: np.ndarray, actions_BT: np.ndarray
) -> dict:
    """Accuracies on `drawn`, `real` frames, and against `shuffled` actions (of the drawn ones).

    Args:
        drawn_BTHWC, real_BTHWC: uint8, the same clips; both begin with a given frame.
        actions_BT: the action that led into each frame.
    """
    truth = actions_BT[:, 2:]
    shuffled = np.random.default_rng(_SEED).permutation(truth.ravel()).reshape(truth.shape)
    guesses = {
        name: probe.read(reader, frames).reshape(-1, NUM_ACTIONS)
        for name, frames in (("drawn", drawn_BTHWC), ("real", real_BTHWC))
    }
    result = {
        "drawn": _accuracies(guesses["drawn"], truth),
        "real": _accuracies(guesses["real"], truth),
        "shuffled": _accuracies(guesses["drawn"], shuffled),
        "actions": truth.size,
        "groups": list(GROUP_NAMES),
    }
    # Balanced, since half of all actions leave the player standing.
    got, ceiling, floor = (
        result[name]["groups"]["balanced"] for name in ("drawn", "real", "shuffled")
    )
    # 1: as readable as the real game; 0: no more than chance.
    result["control"] = (got - floor) / (ceiling - floor) if ceiling > floor else float("nan")
    return result


def _accuracies(guess_N15: np.ndarray, truth_BT: np.ndarray) -> dict:
    """Of the 15 actions, and of the six groups, whose probabilities are sums."""
    grouped = np.stack([guess_N15[:, g == GROUPS].sum(1) for g in range(len(GROUP_NAMES))], axis=1)
    return {
        "actions": _counts(guess_N15.argmax(1), truth_BT, NUM_ACTIONS),
        "groups": _counts(grouped.argmax(1), GROUPS[truth_BT], len(GROUP_NAMES)),
    }


def _counts(guess_N: np.ndarray, truth_BT: np.ndarray, kinds: int) -> dict:
    """Accuracy, that of each kind, their mean (`balanced`), and the confusion matrix.

    `confusion[i][j]` counts frames where i was pressed and j was read; a kind that never occurs
    has no accuracy (NaN) and does not count for `balanced`.
    """
    confusion = np.zeros((kinds, kinds), int)
    np.add.at(confusion, (truth_BT.ravel(), guess_N), 1)
    with np.errstate(invalid="ignore"):
        recall = confusion.diagonal() / confusion.sum(1)
    right_BT = (guess_N == truth_BT.ravel()).reshape(truth_BT.shape)
    return {
        "accuracy": quality.as_dict(*intervals.of_mean(right_BT.mean(1))),
        "balanced": float(np.nanmean(recall)),
        "by_kind": recall.tolist(),
        "confusion": confusion.tolist(),
    }
