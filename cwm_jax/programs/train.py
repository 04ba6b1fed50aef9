"""Trains a world model.

    python train.py --config configs/small.py --workdir runs/small [--config.optimizer.lr=3e-4 …]

Started again with the same workdir, it continues from the last checkpoint. SIGTERM, SIGHUP or
Ctrl-C make it finish its step, save, and exit with code 75; a second one ends it at once. With
`--dry-run` it trains nothing, and prints how much memory and time the run needs. Over several
hosts, see docs/scaling.md.
"""

import argparse
import gc
import importlib.util
import re
import sys
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from cwm_jax import shipped
from cwm_jax.checkpoints import migration
from cwm_jax.errors import UserError, echo, shown_to_user
from cwm_jax.experiment import dry_run, loop
from cwm_jax.experiment.settings import Settings
from cwm_jax.files import local_path, path_flag
from cwm_jax.models import attention
from cwm_jax.runtime import compile_cache, devices, hosts, preemption, process_memory

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config: small, large, …, or a file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, videos and metrics.")
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "Print the run's memory and time; train nothing.")
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


def main() -> None:
    """Parses the flags of `sys.argv` and trains."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        with shown_to_user():
            print(parser().format_help())
        return
    flags.mark_flag_as_required("config")
    flags.register_multi_flags_validator(
        ["workdir", "dry-run"],
        lambda given: given["workdir"] or given["dry-run"],
        "set the run's folder: --workdir=runs/NAME",
    )
    app.run(_run, flags_parser=_parse)


def _run(_) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax logs every step of every save
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
        attention.check_device(*settings.model.attentions)
        if _DRY_RUN.value:
            dry_run.report(settings)
        else:
            _train(settings, config, workdir)


def _compile_cache() -> str:
    """The flag with its home folder expanded; JAX also accepts URLs."""
    given = _CACHE.value
    return (
        given
        if given in ("auto", "") or "://" in given
        else str(local_path(given, "--compile_cache"))
    )


def _train(settings: Settings, config: dict, workdir: Path) -> None:
    try:
        loop.train(settings, workdir, config=config)
        gc.collect()  # frees the last batches, else the exit warns about their shared memory, …
        time.sleep(_LAST_BATCHES_SECONDS)  # … which Grain frees in a thread that the exit stops
    except preemption.Preempted as stopped:
        echo(str(stopped))
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
    """Parses flags; ml_collections' errors become readable messages."""
    with shown_to_user():
        argv = _with_config_found(argv)
        _make_configs_importable()
        try:
            rest = flags.FLAGS(argv)
            _CONFIG.value.to_dict()  # a file that did not load raises only now
        except flags.Error as error:
            raise UserError(_reason(error)) from None
        except (AttributeError, KeyError, TypeError, OSError, ImportError, SyntaxError) as error:
            raise UserError(_message(error, argv)) from None
        if len(rest) > 1:
            meant = f" (did you mean --{rest[1]}?)" if rest[1].startswith("config.") else ""
            raise UserError(f"{rest[1]} is no flag{meant}; flags begin with --")
    return rest


def _reason(error: flags.Error) -> str:
    """What is wrong with a flag; ml_collections puts a traceback into some of its errors."""
    text = str(error)
    raised = re.findall(r"^ *\w+Error: (.*)$", text, re.MULTILINE)
    return raised[-1] if raised and "Traceback" in text else " ".join(text.split())


def _with_config_found(argv: list[str]) -> list[str]:
    """The words with the path of the config file, see `_config_file`."""
    words, is_next = [], False
    for word in argv:
        flag, equals, name = word.partition("=")
        if is_next:
            words.append(_config_file(word))
        elif equals and flag.lstrip("-") == "config":
            words.append(f"{flag}={_config_file(name)}")
        else:
            words.append(word)
        is_next = word.lstrip("-") == "config" and word != "config"
    return words


def _config_file(name: str) -> str:
    """A path with its home folder; `small` and `configs/small.py` are found from any folder.

    What follows a colon is the config's own argument (`ml_collections.config_flags`).
    """
    name, colon, argument = name.partition(":")
    path = shipped.found(local_path(name, "--config"))
    if not path.exists() and shipped.config(name).is_file() and name.isidentifier():
        path = shipped.config(name)
    if not path.exists():
        raise UserError(_no_config(name))
    return f"{path}{colon}{argument}"


def _no_config(name: str) -> str:
    if why := shipped.missing(shipped.CONFIGS):
        return f"--config {name}: {why}"
    known = sorted(path.stem for path in (shipped.root() / shipped.CONFIGS).glob("[a-z]*.py"))
    return f"--config {name}: there is no such file; use a file, or one of {', '.join(known)}"


def _make_configs_importable() -> None:
    """Makes `from configs import base` work in any config, if there is no other `configs`."""
    if importlib.util.find_spec("configs") is None:
        sys.path.append(str(shipped.root()))


def _message(error: Exception, argv: list[str]) -> str:
    """The error of the config; for an unknown key ml_collections names only one part."""
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


def parser() -> argparse.ArgumentParser:
    """The flags above for argparse, for shell completion."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--config.NAME=VALUE changes any setting; docs/settings.md lists them.",
    )
    for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[__name__]):
        choices = getattr(flag.parser, "enum_values", None)
        value = dict(action="store_true") if flag.boolean else dict(choices=choices)
        if flag.name in ("config", "workdir", "compile_cache"):
            value["type"] = path_flag
        parser.add_argument(f"--{flag.name}", help=flag.help, **value)
    return parser


if __name__ == "__main__":
    main()
