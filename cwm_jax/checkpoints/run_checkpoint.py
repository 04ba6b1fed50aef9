"""Checkpoints with orbax: saving and resuming a run, and loading a network for sampling.

DIR/checkpoints/STEP/params      the parameters, by name
DIR/checkpoints/STEP/ema         their moving average, where the run keeps one
DIR/checkpoints/STEP/optimizer   the rest of the training state
DIR/checkpoints/STEP/meta        JSON: step, position in the data, the full config
DIR/checkpoints/STEP/SHA256SUMS  of all these files, checked when they are read

A checkpoint gets its name when it is complete, checksums included. A damaged one is renamed to
STEP.damaged when a run resumes from the one before it.
"""

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from cwm_jax import config_group
from cwm_jax.checkpoints import checksums, migration
from cwm_jax.errors import UserError, echo
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params
from cwm_jax.training.train_step import TrainState

FOLDER = "checkpoints"
_FORMAT = 2
_METADATA = "_CHECKPOINT_METADATA"  # orbax writes the time of completion to it last
_QUICK_CHECK = ("meta", "metrics")  # small, and read from every checkpoint at the start


class Trained(NamedTuple):
    """What sampling needs of a run."""

    network: DiTConfig
    params: Params  # the moving average where there is one
    config: dict[str, Any]  # the run's full config
    step: int
    path: Path


class Saved(NamedTuple):
    """The metadata of a checkpoint."""

    step: int
    data_position: str
    config: dict[str, Any]  # the run's full config
    pause_due: bool  # validation and other work due after this step is still to be done
    seconds: float = 0.0  # the run's time so far, see `clock`; older checkpoints lack it


class Retention(NamedTuple):
    """Which checkpoints to keep."""

    last: int  # the newest so many
    every: int = 0  # those of steps that are multiples of this; 0: none
    best: int = 0  # so many with the lowest validation loss, of those that have one

    def should_preserve(self, checkpoints, *, context=None) -> list[bool]:
        """For each checkpoint, oldest first; the method of orbax's `PreservationPolicy`."""
        losses = {info.step: (info.metrics or {}).get("val_loss") for info in checkpoints}
        rated = sorted((step for step in losses if losses[step] is not None), key=losses.get)
        stay = {info.step for info in checkpoints[-self.last :]} | set(rated[: self.best])
        return [
            info.step in stay or bool(self.every and info.step % self.every == 0)
            for info in checkpoints
        ]


class Checkpoints:
    """A run's checkpoint folder; a context manager, which waits for the last save on exit.

    A failed save is logged prominently, counted in `failures`, and leaves older checkpoints alone.
    """

    def __init__(self, workdir: Path, *, retention: Retention):
        root = (Path(workdir) / FOLDER).absolute()
        check_name(root)
        self.failures = 0
        self._saving: int | None = None
        self._succeeded = True  # the last save, as far as known
        self._root = root
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=retention,
            best_fn=lambda metrics: 0.0,  # only makes orbax keep metrics; retention reads them
            create=True,
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=lambda: _seal(root, self._saving)
            ),
        )
        try:
            if jax.process_index() == 0:
                _set_damaged_aside(root)
            self._manager = ocp.CheckpointManager(root, options=self._options)
        except OSError as error:
            raise UserError(f"cannot write checkpoints under {workdir}: {error.strerror}") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.settle()
        try:
            self._manager.close()
        except Exception as error:  # left by a failed save, which was logged
            echo(f"warning: closing the checkpoints: {_first_line(error)}")

    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        *,
        data_position: str,
        config: dict[str, Any],
        pause_due: bool = False,
        seconds: float = 0.0,
        val_loss: float | None = None,
    ) -> float:
        """Starts to write the state in the background; a step that is already saved is skipped.

        Returns:
            The seconds that the caller waited: for copies from the device, and for the previous
            save where it was not finished.
        """
        began = time.perf_counter()
        self.settle()
        self._succeeded = True
        step = int(state.step)
        if step in self._manager.all_steps():
            return time.perf_counter() - began
        meta = meta_of(Saved(step, data_position, config, pause_due, seconds))
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        args = ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta))
        self._saving = step
        try:
            if not self._manager.save(step, args=args, metrics={"val_loss": val_loss}):
                raise UserError(f"orbax refused it: the newest checkpoint is {self.latest()}")
        except Exception as error:  # of any kind: training must not end because of a failed save
            self._failed(error)
        return time.perf_counter() - began

    def settle(self, *, wait: bool = True) -> bool:
        """Finishes the last save; True where it succeeded or there was none.

        Args:
            wait: False does not wait for a save in progress.
        """
        if self._saving is None or not (wait or not self._manager.is_saving_in_progress()):
            return self._succeeded
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error)
            return False
        self._saving = None
        return True

    def _failed(self, error: Exception) -> None:
        step, self._saving, self._succeeded = self._saving, None, False
        self.failures += 1
        _warn(
            f"WARNING: the checkpoint of step {step} could not be saved.\n"
            f"  {_first_line(error)}\n"
            f"Training continues, and older checkpoints are unchanged; the next save is tried as "
            f"planned."
        )
        if jax.process_index() == 0:  # the unfinished files may fill the disk
            for half in self._manager.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)
        self._forget_failures()

    def _forget_failures(self) -> None:
        """Clears stored errors of a failed save, which the next save would otherwise raise."""
        for remains in (self._manager.wait_until_finished, self._manager.check_for_errors):
            with contextlib.suppress(Exception):
                remains()
        if jax.process_count() > 1:  # a new manager would need all processes at once
            self._manager.reload()
            return
        # Each item of a checkpoint may hold an error of its own, which its next save would raise.
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = ocp.CheckpointManager(self._root, options=self._options)

    def newest(self) -> Saved | None:
        """The metadata of the newest whole checkpoint; None where nothing was saved yet.

        Raises:
            UserError: its folder has another number than its step: orbax would refuse to save
                the steps between the two.
        """
        step = self.latest()
        if step is None:
            return None
        folder = self._manager.directory / str(step)
        saved = _meta(folder)
        if saved.step != step:
            raise UserError(
                f"{folder} holds step {saved.step}, so it was copied or renamed, and no step below "
                f"{step} could be saved beside it: name it kept_{saved.step}, or move it away"
            )
        return saved

    def restore(self, like: TrainState) -> TrainState:
        """The newest state.

        `like` gives shapes, dtypes and shardings (arrays, or `jax.ShapeDtypeStruct`s).
        """
        step = self.latest()
        try:
            return _state(self._manager.restore(step, args=_wanted(_items(like))))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"cannot continue from {self._manager.directory / str(step)}: {_first_line(error)}"
            ) from None


def check_name(folder: Path) -> None:
    """Raises `UserError` for a path that orbax would read as a pattern, and then lose arrays."""
    if found := set("*?[") & set(str(folder.absolute())):
        raise UserError(
            f"{folder}: a path of checkpoints must not contain {' '.join(sorted(found))}, which "
            f"orbax reads as a pattern: name another folder"
        )


def _items(state: TrainState) -> dict[str, Any]:
    rest = {k: v for k, v in state._asdict().items() if k not in ("params", "ema")}
    items = dict(params=state.params, optimizer=rest)
    return items if state.ema is None else items | dict(ema=state.ema)


def _wanted(items: dict[str, Any]) -> ocp.args.Composite:
    return ocp.args.Composite(**{k: ocp.args.StandardRestore(tree) for k, tree in items.items()})


def _state(items: ocp.args.Composite) -> TrainState:
    return TrainState(params=items.params, ema=items.get("ema"), **items.optimizer)


def _seal(root: Path, step: int | None) -> None:
    """Adds the checksums of a finished save, before orbax renames its folder to the step."""
    (folder,) = root.glob(f"{step}.orbax-checkpoint-tmp*")
    checksums.write(folder, lambda name: name != _METADATA)


def _steps(root: Path) -> list[int]:
    """The steps of the checkpoints in a folder, newest first."""
    found = root.iterdir() if root.is_dir() else ()
    return sorted((int(p.name) for p in found if p.name.isdigit() and p.is_dir()), reverse=True)


def _set_damaged_aside(root: Path) -> None:
    """Renames damaged checkpoints, so that the run resumes from the newest undamaged one.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    faults, whole = {}, None
    for step in _steps(root):
        # Checkpoints older than the one to resume from get a quick check only.
        fault = checksums.fault(root / str(step), within=_QUICK_CHECK if whole is not None else ())
        if fault:
            faults[step] = fault
        elif whole is None:
            whole = step
    listed = "\n".join(f"  {root / str(step)}: {fault}" for step, fault in faults.items())
    if faults and whole is None:
        raise UserError(
            f"every checkpoint is damaged, so there is none to resume from:\n{listed}\n"
            f"Restore one from a copy, or start a new run in another workdir."
        )
    if faults:
        _warn(
            f"WARNING: damaged checkpoints were renamed; the newest undamaged one is that of step "
            f"{whole}.\n{listed}"
        )
    for step in faults:
        aside = root / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        (root / str(step)).rename(aside)


def meta_of(saved: Saved) -> dict[str, Any]:
    """The JSON value of a checkpoint's `meta`."""
    return dict(format=_FORMAT, **saved._asdict())


def _meta(folder: Path) -> Saved:
    try:
        meta = json.loads((folder / "meta" / "metadata").read_bytes())
        if meta.pop("format") != _FORMAT:
            raise ValueError("it was written by another version of this program")
        saved = Saved(**meta)
        if not (isinstance(saved.step, int) and isinstance(saved.config, dict)):
            raise ValueError("it does not hold a step and a config")
        saved = saved._replace(config=migration.migrated(saved.config))
        if not isinstance(saved.seconds, (int, float)):
            raise ValueError(f"its seconds are {saved.seconds!r}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{folder} is not a whole checkpoint: meta: {_first_line(error)}") from None
    return saved


def load(path: Path | str, *, step: int | None = None) -> Trained:
    """Loads a network for sampling; the folder alone holds its sizes.

    Args:
        path: a run's workdir, its `checkpoints` folder, or one checkpoint in it.
        step: which checkpoint of a run. By default the newest undamaged one; damaged newer
            ones are logged.

    Raises:
        UserError: where there is no whole checkpoint at `path`, or it does not fit this network.
    """
    candidates = _find(Path(path).absolute(), step)
    for folder in candidates:
        item = "ema" if (folder / "ema").is_dir() else "params"
        fault = checksums.fault(
            folder, within=("meta", "ema", item)
        )  # also finds a missing average
        if fault is None:
            return _loaded(folder, item)
        message = f"{folder} is not a whole checkpoint: {fault}"
        if folder == candidates[-1]:
            raise UserError(message)
        echo(f"warning: {message}; trying the one before it")
    raise AssertionError("there is at least one candidate")


def _loaded(folder: Path, item: str) -> Trained:
    saved = _meta(folder)
    try:
        network = config_group.build(DiTConfig, saved.config["model"])
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), dit.shapes(network)
        )
        params = _read(folder, {item: shapes})[item]
    except (ValueError, KeyError, TypeError, OSError, UserError) as error:
        raise UserError(f"{folder} is not a whole checkpoint: {_first_line(error)}") from None
    return Trained(network, params, saved.config, saved.step, folder)


def load_state(folder: Path, like: TrainState) -> TrainState:
    """The whole training state of one checkpoint; nothing in its run is changed.

    Args:
        folder: the checkpoint, such as `Trained.path`.
        like: as for `Checkpoints.restore`.

    Raises:
        UserError: where it is damaged, or its arrays are different.
    """
    if fault := checksums.fault(folder):
        raise UserError(f"{folder} is not a whole checkpoint: {fault}")
    try:
        return _state(_read(folder, _items(like)))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{folder} is not a whole checkpoint: {_first_line(error)}") from None


def _read(folder: Path, items: dict[str, Any]) -> ocp.args.Composite:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler()).restore(folder, _wanted(items))


def _find(path: Path, step: int | None) -> list[Path]:
    """The checkpoint folders to try in turn, for a path that the user named."""
    if not path.is_dir():
        raise UserError(f"no checkpoint folder at {path}")
    if (path / "meta").is_dir():
        return [path]
    root = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = _steps(root)
    if not steps:
        raise UserError(
            f"no checkpoint in {path}: name a run's workdir, its {FOLDER} folder, or one of the "
            f"numbered folders in it (unfinished saves do not count)"
        )
    if step is not None and step not in steps:
        raise UserError(f"no checkpoint of step {step} in {root}: available: {steps[::-1]}")
    return [root / str(step) for step in (steps if step is None else [step])]


def _warn(text: str) -> None:
    rule = "=" * 78
    echo(f"{rule}\n{text}\n{rule}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
