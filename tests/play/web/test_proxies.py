"""Play works behind reverse proxies, tested in a real browser and with their headers."""

import contextlib
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest
from starlette.datastructures import Headers
from test_browser import CHROMIUM, DRIVER, launched, served, visiting

from cwm_jax.errors import UserError
from cwm_jax.play.web import launch, proxies

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
OPENSSL = shutil.which("openssl")
THERE = all((NGINX, OPENSSL, CHROMIUM, DRIVER))
needs_nginx = pytest.mark.skipif(not THERE, reason="no nginx, openssl and chromium here")
pytestmark = pytest.mark.xdist_group("browser")
SOCKETS = "proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade;"
SOCKETS += " proxy_set_header Connection upgrade;"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def nginx(folder, server):
    """Runs nginx with one server; `server` is its block's content."""
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error; worker_processes 1;\n"
        f"events {{}} http {{ access_log off; client_body_temp_path {folder}/b; "
        f"proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; "
        f"scgi_temp_path {folder}/s; server {{ {server} }} }}\n"
    )
    words = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", f"{folder}/error"]
    running = subprocess.Popen(words)
    try:
        time.sleep(0.5)
        assert running.poll() is None, (folder / "error").read_text()
        yield
    finally:
        running.terminate()
        running.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    driver = launched(folder, "--ignore-certificate-errors")
    yield driver
    driver.quit()


def certificate(folder):
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key -out cert"
    subprocess.run([OPENSSL, *words.split()], cwd=folder, check=True, capture_output=True)
    return f"ssl_certificate {folder}/cert; ssl_certificate_key {folder}/key;"


@needs_nginx
@pytest.mark.parametrize("case", ["prefix", "tls and prefix", "tls", "prefix kept"])
def test_the_game_is_played_behind_nginx(case, browser, scheduler, clips, tmp_path):
    """With only nginx' documented lines for WebSockets, it forwards its own Host and no other."""
    public, upstream = free_port(), free_port()
    scheme, path = "https" if "tls" in case else "http", "/" if case == "tls" else "/proxy/7860/"
    page = f"{scheme}://localhost:{public}{path}"
    kept = case == "prefix kept"
    block = f"listen 127.0.0.1:{public}{' ssl' if scheme == 'https' else ''};"
    block += certificate(tmp_path) if scheme == "https" else ""
    target = f"http://127.0.0.1:{upstream}{'' if kept else '/'}"
    block += f"location {path} {{ proxy_pass {target}; {SOCKETS} }}"
    address = dict(address=page) if kept else {}
    with nginx(tmp_path, block), served(scheduler, clips, upstream, **address):
        wait_for(upstream)
        with visiting(browser, page) as one:
            one.start(5)
            one.hold("ArrowRight", 3)
            entries = "return performance.getEntriesByType('resource').map((e) => e.name)"
            names = one.run(entries)
            assert len(names) > 5
            assert not [name for name in names if not name.startswith((page, "data:", "blob:"))]
            one.click("play-npz")
            link = one.until("return document.querySelector('#note a[download$=npz]')?.href")
            assert link.startswith(page)


def wait_for(port):
    """Waits until the page itself is served, not the loading page."""
    deadline = time.monotonic() + 60
    while b"gradio" not in urllib.request.urlopen(f"http://127.0.0.1:{port}/").read():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@needs_nginx
def test_the_page_names_a_proxy_that_forwards_no_sockets(browser, scheduler, clips, tmp_path):
    public, upstream = free_port(), free_port()
    block = f"listen 127.0.0.1:{public}; location / {{ proxy_pass http://127.0.0.1:{upstream}; }}"
    with nginx(tmp_path, block), served(scheduler, clips, upstream):
        wait_for(upstream)
        browser.get(f"http://localhost:{public}/")
        text = "return document.querySelector('#cover-text')?.textContent ?? ''"
        deadline = time.monotonic() + 30
        while "does not forward WebSockets" not in browser.execute_script(text):
            assert time.monotonic() < deadline, browser.execute_script(text)
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("origin", "headers", "address"),
    [
        ("http://a.example", {"host": "a.example"}, ""),
        ("https://a.example", {"host": "a.example:443"}, ""),
        ("https://a.example:443", {"host": "A.example"}, ""),
        ("http://a.example:7860", {"host": "a.example:7860"}, ""),
        ("https://a.example", {"host": "in", "x-forwarded-host": "a.example, inner.local"}, ""),
        ("https://a.example", {"host": "in", "x-forwarded-host": "inner, a.example:443"}, ""),
        ("https://a.example", {"host": "in", "forwarded": 'for=1; host="a.example"'}, ""),
        ("https://a.example:8443", {"host": "a.example", "x-forwarded-port": "8443"}, ""),
        ("https://a.example", {"host": "127.0.0.1:7860"}, "https://a.example/world"),
    ],
)
def test_a_page_of_this_site_is_recognised_by_proxy_headers(origin, headers, address):
    assert proxies.is_same_site(Headers(headers | {"origin": origin}), address)
    for other in ("https://evil.example", "http://a.example.evil", "null", "https://a.example:9"):
        assert not proxies.is_same_site(Headers(headers | {"origin": other}), address)
    assert proxies.is_same_site(Headers(headers), address)


@pytest.mark.parametrize(
    ("headers", "prefix"),
    [
        ({"x-forwarded-prefix": "/proxy/7860"}, "/proxy/7860"),
        ({"x-forwarded-prefix": "/a/, /b"}, "/a"),
        ({"x-forwarded-context": "/user/ann/proxy/7860"}, "/user/ann/proxy/7860"),
        ({"x-script-name": "/world/"}, "/world"),
        ({"x-forwarded-prefix": "/"}, ""),
        ({"x-forwarded-prefix": '/"><script>'}, ""),
        ({"x-forwarded-prefix": "https://evil.example"}, ""),
        ({"x-forwarded-prefix": "//evil.example"}, ""),
        ({}, ""),
    ],
)
def test_the_prefix_comes_from_the_proxys_headers(headers, prefix):
    assert proxies.prefix_of(Headers(headers)) == prefix


@pytest.mark.parametrize("address", ["lab.example.org", "ftp://a/b", "https://", "https://a/?b"])
def test_a_wrong_address_is_named(address):
    usual = dict(checkpoint=None, step=None, data=None, host="", port=0, share=False, auth=None)
    with pytest.raises(UserError, match=r"--address .*: it must be the URL of the page"):
        launch.Options(**usual, fps=15, players=1, idle_minutes=1, address=address)
