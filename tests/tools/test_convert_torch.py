"""Checkpoints of the PyTorch original come across whole, and hostile ones do not run."""

import json
import os
import pickle

import jax
import numpy as np
import pytest
from test_golden import FOLDER, SIZES, arrays, params_of

from cwm_jax.checkpoints import run_checkpoint
from cwm_jax.errors import UserError
from cwm_jax.tools import convert_torch
from cwm_jax.training import train_step

torch = pytest.importorskip("torch", reason="PyTorch is not installed: .pt files cannot be read")


def imported(tmp_path, name):
    convert_torch.convert(FOLDER / name, tmp_path / "run", max_frames=SIZES["max_frames"])
    return tmp_path / "run"


@pytest.mark.parametrize("step", [0, 3])
def test_parameters_and_step(tmp_path, step):
    trained = run_checkpoint.load(imported(tmp_path, f"ckpt_step_{step:07d}.pt"))
    assert trained.step == step
    for name, value in params_of(f"weights_step{step}").items():
        np.testing.assert_array_equal(trained.params[name], value)
    sizes = ("hidden_size", "depth", "num_heads", "patch_size", "num_actions", "max_frames")
    assert {k: getattr(trained.network, k) for k in sizes} == {k: SIZES[k] for k in sizes}


def test_moments_come_across(tmp_path):
    """One more update from the imported state equals torch's AdamW from the same checkpoint."""
    loaded = torch.load(FOLDER / "ckpt_step_0000003.pt", weights_only=True)
    trained = run_checkpoint.load(imported(tmp_path, "ckpt_step_0000003.pt"))
    optim = train_step.OptimizerConfig(
        lr=1e-3, weight_decay=0.01, warmup_steps=0, grad_clip=1e9, ema_decay=0.0
    )
    state = convert_torch.state_of(loaded, trained.network, optim)
    weights = arrays("weights_step3")
    gradient = {k: np.cos(np.arange(v.size)).reshape(v.shape) * 1e-3 for k, v in weights.items()}
    ours = convert_torch.torch_format.from_original(gradient, trained.network)
    update = jax.jit(train_step.optimizer(optim).update)
    updates, _ = update(ours, state.opt_state, state.params)
    stepped = jax.tree.map(lambda p, u: p + u, state.params, updates)

    names = [n for n in loaded["model"] if not (n.startswith("blocks.") and "rotary" in n)]
    tensors = [torch.nn.Parameter(loaded["model"][n]) for n in names]
    adamw = torch.optim.AdamW(tensors, lr=1e-3, weight_decay=0.01)
    loaded["optimizer"]["param_groups"][0]["lr"] = 1e-3
    adamw.load_state_dict(loaded["optimizer"])
    for tensor, name in zip(tensors, names, strict=True):
        if name in gradient:
            tensor.grad = torch.tensor(gradient[name], dtype=torch.float32)
    adamw.step()
    expected = {n: t.detach().numpy() for n, t in zip(names, tensors, strict=True)}
    expected = convert_torch.torch_format.from_original(expected, trained.network)
    for name, value in expected.items():
        np.testing.assert_allclose(stepped[name], value, rtol=0, atol=1e-6, err_msg=name)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for name in ("evil.pt", "old.pt"):
        with pytest.raises(UserError, match=name):
            convert_torch.convert(tmp_path / name, tmp_path / "run", max_frames=8)
    assert not (tmp_path / "ran").exists()


def test_wrong_files_are_named(tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"model": {}}, tmp_path / "half.pt")
    loaded = torch.load(FOLDER / "ckpt_step_0000000.pt", weights_only=True)
    del loaded["model"]["external_cond.bias"]
    torch.save(loaded, tmp_path / "holes.pt")
    for name, message in (
        ("none.pt", "no file"),
        ("text.pt", "text.pt"),
        ("half.pt", "it lacks"),
        ("holes.pt", "external_cond.bias"),
    ):
        with pytest.raises(UserError, match=message):
            convert_torch.convert(tmp_path / name, tmp_path / "run", max_frames=8)


def test_an_existing_run_is_not_overwritten(tmp_path):
    run = imported(tmp_path, "ckpt_step_0000000.pt")
    with pytest.raises(UserError, match="already contains"):
        convert_torch.convert(FOLDER / "ckpt_step_0000003.pt", run, max_frames=8)
    assert run_checkpoint.load(run).step == 0


def test_a_run_in_its_first_save_is_left_alone(tmp_path):
    half = tmp_path / "run" / "checkpoints" / "7.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    with pytest.raises(UserError, match="already contains"):
        imported(tmp_path, "ckpt_step_0000003.pt")
    assert [p.name for p in half.parent.iterdir()] == [half.name]


def test_its_settings_are_kept(tmp_path):
    trained = run_checkpoint.load(imported(tmp_path, "ckpt_step_0000003.pt"))
    theirs = torch.load(FOLDER / "ckpt_step_0000003.pt", weights_only=True)["config"]
    assert trained.config["optimizer"]["lr"] == theirs["lr"]
    assert trained.config["rollouts"]["n_prompt"] == theirs["n_prompt_frames"]
    assert json.dumps(trained.config)
