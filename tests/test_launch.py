"""The launch files start programs with flags that they have, and name what there is."""

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from absl.testing import flagsaver

from cwm_jax.programs import play, train
from hatch_build import SHIPPED

ROOT = Path(__file__).parents[1]
SLURM, KUBERNETES = ROOT / "launch" / "slurm.sbatch", ROOT / "launch" / "kubernetes.yaml"

# Stubs of the cluster's own programs.
STUBS = {
    "scontrol": 'case $1 in show) printf "node7\\nnode8\\n";; *) echo "$@" >> "$CALLS";; esac',
    "srun": 'shift; SLURM_PROCID=1 exec "$@"',
    "python": 'printf "%s\\n" "$@" > "$ARGV"; exit "$CODE"',
}


@pytest.fixture
def parsed(monkeypatch):
    """parsed(words): the values of train.py's flags, once it has accepted the command line."""

    def parse(words):
        script, *rest = words
        assert script == "train.py"
        words = train._with_config_found(words)
        _, *rest = words
        monkeypatch.setattr(sys, "argv", words)  # where a config's own flags are looked for
        assert train.flags.FLAGS([script, *rest]) == [script]  # all arguments are flags
        return train.flags.FLAGS

    with flagsaver.flagsaver():
        yield parse


def place(known):
    names = ("launcher", "coordinator", "num_processes", "process_id")
    return tuple(known[name].value for name in names)


def submitted(tmp_path, code, *words):
    """Runs the Slurm script's own lines where the cluster's programs are stubs: its result."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "ARGV": str(tmp_path / "argv"),
        "CALLS": str(tmp_path / "calls"),
        "CODE": str(code),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "41",
    }
    command = ["bash", str(SLURM), *words]
    return subprocess.run(command, env=environment, timeout=60, check=False, capture_output=True)


def test_the_slurm_script_is_sound_bash():
    subprocess.run(["bash", "-n", str(SLURM)], check=True)


def test_the_slurm_script_starts_the_training_program(tmp_path, parsed):
    words = ["--config", "configs/small.py", "--workdir", "runs/a b"]
    assert submitted(tmp_path, 0, *words).returncode == 0
    known = parsed((tmp_path / "argv").read_text().splitlines())
    assert place(known) == ("flags", "node7:51234", 2, 1)
    assert known["workdir"].value == "runs/a b"
    assert known["config"].value.optimizer.lr > 0
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(("code", "calls"), [(75, "requeue 41\n"), (2, None)])
def test_the_slurm_script_is_requeued_only_after_a_preemption(tmp_path, code, calls):
    assert submitted(tmp_path, code, "--config", "configs/small.py").returncode == code
    found = tmp_path / "calls"
    assert (found.read_text() if found.exists() else None) == calls


def test_the_kubernetes_job_starts_the_training_program(parsed):
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["cwm", "train"]
    args = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]]
    known = parsed(["train.py", *args])
    address = f"{job['metadata']['name']}-0.{service['metadata']['name']}:51234"
    assert place(known) == ("flags", address, job["spec"]["completions"], 1)
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    assert known["config"].value.data.dir == "/data/coinrun"


@pytest.mark.parametrize("wrong", ["--num_procs=2", "--config.data.folder=x"])
def test_an_unknown_flag_is_detected(parsed, wrong):
    with pytest.raises((train.flags.Error, AttributeError, KeyError), match=r"num_procs|folder"):
        parsed(["train.py", "--config=configs/small.py", wrong])


def dockerfile(path):
    """(instruction, rest) of each line, continued lines joined."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("folder", [".", "launch/space"])
def test_the_dockerfiles_use_what_is_there_and_run_sound_shell(folder):
    known = {"ARG", "FROM", "RUN", "USER", "WORKDIR", "COPY", "ENV", "EXPOSE", "ENTRYPOINT", "CMD"}
    lines = dockerfile(ROOT / folder / "Dockerfile")
    assert {word for word, _ in lines} <= known
    for word, rest in lines:
        if word == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
        if word in ("ENTRYPOINT", "CMD"):
            assert json.loads(rest)


def test_the_image_plays(parsed):
    lines = dict(dockerfile(ROOT / "Dockerfile"))
    assert json.loads(lines["ENTRYPOINT"]) == ["cwm"]
    name, *flags = json.loads(lines["CMD"])
    assert name == "play"
    assert play.parser().parse_args(flags).host == "0.0.0.0"
    ignored = (ROOT / ".dockerignore").read_text().split()
    for needed in (*SHIPPED, "cwm_jax", "pyproject.toml", "README.md", "LICENSE"):
        assert needed.split("/")[0] not in ignored


def test_the_devcontainer_builds_that_image():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    arguments = {
        rest.split("=")[0] for word, rest in dockerfile(ROOT / "Dockerfile") if word == "ARG"
    }
    assert set(container["build"]["args"]) <= arguments
    assert (
        ROOT / ".devcontainer" / container["build"]["dockerfile"]
    ).resolve() == ROOT / "Dockerfile"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(container["build"]["args"]["EXTRA"].split(",")) <= {"cpu", *extras}


def test_the_space_starts_the_page_on_its_port(monkeypatch):
    front = yaml.safe_load((ROOT / "launch/space/README.md").read_text().split("---")[1])
    assert front["sdk"] == "docker"
    monkeypatch.setenv("SPACE_HOST", "you-coinrun.example.org")
    monkeypatch.setenv("CWM_CHECKPOINT", "hf://you/model")
    words = runpy.run_path(str(ROOT / "launch/space/app.py"))["words"]()
    args = play.parser().parse_args(words[1:])
    assert (args.host, args.port, args.players) == ("0.0.0.0", front["app_port"], 2)
    assert (args.checkpoint, args.address) == ("hf://you/model", "https://you-coinrun.example.org")


def test_the_workflow_calls_make_targets_that_there_are():
    flow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert flow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    commands = [s["run"] for job in flow["jobs"].values() for s in job["steps"] if "run" in s]
    targets = {command.split()[1] for command in commands if command.startswith("make ")}
    assert targets == {"install", "lint", "test", "docs"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_hooks_of_pre_commit_are_sound():
    clientlib = pytest.importorskip("pre_commit.clientlib")
    config = clientlib.load_config(str(ROOT / ".pre-commit-config.yaml"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {hook["id"] for hook in hooks} >= {"ruff-format", "ruff-check"}
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks)
