"""The web application: Gradio's page, the players' WebSocket, and their downloads."""

import asyncio
import contextlib
import importlib.resources
from collections.abc import Callable, Mapping

import gradio
from fastapi import FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from starlette.routing import Mount

from cwm_jax.play.web import page, proxies
from cwm_jax.play.web.app_state import Studio

STATIC = importlib.resources.files("cwm_jax.play.web") / "static"


_NO_SOCKET = (
    "The proxy in front of this page does not forward WebSockets. In nginx: "
    "proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; "
    "proxy_set_header Connection upgrade;"
)
_OTHER_SITE = (
    "The server does not recognise the address of this page. Reload it. Behind a proxy, set the "
    "address of the page: play.py --address URL"
)


def make_app(studio: Studio, *, auth: tuple[str, str] | None = None, address: str = "") -> FastAPI:
    """The application.

    Args:
        auth: user and password, which protect the page, the socket and the downloads.
        address: URL of the page for visitors, if proxies do not forward it.
    """
    app = FastAPI(title="cwm_jax play", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(proxies.RelativePage)
    app.add_middleware(proxies.Prefixed, address=address)  # added last, so called first
    key = proxies.Key()
    app.mount("/play/static", StaticFiles(directory=str(STATIC)), name="static")

    @app.get("/play/files/{token}/{name}")
    def download(token: str, name: str, request: Request) -> FileResponse:
        player = studio.players.get(token)
        path = player.downloads.find(name) if player and admitted(request.cookies) else None
        if path is None:
            raise HTTPException(404, "There is no such file, or its session has ended.")
        return FileResponse(path, filename=f"cwm_jax_{name}")

    @app.get("/play/key")
    def show_key(request: Request) -> JSONResponse:
        """Browsers let only pages of this site read the answer."""
        if not admitted(request.cookies):
            raise HTTPException(403, "Log in first.")
        return JSONResponse({"key": key.text}, headers={"Cache-Control": "no-store"})

    @app.get("/play/socket")
    def no_socket() -> PlainTextResponse:
        return PlainTextResponse(_NO_SOCKET, 426, headers={"Upgrade": "websocket"})

    @app.websocket("/play/socket")
    async def play(socket: WebSocket) -> None:
        if not admitted(socket.cookies):
            await socket.close(1008)
            return
        await socket.accept()
        given = socket.query_params.get("key", "")
        if not key.fits(given) and not proxies.is_same_site(socket.headers, address):
            await socket.send_json({"event": "fault", "text": _OTHER_SITE})
            await socket.close(1008)
            return
        player_type = await asyncio.to_thread(_player_type)
        with contextlib.suppress(RuntimeError):  # closed before the first message
            await player_type(socket, studio).run()

    gradio.mount_gradio_app(
        app,
        page.build(studio.rules),
        path="/",
        auth=auth,
        auth_message="Please log in to this world model.",
        allowed_paths=[],
        max_file_size="1kb",  # nothing is uploaded through Gradio
        footer_links=[],
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        **page.style(),
    )
    admitted = _admission(app, auth)
    return app


def _player_type() -> type:
    """Imported on use: it imports JAX, which the page should not wait for."""
    from cwm_jax.play.web.player import Player

    return Player


def _admission(app: FastAPI, auth) -> Callable[[Mapping[str, str]], bool]:
    """Returns a check whether cookies are of a user logged in on Gradio's page, if required."""
    if auth is None:
        return lambda cookies: True
    inner = next(route.app for route in app.routes if isinstance(route, Mount) and not route.path)
    names = [f"access-token-{inner.cookie_id}", f"access-token-unsecure-{inner.cookie_id}"]
    return lambda cookies: any(cookies.get(name) in inner.tokens for name in names)
