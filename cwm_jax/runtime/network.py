"""Network settings of the environment, and which of them cannot be used.

No message holds a value: proxies hold passwords.
"""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from cwm_jax.errors import UserError, echo

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_SCHEMES = ("http", "https", "socks5", "socks5h")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_WANTED = (
    "use http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, where a password has %23 for #, "
    "%40 for @, %3A for : and %2F for /"
)


def proxies() -> list[str]:
    """The variables that name a proxy, or hosts to reach without one."""
    names = (*_PROXIES, "no_proxy")
    return [name for name, value in os.environ.items() if name.lower() in names and value]


def faults() -> list[str]:
    """A sentence for each variable that cannot be used."""
    found = [_proxy_fault(name) for name in proxies() if name.lower() in _PROXIES]
    for name in _CERTIFICATES:
        if (path := os.environ.get(name)) and not os.path.exists(path):
            found.append(f"{name} names {path}, which does not exist")
    return [fault for fault in found if fault]


def _proxy_fault(name: str) -> str:
    value = os.environ[name]
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        sound = parts.hostname and parts.port != 0 and not (parts.query or parts.fragment)
    except ValueError:
        return f"{name} is not a proxy address: {_WANTED}"
    if not sound or "@" in parts.path or parts.scheme.lower() not in _SCHEMES:
        return f"{name} is not a proxy address: {_WANTED}"
    if parts.scheme.lower().startswith("socks") and importlib.util.find_spec("socksio") is None:
        return f"{name} is a SOCKS proxy, which needs a package: pip install socksio"
    return ""


@contextlib.contextmanager
def hub_settings_read() -> Iterator[None]:
    """The context for importing `huggingface_hub`, which then reads its variables.

    Raises:
        UserError: one of them has a value that the library cannot read.
    """
    try:
        yield
    except ValueError as error:
        shown = [
            name if name == "HF_ENDPOINT" else f"{name}={os.environ[name]}"  # may hold a password
            for name in _hub_variables_in(error)
        ]
        raise UserError(
            f"huggingface_hub cannot read {', '.join(shown) or 'one of the HF_ variables'}: "
            f"times and counts are whole numbers, such as 30, and HF_ENDPOINT an address"
        ) from None


def _hub_variables_in(error: ValueError) -> list[str]:
    """The variables whose value the library's error quotes."""
    bad = re.findall("'([^']+)'", str(error))
    return [
        name
        for name, value in os.environ.items()
        if name.startswith("HF_") and "TOKEN" not in name and any(x in value for x in bad)
    ]


def without_unusable() -> None:
    """Removes settings from this process's environment with which no HTTP client can be created.

    For programs without network use whose libraries create a client when imported.
    """
    try:
        import huggingface_hub.constants  # noqa: F401 (reads its variables)
    except ValueError as error:
        _ignore(_hub_variables_in(error), "huggingface_hub cannot read it")
    import httpx

    try:
        httpx.Client().close()
    except Exception as error:  # of any kind; its message may hold a password
        names = [*proxies(), *(name for name in _CERTIFICATES if name in os.environ)]
        _ignore(names, "; ".join(faults()) or type(error).__name__)


def _ignore(names: list[str], reason: str) -> None:
    echo(f"warning: {', '.join(names)} cannot be used and is ignored: {reason}")
    for name in names:
        del os.environ[name]
