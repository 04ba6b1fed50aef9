"""A game's controls: read from a data folder, and the meaning of actions."""

import json

import pytest

from cwm_jax import coinrun, controls
from cwm_jax.controls import Control, Controls
from cwm_jax.errors import UserError

PAD = Controls("nes", "buttons", (Control("A", ("KeyX",)), Control("B"), Control("UP")))


def test_a_folder_without_metadata_holds_coinrun(tmp_path):
    known = controls.read(tmp_path)
    assert [known.name(a) for a in range(-1, 15)] == ["-", *coinrun.ACTION_NAMES]
    assert known.controls[8].keys == ("ArrowRight", "ArrowUp")
    assert known.controls[coinrun.NOOP].keys == ()
    assert known.num_values == 15


def test_buttons_are_bits(tmp_path):
    assert PAD.num_values == 8
    assert [PAD.name(a) for a in (-1, 0, 1, 2, 6, 7)] == ["-", "NOOP", "A", "B", "B+UP", "A+B+UP"]
    (tmp_path / "metadata.json").write_text(json.dumps(PAD.to_json()))
    assert controls.read(tmp_path) == PAD


@pytest.mark.parametrize(
    ("metadata", "fault"),
    [
        ("[1]", "JSON object"),
        ("{", "JSON"),
        ('{"actions": 3}', "must be a list"),
        ('{"actions": [{"keys": []}]}', "action 0"),
        ('{"actions": [{"name": "A"}, {"name": "A"}]}', "two actions"),
        ('{"actions": [{"name": "A"}], "action_encoding": "bits"}', "one_hot, buttons"),
        ('{"actions": []}', "at least 1"),
    ],
)
def test_wrong_metadata_is_named(tmp_path, metadata, fault):
    (tmp_path / "metadata.json").write_text(metadata)
    with pytest.raises(UserError, match=fault):
        controls.read(tmp_path)


def test_the_idle_action():
    def one_hot(*pairs):
        return Controls("game", "one_hot", tuple(Control(name, keys) for name, keys in pairs))

    assert controls.procgen("maze").idle == coinrun.NOOP
    assert PAD.idle == 0
    key = ("KeyA",)
    assert one_hot(("LEFT", ()), ("stay", ("KeyS",))).idle == 1
    assert one_hot(("LEFT", key), ("DRIFT", ()), ("FLOAT", ())).idle == 1
    assert one_hot(("LEFT", key), ("RIGHT", ("KeyD",))).idle == coinrun.NO_ACTION


def test_the_futures_of_what_if():
    assert controls.procgen("maze").futures == coinrun.MEANINGFUL_ACTIONS
    assert PAD.futures == (0, 1, 2, 4)
    full = Controls("pad", "buttons", tuple(Control(name) for name in "ABCDEFGH"))
    assert full.futures == (0, 1, 2, 4, 8, 16, 32, 64)
    dice = Controls("dice", "one_hot", (Control("ROLL", ("KeyR",)), Control("STAY")))
    assert dice.futures == (1, 0)
    ways = Controls("ways", "one_hot", (Control("L", ("KeyA",)), Control("R", ("KeyD",))))
    assert ways.futures == (0, 1)


@pytest.mark.parametrize(
    ("metadata", "count", "first"),
    [
        ({"env": "ALE/Pong-v5", "num_actions": 18, "num_episodes_train": 6}, 18, "0"),
        ({"env": "coinrun", "num_actions": 15}, 15, "LEFT+DOWN"),
        ({"env": "procgen:procgen-maze-v0", "num_actions": 15}, 15, "LEFT+DOWN"),
        ({"num_episodes_train": 6}, 15, "LEFT+DOWN"),
        ({"env": "MineRL", "num_actions": 15}, 15, "0"),
        ({"env": "x", "num_actions": 3, "action_encoding": "buttons"}, 3, "0"),
        ({"game": "g", "actions": ["STAY", "GO"], "num_actions": 2}, 2, "STAY"),
    ],
)
def test_actions_that_are_only_counted_or_named_are_known(tmp_path, metadata, count, first):
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    known = controls.read(tmp_path)
    assert (len(known.controls), known.controls[0].name) == (count, first)
    assert controls.from_json(known.to_json(), "copy") == known
    if first == "0":
        assert (known.idle, known.is_procgen) == (0, False)


@pytest.mark.parametrize("count", ["many", 0, -1, 2.5, None, True, [18]])
def test_a_wrong_number_of_actions_is_named(tmp_path, count):
    (tmp_path / "metadata.json").write_text(json.dumps({"env": "x", "num_actions": count}))
    with pytest.raises(UserError, match=r"metadata\.json: num_actions is .* 1 or more"):
        controls.read(tmp_path)
