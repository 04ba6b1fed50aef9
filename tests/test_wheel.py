"""Wheel and sdist: built here, installed into an empty folder, used from another one."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("build")
pytest.importorskip("hatchling")

TINY = ["hidden_size=16", "depth=1", "num_heads=1", "patch_size=32", "max_frames=4", "history=1"]
HELP = """
import contextlib, io, sys
import cwm_jax
from cwm_jax.programs import command
names = [name for name in command.available()]
for name in names:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            command.main([name, "--help"])
    except SystemExit as ended:
        assert not ended.code, (name, ended.code)
    assert f"usage: cwm {name}" in said.getvalue(), (name, said.getvalue())
print(cwm_jax.__file__, *names, sep="\\n")
command.main("check assets/coinrun".split())
command.main("export checkpoints/pocket --format safetensors --output mine.safetensors".split())
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist); the wheel is made of the sdist, so nothing that it needs is missing there."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Where the wheel is; the packages that it needs are those of this environment."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(place), str(built[0])], check=True)
    return place


@pytest.fixture
def run(installed, tmp_path):
    """Runs a program of the installed wheel in an empty folder; returns what it printed."""

    def run(*words, code=0):
        environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
        environment |= {"WANDB_MODE": "disabled", "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def digests(place):
    files = (path for path in sorted(place.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).digest() for path in files}


def test_the_wheel_holds_what_it_needs_and_no_more(built):
    wheel, _ = built
    assert wheel.stat().st_size <= 25e6
    names = zipfile.ZipFile(wheel).namelist()
    for part in ("checkpoints/pocket/model.safetensors", "assets/coinrun/metadata.json"):
        assert f"cwm_jax/_shipped/{part}" in names
    top = {name.split("/")[0] for name in names}
    assert all(name.startswith("cwm_jax") for name in top), top  # takes no other name for itself
    sources = ROOT / "cwm_jax"
    wanted = {p.relative_to(ROOT).as_posix() for p in sources.rglob("*") if p.is_file()}
    assert {name for name in wanted if "__pycache__" not in name} <= set(names)
    assert not [name for name in names if "__pycache__" in name]


def test_every_subcommand_starts_from_any_folder_and_writes_nothing_to_its_own(run, installed):
    before = digests(installed)
    first, *names = (printed := run("-c", HELP)).splitlines()
    assert Path(first).is_relative_to(installed)
    wanted = "train sample play evaluate collect pack preview check export import hub doctor"
    assert set(wanted.split()) <= set(names)
    assert "test: 1 shards, 20 readable records" in printed
    assert "of checkpoints/pocket → mine.safetensors" in printed
    settings = [f"--config.model.{size}" for size in TINY]
    settings += ["--config.data.clip_len=4", "--config.data.batch_size=2"]
    cwm = ("-m", "cwm_jax.programs.command")
    printed = run(*cwm, "train", "--config", "debug", "--dry-run", *settings)
    assert "2 clips of 4 frames" in printed
    assert digests(installed) == before


def test_the_command_starts_at_once(run):
    """Without any large library; the measured time is in docs/install.md."""
    heavy = "import sys; from cwm_jax.programs import command; command.main(['--help'])\n"
    heavy += "print([m for m in ('jax', 'numpy', 'flax', 'gradio', 'absl') if m in sys.modules])"
    assert run("-c", heavy).endswith("[]\n")


def test_a_word_that_is_no_subcommand_is_named(run):
    printed = run("-m", "cwm_jax.programs.command", "smaple", code=2)
    assert printed.startswith(
        "error: there is no `cwm smaple` (did you mean sample?); there are train"
    )


def test_a_wheel_without_its_data_files_says_so(run, installed, tmp_path):
    code = f"""
import shutil, sys
shutil.copytree({str(installed / "cwm_jax")!r}, "site/cwm_jax", ignore=lambda *_: ["_shipped"])
sys.path.insert(0, "site")
from cwm_jax import shipped
from cwm_jax.checkpoints import pretrained
from cwm_jax.data import shards
from cwm_jax.errors import UserError
from cwm_jax.programs import train
assert shipped.__file__.startswith(sys.path[0]) or "/site/" in shipped.__file__
for call in (
    lambda: pretrained.unless(None),
    lambda: shards.find_shards("assets/coinrun", "val"),
    lambda: shards.find_shards(shipped.data(), "val"),
    lambda: train._config_file("small"),
):
    try:
        call()
    except UserError as error:
        print(error)
"""
    printed = run("-c", code)
    assert printed.count("this package was built without its ") == 4
    for name in ("checkpoints/pocket", "assets/coinrun", "configs"):
        assert f"{name}" in printed
    assert "install it from a complete wheel" in printed
