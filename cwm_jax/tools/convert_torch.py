"""Converts a training checkpoint of the PyTorch original to one of ours, or one of ours back.

    python -m cwm_jax.tools.convert_torch ckpt_step_0110000.pt runs/imported
    python -m cwm_jax.tools.convert_torch runs/small ckpt_step_0110000.pt

A `.pt` file as the target converts back: the newest checkpoint of a run, or the one that is
named (`runs/small/checkpoints/110000`), as a file that the original loads and trains on. The
conversion is exact both ways: parameters and moments keep every bit.

An import contains parameters, AdamW moments, the step and the settings that both share;
`sample.py --checkpoint runs/imported` generates from it, and
`train.py --config configs/small.py --workdir runs/imported` trains on. Reading a `.pt` needs torch
(`pip install "cwm_jax[torch]"`); it is opened with `weights_only=True`, so no code in it can run.
"""

import argparse
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cwm_jax import files
from cwm_jax.checkpoints import migration, run_checkpoint, torch_format
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.runtime import devices
from cwm_jax.training import train_step
from cwm_jax.training.config import OptimizerConfig
from cwm_jax.training.train_step import TrainState

_ONE = run_checkpoint.Retention(1)
_KEYS = ("model", "optimizer", "scheduler", "epoch", "step", "config")
_SETTINGS = {  # the original's names, and ours, of shared settings
    "ckpt_every_steps": "checkpoints.every_steps",
    "n_prompt_frames": "rollouts.n_prompt",
    "rollout_frames": "rollouts.frames",
    "n_rollout_samples": "rollouts.count",
    "rollout_every_steps": "rollouts.every_steps",
    "val_every_steps": "validation.every_steps",
    "val_subset_batches": "validation.batches",
    "log_every_steps": "logging.every_steps",
    "ddim_steps": "sampler.ddim_steps",
    "epochs": "schedule.epochs",
    "batch_size": "data.batch_size",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "warmup_steps": "optimizer.warmup_steps",
    "grad_clip": "optimizer.grad_clip",
}


def read(path: Path) -> dict[str, Any]:
    """The checkpoint's dict, tensors on the CPU.

    Raises:
        UserError: torch is missing, or the file is not a training checkpoint.
    """
    torch = _torch()
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no file at {path}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a readable torch checkpoint: {reason}") from None
    missing = [k for k in _KEYS if not isinstance(loaded, dict) or k not in loaded]
    if missing:
        raise UserError(f"{path} is not a training checkpoint of the original: it lacks {missing}")
    return loaded


def state_of(loaded: dict[str, Any], network: DiTConfig, optim: OptimizerConfig) -> TrainState:
    """The original's parameters, moments and step as our training state."""
    weights = {k: v.numpy() for k, v in loaded["model"].items()}
    params = _arrays(torch_format.from_original(weights, network), network)
    state = train_step.init_state(network, optim, 0)._replace(
        params=params, step=jnp.asarray(loaded["step"], jnp.int32)
    )
    moments = loaded["optimizer"]["state"]
    if not moments:  # saved before the first update
        return state
    # Moments are numbered like `parameters()`, which lists a shared tensor (RoPE) once.
    names = [n for n in weights if not (n.startswith("blocks.") and "rotary_emb" in n)]
    named = {names[i]: moment for i, moment in moments.items()}
    restored = {
        kind: _arrays(
            torch_format.from_original({n: m[kind].numpy() for n, m in named.items()}, network),
            network,
        )
        for kind in ("exp_avg", "exp_avg_sq")
    }
    return state._replace(
        opt_state=_with_moments(state, restored["exp_avg"], restored["exp_avg_sq"])
    )


def _arrays(flat: dict[str, np.ndarray], network: DiTConfig) -> dit.Params:
    dit.check_params(network, flat)
    return {name: jnp.asarray(value, jnp.float32) for name, value in flat.items()}


def _with_moments(state: TrainState, mu, nu) -> optax.OptState:
    """The optimizer state with AdamW's moments and every counter at the state's step."""
    counted = jax.tree.map(
        lambda x: state.step if x.ndim == 0 else x, state.opt_state
    )  # both optax counters are scalars, all moments are not
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)
    return jax.tree.map(
        lambda node: node._replace(mu=mu, nu=nu) if is_adam(node) else node,
        counted,
        is_leaf=is_adam,
    )


def settings_of(loaded: dict[str, Any], network: DiTConfig) -> dict[str, Any]:
    """The checkpoint's settings, under our config's names."""
    theirs = loaded["config"]
    ours = {name: theirs[key] for key, name in _SETTINGS.items() if key in theirs}
    model_section = {k: getattr(network, k) for k in DiTConfig.__dataclass_fields__}
    config = migration.nested(ours | {"imported_epoch": loaded["epoch"]})
    return config | {"model": model_section}


def to_original(state: TrainState, network: DiTConfig, config: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint dict that the original would have saved; arrays are torch tensors.

    Args:
        config: the run's full config.
    """
    torch = _torch()
    tensors = lambda flat: {
        name: torch.from_numpy(np.array(value, np.float32)) for name, value in flat.items()
    }
    convert = lambda params: tensors(torch_format.to_original(params, network))
    weights = convert(state.params) | tensors(torch_format.frequencies(network))
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)
    (adam,) = filter(is_adam, jax.tree.leaves(state.opt_state, is_leaf=is_adam))
    moments = {"exp_avg": convert(adam.mu), "exp_avg_sq": convert(adam.nu)}
    step, listed = int(state.step), torch_format.parameters(network)
    per_parameter = {
        number: {"step": torch.tensor(float(step)), **{k: m[name] for k, m in moments.items()}}
        for number, name in enumerate(listed)
        if name in moments["exp_avg"] and step
    }
    optim = config["optimizer"]
    schedule = _schedule(optim, step)
    group = {
        **_adamw_defaults(torch, lr=schedule["_last_lr"][0], decay=optim["weight_decay"]),
        "initial_lr": optim["lr"],
        "params": list(range(len(listed))),
    }
    flat = dict(migration.flattened(config))
    theirs = {key: flat[ours] for key, ours in _SETTINGS.items() if ours in flat}
    return {
        "model": weights,
        "optimizer": {"state": per_parameter, "param_groups": [group]},
        "scheduler": schedule,
        "epoch": config.get("imported_epoch", 0),
        "step": step,
        "val_loss": None,
        "config": theirs,
    }


def _adamw_defaults(torch, *, lr: float, decay: float) -> dict[str, Any]:
    """A parameter group of AdamW with all fields of this release of torch."""
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=lr, weight_decay=decay)
    (group,) = optimizer.state_dict()["param_groups"]
    return group


def _schedule(optim: dict[str, Any], step: int) -> dict[str, Any]:
    """The state of the original's LinearLR after `step` updates."""
    warmup, lr = max(1, optim["warmup_steps"]), optim["lr"]
    factor = 1 / warmup + (1 - 1 / warmup) * min(step / warmup, 1)
    return {
        "start_factor": 1 / warmup,
        "end_factor": 1.0,
        "total_iters": warmup,
        "base_lrs": [lr],
        "last_epoch": step,
        "_step_count": step + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": [lr * factor],
    }


def main(argv: Sequence[str] | None = None) -> None:
    with shown_to_user():
        args = parser().parse_args(argv)
        devices.check()
        if args.target.suffix == ".pt":
            convert_back(args.source, args.target, ema=args.ema)
        else:
            convert(args.source, args.target, max_frames=args.max_frames)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=path_flag, help="the original's .pt file, or a run or one checkpoint of it")
    add(
        "target",
        type=path_flag,
        help="workdir to make, which must not contain a run yet, or a .pt file",
    )
    add("--max-frames", type=int, default=32, help="window; not recorded in a .pt (%(default)s)")
    add("--ema", action="store_true", help="back to .pt: the moving average as the parameters")
    return parser


def convert(path: Path, out_dir: Path, *, max_frames: int) -> None:
    """Writes `path`, a checkpoint of the original, as a checkpoint of ours under `out_dir`.

    Raises:
        UserError: `path` is no such checkpoint, or `out_dir` contains a run, even without finished
        saves.
    """
    if any((out_dir / run_checkpoint.FOLDER).glob("*")):  # an active run would lose its save
        raise UserError(f"{out_dir} already contains checkpoints; choose an empty folder")
    loaded = read(path)
    weights = {k: v.numpy() for k, v in loaded["model"].items()}
    network = torch_format.infer_config(weights, image_size=64, max_frames=max_frames, dtype="auto")
    settings = settings_of(loaded, network)
    optim = _optimizer_of(settings, ema=False)
    with run_checkpoint.Checkpoints(out_dir, retention=_ONE) as saved:
        saved.save(state_of(loaded, network, optim), data_position="", config=settings)
    print(f"{path}: step {loaded['step']}, {network} → {out_dir}")


def convert_back(workdir: Path, path: Path, *, ema: bool) -> None:
    """Writes a checkpoint of ours as `path`, a checkpoint of the original.

    Args:
        workdir: a run, whose newest checkpoint is taken, or one checkpoint in it.
        ema: write the moving average as the original's parameters.

    Raises:
        UserError: there is no complete checkpoint, it has no moving average, or the original has no
            such network.
    """
    torch = _torch()
    trained = run_checkpoint.load(workdir)
    has_ema = (trained.path / "ema").is_dir()
    if ema and not has_ema:
        raise UserError(f"{workdir} has no moving average: omit --ema")
    optim = _optimizer_of(trained.config, ema=has_ema)
    like = jax.eval_shape(lambda: train_step.init_state(trained.network, optim, 0))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    state = run_checkpoint.load_state(trained.path, like)
    if ema:
        state = state._replace(params=state.ema)
    with files.written_whole(path) as temporary:
        torch.save(to_original(state, trained.network, trained.config), temporary)
    print(f"{workdir}: step {trained.step} → {path}")


def _optimizer_of(config: dict[str, Any], *, ema: bool) -> OptimizerConfig:
    names = ("lr", "weight_decay", "warmup_steps", "grad_clip")
    return OptimizerConfig(
        **{name: config["optimizer"][name] for name in names}, ema_decay=0.5 if ema else 0.0
    )


def _torch():
    try:
        import torch
    except ImportError:
        raise UserError('.pt files need torch: pip install "cwm_jax[torch]"') from None
    return torch


if __name__ == "__main__":
    main()
