"""What the page without a server costs, in headless Chromium.

    make web
    python -m benchmarks.web [--page dist/web] [--seconds 10] [--frames 5000] [--threads 1,2]
        [--steps 1,2,4] [--only pace,keys,load,memory]

Frames a second by steps and threads, with the time that a processor spends on each and the slowest
frame beside the median; from a key to its frame; from opening the page to its first frame; memory
over many frames. WebGPU is measured where the browser has an adapter.
"""

import argparse
import contextlib
import itertools
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

from selenium import webdriver

from benchmarks import machine
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.static_page import server

_ROOT = Path(__file__).parents[1]
_FLAGS = (
    "--headless=new --no-sandbox --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900"
)
_TICKS = os.sysconf("SC_CLK_TCK")
_PATIENCE = 300  # seconds
_WARM = 40  # frames before anything is timed


class Page:
    """One tab that plays, and the process behind it."""

    def __init__(self, driver, address: str):
        self.driver = driver
        driver.set_script_timeout(_PATIENCE)
        driver.get(address)
        self.wait("return window.play?.started")

    def run(self, script: str, *args):
        return self.driver.execute_script(script, *args)

    def wait(self, script: str):
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(Exception):  # the first visit loads the page twice
                if found := self.run(script):
                    return found
            time.sleep(0.05)
        raise UserError(f"the page did nothing for {_PATIENCE} s: {self.run(_TEXT)}")

    def frames(self, count: int) -> list[float]:
        """Milliseconds between so many frames of auto-run, as fast as they come."""
        self.run("play.times = []; play.seen = (message, now) => play.times.push(now);"
                 "play.send({do: 'settings', fps: 1000, auto: true})")  # fmt: skip
        self.wait(f"return play.times.length > {count}")
        self.run("play.send({do: 'settings', auto: false})")
        times = self.run("return play.times")
        return [b - a for a, b in itertools.pairwise(times)]

    def settings(self, **settings) -> None:
        self.run("play.send({do: 'settings', ...arguments[0]})", settings)


_PRESS = """
    play.delays = [];
    play.seen = ({stamp}, now) => stamp && play.delays.push(now - stamp);
    let down = false;
    play.timer = setInterval(() => {
      down = !down;
      dispatchEvent(new KeyboardEvent(down ? "keydown" : "keyup", {code: "ArrowRight"}));
    }, 400);"""
_TEXT = "return document.body.innerText.slice(0, 500)"


@contextlib.contextmanager
def _served(folder: Path):
    with server.serving(folder, "127.0.0.1", 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}/"
        serving.shutdown()


@contextlib.contextmanager
def _browser(profile: str):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser") or ""
    for flag in (*_FLAGS.split(), f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def _renderer(profile: str) -> int:
    """The process of the tab: the busiest renderer of this profile."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (path / "cmdline").read_bytes()
            if b"--type=renderer" in line and profile.encode() in line:
                found[int(path.name)] = _processor_seconds(int(path.name))
    return max(found, key=found.get)


def _processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _megabytes(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def pace(address: str, args: argparse.Namespace) -> None:
    """Frames a second."""
    rows = []
    kinds = [("wasm", threads) for threads in args.threads] + [("webgpu", 1)]
    for backend, threads in kinds:
        with tempfile.TemporaryDirectory() as profile, _browser(profile) as driver:
            page = Page(driver, f"{address}?backend={backend}&threads={threads}")
            model = page.run("return play.model")
            if model["backend"] != backend:
                print("no WebGPU here, or one that computes otherwise than WASM")
                continue
            process = _renderer(profile)
            for steps in args.steps:
                page.settings(steps=steps)
                page.frames(_WARM)
                page.run(_RESTART)
                before, began = _processor_seconds(process), time.perf_counter()
                count = 0
                times = []
                while time.perf_counter() - began < args.seconds:
                    times += page.frames(20)
                    count += 21
                spent = _processor_seconds(process) - before
                times.sort()
                rows.append({
                    "backend": backend,
                    "threads": model["threads"],
                    "steps": steps,
                    "frames/s": round(1000 * len(times) / sum(times), 1),
                    "ms, median": round(times[len(times) // 2], 1),
                    "ms, 95 %": round(times[int(0.95 * len(times))], 1),
                    "ms, fastest": round(times[0], 1),
                    "processor ms a frame": round(1000 * spent / count, 1),
                })  # fmt: skip
                print(machine.told(rows[-1]), flush=True)
    print(machine.table(rows))


_RESTART = "play.send({do: 'start', clip: 5, frames: 4})"


def keys(address: str, args: argparse.Namespace) -> None:
    """From a key to the frame that it led to, the page being still, and with 15 frames a second."""
    with tempfile.TemporaryDirectory() as profile, _browser(profile) as driver:
        page = Page(driver, f"{address}?backend=wasm&threads=1")
        page.settings(fps=15, steps=0)
        page.frames(_WARM)
        page.settings(fps=15)
        page.run(_PRESS)
        page.wait(f"return play.delays.length >= {max(20, int(args.seconds))}")
        delays = sorted(page.run("clearInterval(play.timer); return play.delays"))
        steps = page.run("return document.getElementById('r-steps').textContent")
        row = {"presses": len(delays), "p50 ms": round(delays[len(delays) // 2])}
        print(
            machine.told(row | {"p95 ms": round(delays[int(0.95 * len(delays))]), "steps": steps})
        )


def load(address: str, args: argparse.Namespace) -> None:
    """From opening the page to the first frame that a person can play on from."""
    with tempfile.TemporaryDirectory() as profile, _browser(profile) as driver:
        for visit in ("first", "second"):
            began = time.perf_counter()
            page = Page(driver, f"{address}?backend=wasm&threads=1")
            print(f"{visit} visit: {time.perf_counter() - began:.1f} s to the first frame")
            if visit == "first":
                page.wait("return navigator.serviceWorker.controller")
                time.sleep(5)  # the service worker keeps the rest


def memory(address: str, args: argparse.Namespace) -> None:
    """Memory of the tab's process while it plays."""
    with tempfile.TemporaryDirectory() as profile, _browser(profile) as driver:
        page = Page(driver, f"{address}?backend=wasm&threads=1")
        process = _renderer(profile)
        page.settings(steps=1)
        for share in (0, 0.1, 0.25, 0.5, 0.75, 1):
            at = int(share * args.frames)
            page.frames(max(1, at - page.run("return play.frames")))
            print(f"{at} frames: {_megabytes(process):.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    whole = lambda text: [int(word) for word in text.split(",")]
    add = parser.add_argument
    add("--page", type=path_flag, default=_ROOT / "dist" / "web")
    add("--seconds", type=float, default=10)
    add("--frames", type=int, default=5000)
    add("--threads", type=whole, default=[1, 2])
    add("--steps", type=whole, default=[1, 2, 4])
    add("--only", default="pace,keys,load,memory")
    args = parser.parse_args()
    with shown_to_user(), _served(args.page) as address:
        print(machine.told(machine.description()))
        for part in args.only.split(","):
            print(f"\n{part}", flush=True)
            globals()[part](address, args)


if __name__ == "__main__":
    main()
