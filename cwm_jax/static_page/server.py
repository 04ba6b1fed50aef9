"""Serves a built page on this machine, with the headers of an isolated page, which threads need."""

import functools
import http.server
from pathlib import Path

from cwm_jax.errors import UserError

_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
_KEPT = "public, max-age=31536000, immutable"  # names that change with what is in the file
_TYPES = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".packed": "application/octet-stream",
}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of one folder."""

    protocol_version = "HTTP/1.1"
    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | _TYPES

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        is_fixed = "/assets/" in self.path or "/app-" in self.path
        self.send_header("Cache-Control", _KEPT if is_fixed else "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args) -> None:
        """Nothing: a line for each file helps nobody."""


def serving(folder: Path, host: str, port: int) -> http.server.ThreadingHTTPServer:
    """A server of the folder, bound but not yet running.

    Raises:
        UserError: there is no page in the folder, or the port is taken.
    """
    if not (folder / "index.html").is_file():
        raise UserError(f"there is no page in {folder}; `make web` builds one")
    handler = functools.partial(Handler, directory=str(folder))
    try:
        return http.server.ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        raise UserError(
            f"cannot serve on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from None
