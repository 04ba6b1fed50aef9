"""Action lists are read as spreadsheets and loggers write them; what is unclear is named."""

import numpy as np
import pytest

from cwm_jax.controls import Control, Controls
from cwm_jax.data import action_lists
from cwm_jax.errors import UserError

WALK = Controls("g", "one_hot", tuple(map(Control, ("STAY", "LEFT", "RIGHT"))))
PAD = Controls("p", "buttons", tuple(map(Control, ("A", "LEFT", "RIGHT"))))
MARK = "\ufeff"


@pytest.mark.parametrize(
    ("name", "text", "known", "actions"),
    [
        ("a.csv", MARK + "action\r\n0\r\n1\r\n", WALK, [0, 1]),
        ("a.csv", MARK + "A,LEFT,RIGHT\r\n0,1,0\r\n", PAD, [2]),
        ("a.csv", "A;LEFT;RIGHT\n0;1;1\n", PAD, [6]),
        ("a.csv", "sep=;\r\nframe;action\r\n0;LEFT\r\n", WALK, [1]),
        ("a.csv", "frame\taction\n0\t2\n", WALK, [2]),
        ("a.csv", '"A", "LEFT", "RIGHT"\n0, 1 , 0\n', PAD, [2]),
        ("a.csv", " Action \nleft\n Right\n", WALK, [1, 2]),
        ("a.csv", ",a,left,right\n0,TRUE,false,1.0\n", PAD, [5]),
        ("a.csv", "\naction\n\n0\n\n1.0\n\n", WALK, [0, 1]),
        ("a.csv", "action,note\n1,\n2\n,\n,\n", WALK, [1, 2]),
        ("a.csv", "action\r0\r1\r", WALK, [0, 1]),
        ("A.CSV", "action\n1\n", WALK, [1]),
        ("a.csv", "action\nLEFT\nA+RIGHT\nNOOP\n3\n", PAD, [2, 5, 0, 3]),
        ("a.jsonl", MARK + '{"action": 1}\n', WALK, [1]),
        ("a.jsonl", '{"action": "LEFT", "note": "a\u2028b\x85"}\n', WALK, [1]),
        ("a.jsonl", '{"Action": 2.0}\r\n\r\n{"Action": "stay"}', WALK, [2, 0]),
        ("a.jsonl", '{"Buttons": ["a", "RIGHT"]}', PAD, [5]),
        ("a.jsonl", '{"a": true, "Left": 0, "RIGHT": 1.0}', PAD, [5]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_clear_lists_are_read(tmp_path, name, text, known, actions, encoding):
    if encoding == "utf-16" and not text.startswith(MARK):
        pytest.skip("without its mark")
    (tmp_path / name).write_bytes(text.removeprefix(MARK).encode("utf-16") if encoding == "utf-16"
                                  else text.encode())  # fmt: skip
    assert action_lists.read(tmp_path / name, known).tolist() == actions


@pytest.mark.parametrize(
    ("name", "text", "known", "fault"),
    [
        ("a.csv", "action\n0\n\n\n9\n", WALK, "line 5: the action is '9'"),
        ("a.csv", 'note,action\n"a\nb",1\nc,9\n', WALK, "line 4: the action is '9'"),
        ("a.csv", "time,step\n0,1\n", WALK, "'time', 'step'"),
        ("a.csv", "a|b|c\n0|1|0\n", PAD, "'a|b|c'"),
        ("a.csv", "time,action\n0,5,1\n", WALK, "line 2 has 3 values under 2 columns"),
        ("a.csv", "time,action\n,\n5,1\n", WALK, "line 2 is empty"),
        ("a.csv", "action,action\n0,1\n", WALK, "two columns are named 'action'"),
        ("a.csv", "time,action\n1\n", WALK, "line 2: the action is ''"),
        ("a.csv", "action\nHOP\n", PAD, "line 2: the action is 'HOP'"),
        ("a.csv", "action\n1_0\n", Controls("g", "one_hot", WALK.controls * 4), "'1_0'"),
        ("a.csv", "A,LEFT,RIGHT\n0,2,0\n", PAD, "button 'LEFT' is '2'"),
        ("a.jsonl", '{"action": 1}\n\n{"action": }', WALK, "line 3 is no JSON"),
        ("a.jsonl", '{"action": 0.5}', WALK, "the action is 0.5"),
        ("a.jsonl", '{"keys": []}', PAD, "'keys'"),
    ],
)
def test_unclear_lists_are_reported(tmp_path, name, text, known, fault):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        action_lists.read(tmp_path / name, known)
    assert fault in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_a_list_in_another_encoding_is_reported_with_a_fix(tmp_path):
    (tmp_path / "a.csv").write_bytes("action,größe\n1,2\n".encode("latin-1"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        action_lists.read(tmp_path / "a.csv", WALK)


def test_names_that_differ_only_in_case_are_distinguished(tmp_path):
    known = Controls("p", "buttons", tuple(map(Control, ("a", "A", "Action"))))
    (tmp_path / "a.csv").write_text("a,A,Action\n1,0,0\n0,1,0\n0,0,1\n")
    assert action_lists.read(tmp_path / "a.csv", known).tolist() == [1, 2, 4]
    (tmp_path / "a.csv").write_text("a,ACTION\n1,0\n")
    with pytest.raises(UserError, match="'A' is missing"):
        action_lists.read(tmp_path / "a.csv", known)


def test_arrays_of_whole_floats_and_of_one_column_are_read(tmp_path):
    for array in (np.array([0.0, 2.0]), np.array([[0], [2]])):
        np.savez(tmp_path / "a.npz", actions=array)
        assert action_lists.read(tmp_path / "a.npz", WALK).tolist() == [0, 2]
    np.savez(tmp_path / "a.npz", actions=np.array([0.0, np.nan]))
    with pytest.raises(UserError, match="float64"):
        action_lists.read(tmp_path / "a.npz", WALK)
