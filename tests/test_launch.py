"""The launch files start train.py with flags that it has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from absl.testing import flagsaver

import train

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
    assert container["command"] == ["python", "train.py"]
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
