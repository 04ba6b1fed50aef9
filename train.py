"""Trains a world model.

    python train.py --config configs/small.py --workdir runs/small [--config.optimizer.lr=3e-4 …]

Started again with the same workdir, it continues from the last checkpoint. SIGTERM, SIGHUP or
Ctrl-C make it finish its step, save, and exit with code 75; a second one ends it at once. With
`--dry-run` it trains nothing, and tells how much memory and time the run will take. Over several
hosts, see docs/scaling.md.
"""

import gc
import re
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from cwm_jax.checkpoints import migration
from cwm_jax.errors import UserError, shown_to_user, tell
from cwm_jax.experiment import dry_run, loop
from cwm_jax.experiment.settings import Settings
from cwm_jax.files import local_path
from cwm_jax.models import attention
from cwm_jax.runtime import compile_cache, devices, hosts, preemption, process_memory

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, configs/NAME.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, films and metrics go.")
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "Tell the run's memory and time; train nothing.")
_CACHE = flags.DEFINE_string(
    "compile_cache", "auto", "Folder of compiled programs; auto: the user's cache; empty: none."
)
_LAUNCHER = flags.DEFINE_enum(
    "launcher", "none", hosts.LAUNCHERS, "What started the processes, or `flags` below."
)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "Processes in all.")
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "This process, from 0.")
_JOIN_TIMEOUT = flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for all processes.")

_LAST_BATCHES_SECONDS = 0.2


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of every save
    with shown_to_user():
        config = _CONFIG.value.to_dict()
        settings = Settings.from_config(config)
        workdir = local_path(_WORKDIR.value or "", "--workdir")
        process_memory.claim_gpu()
        process_memory.schedule_for_memory()
        process_memory.keep_freed()
        compile_cache.enable(_compile_cache())
        _join_others()
        devices.check()
        hosts.check_same({"config": config})
        attention.check_device(settings.model.attention)
        if _DRY_RUN.value:
            dry_run.report(settings)
        else:
            _train(settings, config, workdir)


def _compile_cache() -> str:
    """The flag with its home folder; JAX itself keeps compiled programs at addresses too."""
    given = _CACHE.value
    return (
        given
        if given in ("auto", "") or "://" in given
        else str(local_path(given, "--compile_cache"))
    )


def _train(settings: Settings, config: dict, workdir: Path) -> None:
    try:
        loop.train(settings, workdir, config=config)
        gc.collect()  # the last batches, lest the exit complain of their shared memory, …
        time.sleep(_LAST_BATCHES_SECONDS)  # … which Grain frees in a thread that the exit would end
    except preemption.Preempted as stopped:
        tell(str(stopped))
        raise SystemExit(preemption.EXIT_CODE) from None


def _join_others() -> None:
    wait = dict(wait_seconds=_JOIN_TIMEOUT.value)
    if _LAUNCHER.value == "flags":
        place = hosts.Place(
            coordinator=_COORDINATOR.value, count=_NUM_PROCESSES.value, index=_PROCESS_ID.value
        )
        hosts.join(place, **wait)
    elif _LAUNCHER.value != "none":
        hosts.join(hosts.find_place(_LAUNCHER.value, **wait), **wait)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; ml_collections' own errors become ones that a person can read."""
    with shown_to_user():
        argv = [_with_home(word) for word in argv]
        try:
            rest = app.parse_flags_with_usage(argv)
            _CONFIG.value.to_dict()  # a file that did not load says so only now
        except (AttributeError, KeyError, TypeError, OSError, ImportError, SyntaxError) as error:
            raise UserError(_told(error, argv)) from None
    return rest


def _with_home(word: str) -> str:
    """`--config=~/mine.py`, where no shell puts in the home folder."""
    flag, _, path = word.partition("=")
    is_config = flag.lstrip("-") == "config" and path.startswith("~")
    return f"{flag}={local_path(path, '--config')}" if is_config else word


def _told(error: Exception, argv: list[str]) -> str:
    """What is wrong with the config; of an unknown key ml_collections names one part alone."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    reason = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    for word in argv:
        name = word.removeprefix("--").partition("=")[0]
        if now := migration.RENAMED.get(name.removeprefix("config.")):
            return f"{name} is config.{now} since version 0.2; see docs/settings.md"
        if name.startswith("config.") and any(f"'{k}'" in reason for k in name.split(".")[1:]):
            meant = re.search(r'Did you mean "(\w+)"', reason)
            hint = f" (did you mean {meant[1]}?)" if meant else ""
            return f"there is no setting {name}{hint}; see docs/settings.md"
    return f"--config does not name a config file that can be read: {reason}"


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    flags.register_multi_flags_validator(
        ["workdir", "dry-run"],
        lambda given: given["workdir"] or given["dry-run"],
        "say where the run goes: --workdir=runs/NAME",
    )
    app.run(main, flags_parser=_parse)
