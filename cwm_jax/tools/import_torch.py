"""Turns a training checkpoint of the PyTorch original into one of ours.

    python -m cwm_jax.tools.import_torch ckpt_step_0110000.pt runs/imported

The result holds parameters, AdamW moments, the step and the settings that both projects share;
`sample.py --checkpoint runs/imported` draws from it, and
`train.py --config configs/small.py --workdir runs/imported` trains on. Reading a `.pt` needs torch
(`pip install "cwm_jax[torch]"`); it is opened with `weights_only=True`, so nothing in it can run.
"""

import argparse
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cwm_jax import checkpoint, model, torch_format, training
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.model import DiTConfig
from cwm_jax.training import OptimizerConfig, TrainState

_KEYS = ("model", "optimizer", "scheduler", "epoch", "step", "config")
_SETTINGS = {  # the original's names for what both projects have, where they differ
    "ckpt_every_steps": "ckpt_every_steps",
    "n_prompt_frames": "n_prompt",
    "rollout_frames": "rollout_frames",
    "n_rollout_samples": "n_rollout_samples",
    "rollout_every_steps": "rollout_every_steps",
    "val_every_steps": "val_every_steps",
    "val_subset_batches": "val_batches",
    "log_every_steps": "log_every_steps",
    "ddim_steps": "ddim_steps",
    "epochs": "epochs",
    "batch_size": "batch_size",
    "lr": "lr",
    "weight_decay": "weight_decay",
    "warmup_steps": "warmup_steps",
    "grad_clip": "grad_clip",
}


def read(path: Path) -> dict[str, Any]:
    """The checkpoint's dict, tensors on the CPU.

    Raises:
        UserError: where torch is missing, or the file is not a training checkpoint.
    """
    try:
        import torch
    except ImportError:
        raise UserError('reading a .pt file needs torch: pip install "cwm_jax[torch]"') from None
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
    state = training.init_state(network, optim, 0)._replace(
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


def _arrays(flat: dict[str, np.ndarray], network: DiTConfig) -> model.Params:
    model.check_params(network, flat)
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
    """What the checkpoint says of its run, under our config's names."""
    theirs = loaded["config"]
    ours = {name: theirs[key] for key, name in _SETTINGS.items() if key in theirs}
    model_section = {k: getattr(network, k) for k in DiTConfig.__dataclass_fields__}
    return ours | {"model": model_section, "imported_epoch": loaded["epoch"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="the original's .pt file")
    parser.add_argument("out_dir", type=Path, help="workdir to make; must not hold a run yet")
    parser.add_argument(
        "--max-frames",
        type=int,
        default=32,
        help="window; a checkpoint does not tell (%(default)s)",
    )
    args = parser.parse_args()
    with shown_to_user():
        convert(args.checkpoint, args.out_dir, max_frames=args.max_frames)


def convert(path: Path, out_dir: Path, *, max_frames: int) -> None:
    """Writes `path`, a checkpoint of the original, as a checkpoint of ours under `out_dir`."""
    loaded = read(path)
    weights = {k: v.numpy() for k, v in loaded["model"].items()}
    network = torch_format.infer_config(weights, image_size=64, max_frames=max_frames, dtype="auto")
    settings = settings_of(loaded, network)
    optim = OptimizerConfig(
        **{k: settings[k] for k in ("lr", "weight_decay", "warmup_steps", "grad_clip")}, ema_decay=0
    )
    with checkpoint.Checkpoints(out_dir, retention=checkpoint.Retention(1)) as saved:
        if saved.latest() is not None:
            raise UserError(f"{out_dir} already holds checkpoints; name an empty folder")
        saved.save(state_of(loaded, network, optim), data_position="", config=settings)
    print(f"{path}: step {loaded['step']}, {network} → {out_dir}")


if __name__ == "__main__":
    main()
