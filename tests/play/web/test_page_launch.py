"""The page is served in environments where Gradio alone would not start."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from cwm_jax.errors import UserError
from cwm_jax.play.web import launch

ROOT = Path(__file__).parents[3]


def wait_for(path, word):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if word in (text := path.read_text()):
            return text
        time.sleep(0.1)
    raise TimeoutError(path.read_text())


@pytest.mark.timeout(120)
def test_the_page_is_served_with_unusable_proxies_and_another_users_folder(tmp_path):
    (tmp_path / "gradio").touch()  # where Gradio writes by default
    odd = {"TMPDIR": str(tmp_path), "HTTPS_PROXY": "http://user:p#ss@127.0.0.1:9"}
    odd |= {"ALL_PROXY": "socks5://127.0.0.1:9", "HF_HUB_DOWNLOAD_TIMEOUT": "30s"}
    command = [sys.executable, str(ROOT / "play.py"), "--demo", "--port", "0"]
    output = tmp_path / "output"
    with output.open("w") as file:
        play = subprocess.Popen(command, env=os.environ | odd, stdout=file, stderr=file)
    try:
        text = wait_for(output, "ready after")
        address = text.split("Play at ")[1].split()[0]
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(address, timeout=30) as answer:
            assert answer.status == 200
        assert "cannot be used" in text
        assert "p#ss" not in text
        play.send_signal(signal.SIGINT)
        assert play.wait(30) == 0
    finally:
        play.kill()
    assert {path.name for path in tmp_path.iterdir()} == {"gradio", "output"}


def test_gradios_own_folder_variable_is_respected(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with launch._own_temporary_folder():
        assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)


def test_without_a_temporary_folder_a_variable_is_named(monkeypatch):
    def none(*_, **__):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    monkeypatch.setattr(launch.tempfile, "TemporaryDirectory", none)
    with pytest.raises(UserError, match="TMPDIR"), launch._own_temporary_folder():
        pass
