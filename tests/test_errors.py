"""What a person sees when something is wrong: words, never a traceback."""

import pytest

from cwm_jax.errors import UserError, shown_to_user


@pytest.mark.parametrize(
    ("raised", "told", "code"),
    [
        (UserError("runs/x is no folder"), "error: runs/x is no folder\n", 2),
        (KeyboardInterrupt(), "\nbroken off\n", 130),
    ],
)
def test_a_mistake_and_ctrl_c_end_a_program_in_words(raised, told, code, capsys):
    with pytest.raises(SystemExit) as ended, shown_to_user():
        raise raised
    assert ended.value.code == code
    assert capsys.readouterr().err == told


def test_our_own_faults_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), shown_to_user():
        raise ZeroDivisionError
