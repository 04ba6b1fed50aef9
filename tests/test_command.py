"""`cwm`: completion from the flags that programs have, and the project's files by their names."""

import subprocess

import pytest

from cwm_jax import shipped
from cwm_jax.errors import UserError
from cwm_jax.programs import command, completion, train


@pytest.fixture(scope="module")
def whole():
    return completion.everything()


def parsers_of(parser):
    (jobs,) = (a for a in parser._actions if a.dest == "subcommand")
    return jobs.choices


def flags_of(parser):
    return {flag for action in parser._actions for flag in action.option_strings}


def test_completion_knows_every_program_and_its_flags(whole):
    programs = parsers_of(whole)
    assert list(programs) == list(command.available())
    assert flags_of(programs["train"]) >= {"--config", "--workdir", "--dry-run", "--launcher"}
    assert flags_of(programs["sample"]) >= {"--ddim-steps", "--checkpoint"}
    assert flags_of(programs["export"]) >= {"--format"}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_is_sound_and_completes_values_and_files(whole, shell, monkeypatch, capsys):
    monkeypatch.setattr(completion, "everything", lambda: whole)
    completion.main([shell])
    script = capsys.readouterr().out
    for word in ("closed-loop", "safetensors", "--noise-levels"):
        assert word in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        complete = (
            f"{script}\nCOMP_WORDS=(cwm sa); COMP_CWORD=1; _shtab_cwm; echo ${{COMPREPLY[@]}}"
        )
        done = subprocess.run(["bash"], input=complete, text=True, capture_output=True, check=True)
        assert done.stdout.split() == ["sample"]


def test_a_config_is_named_by_a_word_or_a_path_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = str(shipped.root() / "configs" / "small.py")
    assert train._config_file("small") == train._config_file("configs/small.py") == small
    assert train._config_file("small:8") == f"{small}:8"
    words = ["cwm train", "--config", "small", "--config.model.depth=2", "--workdir", "config"]
    assert train._with_config_found(words) == [*words[:2], small, *words[3:]]
    (tmp_path / "small").write_text("my own")
    assert train._config_file("small") == "small"
    with pytest.raises(UserError, match=r"--config smal: there is no such file.*small"):
        train._config_file("smal")


def test_own_files_go_before_those_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.found("checkpoints/pocket") == shipped.model()
    assert shipped.found("assets/coinrun/val") == shipped.data() / "val"
    for other in ("checkpoints/mine", "assets", "../assets/coinrun", "README.md"):
        assert str(shipped.found(other)) == other
    (tmp_path / "checkpoints/pocket").mkdir(parents=True)
    assert str(shipped.found("checkpoints/pocket")) == "checkpoints/pocket"
