"""What reverse proxies change of a request: its host, its scheme, and the front of its path.

Proxies differ. Some hand the visitor's `Host` on, some put it into `X-Forwarded-Host` or
`Forwarded`, several of them in a list; nginx as its manual has it does neither. The page's
addresses are therefore relative to where the browser found it, and its socket is let in by a key
that only the page can read.
"""

import re
import secrets
from collections.abc import Iterator
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders

_PREFIXES = ("x-forwarded-prefix", "x-forwarded-context", "x-proxycontextpath", "x-script-name")
_PREFIX = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)+")
# Of Gradio's page: where its settings stand, and what of it names the server.
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
    """What a page shows so that its socket is let in; other sites cannot read the page."""

    def __init__(self):
        self.text = secrets.token_urlsafe(32)

    def fits(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.text.encode())


class Prefixed:
    """An ASGI application below a path: the one that a proxy names, or the one of `address`.

    A proxy may take the path away before it hands a request on, or leave it.

    Args:
        address: of the page as its visitors see it, such as https://lab.example.org/world; or "".
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
    """An ASGI application whose page looks for everything beside itself.

    Gradio writes the server's address into its page, as far as the request tells. That is the
    proxy's name for the server where the proxy does not hand on the visitor's.
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
    """The path that a proxy took away, as it tells; empty where it tells none."""
    for name in _PREFIXES:
        prefix = headers.get(name, "").split(",")[0].strip().rstrip("/")
        if _PREFIX.fullmatch(prefix):
            return prefix
    return ""


def is_same_site(headers: Headers, address: str = "") -> bool:
    """Whether a socket is asked for by a page of this very site, as far as headers tell.

    Browsers let any site open a socket to any other, and say which; other programs say none.
    """
    origin = headers.get("origin")
    if origin is None:
        return True
    asking = urlsplit(origin)
    return _host(asking.netloc, asking.scheme) in {
        _host(host, asking.scheme) for host in (*_hosts(headers), urlsplit(address).netloc) if host
    }


def _hosts(headers: Headers) -> Iterator[str]:
    """The names of this site: as asked for, and as each proxy on the way was asked for it."""
    for name in ("host", "x-forwarded-host", "x-original-host"):
        yield from (host.strip() for host in headers.get(name, "").split(","))
    yield from re.findall(r'host="?([^",;\s]+)', headers.get("forwarded", ""), re.IGNORECASE)
    if port := headers.get("x-forwarded-port", "").split(",")[0].strip():
        yield f"{headers.get('host', '').partition(':')[0]}:{port}"


def _host(netloc: str, scheme: str) -> str:
    """A host without the port that its scheme has anyway."""
    return netloc.lower().removesuffix(f":{_USUAL_PORTS.get(scheme, '')}")
