"""Unusable network settings are named, and no password is shown."""

import os

import pytest

from cwm_jax.errors import UserError
from cwm_jax.runtime import network

PASSWORD = "p4#ss"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("SSL_CERT", "HF_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("value", "usable"),
    [
        ("http://127.0.0.1:3128", True),
        ("proxy.example.org:3128", True),
        ("http://user:p%23ss@proxy.example.org:3128/", True),
        ("http://[::1]:3128", True),
        (f"http://user:{PASSWORD}@proxy.example.org:3128", False),
        ("http://user:12#34@proxy.example.org:3128", False),
        ("http://user:a/b@proxy.example.org:3128", False),
        ("http://proxy.example.org:port", False),
        ("http://proxy.example.org:99999", False),
        ("http://:3128", False),
        ("http://[::1", False),
        ("socks4://127.0.0.1:9", False),
        ("htp://127.0.0.1:9", False),
    ],
)
@pytest.mark.parametrize("name", ["HTTPS_PROXY", "all_proxy"])
def test_a_proxy_is_usable_or_named_without_its_value(monkeypatch, name, value, usable):
    monkeypatch.setenv(name, value)
    assert network.proxies() == [name]
    found = network.faults()
    assert bool(found) != usable
    if found:
        assert found[0].startswith(f"{name} is not a proxy address")
        assert value not in found[0]
        assert PASSWORD[:2] not in found[0]


def test_a_socks_proxy_needs_its_package(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    find = network.importlib.util.find_spec
    for there, message in ((None, "pip install socksio"), (True, "")):
        monkeypatch.setattr(network.importlib.util, "find_spec", lambda _, there=there: there)
        assert message in "".join(network.faults())
        assert bool(network.faults()) == (there is None)
    monkeypatch.setattr(network.importlib.util, "find_spec", find)


def test_missing_certificates_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    assert "none.pem, which does not exist" in network.faults()[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks4://127.0.0.1:9"),
        ("HTTPS_PROXY", f"http://user:{PASSWORD}@127.0.0.1:9"),
        ("no_proxy", "[::1"),
        ("SSL_CERT_FILE", "/nonexistent/ca.pem"),
    ],
)
def test_a_program_without_network_use_continues(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    network.without_unusable()
    message = capsys.readouterr().err
    if name in os.environ:  # it is harmless
        assert not message
    else:
        assert f"warning: {name} cannot be used" in message
        assert PASSWORD[:2] not in message


def test_usable_settings_stay(monkeypatch, capsys):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    network.without_unusable()
    assert os.environ["HTTPS_PROXY"] == "http://127.0.0.1:9"
    assert not capsys.readouterr().err


def test_a_variable_that_the_hub_cannot_read_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "30s")
    monkeypatch.setenv("HF_TOKEN", "hf_30s")
    with (
        pytest.raises(UserError, match="cannot read HF_HUB_DOWNLOAD_TIMEOUT=30s:") as error,
        network.hub_settings_read(),
    ):
        int(os.environ["HF_HUB_DOWNLOAD_TIMEOUT"])
    assert "hf_30s" not in str(error.value)
