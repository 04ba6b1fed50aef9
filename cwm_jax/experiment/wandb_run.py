"""Reports metrics and media to Weights & Biases."""

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cwm_jax.config_group import ConfigGroup, setting
from cwm_jax.errors import echo
from cwm_jax.files import written_whole

MODES = ("auto", "online", "offline", "disabled")
PROJECT = "coinrun-world-model"
RUN_ID_FILE = "wandb_run_id.txt"
_INIT_SECONDS = 30  # longest delay of the start of training by an unreachable server …
_FINISH_SECONDS = 120  # … and of its end; unsent data stays on disk for `wandb sync`


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbConfig(ConfigGroup):
    """Weights & Biases; `config.logging.wandb`."""

    PATH = "config.logging.wandb"

    project: str = setting("", f"empty: that of W&B's own settings, else `{PROJECT}`")
    entity: str = setting("", "user or team; empty: the default of the account")
    mode: str = setting(
        "auto",
        "`offline` keeps the run in the workdir, for `wandb sync`; `auto`: what W&B's own settings "
        "say, else online where W&B finds credentials",
        choices=MODES,
    )


class WandbRun:
    """One W&B run. A failure is logged once, prominently, and never ends the training.

    When a run resumes, W&B already has the steps between the last checkpoint and the crash, and
    accepts none twice: they are skipped until the run is past them.
    """

    def __init__(self, run: Any):
        self._run = run
        self._first_step = run.step
        self._works = True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._send(step, lambda: dict(values))

    def media(self, step: int, name: str, path: Path, kind: str) -> None:
        def content():
            import wandb

            is_video = kind == "video"
            return {
                name: wandb.Video(str(path), format="mp4") if is_video else wandb.Image(str(path))
            }

        self._send(step, content)

    def close(self, *, failed: bool = False) -> None:
        self._try(lambda: self._run.finish(exit_code=int(failed)))

    def _send(self, step: int, content: Callable[[], dict]) -> None:
        if step >= self._first_step:
            self._try(lambda: self._run.log(content(), step=step))

    def _try(self, action: Callable[[], Any]) -> None:
        if self._works:
            try:
                action()
            except Exception as error:
                self._works = False
                _warn(error)


def open_wandb(
    config: WandbConfig, workdir: Path, *, run_config: Mapping[str, Any], resuming: bool
) -> WandbRun | None:
    """Starts a run, or continues the workdir's own when `resuming`.

    Args:
        config: project, entity and mode.
        workdir: holds the run's id in `wandb_run_id.txt`, and W&B's local files.
        run_config: the settings to show with the run; a plain nested dict.
        resuming: whether training resumes from a checkpoint of this workdir.

    Returns:
        The run; None where W&B is disabled, or could not be started, which is logged.
    """
    mode = resolved_mode(config.mode)
    if mode == "disabled":
        return None
    try:
        return WandbRun(_init(config, mode, workdir, run_config, resuming))
    except Exception as error:
        _warn(error)
        return None


def _init(config: WandbConfig, mode: str, workdir: Path, run_config: Mapping, resuming: bool):
    """Starts W&B's run. W&B's own settings, such as WANDB_DIR, take precedence."""
    import wandb  # slow to import, and not everyone uses it

    own = _own_settings()
    already_set = own.model_fields_set
    limits = dict(init_timeout=_INIT_SECONDS, finish_timeout=_FINISH_SECONDS)
    return wandb.init(
        project=config.project or own.project or PROJECT,
        entity=config.entity or None,
        mode=None if config.mode == "auto" and "mode" in already_set else mode,
        dir=None if "root_dir" in already_set else workdir,
        config=dict(run_config),
        id=own.run_id or _run_id(workdir / RUN_ID_FILE, resuming),
        resume=own.resume or "allow",
        settings=wandb.Settings(**{k: v for k, v in limits.items() if k not in already_set}),
    )


def resolved_mode(mode: str) -> str:
    """The mode of "auto": "online", "offline" or "disabled"; other modes are unchanged."""
    if mode != "auto":
        return mode
    try:
        return _own_mode()
    except Exception as error:  # no home folder, or an unknown value in WANDB_…
        echo(
            f"warning: W&B cannot read its settings, so the run is kept on this machine: "
            f"{type(error).__name__}: {error}"
        )
        return "disabled"


def _own_mode() -> str:
    own = _own_settings()
    if own.mode == "disabled":
        return "disabled"
    if own.mode in ("offline", "dryrun"):
        return "offline"
    return "online" if "mode" in own.model_fields_set or has_api_key() else "disabled"


def _own_settings():
    """W&B's settings: variables, `wandb/settings`, and the user's own file."""
    from wandb.sdk import wandb_setup  # the part of `wandb.setup()` that starts no process

    return wandb_setup.singleton().settings


def has_api_key() -> bool:
    """Whether W&B finds credentials for its server, without network use or prompts.

    Raises W&B's errors where it cannot search, or finds an invalid key.
    """
    from wandb.sdk.lib import wbauth

    options = dict(source="cwm_jax", prompt=False, update_session=False)
    return wbauth.authenticate_session(host=_own_settings().base_url, **options) is not None


def _run_id(file: Path, resuming: bool) -> str:
    """The id in the workdir of a run to resume, else a new one, which is stored there."""
    if resuming and file.exists() and (kept := file.read_text(encoding="utf-8").strip()):
        return kept
    run_id = secrets.token_hex(4)
    with written_whole(file) as temporary:
        temporary.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def _warn(error: Exception) -> None:
    rule = "=" * 78
    echo(
        f"{rule}\nWARNING: W&B failed and is disabled for the rest of this run.\n"
        f"  {type(error).__name__}: {error}\n"
        f"Training continues, and metrics.jsonl has every number.\n{rule}"
    )
