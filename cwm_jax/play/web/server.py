"""The web application: the page by Gradio, the players' WebSocket, and their downloads."""

import asyncio
import contextlib
import importlib.resources
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import gradio
from fastapi import FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.routing import Mount

from cwm_jax.play.web import page
from cwm_jax.play.web.app_state import Studio

STATIC = importlib.resources.files("cwm_jax.play.web") / "static"


def make_app(studio: Studio, *, auth: tuple[str, str] | None = None) -> FastAPI:
    """The application.

    Args:
        auth: user and password, which then guard the page, the socket and the downloads alike.
    """
    app = FastAPI(title="cwm_jax play", docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/play/static", StaticFiles(directory=str(STATIC)), name="static")

    @app.get("/play/files/{token}/{name}")
    def download(token: str, name: str, request: Request) -> FileResponse:
        player = studio.players.get(token)
        path = player.downloads.find(name) if player and admitted(request.cookies) else None
        if path is None:
            raise HTTPException(404, "There is no such file, or its session has ended.")
        return FileResponse(path, filename=f"cwm_jax_{name}")

    @app.websocket("/play/socket")
    async def play(socket: WebSocket) -> None:
        if not _same_origin(socket) or not admitted(socket.cookies):
            await socket.close(1008)
            return
        await socket.accept()
        player_type = await asyncio.to_thread(_player_type)
        with contextlib.suppress(RuntimeError):  # gone before the first word
            await player_type(socket, studio).run()

    gradio.mount_gradio_app(
        app,
        page.build(studio.rules),
        path="/",
        auth=auth,
        auth_message="This world model asks for a user and a password.",
        allowed_paths=[],
        max_file_size="1kb",  # nothing is uploaded through Gradio
        footer_links=[],
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        **page.look(),
    )
    admitted = _admission(app, auth)
    return app


def _player_type() -> type:
    """Imported at need: it brings JAX with it, and the page should not wait for that."""
    from cwm_jax.play.web.player import Player

    return Player


def _admission(app: FastAPI, auth) -> Callable[[Mapping[str, str]], bool]:
    """Whether somebody with these cookies has logged in on Gradio's page, if that is asked for."""
    if auth is None:
        return lambda cookies: True
    inner = next(route.app for route in app.routes if isinstance(route, Mount) and not route.path)
    names = [f"access-token-{inner.cookie_id}", f"access-token-unsecure-{inner.cookie_id}"]
    return lambda cookies: any(cookies.get(name) in inner.tokens for name in names)


def _same_origin(socket: WebSocket) -> bool:
    """Browsers let any site open a socket to any other, and say which; other programs say none."""
    origin = socket.headers.get("origin")
    hosts = {socket.headers.get("host"), socket.headers.get("x-forwarded-host")}
    return origin is None or urlsplit(origin).netloc in hosts
