"""`cwm`: one command for all programs.

A subcommand's module is imported only when it is called: `cwm --help` loads neither JAX nor any
other large library. The words after the subcommand are the program's own.
"""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import NamedTuple

from cwm_jax import __version__
from cwm_jax.errors import UserError, shown_to_user


class Subcommand(NamedTuple):
    """A program and what it does, in a few words."""

    module: str
    summary: str


SUBCOMMANDS = {
    "train": Subcommand("cwm_jax.programs.train", "train a world model"),
    "sample": Subcommand("cwm_jax.programs.sample", "generate rollouts as a video"),
    "play": Subcommand("cwm_jax.programs.play", "play in a world model, in the browser"),
    "evaluate": Subcommand(
        "cwm_jax.programs.evaluate", "measure, compare, replay next to the game"
    ),
    "collect": Subcommand("cwm_jax.tools.collect", "record the real game (Procgen)"),
    "pack": Subcommand("cwm_jax.tools.pack", "make a data folder from your own recordings"),
    "preview": Subcommand("cwm_jax.tools.preview", "show a data folder"),
    "check": Subcommand("cwm_jax.tools.check", "find and remove bad records"),
    "export": Subcommand("cwm_jax.tools.export", "safetensors, orbax, bundle or ONNX of a model"),
    "heads": Subcommand("cwm_jax.tools.heads", "add rewards and ends of episodes to a model"),
    "web": Subcommand("cwm_jax.tools.web", "make a page that runs a model in the browser"),
    "import": Subcommand(
        "cwm_jax.tools.convert_torch", "convert a .pt of the PyTorch original, or back"
    ),
    "hub": Subcommand("cwm_jax.tools.hub", "data and models from and to the Hugging Face Hub"),
    "perceptual": Subcommand("cwm_jax.tools.perceptual", "download the weights of LPIPS"),
    "pocket": Subcommand("cwm_jax.tools.pocket", "record, train and export the pocket model"),
    "doctor": Subcommand("cwm_jax.tools.doctor", "check this machine"),
    "completion": Subcommand("cwm_jax.programs.completion", "print shell completion"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the subcommand of `argv`; of `sys.argv` by default."""
    words = list(sys.argv[1:] if argv is None else argv)
    with shown_to_user():
        if not words or words[0] in ("-h", "--help"):
            print(usage())
        elif words[0] == "--version":
            print(f"cwm_jax {__version__}")
        else:
            run(words[0], words[1:])


def run(name: str, words: Sequence[str]) -> None:
    """Raises `UserError` if there is no such subcommand."""
    known = available()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"there is no `cwm {name}`{meant}; there are {', '.join(known)}")
    sys.argv = [f"cwm {name}", *words]  # read by the programs, and named in their messages
    importlib.import_module(known[name].module).main()


def available() -> dict[str, Subcommand]:
    """The subcommands that are installed here."""
    return {name: one for name, one in SUBCOMMANDS.items() if importlib.util.find_spec(one.module)}


def usage() -> str:
    rows = "\n".join(f"  {name:<12}{one.summary}" for name, one in available().items())
    return (
        f"A playable CoinRun world model in JAX, {__version__}.\n\n"
        f"usage: cwm SUBCOMMAND …      cwm SUBCOMMAND --help      cwm --version\n\n{rows}\n\n"
        "cwm play uses the model of the package by default. A model is named by its folder or\n"
        "file, or by its place on the hub: hf://USER/REPOSITORY[@REVISION][/FOLDER]."
    )


if __name__ == "__main__":
    main()
