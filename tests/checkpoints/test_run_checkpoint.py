"""Checkpoints: complete, exact, and damage is detected."""

import dataclasses
import functools
import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import pytest
from tiny_network import TINY

from cwm_jax.checkpoints import checksums, migration, run_checkpoint
from cwm_jax.checkpoints.run_checkpoint import Checkpoints, Retention
from cwm_jax.errors import UserError
from cwm_jax.training import train_step

OPTIM = train_step.OptimizerConfig(
    lr=1e-3, weight_decay=0.01, warmup_steps=3, grad_clip=1.0, ema_decay=0.9
)
CONFIG = {"model": dataclasses.asdict(TINY), "lr": 1e-3}


@functools.cache
def fresh():
    return train_step.init_state(TINY, OPTIM, 0)


def state_at(step):
    state = fresh()
    different = jax.tree.map(lambda x: x + step, state.ema)
    return state._replace(step=jnp.int32(step), ema=different)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    with Checkpoints(folder, retention=Retention(2)) as saved:
        for step in (3, 7, 11):
            saved.save(
                state_at(step), data_position=f"place {step}", config=CONFIG, seconds=step / 2
            )
    return folder


@pytest.fixture
def run(tmp_path, written):
    return shutil.copytree(written, tmp_path, dirs_exist_ok=True)


def test_state_and_position_come_back_exactly(run):
    with Checkpoints(run, retention=Retention(2)) as saved:
        assert saved.latest() == 11
        assert saved.newest() == (11, "place 11", migration.migrated(CONFIG), False, 5.5)
        state = saved.restore(jax.eval_shape(lambda: state_at(0)))
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and bool((a == b).all()), state, state_at(11)
    )
    assert jax.tree.all(same)


def test_old_checkpoints_are_deleted(run):
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert {"7", "11"} <= names
    assert "3" not in names


def test_loading_needs_the_folder_alone(run):
    for path in (run, run / "checkpoints", run / "checkpoints" / "11"):
        trained = run_checkpoint.load(path)
        assert trained.network == TINY
        assert trained.step == 11
        assert trained.config == migration.migrated(CONFIG)
        assert all((trained.params[k] == v).all() for k, v in state_at(11).ema.items())
    assert run_checkpoint.load(run, step=7).step == 7


def test_without_an_average_the_parameters_are_loaded(tmp_path):
    state = state_at(2)._replace(ema=None)
    with Checkpoints(tmp_path, retention=Retention(1)) as saved:
        saved.save(state, data_position="", config=CONFIG)
    loaded = run_checkpoint.load(tmp_path).params
    assert all((loaded[k] == v).all() for k, v in state.params.items())


def test_paths_without_a_checkpoint_are_named(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    half = run / "checkpoints" / "13.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "11", half)
    for path, message in (
        (run / "nowhere", "no checkpoint folder at"),
        (empty, "no checkpoint in"),
    ):
        with pytest.raises(UserError, match=message):
            run_checkpoint.load(path)
    assert run_checkpoint.load(run).step == 11  # an unfinished save does not count
    with pytest.raises(UserError, match="no checkpoint of step 5"):
        run_checkpoint.load(run, step=5)


@pytest.mark.parametrize("lost", ["ema", "meta/metadata", "ema/manifest.ocdbt", "ema/d"])
def test_a_checkpoint_with_a_part_missing_is_named(run, lost):
    step = run / "checkpoints" / "11"
    victim = step / lost
    if victim.is_dir():
        shutil.rmtree(victim)
    else:
        victim.unlink()
    with pytest.raises(UserError, match="11 is not a whole checkpoint"):
        run_checkpoint.load(step)


def test_a_foreign_config_is_named(run):
    meta = run / "checkpoints" / "11" / "meta" / "metadata"
    changed = json.loads(meta.read_text())
    changed["config"]["model"]["hidden_size"] = 48
    meta.write_text(json.dumps(changed))
    checksums.write(run / "checkpoints" / "11")
    with pytest.raises(UserError, match="11"):
        run_checkpoint.load(run)


def test_another_network_does_not_continue_it(run):
    wide = dataclasses.replace(TINY, hidden_size=48)
    like = jax.eval_shape(lambda: train_step.init_state(wide, OPTIM, 0))
    with (
        Checkpoints(run, retention=Retention(2)) as saved,
        pytest.raises(UserError, match="cannot continue from"),
    ):
        saved.restore(like)


def test_one_checkpoint_is_read_whole_and_its_run_is_unchanged(run):
    kept = run / "checkpoints"
    (kept / "13.orbax-checkpoint-tmp").mkdir()
    (kept / "11" / "meta" / "metadata").write_text("damaged")
    before = {p: p.is_file() and p.read_bytes() for p in run.rglob("*")}
    like = jax.eval_shape(lambda: state_at(0))
    state = run_checkpoint.load_state(kept / "7", like)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, state_at(7)))
    assert {p: p.is_file() and p.read_bytes() for p in run.rglob("*")} == before
    with pytest.raises(UserError, match="11 is not a whole checkpoint: meta"):
        run_checkpoint.load_state(kept / "11", like)
    shutil.rmtree(kept / "7" / "optimizer")  # as in an export
    checksums.write(kept / "7")
    with pytest.raises(UserError, match="7 is not a whole checkpoint"):
        run_checkpoint.load_state(kept / "7", like)


def flip(path, place=-3):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x10
    path.write_bytes(raw)


def test_sha256sum_agrees(run):
    """The listing is complete and is what the standard program checks."""
    folder = run / "checkpoints" / "11"
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    late = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # hold only the time of completion
    assert present - listed == {"SHA256SUMS"} | late
    command = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=folder, check=False).returncode == 0


@pytest.mark.parametrize("part", ["params", "optimizer", "meta"])
def test_a_flipped_bit_is_found_and_the_run_resumes_from_the_previous_checkpoint(run, part, capsys):
    root = run / "checkpoints"
    flip(max((root / "11" / part).rglob("*"), key=lambda p: p.is_file() and p.stat().st_size))
    with Checkpoints(run, retention=Retention(2)) as saved:
        assert saved.newest().step == 7
        state = saved.restore(jax.eval_shape(lambda: state_at(0)))
        assert int(state.step) == 7
        message = capsys.readouterr().err
        assert f"{root / '11'}: {part}/" in message
        saved.save(state_at(11), data_position="again", config=CONFIG)  # its name is free
    assert run_checkpoint.load(run).step == 11
    assert (root / "11.damaged").is_dir()


def test_a_missing_file_and_missing_sums_are_found(run):
    root = run / "checkpoints"
    (root / "11" / "SHA256SUMS").unlink()
    next((root / "7" / "params").rglob("manifest.ocdbt")).unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged") as raised:
        Checkpoints(run, retention=Retention(2))
    assert "SHA256SUMS" in str(raised.value)
    assert "manifest.ocdbt is missing" in str(raised.value)
    assert {"7", "11"} <= {p.name for p in root.iterdir()}  # nothing is taken away


def test_sampling_uses_the_previous_checkpoint_and_reports_it(run, capsys):
    flip(run / "checkpoints" / "11" / "ema" / "manifest.ocdbt")
    assert run_checkpoint.load(run).step == 7
    assert "11 is not a whole checkpoint: ema/manifest.ocdbt" in capsys.readouterr().err
    with pytest.raises(UserError, match="11 is not a whole checkpoint"):
        run_checkpoint.load(run, step=11)


def test_malicious_checksum_paths_are_never_opened(run):
    folder = run / "checkpoints" / "11"
    for line in ("../../../secret", "/etc/passwd", "params/../../secret"):
        (folder / "SHA256SUMS").write_text(f"{'0' * 64}  {line}\n")
        fault = checksums.fault(folder)
        assert fault in ("SHA256SUMS is damaged", f"{line} is missing")


def test_retention(tmp_path):
    losses = {2: 0.5, 4: 0.1, 6: 0.3, 8: None, 10: 0.2, 12: None, 14: 0.4}
    with Checkpoints(tmp_path, retention=Retention(2, every=6, best=2)) as saved:
        for step, loss in losses.items():
            saved.save(state_at(step), data_position="", config=CONFIG, val_loss=loss)
    kept = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {"4", "10", "6", "12", "14"}
    with Checkpoints(tmp_path, retention=Retention(1, best=1)) as saved:  # losses were kept too
        saved.save(state_at(16), data_position="", config=CONFIG)
    kept = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {"4", "16"}


def test_a_failed_save_is_reported_and_leaves_the_others(run, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    root = run / "checkpoints"
    with Checkpoints(run, retention=Retention(2)) as saved:
        with monkeypatch.context() as patch:
            patch.setattr(checksums, "write", full)
            saved.save(state_at(13), data_position="", config=CONFIG)
            assert not saved.settle()
        assert saved.failures == 1
        assert saved.latest() == 11
        assert sorted(p.name for p in root.iterdir()) == ["11", "7"]
        saved.save(state_at(17), data_position="", config=CONFIG)
        assert saved.settle()
    message = capsys.readouterr().err
    assert "step 13 could not be saved" in message
    assert "No space left on device" in message
    assert sorted(p.name for p in root.iterdir()) == ["11", "17"]
    assert run_checkpoint.load(run).step == 17


def test_a_save_that_fails_before_it_begins_counts_as_failed(run, monkeypatch):
    """A full disk may refuse the first folder: this must not count as saved."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with Checkpoints(run, retention=Retention(2)) as saved:
        with monkeypatch.context() as patch:
            patch.setattr(saved._manager, "save", full)
            saved.save(state_at(13), data_position="", config=CONFIG)
        assert not saved.settle(wait=False)
        assert not saved.settle()
        saved.save(state_at(17), data_position="", config=CONFIG)
        assert saved.settle()


def test_a_save_that_orbax_refuses_counts_as_failed(run, capsys):
    with Checkpoints(run, retention=Retention(2)) as saved:
        saved.save(state_at(9), data_position="", config=CONFIG)
        assert not saved.settle()
        assert saved.failures == 1
    assert "step 9 could not be saved" in capsys.readouterr().err


def test_a_checkpoint_under_another_number_is_named(run):
    shutil.copytree(run / "checkpoints" / "7", run / "checkpoints" / "9999")
    with (
        Checkpoints(run, retention=Retention(2)) as saved,
        pytest.raises(UserError, match=r"checkpoints/9999 holds step 7.*kept_7"),
    ):
        saved.newest()
    (run / "checkpoints" / "9999").rename(run / "checkpoints" / "kept_7")
    with Checkpoints(run, retention=Retention(2)) as saved:
        assert saved.newest().step == 11


@pytest.mark.parametrize(
    ("name", "fits"), [("a:b @2 #1 100%20é", True), ("run[0:1]", False), ("run?", False)]
)
def test_a_name_keeps_all_arrays_or_is_refused(tmp_path, name, fits):
    if not fits:
        with pytest.raises(UserError, match="as a pattern: name another folder"):
            Checkpoints(tmp_path / name, retention=Retention(2))
        return
    with Checkpoints(tmp_path / name, retention=Retention(2)) as saved:
        saved.save(state_at(3), data_position="", config=CONFIG)
    assert run_checkpoint.load(tmp_path / name).step == 3
