"""How well a probe reads actions from generated and real frames, and the floor by shuffling."""

import numpy as np

from cwm_jax.coinrun import ACTION_NAMES
from cwm_jax.evaluation import bootstrap, probe, rollout_quality
from cwm_jax.evaluation.probe import GROUP_NAMES, GROUPS, KEYS, Probe

_SEED = 0


def summary(
    reader: Probe, generated_BTHWC: np.ndarray, real_BTHWC: np.ndarray, actions_BT: np.ndarray
) -> dict:
    """Accuracies on `drawn` (generated) and `real` frames, and against `shuffled` actions.

    Args:
        drawn_BTHWC, real_BTHWC: uint8, the same clips; both begin with a given frame.
        actions_BT: the action that led into each frame.
    """
    pressed = actions_BT[:, 2:]
    shuffled = np.random.default_rng(_SEED).permutation(pressed.ravel()).reshape(pressed.shape)
    generated, real = (probe.read(reader, frames) for frames in (generated_BTHWC, real_BTHWC))
    result = {
        "drawn": _accuracies(generated, pressed),
        "real": _accuracies(real, pressed),
        "shuffled": _accuracies(generated, shuffled),
        "actions": pressed.size,
        "groups": list(GROUP_NAMES),
    }
    of_key = lambda side, key: (
        result[side]["keys"][key]["read"] - result[side]["keys"][key]["false"]
    )
    # 1: as readable as the real game; 0: chance.
    result["keys_of_real"] = {k: _ratio(of_key("drawn", k), of_key("real", k)) for k in KEYS}
    # Balanced, since half of all actions do not move the player.
    got, ceiling, floor = (result[side]["balanced"] for side in ("drawn", "real", "shuffled"))
    result["control"] = _ratio(got - floor, ceiling - floor)
    return result


def of_real(reader: Probe, frames_BTHWC: np.ndarray, actions_BT: np.ndarray) -> dict:
    """The accuracies on real frames only, as `summary` has them under `real`."""
    return _accuracies(probe.read(reader, frames_BTHWC), actions_BT[:, 2:])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


def _accuracies(read_BT: np.ndarray, pressed_BT: np.ndarray) -> dict:
    """How often the action that was read is the one that was pressed.

    `accuracy` over all frames; `by_group` and `by_action` over those where that was pressed (an
    action is read where its group is), NaN if none was; `balanced`, the mean of the groups;
    `keys`, how often each was `read` where it was pressed, and where it was not (`false`);
    `confusion[i][j]`, in how many frames group i was pressed and j was read.
    """
    wanted_BT = GROUPS[pressed_BT]
    right_BT = read_BT == wanted_BT
    confusion = np.zeros((len(GROUP_NAMES),) * 2, int)
    np.add.at(confusion, (wanted_BT.ravel(), read_BT.ravel()), 1)
    by_group = {n: _share(right_BT[wanted_BT == g]) for g, n in enumerate(GROUP_NAMES)}
    return {
        "accuracy": rollout_quality.as_dict(*bootstrap.of_mean(right_BT.mean(1))),
        "balanced": float(np.nanmean([*by_group.values()])),
        "by_group": by_group,
        "by_action": {n: _share(right_BT[pressed_BT == a]) for a, n in enumerate(ACTION_NAMES)},
        "keys": {
            key: _of_key(np.isin(read_BT, g), np.isin(wanted_BT, g)) for key, g in KEYS.items()
        },
        "confusion": confusion.tolist(),
    }


def _of_key(read_BT: np.ndarray, pressed_BT: np.ndarray) -> dict[str, float]:
    return {"read": _share(read_BT[pressed_BT]), "false": _share(read_BT[~pressed_BT])}


def _share(right_N: np.ndarray) -> float:
    return float(right_N.mean()) if right_N.size else float("nan")
