"""Play inside a trained world model, in the browser.

    python play.py                                  then open http://127.0.0.1:7860
    python play.py --checkpoint runs/small

Without --checkpoint the repository's own model, `checkpoints/pocket`, is played; with --demo the
page replays real clips and needs no model.
"""

import argparse
import os

from cwm_jax import shipped
from cwm_jax.checkpoints import pretrained
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.files import model_flag, path_flag

_CHECKPOINT = "a run, an export, or hf://USER/REPOSITORY[@REVISION] (checkpoints/pocket)"


def main() -> None:
    with shown_to_user():
        args = parser().parse_args()
        from cwm_jax.play.web import launch  # light: heavy libraries load after the first page

        launch.serve(
            launch.Options(
                checkpoint=None if args.demo else pretrained.unless(args.checkpoint),
                step=args.step,
                data=args.data or shipped.data(),
                host=args.host,
                port=args.port,
                share=args.share,
                auth=_auth(args.auth),
                fps=args.fps,
                players=args.players,
                idle_minutes=args.idle_minutes,
                address=args.address,
            )
        )
    os._exit(0)  # a thread may be compiling, which cannot be interrupted; the rest has ended


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=model_flag, help=_CHECKPOINT)
    add("--step", type=int, help="which checkpoint of the run (the newest)")
    add("--demo", action="store_true", help="no model: replay real clips, to try the page")
    add("--data", type=path_flag, help="folder with val/, where sessions start (the embedded one)")
    add(
        "--host",
        default="127.0.0.1",
        help="0.0.0.0: reachable from other machines (%(default)s)",
    )
    add("--port", type=int, default=7860, help="0: any free port (%(default)s)")
    add(
        "--address",
        default="",
        metavar="URL",
        help="public address of the page, behind a proxy that does not send it (its own)",
    )
    add("--share", action="store_true", help="also make a public link, through Gradio's relay")
    add("--auth", metavar="USER:PASSWORD", help="require these of everyone")
    add("--fps", type=int, default=15, help="frames a second to aim at, 1…60 (%(default)s)")
    add("--players", type=int, default=8, help="simultaneous players (%(default)s)")
    add(
        "--idle-minutes",
        type=float,
        default=5,
        help="until an idle player's place is freed (%(default)s)",
    )
    return parser


def _auth(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise UserError("--auth needs USER:PASSWORD, neither of them empty")
    return user, password


if __name__ == "__main__":
    main()
