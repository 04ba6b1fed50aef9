"""The page without a server, in headless Chromium: a tiny network, built and served here."""

import asyncio
import contextlib
import dataclasses
import json
import shutil
import threading
import time

import jax
import numpy as np
import pytest

from cwm_jax.checkpoints.run_checkpoint import Trained
from cwm_jax.errors import UserError
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.play.inference.engine import Engine
from cwm_jax.play.inference.scheduler import Scheduler
from cwm_jax.play.session import share_code
from cwm_jax.play.session.prompt_sources import ClipPrompts, ClipSource
from cwm_jax.play.session.session import Session
from cwm_jax.runtime import random_numbers
from cwm_jax.sampling import sampler
from cwm_jax.static_page import build, npm_package, server, start_clips

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here"),
    pytest.mark.xdist_group("browser"),
]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    "--window-size=1280,900"
)
PATIENCE = 150  # seconds that anything may take on a busy machine
TINY = DiTConfig(
    hidden_size=32,
    depth=1,
    num_heads=2,
    patch_size=16,
    image_size=64,
    num_actions=15,
    max_frames=8,
    history=2,
    qk_norm=True,
    dtype="float32",
)


def trained():
    """Random numbers that bfloat16, and so float16, holds exactly, as a shipped model's are."""
    rng = np.random.default_rng(0)
    shapes = sorted(dit.shapes(TINY).items())
    params = {k: np.round(rng.standard_normal(v.shape) * 32) / 256 for k, v in shapes}
    params = {name: value.astype(np.float32) for name, value in params.items()}
    sampling = {"ddim_steps": 2, "playable_steps": [1, 2]}
    config = {"model": dataclasses.asdict(TINY), "sampler": sampling}
    return Trained(TINY, params, config, 7, None)


@pytest.fixture(scope="module")
def prompts():
    return ClipPrompts("assets/coinrun")


@pytest.fixture(scope="module")
def page(tmp_path_factory, prompts):
    """The folder of a built page; skips where the runtime is not in the cache and npm not here."""
    out = tmp_path_factory.mktemp("web") / "page"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "LEVEL", 1)
        patch.setattr(build, "MOST_BYTES", 60_000_000)
        patch.setattr(start_clips, "LEVEL", 1)
        try:
            build.build(trained(), prompts, out, name="tiny", steps=(1, 2))
        except UserError as error:
            if npm_package.NAME in str(error):
                pytest.skip(str(error))
            raise
    return out


@contextlib.contextmanager
def served(folder, port=0):
    with server.serving(folder, "127.0.0.1", port) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{serving.server_address[1]}/"
        finally:  # without it the thread would query a closed socket for ever
            serving.shutdown()


@contextlib.contextmanager
def browser(folder, *more, downloads=None):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), *more, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    if downloads:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(PATIENCE)
    try:
        yield driver
    finally:
        driver.quit()


class Person:
    """A user of the page; opens it and waits until it plays."""

    def __init__(self, driver, address, wait_for="play.started"):
        self.driver = driver
        driver.get(address)
        self.until(f"return window.{wait_for}")

    def until(self, script, *args):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(Exception):  # the page may be loading anew
                if found := self.driver.execute_script(script, *args):
                    return found
            time.sleep(0.05)
        text = self.driver.execute_script("return document.body.innerText")
        raise AssertionError(f"{script} never came true. The page: {text}")

    def run(self, script, *args):
        return self.driver.execute_script(script, *args)

    def key(self, code, kind="keydown"):
        self.run(
            "dispatchEvent(new KeyboardEvent(arguments[1], {code: arguments[0], bubbles: true}))",
            code,
            kind,
        )

    def hold(self, code, frames):
        """Holds a key until so many frames more have come."""
        wanted = self.total + frames
        self.key(code)
        self.until(f"return {TOTAL} >= {wanted}")
        self.key(code, "keyup")
        self.settled()

    def begins(self, clip):
        """Starts a session and waits for it: keys held before it are let go at its start."""
        before = self.run("return play.sessions")
        self.run("play.start({clip: arguments[0]})", clip)
        self.until(f"return play.sessions > {before} && {TOTAL} == 4")

    def settled(self):
        """Waits until no frame comes any more."""
        before = -1
        while before != (before := self.run("return play.frames")):
            time.sleep(0.3)

    def click(self, where):
        self.run("document.querySelector(arguments[0]).click()", where)

    @property
    def total(self):
        return self.run(f"return {TOTAL}")

    def frames(self, start, stop):
        script = """const [start, stop, done] = arguments;
            play.history(start, stop).then((frames) => done(frames.map((f) => Array.from(f))))"""
        found = self.driver.execute_async_script(script, start, stop)
        return np.array(found, np.uint8).reshape(-1, 64, 64, 3)

    def code(self):
        return self.driver.execute_async_script("play.makeCode().then(arguments[0])")

    def backend(self):
        return self.run("return document.getElementById('backend').textContent")

    def note(self):
        return self.run("return document.getElementById('note').textContent")


TOTAL = "Number(document.getElementById('place').textContent.split('/')[1])"


@pytest.fixture(scope="module")
def person(page, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    with served(page) as address, browser(folder, downloads=folder) as driver:
        someone = Person(driver, f"{address}?threads=1")
        someone.run("play.send({do: 'settings', fps: 60, steps: 2})")
        someone.folder, someone.address = folder, address
        yield someone


@pytest.fixture
def anew(person):
    """A session from a clip's first four frames."""
    person.begins(5)
    return person


def python_frames(prompts, code):
    """The frames that the Python page shows for a share code."""

    async def play():
        engine = Engine(TINY, trained().params, steps=(2, 1), usual=2, playable=(1, 2))
        with Scheduler(engine) as scheduler:
            session = Session.from_recipe(scheduler, prompts, share_code.decode(code))
            with contextlib.suppress(UserError):  # the last frame may differ by a rounding
                while session.to_replay:
                    await session.replay_step()
            return np.stack(list(session.history.frames(0, len(session.history))))

    return asyncio.run(play())


def differences(a, b):
    """The largest difference of each frame, in levels of 255."""
    return np.abs(a.astype(int) - b.astype(int)).reshape(len(a), -1).max(1)


def alike(a, b):
    """Whether two machines generated a session: one frame from the same past differs by a rounding.

    Later frames build on that difference: 5 to 8 levels after 20 frames of this network.
    """
    found = differences(a, b)
    print("levels by frame:", *found)
    return max(found[found > 0][:1], default=0) <= 1 and found.max() <= 12


def test_plays_200_frames_with_keys_and_rewinds(anew):
    for code in ("ArrowRight", "ArrowUp", "ArrowLeft", "ArrowRight"):
        anew.hold(code, 50)
    assert anew.total >= 204
    before = anew.frames(100, 110)
    assert (before[0] != before[9]).any()
    anew.run("play.send({do: 'rewind', to: 99})")
    anew.until("return document.getElementById('place').textContent.startsWith('100 /')")
    anew.hold("ArrowUp", 1 - (anew.total - 100))  # a branch: what came later is forgotten
    assert 101 <= anew.total < 110
    assert (anew.frames(98, 100) == anew.frames(98, 100)).all()


def test_noise_is_that_of_jax(person):
    script = """const [seed, number, done] = arguments;
        const path = JSON.parse(document.getElementById("files").textContent)["noise.js"].path;
        import(new URL(path, document.baseURI)).then((m) =>
          done(Array.from(m.frameNoise(seed, number, 12288))))"""
    for seed, number in ((0, 4), (4_123_456_789, 1717)):
        key = jax.random.fold_in(random_numbers.key(np.uint32(seed)), number)
        wanted, _ = sampler.frame_noise(key, (12288,))
        found = np.array(person.driver.execute_async_script(script, seed, number))
        assert np.abs(found - np.asarray(wanted)).max() < 1e-6


def test_what_if_shows_six_futures_and_continues_one(anew):
    anew.click("#whatif")
    anew.until(
        "return document.querySelectorAll('#futures-grid button:not(:disabled)').length == 6"
    )
    anew.click("#futures-grid button:nth-child(5)")
    anew.until("return document.getElementById('place').textContent == '12 / 12'")


def test_a_code_of_the_page_is_read_by_the_python_page_and_the_other_way_round(anew, prompts):
    anew.hold("ArrowRight", 9)
    anew.hold("ArrowUp", 6)
    shown, code = anew.frames(0, anew.total), anew.code()
    assert alike(python_frames(prompts, code), shown)

    recipe = share_code.decode(code)
    other = recipe._replace(source=ClipSource(40, 3), seed=4_000_000_001)
    other = other._replace(prompt_checksum=prompts.load(other.source).checksum).encoded
    anew.run("play.replay(arguments[0])", other)
    anew.until("return document.getElementById('note').textContent.startsWith('Played again')")
    assert alike(python_frames(prompts, other), anew.frames(0, anew.total))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r._replace(fingerprint=b"12345678").encoded, "another model (3132333435363738)"),
        (lambda r: r._replace(prompt_checksum=1).encoded, "another clip 5"),
        (lambda r: r._replace(source=ClipSource(9999, 4)).encoded, "no clip 9999"),
        (lambda r: r.encoded[:-3] + "abc", "damaged"),
        (lambda r: "hello", "no share code"),
    ],
)
def test_a_code_that_cannot_be_played_is_named(anew, change, words):
    anew.hold("ArrowRight", 2)
    anew.run("play.replay(arguments[0])", change(share_code.decode(anew.code())))
    anew.until("return document.getElementById('note').className == 'bad'")
    assert words in anew.note()


def test_a_users_picture_starts_a_session_that_python_reads(anew, prompts):
    anew.run("""const canvas = new OffscreenCanvas(200, 100), context = canvas.getContext("2d");
        context.fillStyle = "teal"; context.fillRect(0, 0, 200, 100);
        context.fillStyle = "gold"; context.fillRect(80, 30, 40, 40);
        canvas.convertToBlob().then((blob) => {
          const data = new DataTransfer();
          data.items.add(new File([blob], "mine.png", {type: "image/png"}));
          dispatchEvent(new DragEvent("drop", {dataTransfer: data, cancelable: true}));
        })""")
    anew.until("return document.getElementById('place').textContent == '1 / 1'")
    anew.hold("ArrowLeft", 3)
    code = anew.code()
    assert alike(python_frames(prompts, code), anew.frames(0, anew.total))


def test_two_threads_show_the_same_frames(anew):
    anew.hold("ArrowRight", 6)
    shown, code, driver = anew.frames(0, anew.total), anew.code(), anew.driver
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    try:
        other = Person(driver, f"{anew.address}?backend=wasm&threads=2")
        other.run("play.replay(arguments[0])", code)
        other.until("return document.getElementById('note').textContent.startsWith('Played again')")
        assert (other.frames(0, other.total) == shown).all()
        assert other.backend() == "WebAssembly, 2 threads"
    finally:
        driver.close()
        driver.switch_to.window(first)


def test_webgpu_generates_the_frames_of_the_kernels_with_a_software_adapter(page, tmp_path):
    flags = "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"
    with served(page) as address, browser(tmp_path, *flags) as driver:
        driver.get(f"{address}cwm-web.json")
        find = "navigator.gpu?.requestAdapter().then((found) => arguments[0](Boolean(found)))"
        if not driver.execute_async_script(f"{find} ?? arguments[0](false)"):
            pytest.skip("this browser has no software adapter")
        # The page compares a frame after two others, and says "WebAssembly" if it differs.
        someone = Person(driver, f"{address}?backend=webgpu", wait_for="play.model?.backend")
        assert someone.backend() == "WebGPU"


def test_records_a_video(anew):
    anew.click("#record")
    anew.hold("ArrowRight", 10)
    anew.click("#record")
    anew.until("return document.querySelector('#note a')")
    end = time.monotonic() + PATIENCE
    while not (found := list(anew.folder.glob("cwm_jax*.webm"))) and time.monotonic() < end:
        time.sleep(0.1)
    assert found[0].stat().st_size > 1000
    assert found[0].read_bytes()[:4] == b"\x1a\x45\xdf\xa3"  # Matroska


def test_plays_offline_after_the_first_visit(page, tmp_path):
    with browser(tmp_path) as driver:
        with served(page) as address:
            port = int(address.rstrip("/").rpartition(":")[2])
            someone = Person(driver, address)
            names = len(
                json.loads(someone.run("return document.getElementById('files').textContent"))
            )
            someone.until(
                """return (async () => (await Promise.all((await caches.keys()).map(async (name) =>
                (await (await caches.open(name)).keys()).length)))[0])()"""
                + f" .then((kept) => kept > {names})"
            )
        with pytest.raises(OSError, match=r".*"), served(page, port) as _:
            raise OSError  # the port is free again: nobody answers there now
        someone = Person(driver, address)
        assert someone.run("return crossOriginIsolated")
        someone.begins(200)
        someone.hold("ArrowRight", 5)


def test_a_damaged_weight_file_is_fetched_once_more_and_then_named(page, tmp_path):
    folder = tmp_path / "page"
    shutil.copytree(page, folder)
    (weights,) = folder.glob("assets/weights.*")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with served(folder) as address, browser(tmp_path) as driver:
        cover = "!document.getElementById('cover-button').hidden"
        someone = Person(driver, address, wait_for=f"play && {cover}")
        text = someone.run("return document.getElementById('cover').innerText")
        assert "weights" in text
        assert "tried twice" in text
        weights.write_bytes(whole)
        someone.click("#cover-button")
        someone.until("return window.play.started")


def test_a_browser_without_vector_instructions_shows_a_recorded_rollout(page, tmp_path):
    flags = "--js-flags=--no-enable-sse4-1 --no-enable-sse4-2 --no-enable-avx"
    with served(page) as address, browser(tmp_path, flags) as driver:
        someone = Person(driver, address, wait_for="document.body?.dataset.state")
        assert "SIMD" in someone.run("return document.getElementById('cover').innerText")
        assert someone.run("return document.getElementById('recorded').naturalWidth") == 64


def test_a_small_screen_with_touch(page, tmp_path):
    with served(page) as address, browser(tmp_path, "--touch-events=enabled") as driver:
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True},
        )
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        someone = Person(driver, address)
        assert someone.run("return document.documentElement.scrollWidth") <= 390
        x, y = someone.run("""const {x, y, width, height} =
            document.querySelector(".pad [data-key=right]").getBoundingClientRect();
            return [x + width / 2, y + height / 2]""")
        assert 0 < y < 844, "the buttons are on the first screen"
        touch = lambda kind, points: driver.execute_cdp_cmd(
            "Input.dispatchTouchEvent", {"type": kind, "touchPoints": points}
        )
        touch("touchStart", [{"x": x, "y": y}])
        someone.until(f"return {TOTAL} >= 8")
        touch("touchEnd", [])
        someone.settled()
        assert someone.total < 60
