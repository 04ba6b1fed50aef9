"""Programs tell a wrong flag at once, before they open a model."""

import sys

import pytest

import evaluate
import sample
from cwm_jax.checkpoints import formats, pretrained


@pytest.mark.parametrize(
    ("program", "words", "told"),
    [
        (sample, "--seed -1", "seed=-1: must be 0…4294967295"),
        (sample, "--seed 4294967296", "seed=4294967296: must be"),
        (sample, "--fps 0 --output x.gif", "--fps 0: must be 1…1000"),
        (sample, "--fps -3", "--fps -3: must be"),
        (sample, "--fps 9999999999", "--fps 9999999999: must be"),
        (evaluate, "--seed -1", "seed=-1: must be"),
        (evaluate, "settings --seed -1", "seed=-1: must be"),
        (evaluate, "settings --steps 1,x", "--steps 1,x: wanted whole numbers, such as 1,2,4"),
        (evaluate, "settings --steps 1,0", "ddim_steps must be 1…1000, not 0"),
        (evaluate, "closed-loop --seed -1", "seed=-1: must be"),
        (evaluate, "closed-loop --levels 0", "levels=0: must be 1 or more"),
        (evaluate, "closed-loop --frames 0", "1 of 0 frames given leave none to draw"),
        (evaluate, "closed-loop --frames 4 --n-prompt 4", "4 of 4 frames given"),
    ],
)
def test_a_wrong_number_is_told_before_a_model_is_opened(program, words, told, monkeypatch, capsys):
    for module, name in ((pretrained, "unless"), (formats, "open_sampler")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a model was asked for"))
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
