"""Starts the server from the command line's options."""

import contextlib
import dataclasses
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cwm_jax.checkpoints import pretrained
from cwm_jax.errors import UserError
from cwm_jax.files import HUB
from cwm_jax.play.web import loading_page
from cwm_jax.runtime import network

MAX_MESSAGE = 5 << 20  # bytes; pictures are the largest messages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options from the command line; `play.py --help` explains each."""

    checkpoint: Path | None  # None: replay real clips
    step: int | None
    data: Path
    host: str
    port: int
    share: bool
    auth: tuple[str, str] | None
    fps: int
    players: int
    idle_minutes: float
    address: str = ""  # URL of the page for visitors, behind a proxy that does not forward it

    def __post_init__(self):
        for name, low, high in (("fps", 1, 60), ("players", 1, 64), ("port", 0, 65535)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name} {getattr(self, name)}: it must be {low}…{high}")
        if self.address and not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", self.address):
            raise UserError(
                f"--address {self.address}: it must be the URL of the page, such as "
                "https://lab.example.org/world"
            )
        if not self.idle_minutes > 0:
            raise UserError(f"--idle-minutes {self.idle_minutes}: it must be more than 0")


def serve(options: Options) -> None:
    """Serves the page until it is interrupted.

    Raises:
        UserError: the port cannot be used, or temporary files cannot be written.
    """
    import uvicorn

    listener = loading_page.bind(options.host, options.port)
    host, port = listener.getsockname()[:2]
    shown = f"[{options.host}]" if ":" in options.host else options.host
    print(f"Play at http://{shown}:{port}", flush=True)
    faults: list[BaseException] = []

    def failed(error: BaseException) -> None:
        faults.append(error)
        server.should_exit = True

    app = loading_page.Opening(lambda: _make_app(options), failed)
    config = uvicorn.Config(
        app, log_level="warning", ws="websockets-sansio", ws_max_size=MAX_MESSAGE,
        timeout_graceful_shutdown=3,
    )  # fmt: skip
    server = uvicorn.Server(config)
    if options.share:
        threading.Thread(target=_share, args=(host, port, options), daemon=True).start()
    with _own_temporary_folder(), contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the server
        server.run(sockets=[listener])
    if faults:
        raise faults[0]


@contextlib.contextmanager
def _own_temporary_folder() -> Iterator[None]:
    """A folder for Gradio; its default, `/tmp/gradio`, may belong to another user."""
    if os.environ.get("GRADIO_TEMP_DIR"):
        yield
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix="cwm_jax_page_", ignore_cleanup_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"no temporary folder ({reason}): set TMPDIR to one you may write"
        ) from None
    with folder as name:
        os.environ["GRADIO_TEMP_DIR"] = name
        try:
            yield
        finally:
            del os.environ["GRADIO_TEMP_DIR"]


def _make_app(options: Options):
    """The application; a thread then loads and compiles the model."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    network.without_unusable()  # Gradio creates a client when imported
    from cwm_jax.play.web import server
    from cwm_jax.play.web.app_state import Rules, Studio

    rules = Rules(options.fps, options.players, options.idle_minutes * 60)
    studio = Studio(rules)
    app = server.make_app(studio, auth=options.auth, address=options.address)
    threading.Thread(target=_open, args=(studio, options), daemon=True, name="play-loading").start()
    return app


def _open(studio, options: Options) -> None:
    """Loads the model and data; errors are shown on the page and printed."""
    began = time.perf_counter()
    try:
        scheduler = _load(studio, options)
        scheduler.first_program.wait()
        if scheduler.fault:
            raise scheduler.fault
    except Exception as error:
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        studio.fault = f"{name}{error}"
        print(f"error: {studio.fault}", flush=True)
        return
    print(f"{studio.title}: ready after {time.perf_counter() - began:.1f} s", flush=True)


def _load(studio, options: Options):
    from cwm_jax.play.inference.scheduler import Scheduler
    from cwm_jax.play.session.prompt_sources import ClipPrompts

    studio.stage = "Reading the clips …"
    prompts = ClipPrompts(options.data)
    check_size(prompts.known, options.data)
    if options.checkpoint is None:
        from cwm_jax.play.session.episode_playback import RealClips

        generator, title = RealClips(prompts), "Demonstration: real clips, no model"
    else:
        studio.stage = "Loading the checkpoint …"
        generator, title = _engine(options, prompts.known, studio.rules.steps)
    studio.stage = "Compiling: a minute the first time, seconds from then on …"
    scheduler = Scheduler(generator).__enter__()
    studio.open(scheduler, prompts, title=title, demo=options.checkpoint is None)
    return scheduler


def _engine(options: Options, known, steps):
    from cwm_jax.checkpoints import formats
    from cwm_jax.play.inference.engine import Engine
    from cwm_jax.runtime import compile_cache, devices

    devices.check()
    compile_cache.enable(everything=True)
    trained = formats.load(options.checkpoint, step=options.step)
    network = trained.network
    check_fits(network, trained.path, known, options.data)
    title = f"{_name(options.checkpoint)} · step {trained.step}"
    usual, playable = formats.usual_steps(trained), formats.playable_steps(trained)
    return Engine(network, trained.params, steps=steps, usual=usual, playable=playable), title


def _name(checkpoint: Path) -> str:
    """What a player may know of where the model is: a name, and no folder of this machine."""
    shown = pretrained.shown(checkpoint)
    return shown.removeprefix(HUB).partition("@")[0] if shown.startswith(HUB) else checkpoint.name


def check_size(known, data: Path) -> None:
    """Raises a `UserError` for a game with more actions than share codes support."""
    from cwm_jax.play.session.share_code import MAX_ACTIONS

    if known.num_values > MAX_ACTIONS:
        raise UserError(
            f"{data} has {known.num_values} actions; play supports at most {MAX_ACTIONS}"
        )


def check_fits(network, path: Path, known, data: Path) -> None:
    """Raises a `UserError` where the network was trained on another game than the data's."""
    from cwm_jax.coinrun import IMAGE_SIZE

    has = network.image_size, network.num_actions, network.action_encoding
    wanted = IMAGE_SIZE, len(known.controls), known.encoding
    if has != wanted:
        raise UserError(
            f"{path} has image_size {has[0]}, num_actions {has[1]}, action_encoding {has[2]}; "
            f"{data} is of {known.game}: {wanted[0]}, {wanted[1]}, {wanted[2]}. Use its "
            "training data with --data"
        )
    if network.max_frames < 2:
        raise UserError(f"{path} has max_frames 1: a world needs a window of 2 or more")


def _share(host: str, port: int, options: Options) -> None:
    from gradio import networking

    if not options.auth:
        print("anyone with the public link can play; --auth USER:PASSWORD protects it")
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    try:
        link = networking.setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
        print(f"Public link: {link}", flush=True)
    except Exception as error:  # usually no network; the local page still works
        reason = str(error).rstrip(".")
        print(f"no public link: {reason}. The page on this machine still works", flush=True)
