"""Prints a script with which a shell completes `cwm`, its subcommands, flags and files.

    cwm completion bash > ~/.local/share/bash-completion/completions/cwm
    cwm completion zsh > ~/.zfunc/_cwm
    cwm completion tcsh >> ~/.tcshrc

The script is generated once, from the programs' flags, and starts no program itself.
"""

import argparse
import importlib
from collections.abc import Sequence

import shtab

from cwm_jax import files
from cwm_jax.errors import shown_to_user
from cwm_jax.programs import command


def main(argv: Sequence[str] | None = None) -> None:
    with shown_to_user():
        args = parser().parse_args(argv)
        print(shtab.complete(everything(), shell=args.shell))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return parser


def everything() -> argparse.ArgumentParser:
    """All subcommands with their flags, as one parser."""
    whole = argparse.ArgumentParser(prog="cwm")
    subcommands = whole.add_subparsers(dest="subcommand")
    for name, (module, summary) in command.available().items():
        program = importlib.import_module(module)
        own = subcommands.add_parser(
            name,
            help=summary,
            parents=[program.parser()],
            add_help=False,
            conflict_handler="resolve",
        )
        further = getattr(program, "SUBCOMMANDS", None)
        if further and name != "completion":
            _add(own, further)
        _complete_files(own)
    return whole


def _add(own: argparse.ArgumentParser, further: dict) -> None:
    """Subcommands of a program, before its flags."""
    jobs = own.add_subparsers()
    for name, make in further.items():
        _complete_files(jobs.add_parser(name, parents=[make()], add_help=False))


def _complete_files(own: argparse.ArgumentParser) -> None:
    for action in own._actions:
        if action.type in (files.path_flag, files.model_flag):
            action.complete = shtab.FILE
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                _complete_files(one)
