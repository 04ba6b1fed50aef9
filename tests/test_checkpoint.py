"""Checkpoints: whole, exact, and recognised when they are not."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY

from cwm_jax import checkpoint, training
from cwm_jax.checkpoint import Checkpoints, Retention
from cwm_jax.errors import UserError

OPTIM = training.OptimizerConfig(
    lr=1e-3, weight_decay=0.01, warmup_steps=3, grad_clip=1.0, ema_decay=0.9
)
CONFIG = {"model": dataclasses.asdict(TINY), "lr": 1e-3}


def state_at(step, seed=0):
    state = training.init_state(TINY, OPTIM, seed)
    different = jax.tree.map(lambda x: x + step, state.ema)
    return state._replace(step=jnp.int32(step), ema=different)


@pytest.fixture
def run(tmp_path):
    with Checkpoints(tmp_path, retention=Retention(2)) as saved:
        for step in (3, 7, 11):
            saved.save(state_at(step), data_position=f"place {step}", config=CONFIG)
    return tmp_path


def test_state_and_position_come_back_exactly(run):
    with Checkpoints(run, retention=Retention(2)) as saved:
        assert saved.latest() == 11
        assert saved.newest() == (11, "place 11", CONFIG, False)
        state = saved.restore(jax.eval_shape(lambda: state_at(0)))
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and bool((a == b).all()), state, state_at(11)
    )
    assert jax.tree.all(same)


def test_old_ones_go(run):
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert {"7", "11"} <= names
    assert "3" not in names


def test_loading_needs_the_folder_alone(run):
    for path in (run, run / "checkpoints", run / "checkpoints" / "11"):
        trained = checkpoint.load(path)
        assert trained.network == TINY
        assert trained.step == 11
        assert trained.config == CONFIG
        assert all((trained.params[k] == v).all() for k, v in state_at(11).ema.items())
    assert checkpoint.load(run, step=7).step == 7


def test_without_an_average_the_parameters_are_loaded(tmp_path):
    state = state_at(2)._replace(ema=None)
    with Checkpoints(tmp_path, retention=Retention(1)) as saved:
        saved.save(state, data_position="", config=CONFIG)
    loaded = checkpoint.load(tmp_path).params
    assert all((loaded[k] == v).all() for k, v in state.params.items())


def test_what_is_no_checkpoint_is_named(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    half = run / "checkpoints" / "13.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "11", half)
    for path, told in (
        (run / "nowhere", "no checkpoint folder at"),
        (empty, "no checkpoint in"),
    ):
        with pytest.raises(UserError, match=told):
            checkpoint.load(path)
    assert checkpoint.load(run).step == 11  # an unfinished save does not count
    with pytest.raises(UserError, match="no checkpoint of step 5"):
        checkpoint.load(run, step=5)


@pytest.mark.parametrize("lost", ["ema", "meta/metadata", "ema/manifest.ocdbt", "ema/d"])
def test_a_checkpoint_with_a_part_missing_is_named(run, lost):
    step = run / "checkpoints" / "11"
    victim = step / lost
    if lost == "ema":
        shutil.rmtree(victim)
        shutil.rmtree(step / "params")
    elif victim.is_dir():
        shutil.rmtree(victim)
    else:
        victim.unlink()
    with pytest.raises(UserError, match="11 is not a whole checkpoint"):
        checkpoint.load(step)


def test_a_foreign_config_is_named(run):
    meta = run / "checkpoints" / "11" / "meta" / "metadata"
    changed = json.loads(meta.read_text())
    changed["config"]["model"]["hidden_size"] = 48
    meta.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="11"):
        checkpoint.load(run)


def test_another_network_does_not_continue_it(run):
    wide = dataclasses.replace(TINY, hidden_size=48)
    like = jax.eval_shape(lambda: training.init_state(wide, OPTIM, 0))
    with (
        Checkpoints(run, retention=Retention(2)) as saved,
        pytest.raises(UserError, match="cannot continue from"),
    ):
        saved.restore(like)
