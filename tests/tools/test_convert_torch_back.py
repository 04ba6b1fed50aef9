"""There and back: a checkpoint of the original, made ours and written again, keeps every bit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.checkpoints import run_checkpoint
from cwm_jax.errors import UserError
from cwm_jax.models.config import DiTConfig
from cwm_jax.tools import convert_torch
from cwm_jax.training import train_step

torch = pytest.importorskip("torch")

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = dict(hidden_size=32, depth=2, num_heads=2, patch_size=8, image_size=64, num_actions=15)


def flat(tree, path=()):
    """Every leaf of nested dicts and lists by its path."""
    if isinstance(tree, dict):
        return {k: v for key in tree for k, v in flat(tree[key], (*path, key)).items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, x in enumerate(tree) for k, v in flat(x, (*path, i)).items()}
    return {path: tree}


@pytest.mark.parametrize("step", [0, 3])
def test_every_bit_comes_back(tmp_path, step):
    source, back = GOLDEN / f"ckpt_step_{step:07d}.pt", tmp_path / "back.pt"
    convert_torch.main([str(source), str(tmp_path / "ours"), "--max-frames", "8"])
    convert_torch.main([str(tmp_path / "ours"), str(back)])
    wanted, found = (flat(torch.load(path, weights_only=True)) for path in (source, back))
    not_kept = {("config", k) for k in wanted_config(wanted) - set(convert_torch._SETTINGS)}
    assert set(wanted) - set(found) == not_kept
    assert set(found) <= set(wanted)
    for path in found:
        if isinstance(wanted[path], torch.Tensor):
            assert wanted[path].dtype == found[path].dtype, path
            assert torch.equal(wanted[path], found[path]), path
        else:
            assert found[path] == wanted[path] or np.isclose(found[path], wanted[path]), path


def wanted_config(wanted):
    return {path[1] for path in wanted if path[0] == "config"}


def save(tmp_path, *, ema_decay, steps=(0,)):
    network = DiTConfig(**TINY, max_frames=8, dtype="float32")
    config = dict(lr=1e-3, weight_decay=0.01, warmup_steps=0, grad_clip=1.0)
    optim = train_step.OptimizerConfig(**config, ema_decay=ema_decay)
    state = train_step.init_state(network, optim, 5)
    if ema_decay:
        state = state._replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    keep = run_checkpoint.Retention(len(steps))
    with run_checkpoint.Checkpoints(tmp_path / "run", retention=keep) as saved:
        model = {k: getattr(network, k) for k in DiTConfig.__dataclass_fields__}
        for step in steps:
            params = jax.tree.map(lambda x, step=step: x + step, state.params)
            saved.save(
                state._replace(params=params, step=jnp.int32(step)),
                data_position="",
                config={"optimizer": config, "model": model},
            )


def test_the_average_goes_out_where_it_is_asked_for(tmp_path):
    save(tmp_path, ema_decay=0.9)
    plain, average = tmp_path / "plain.pt", tmp_path / "average.pt"
    convert_torch.main([str(tmp_path / "run"), str(plain)])
    convert_torch.main([str(tmp_path / "run"), str(average), "--ema"])
    biases = [
        torch.load(path, weights_only=True)["model"]["final_layer.linear.bias"].numpy()
        for path in (plain, average)
    ]
    np.testing.assert_array_equal(biases, [[0] * 192, [1] * 192])


def content(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_checkpoint_that_is_named_goes_out_and_its_run_stays_as_it_is(tmp_path, capsys):
    save(tmp_path, ema_decay=0, steps=(1, 2, 3))
    kept = tmp_path / "run" / "checkpoints"
    (kept / "7.orbax-checkpoint-tmp").mkdir()  # what a run that goes on is at
    (kept / "7.orbax-checkpoint-tmp" / "half").write_bytes(b"half a save")
    (kept / "3" / "meta" / "metadata").write_bytes(b"damaged")
    before = content(tmp_path / "run")
    for source, step in ((kept / "1", 1), (tmp_path / "run", 2)):
        convert_torch.main([str(source), str(tmp_path / "x.pt")])
        found = torch.load(tmp_path / "x.pt", weights_only=True)
        assert found["step"] == step
        assert (found["model"]["final_layer.linear.bias"] == step).all()
    assert f"{tmp_path / 'run'}: step 2 →" in capsys.readouterr().out
    assert content(tmp_path / "run") == before
    victim = next(p for p in sorted((kept / "2" / "optimizer").rglob("*")) if p.is_file())
    victim.unlink()
    with pytest.raises(UserError, match=r"2 is not a whole checkpoint: optimizer/.* is missing"):
        convert_torch.convert_back(kept / "2", tmp_path / "x.pt", ema=False)


def test_faults_are_reported(tmp_path, capsys):
    save(tmp_path, ema_decay=0)
    for argv, fault in (
        ([str(tmp_path / "run"), str(tmp_path / "x.pt"), "--ema"], "no moving average"),
        ([str(tmp_path / "none"), str(tmp_path / "x.pt")], "no checkpoint folder"),
        ([str(tmp_path / "none.pt"), str(tmp_path / "new")], "no file"),
    ):
        with pytest.raises(SystemExit) as ended:
            convert_torch.main(argv)
        assert ended.value.code == 2
        assert fault in capsys.readouterr().err
    assert not (tmp_path / "x.pt").exists()
