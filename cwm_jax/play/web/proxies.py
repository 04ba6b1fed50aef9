"""Support for reverse proxies, which change the host, scheme and path prefix of requests.

Proxies differ. Some forward the visitor's `Host`, some put it into `X-Forwarded-Host` or
`Forwarded`, several of them as a list; nginx as in its manual does neither. The page's URLs are
therefore relative to its own, and its socket is accepted by a key that only the page can read.
"""

import re
import secrets
from collections.abc import Iterator
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders

_PREFIXES = ("x-forwarded-prefix", "x-forwarded-context", "x-proxycontextpath", "x-script-name")
_PREFIX = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)+")
# In Gradio's page: the place of its settings, and the code that names the server.
_MODE, _CONST_ROOT = b"<script data-gradio-mode>", re.compile(rb'const root = "[^"]*";')
_ROOT = (
    b"<script>window.gradio_config.root = "
    b'new URL(".", location.href).href.replace(/\\/$/, "");</script>'
)
_MANIFEST, _BESIDE = (
    b'<link rel="manifest" href="/manifest.json" />',
    b'<link rel="manifest" href="manifest.json" /><link rel="icon" href="favicon.ico" />',
)
_USUAL_PORTS = {"http": "80", "https": "443", "ws": "80", "wss": "443"}


class Key:
    """The key that a page sends to open its socket; other sites cannot read it."""

    def __init__(self):
        self.text = secrets.token_urlsafe(32)

    def fits(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.text.encode())


class Prefixed:
    """An ASGI application below a path prefix: that of the proxy's headers, or of `address`.

    A proxy may remove the prefix from forwarded requests, or keep it.

    Args:
        address: URL of the page for visitors, such as https://lab.example.org/world; or "".
    """

    def __init__(self, app, address: str = ""):
        self._app, self._path = app, urlsplit(address).path.rstrip("/")

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] in ("http", "websocket"):
            prefix = self._path or prefix_of(Headers(scope=scope))
            path = scope["path"]
            if prefix and (path == prefix or path.startswith(f"{prefix}/")):
                path = path.removeprefix(prefix) or "/"
            scope = {**scope, "root_path": prefix, "path": f"{prefix}{path}"}
        await self._app(scope, receive, send)


class RelativePage:
    """An ASGI application whose page uses only relative URLs.

    Gradio writes the server's address from the request into its page. That is the proxy's name for
    the server if the proxy does not forward the visitor's.
    """

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or _below(scope) != "/":
            await self._app(scope, receive, send)
            return
        plain = [(k, v) for k, v in scope["headers"] if k != b"accept-encoding"]
        begin, body = {}, b""

        async def rewritten(message) -> None:
            nonlocal begin, body
            if message["type"] == "http.response.start":
                begin = message
            elif message["type"] != "http.response.body":
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body"):
                    for part in _rewritten(begin, body):
                        await send(part)

        await self._app({**scope, "headers": plain}, receive, rewritten)


def _rewritten(begin, body: bytes) -> Iterator[dict]:
    headers = MutableHeaders(raw=list(begin["headers"]))
    if headers.get("content-type", "").startswith("text/html") and body:
        body = _relative(body)
        headers["content-length"] = str(len(body))
    yield {**begin, "headers": headers.raw}
    yield {"type": "http.response.body", "body": body}


def _below(scope) -> str:
    return scope["path"].removeprefix(scope.get("root_path", "")) or "/"


def _relative(page: bytes) -> bytes:
    page = page.replace(_MODE, _ROOT + _MODE, 1).replace(_MANIFEST, _BESIDE, 1)
    return _CONST_ROOT.sub(b"const root = window.gradio_config.root;", page, count=1)


def prefix_of(headers: Headers) -> str:
    """The path prefix in a proxy's headers; empty if there is none."""
    for name in _PREFIXES:
        prefix = headers.get(name, "").split(",")[0].strip().rstrip("/")
        if _PREFIX.fullmatch(prefix):
            return prefix
    return ""


def is_same_site(headers: Headers, address: str = "") -> bool:
    """Whether the headers show that a page of this site opens the socket.

    Browsers let any site open a socket to any other, and send its origin; other programs send none.
    """
    origin = headers.get("origin")
    if origin is None:
        return True
    page = urlsplit(origin)
    return _host(page.netloc, page.scheme) in {
        _host(host, page.scheme) for host in (*_hosts(headers), urlsplit(address).netloc) if host
    }


def _hosts(headers: Headers) -> Iterator[str]:
    """The names of this site in the request, and in the headers of each proxy."""
    for name in ("host", "x-forwarded-host", "x-original-host"):
        yield from (host.strip() for host in headers.get(name, "").split(","))
    yield from re.findall(r'host="?([^",;\s]+)', headers.get("forwarded", ""), re.IGNORECASE)
    if port := headers.get("x-forwarded-port", "").split(",")[0].strip():
        yield f"{headers.get('host', '').partition(':')[0]}:{port}"


def _host(netloc: str, scheme: str) -> str:
    """A host without the default port of its scheme."""
    return netloc.lower().removesuffix(f":{_USUAL_PORTS.get(scheme, '')}")
