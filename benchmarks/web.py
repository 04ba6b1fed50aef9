"""The cost of the page without a server, in headless Chromium.

    make web
    python -m benchmarks.web [--page dist/web] [--seconds 10] [--frames 5000] [--threads 1,2]
        [--steps 1,2,4] [--backends wasm,onnxruntime,webgpu] [--only pace,keys,load,memory]
        [--patience 300]

Frames a second by backend and steps, with the time of the median and of the slowest frame and the
processor time of the tab's process; from a key to its frame; from opening the page to its first
frame; memory over many frames. Backends are the page's kernels (`wasm`) and onnxruntime-web, both
by number of threads, and WebGPU if the browser has an adapter. Each part ends with a Markdown
table. No measurement takes longer than `--patience` seconds, except of memory: `--frames` frames of
one step.
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
_WARM = 40  # frames before timing starts, of which …
_WARM_SECONDS = 8.0  # … there may be fewer on a slow machine


class Page:
    """One tab that plays.

    Args:
        patience: seconds that anything may take.
    """

    def __init__(self, driver, address: str, patience: float):
        self.driver, self._patience = driver, patience
        driver.set_script_timeout(patience)
        driver.get(address)
        self.wait("return window.play?.started")

    def run(self, script: str, *args):
        return self.driver.execute_script(script, *args)

    def wait(self, script: str):
        end = time.monotonic() + self._patience
        while time.monotonic() < end:
            with contextlib.suppress(Exception):  # the first visit loads the page twice
                if found := self.run(script):
                    return found
            time.sleep(0.05)
        raise UserError(f"the page did nothing for {self._patience} s: {self.run(_TEXT)}")

    def frames(self, count: int, seconds: float) -> list[float]:
        """Milliseconds between frames of auto-run at full speed: up to so many, in so much time."""
        self.run("play.times = []; play.seen = (message, now) => play.times.push(now);"
                 "play.send({do: 'settings', fps: 1000, auto: true})")  # fmt: skip
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.run("return play.times.length") <= count:
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))  # each look costs time too
        self.run("play.send({do: 'settings', auto: false})")
        times = self.run("return play.times")
        return [b - a for a, b in itertools.pairwise(times)]

    def warm(self) -> None:
        self.frames(_WARM, _WARM_SECONDS)

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
        try:
            yield f"http://127.0.0.1:{serving.server_address[1]}/"
        finally:
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


@contextlib.contextmanager
def _playing(address: str, args: argparse.Namespace, query: str = "backend=wasm"):
    """A page in a fresh browser, and the folder of its profile."""
    with tempfile.TemporaryDirectory() as profile, _browser(profile) as driver:
        yield Page(driver, f"{address}?{query}", args.patience), profile


def pace(address: str, args: argparse.Namespace) -> None:
    """Frames a second."""
    rows = []
    on_cpu = itertools.product(("wasm", "onnxruntime"), args.threads)
    kinds = [pair for pair in (*on_cpu, ("webgpu", 1)) if pair[0] in args.backends]
    for backend, threads in kinds:
        query = f"backend={backend}&threads={threads}"
        with _playing(address, args, query) as (page, profile):
            model = page.run("return play.model")
            if model["backend"] != backend:
                print(f"no {backend} here, or its results differ from those of wasm", flush=True)
                continue
            for steps in args.steps or model["steps"]:
                page.settings(steps=steps)
                page.warm()
                measured = _measured(page, _renderer(profile), args.seconds)
                rows.append({"backend": backend, "threads": model["threads"], "steps": steps})
                rows[-1] |= measured
                print(machine.described(rows[-1]), flush=True)
    print(machine.table(rows))


def _measured(page: Page, process: int, seconds: float) -> dict[str, float]:
    before = _processor_seconds(process)
    times = sorted(page.frames(10**9, seconds))
    spent = _processor_seconds(process) - before
    if not times:
        raise UserError(f"no two frames came within {seconds} s: give more --seconds")
    median = times[len(times) // 2]
    return {
        "frames": len(times) + 1,
        "frames/s": round(1000 * len(times) / sum(times), 1),
        "ms, median": _rounded(median),
        "ms, slowest": _rounded(times[-1]),
        "over twice the median": sum(ms > 2 * median for ms in times),
        "processor ms a frame": _rounded(1000 * spent / (len(times) + 1)),
    }


def _rounded(ms: float) -> float:
    return round(ms, 1) if ms < 100 else round(ms)


def keys(address: str, args: argparse.Namespace) -> None:
    """From a key to its frame, at 15 frames a second and the steps that the page chooses."""
    with _playing(address, args) as (page, _):
        page.settings(steps=0)
        page.warm()
        page.settings(fps=15)
        page.run(_PRESS)
        page.wait(f"return play.delays.length >= {max(20, int(args.seconds))}")
        delays = sorted(page.run("clearInterval(play.timer); return play.delays"))
        row = {
            "presses": len(delays),
            "p50 ms": round(delays[len(delays) // 2]),
            "p95 ms": round(delays[int(0.95 * len(delays))]),
            "steps": page.run("return document.getElementById('r-steps').textContent"),
        }
        print(machine.table([row]))


def load(address: str, args: argparse.Namespace) -> None:
    """From opening the page to the first playable frame."""
    rows = []
    with tempfile.TemporaryDirectory() as profile, _browser(profile) as driver:
        for visit in ("first", "second"):
            began = time.perf_counter()
            page = Page(driver, f"{address}?backend=wasm", args.patience)
            seconds = round(time.perf_counter() - began, 1)
            rows.append({"visit": visit, "seconds to the first frame": seconds})
            print(machine.described(rows[-1]), flush=True)
            if visit == "first":
                page.wait("return navigator.serviceWorker.controller")
                time.sleep(5)  # the service worker caches the rest
    print(machine.table(rows))


def memory(address: str, args: argparse.Namespace) -> None:
    """Memory of the tab's process while it plays."""
    rows = []
    with _playing(address, args) as (page, profile):
        process = _renderer(profile)
        page.settings(steps=min(page.run("return play.model")["steps"]))
        for share in (0, 0.1, 0.25, 0.5, 0.75, 1):
            missing = int(share * args.frames) - page.run("return play.frames")
            page.frames(max(1, missing), args.patience + missing)
            at = page.run("return play.frames")
            rows.append({"frames": at, "MB": round(_megabytes(process))})
            print(machine.described(rows[-1]), flush=True)
    print(machine.table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    whole = lambda text: [int(word) for word in text.split(",")]
    add = parser.add_argument
    add("--page", type=path_flag, default=_ROOT / "dist" / "web")
    add("--seconds", type=float, default=10)
    add("--frames", type=int, default=5000)
    add("--threads", type=whole, default=[1, 2])
    add("--steps", type=whole, help="denoising steps, of those that the page has (all)")
    add("--backends", default="wasm,onnxruntime,webgpu", help="of `pace` (%(default)s)")
    add("--only", default="pace,keys,load,memory")
    add("--patience", type=float, default=300, help="seconds for one measurement (%(default)s)")
    args = parser.parse_args()
    with shown_to_user(), _served(args.page) as address:
        print(machine.described(machine.description()))
        for part in args.only.split(","):
            print(f"\n{part}", flush=True)
            globals()[part](address, args)


if __name__ == "__main__":
    main()
