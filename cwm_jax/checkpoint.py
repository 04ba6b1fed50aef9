"""Checkpoints by orbax: a run saved and continued, and a network loaded for sampling.

DIR/checkpoints/STEP/params     the parameters, by name
DIR/checkpoints/STEP/ema        their moving average, where the run keeps one
DIR/checkpoints/STEP/optimizer  the rest of the training state
DIR/checkpoints/STEP/meta       JSON: step, position in the data, the full config
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from cwm_jax import model
from cwm_jax.errors import UserError
from cwm_jax.model import DiTConfig, Params
from cwm_jax.training import TrainState

FOLDER = "checkpoints"
_FORMAT = 1


class Trained(NamedTuple):
    """What sampling needs to know of a run."""

    network: DiTConfig
    params: Params  # the moving average where there is one
    config: dict[str, Any]  # the run's full config
    step: int
    path: Path


class Checkpoints:
    """A run's checkpoint folder; a context manager, which waits for the last save on leaving."""

    def __init__(self, workdir: Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        try:
            self._manager = ocp.CheckpointManager(
                (Path(workdir) / FOLDER).absolute(), options=options
            )
        except OSError as error:
            raise UserError(f"cannot write checkpoints under {workdir}: {error.strerror}") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.wait_until_finished()
        self._manager.close()

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, *, data_position: str, config: dict[str, Any]) -> None:
        """Writes the state in the background; a step that is saved already is left as it is."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        meta = dict(format=_FORMAT, step=step, data_position=data_position, config=config)
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)))

    def restore(self, like: TrainState) -> tuple[TrainState, str]:
        """The latest state and position in the data.

        `like` gives shapes, dtypes and shardings (arrays, or `jax.ShapeDtypeStruct`s).
        """
        step = self.latest()
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(like).items()}
        args = ocp.args.Composite(**items, meta=ocp.args.JsonRestore())
        try:
            saved = self._manager.restore(step, args=args)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"cannot continue from {self._manager.directory / str(step)}: {_first_line(error)}"
            ) from None
        ema = saved.ema if "ema" in items else None
        state = TrainState(params=saved.params, ema=ema, **saved.optimizer)
        return state, saved.meta["data_position"]


def _items(state: TrainState) -> dict[str, Any]:
    rest = {k: v for k, v in state._asdict().items() if k not in ("params", "ema")}
    items = dict(params=state.params, optimizer=rest)
    return items if state.ema is None else items | dict(ema=state.ema)


def load(path: Path | str, *, step: int | None = None) -> Trained:
    """Loads a network for sampling; nothing but the folder is needed to know its sizes.

    Args:
        path: a run's workdir, its `checkpoints` folder, or one checkpoint in it.
        step: which checkpoint of a run; the newest by default.

    Raises:
        UserError: where there is no whole checkpoint at `path`, or it does not fit this network.
    """
    folder = _find(Path(path).absolute(), step)
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    try:
        meta = checkpointer.restore(folder, ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        network = DiTConfig(**meta["config"]["model"])
        item = "ema" if (folder / "ema").is_dir() else "params"
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), model.shapes(network)
        )
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(shapes)})
        params = checkpointer.restore(folder, args)[item]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{folder} is not a whole checkpoint: {_first_line(error)}") from None
    return Trained(network, params, meta["config"], meta["step"], folder)


def _find(path: Path, step: int | None) -> Path:
    """The folder of one checkpoint, from whatever the user named."""
    if not path.is_dir():
        raise UserError(f"no checkpoint folder at {path}")
    if (path / "meta").is_dir():
        return path
    root = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = sorted(
        int(p.name) for p in root.iterdir() if p.name.isdigit() and (p / "meta").is_dir()
    )
    if not steps:
        raise UserError(
            f"no checkpoint in {path}: wanted a run's workdir, its {FOLDER} folder, or one of the "
            f"numbered folders in it (an unfinished save does not count)"
        )
    if step is not None and step not in steps:
        raise UserError(f"no checkpoint of step {step} in {root}: there are {steps}")
    return root / str(steps[-1] if step is None else step)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
