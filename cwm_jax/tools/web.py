"""Builds the page that runs a model without a server, and serves it on this machine.

    python -m cwm_jax.tools.web                    # serves dist/web; builds it if missing
    python -m cwm_jax.tools.web --build            # builds it again, does not serve
    python -m cwm_jax.tools.web --build --checkpoint runs/small --output dist/small

The folder can be copied to any static host, under any path; see docs/web.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cwm_jax import shipped
from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.errors import UserError, echo, shown_to_user
from cwm_jax.files import model_flag, path_flag
from cwm_jax.onnx import folder
from cwm_jax.play.session.prompt_sources import ClipPrompts
from cwm_jax.runtime import devices
from cwm_jax.static_page import build, server

_OUTPUT = Path("dist/web")


def main(argv: Sequence[str] | None = None) -> None:
    with shown_to_user():
        args = parser().parse_args(argv)
        if args.build or not (args.output / "index.html").is_file():
            _build(args)
        if not args.build:
            _serve(args)


def _build(args: argparse.Namespace) -> None:
    devices.check()
    path = pretrained.unless(args.checkpoint)
    trained = formats.load(path, step=args.step)
    steps = folder.default_steps(trained) if args.ddim_steps is None else _steps(args.ddim_steps)
    name = pretrained.NAME.rpartition("/")[2] if args.checkpoint is None else path.name
    size = build.build(
        trained,
        ClipPrompts(args.data),
        args.output,
        name=args.name or name,
        steps=steps,
        runtime=args.runtime,
        dtype=args.dtype,
    )
    print(f"step {trained.step} of {path} → {args.output} ({size / 1e6:.1f} MB)")


def _steps(text: str) -> tuple[int, ...]:
    try:
        return formats.check_playable_steps([int(word) for word in text.split(",")])
    except (ValueError, UserError):
        raise UserError(
            f"--ddim-steps {text}: give integers 1…1000 with commas between, such as 1,2,4"
        ) from None


def _serve(args: argparse.Namespace) -> None:
    with server.serving(args.output, args.host, args.port) as serving:
        host, port = serving.server_address[:2]
        echo(f"Play at http://{host}:{port}/ (Ctrl-C ends it)", file=sys.stdout)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            echo("")


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add("--build", action="store_true", help="build it again, do not serve")
    add("--output", type=path_flag, default=_OUTPUT, help="the folder (%(default)s)")
    add("--checkpoint", type=model_flag, help="the model (checkpoints/pocket)")
    add("--step", type=int, help="which checkpoint of a run (the newest)")
    add("--name", help="name of the model on the page (the checkpoint's name)")
    add("--ddim-steps", metavar="S,S,…", help="denoising steps to choose from (the model's card)")
    add("--dtype", default="float16", choices=folder.DTYPES, help="of the weights (%(default)s)")
    add("--data", type=path_flag, default=shipped.data(), help="data of the start frames")
    add("--runtime", type=path_flag, help="the runtime's .tgz (fetched with npm)")
    add("--host", default="127.0.0.1", help="to serve on (%(default)s)")
    add("--port", type=int, default=8080, help="to serve on (%(default)s)")
    return flags


if __name__ == "__main__":
    main()
