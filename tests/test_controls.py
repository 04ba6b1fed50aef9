"""A game's controls: what a data folder says of them, and what actions then mean."""

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
    ("said", "fault"),
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
def test_wrong_metadata_is_named(tmp_path, said, fault):
    (tmp_path / "metadata.json").write_text(said)
    with pytest.raises(UserError, match=fault):
        controls.read(tmp_path)


def test_what_is_done_while_nothing_is_pressed():
    def one_hot(*pairs):
        return Controls("game", "one_hot", tuple(Control(name, keys) for name, keys in pairs))

    assert controls.procgen("maze").idle == coinrun.NOOP
    assert PAD.idle == 0
    key = ("KeyA",)
    assert one_hot(("LEFT", ()), ("stay", ("KeyS",))).idle == 1
    assert one_hot(("LEFT", key), ("DRIFT", ()), ("FLOAT", ())).idle == 1
    assert one_hot(("LEFT", key), ("RIGHT", ("KeyD",))).idle == coinrun.NO_ACTION


def test_the_futures_that_are_compared():
    assert controls.procgen("maze").futures == coinrun.MEANINGFUL_ACTIONS
    assert PAD.futures == (0, 1, 2, 4)
    full = Controls("pad", "buttons", tuple(Control(name) for name in "ABCDEFGH"))
    assert full.futures == (0, 1, 2, 4, 8, 16, 32, 64)
    dice = Controls("dice", "one_hot", (Control("ROLL", ("KeyR",)), Control("STAY")))
    assert dice.futures == (1, 0)
    ways = Controls("ways", "one_hot", (Control("L", ("KeyA",)), Control("R", ("KeyD",))))
    assert ways.futures == (0, 1)
