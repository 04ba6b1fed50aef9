"""A server that answers at once, while libraries, page and model are loaded.

Importing Gradio and JAX takes seconds. Until the application is ready, every visitor gets a small
page that reloads itself.
"""

import asyncio
import socket
import threading
from collections.abc import Callable

from cwm_jax.errors import UserError

_PAGE = b"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="1"><title>Play the world model</title>
<style>:root{color-scheme:light dark}body{font:16px system-ui,sans-serif;display:grid;
place-items:center;min-height:90vh;margin:0}</style>
<p>The page is loading &hellip;</p></html>"""


class Opening:
    """An ASGI application that replaces another until that one is ready.

    Args:
        make: creates the application; called in a thread when the server starts.
        failed: called in that thread if `make` raises.
    """

    def __init__(self, make: Callable, failed: Callable[[BaseException], None]):
        self._make, self._failed = make, failed
        self._app = None
        self._end = asyncio.Event()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"text/html"), (b"retry-after", b"1")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": _PAGE})
        else:
            await send({"type": "websocket.close", "code": 1013})

    async def _lifespan(self, receive, send) -> None:
        await receive()
        life = asyncio.create_task(self._live())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._end.set()
        await life
        await send({"type": "lifespan.shutdown.complete"})

    async def _live(self) -> None:
        """Creates the application and runs it until the server ends."""
        loop = asyncio.get_running_loop()
        made = loop.create_future()

        def make() -> None:
            try:
                app = self._make()
            except BaseException as error:
                self._failed(error)
            else:
                loop.call_soon_threadsafe(made.set_result, app)

        threading.Thread(target=make, daemon=True, name="play-opening").start()
        end = asyncio.create_task(self._end.wait())
        await asyncio.wait([made, end], return_when=asyncio.FIRST_COMPLETED)
        if made.done():
            app = made.result()
            async with app.router.lifespan_context(app):
                self._app = app
                await end


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises `UserError` where the address cannot be used."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on {host} port {port}: {reason}; is another program using it? "
            "Choose another with --port, or 0 for any free one"
        ) from None
    return listener
