"""Programs report a wrong flag at once, before they open a model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import debug
from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.errors import UserError
from cwm_jax.experiment.settings import Settings
from cwm_jax.programs import evaluate, play, sample
from cwm_jax.programs.evaluate import measure
from cwm_jax.tools import (
    check,
    collect,
    convert_torch,
    doctor,
    export,
    hub,
    pack,
    pocket,
    preview,
)


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        (sample, "--seed -1", "seed=-1: must be 0…4294967295"),
        (sample, "--seed 4294967296", "seed=4294967296: must be"),
        (sample, "--fps 0 --output x.gif", "--fps 0: must be 1…1000"),
        (sample, "--fps -3", "--fps -3: must be"),
        (sample, "--fps 9999999999", "--fps 9999999999: must be"),
        (evaluate, "--seed -1", "seed=-1: must be"),
        (evaluate, "--kvd 24", "--kvd 24: too few clips"),
        (evaluate, "--seeds 1", "seeds=1: a spread needs 2 or more"),
        (evaluate, "--ddim-steps 0", "ddim_steps must be 1…1000, not 0"),
        (evaluate, "--clips -1", "--clips -1: must be 0 (all that are long enough) or more"),
        (evaluate, "--n-prompt 4,0", "--n-prompt 0: must be 1 or more"),
        (evaluate, "outcomes --data x --seed -1", "seed=-1: must be"),
        (evaluate, "outcomes --data x --records -1", "--records -1: must be 0 (all that are"),
        (evaluate, "outcomes --data x --ahead -1", "--ahead -1: must be 0 (no rollouts) or more"),
        (evaluate, "outcomes --data x --ddim-steps 0", "ddim_steps must be 1…1000, not 0"),
        (evaluate, "settings --seed -1", "seed=-1: must be"),
        (evaluate, "settings --steps 1,x", "--steps 1,x: expected whole numbers, such as 1,2,4"),
        (evaluate, "settings --steps 1,0", "ddim_steps must be 1…1000, not 0"),
        (evaluate, "closed-loop --seed -1", "seed=-1: must be"),
        (evaluate, "closed-loop --levels 0", "levels=0: must be 1 or more"),
        (evaluate, "closed-loop --frames 0", "1 of 0 frames given leave none to generate"),
        (evaluate, "closed-loop --frames 4 --n-prompt 4", "4 of 4 frames given"),
    ],
)
def test_a_wrong_number_is_reported_before_a_model_is_opened(
    program, words, message, monkeypatch, capsys
):
    for module, name in ((pretrained, "unless"), (formats, "open_sampler")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a model was opened"))
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "--output FILE/x.json",
        "--output FOLDER",
        "--output FOLDER/x.json --report FILE",
        "outcomes --data x --output FILE/x.json",
        "settings --output FILE",
        "closed-loop --output FILE/x.mp4",
    ],
)
def test_an_output_that_cannot_be_written_is_reported_before_a_model_is_opened(
    words, tmp_path, monkeypatch, capsys
):
    for module, name in ((pretrained, "unless"), (formats, "open_sampler")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a model was opened"))
    (tmp_path / "file").write_text("no folder")
    words = words.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert stopped.value.code == 2
    assert re.search(f"error: cannot write .*{tmp_path}", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_numbers_are_written_even_if_the_report_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cwm_jax.evaluation.html_report", None)  # cannot be imported
    monkeypatch.delattr("cwm_jax.evaluation.html_report", raising=False)
    measure.write_report(tmp_path, None, None)
    printed = capsys.readouterr()
    assert "no report was written: " in printed.err
    assert not printed.out


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (sample, "--output gs://b/x.mp4"),
        (sample, "--data gs://b/x"),
        (play, "--checkpoint gs://b/x"),
        (evaluate, "--report s3://b/x"),
        (evaluate, "--data s3://b/x"),
        (evaluate, "compare gs://b/a.json"),
        (evaluate, "closed-loop --output gs://b/x.mp4"),
        (check, "gs://b/x"),
        (check, "data --repair gs://b/x"),
        (collect, "--output gs://b/x"),
        (convert_torch, "gs://b/a.pt runs/x"),
        (doctor, "--data gs://b/x"),
        (export, "runs/x --output gs://b/x"),
        (hub, "download --to gs://b/x"),
        (pack, "videos --keys keys.toml --output gs://b/x"),
        (pocket, "--workdir gs://b/x"),
        (preview, "--output gs://b/x.mp4"),
    ],
)
def test_an_address_is_refused_for_every_file_and_folder(program, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program.__name__, *words.split()])
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code == 2
    assert "URLs are not supported" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["data.dir", "init_from", "distil_from"])
def test_settings_that_name_a_folder_take_a_tilde_and_no_url(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = debug.get_config()
    config.update_from_flattened_dict({name: "~/x", "ddim_steps": 1})
    settings = Settings.from_config(config.to_dict())
    held = settings.data.dir if name == "data.dir" else getattr(settings, name)
    assert held == str(tmp_path / "x")
    config.update_from_flattened_dict({name: "gs://b/x"})
    with pytest.raises(UserError, match=rf"config\.{name} gs://b/x: URLs"):
        Settings.from_config(config.to_dict())


def test_training_creates_no_folder_named_like_a_url(tmp_path):
    root = Path(__file__).parents[1]
    words = [str(root / "train.py"), f"--config={root}/configs/debug.py", "--workdir=s3://b/run"]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "--workdir s3://b/run: URLs are not supported" in done.stderr
