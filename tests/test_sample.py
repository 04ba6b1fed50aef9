"""sample.py reports wrong flags at once, and writes what it names."""

import sys

import pytest

from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.programs import sample


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """The error that the program's flags cause before a model is opened."""

    def run(words):
        for module, name in ((pretrained, "unless"), (formats, "open_sampler")):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a model was opened"))
        monkeypatch.setattr(sys, "argv", ["sample.py", *words.split()])
        with pytest.raises(SystemExit) as stopped:
            sample.main()
        assert stopped.value.code == 2
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--n-samples 0", "--n-samples 0: must be 1 or more"),
        ("--n-prompt 0", "--n-prompt 0: must be 1 or more"),
        ("--n-prompt 4 --frames 4", "is left to generate; must be more than --n-prompt 4"),
        ("--stabilization-level -3", "--stabilization-level -3: must be 1…1000"),
        ("--stabilization-level 1001", "--stabilization-level 1001: must be 1…1000"),
        ("--noise-levels 999,,3", "--noise-levels 999,,3: expected falling levels"),
        ("--ddim-steps 2 --noise-levels 999,3", "--ddim-steps 2 and --noise-levels 999,3 both"),
        ("--pattern 3,,4", "--pattern 3,,4: expected action numbers"),
        ("--pattern= --action-source pattern", "--pattern : expected action numbers"),
        ("--pattern 7,8 --action-source random", "not used with --action-source random"),
        ("--action-source pattern", "--action-source pattern: also give the pattern"),
        ("--output x.png", "--output x.png: its name must end in .mp4 or .gif"),
        ("--output x", "--output x: its name must end in .mp4 or .gif"),
        ("--output same.png --grid same.png", "--output same.png: its name must end in .mp4"),
        ("--grid x.jpg", "--grid x.jpg: its name must end in .png"),
        ("--output y.mp4 --save-npz y.mp4", "--save-npz y.mp4: its name must end in .npz"),
        ("--grid /dev/null/x.png", "cannot write /dev/null/x.png"),
        ("--save-npz /dev/null/x.npz", "cannot write /dev/null/x.npz"),
    ],
)
def test_a_wrong_flag_is_reported_before_a_model_is_opened(words, message, refused):
    assert message in refused(words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", ("gt", [])),
        ("--action-source random", ("random", [])),
        ("--pattern 7,8", ("pattern", [7, 8])),
        ("--pattern 7 --action-source pattern", ("pattern", [7])),
    ],
)
def test_a_pattern_is_a_source_of_actions(words, expected):
    assert sample._actions(sample.parser().parse_args(words.split())) == expected
