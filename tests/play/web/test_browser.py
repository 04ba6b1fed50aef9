"""Play in a real browser: headless Chromium, driven by selenium, against a server of its own."""

import contextlib
import io
import re
import shutil
import threading
import time
import urllib.request

import numpy as np
import pytest
import uvicorn

from cwm_jax.play.web import loading_page, server
from cwm_jax.play.web.app_state import Rules, Studio

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
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
STEADY = 30  # time limit in seconds, for a busy machine


@pytest.fixture(scope="module")
def address(scheduler, clips):
    with served(scheduler, clips) as where:
        yield where


@contextlib.contextmanager
def served(scheduler, clips, port=0, **options):
    """The address of a server; `options` are those of its application."""
    studio = Studio(Rules(fps=15, steps=scheduler.generator.steps))
    studio.open(scheduler, clips, title="tiny", demo=False)
    config = uvicorn.Config(
        loading_page.Opening(lambda: server.make_app(studio, **options), pytest.fail),
        log_level="error",
        timeout_graceful_shutdown=1,
    )
    with loading_page.bind("127.0.0.1", port) as listener:
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        running.should_exit = True
        thread.join(timeout=10)


def launched(folder, *more):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), *more, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    downloads = {"download.default_directory": str(folder), "download.prompt_for_download": False}
    options.add_experimental_option("prefs", downloads)
    return webdriver.Chrome(options, webdriver.ChromeService(DRIVER))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = launched(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()


class Person:
    """A player in one tab."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.switch_to.new_window("tab")
        self.tab = browser.current_window_handle
        browser.get(address)
        self.until("return window.playFrames > 0")

    def run(self, script, *args):
        self.browser.switch_to.window(self.tab)
        return self.browser.execute_script(script, *args)

    def until(self, script):
        deadline = time.monotonic() + STEADY
        while not (result := self.run(script)):
            assert time.monotonic() < deadline, f"{script}: {self.note}"
            time.sleep(0.05)
        return result

    def click(self, name):
        self.run(f"document.querySelector('#{name}').click()")

    def key(self, code, down):
        kind = "keydown" if down else "keyup"
        script = "window.dispatchEvent(new KeyboardEvent(arguments[0], {code: arguments[1]}))"
        self.run(script, kind, code)

    def hold(self, code, frames):
        goal = self.run("return window.playFrames") + frames
        self.key(code, True)
        self.until(f"return window.playFrames >= {goal}")
        self.key(code, False)
        self.settle()

    def settle(self):
        """Waits until pending messages have arrived: the server answers in order."""
        return self.run("return window.play.share()")

    @property
    def note(self):
        return self.run("return document.querySelector('#note')?.textContent")

    @property
    def place(self):
        return self.run("return document.querySelector('#place').textContent")

    @property
    def picture(self):
        return self.run("return document.querySelector('#screen').toDataURL()")

    def start(self, clip):
        frames = self.run("return window.playFrames")
        self.run(f"window.play.start({clip}, 1)")
        self.until(f"return window.playFrames > {frames}")
        self.until("return document.querySelector('#place').textContent == '1 / 1'")


@pytest.fixture
def person(browser, address):
    with visiting(browser, address) as one:
        yield one


@contextlib.contextmanager
def visiting(browser, address):
    one = Person(browser, address)
    yield one
    browser.switch_to.window(one.tab)
    browser.close()
    browser.switch_to.window(browser.window_handles[0])


def test_the_page_loads_nothing_from_other_hosts(person, address):
    names = person.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(names) > 5
    assert [name for name in names if not name.startswith((address, "data:", "blob:"))] == []


def test_a_held_key_generates_frames_until_it_is_released(person):
    person.start(5)
    first = person.picture
    person.hold("ArrowRight", 8)
    now, total = map(int, person.place.split("/"))
    assert now == total >= 9
    assert person.picture != first
    person.settle()
    assert person.place == f"{now} / {total}"
    assert "ms" in person.until("return document.querySelector('#r-latency').textContent")


def test_rewind_branch_and_share_code(person):
    person.start(5)
    person.hold("KeyD", 6)
    total = int(person.place.split("/")[1])
    person.run("const s = document.querySelector('#scrub'); s.value = 3; s.oninput()")
    person.until(f"return document.querySelector('#place').textContent == '4 / {total}'")
    person.hold("ArrowUp", 2)
    branched = person.place
    assert int(branched.split("/")[1]) < total + 1
    picture = person.picture

    person.click("play-share")
    code = person.until("return document.querySelector('#play-code textarea').value")
    assert code.startswith("CWM2-")
    person.start(9)
    assert person.picture != picture
    person.run("window.play.replay(arguments[0])", code)
    person.until("return document.querySelector('#note').textContent.includes('are identical')")
    assert (person.picture, person.place) == (picture, branched)
    person.run("window.play.replay(arguments[0])", code[:-3] + "AAA")
    person.until("return document.querySelector('#note.bad')?.textContent.includes('damaged')")


def test_modes_and_the_gamepad(person):
    person.start(5)
    mode = "return document.querySelector('#modes [aria-checked=true]').dataset.mode"
    person.run("document.querySelector('[data-mode=auto]').click()")
    person.until("return Number(document.querySelector('#scrub').max) >= 3")
    person.click("back")
    person.until(
        "return document.querySelector('#scrub').value < document.querySelector('#scrub').max"
    )
    assert person.run(mode) == "hold"

    person.run("document.querySelector('[data-mode=step]').click()")
    for _ in range(2):
        number = int(person.place.split("/")[0])
        person.key("KeyW", True)
        person.until(
            f"return document.querySelector('#place').textContent.startsWith('{number + 1} ')"
        )
        person.key("KeyW", False)
    person.click("wait")
    person.until(f"return document.querySelector('#place').textContent.startsWith('{number + 2} ')")
    assert person.run(mode) == "step"

    person.run("document.querySelector('[data-mode=hold]').click()")
    pad = "navigator.getGamepads = () => [{axes: [1, 0], buttons: [{pressed: arguments[0]}]}]"
    person.run(pad, True)
    person.until("return document.querySelectorAll('.pad .held').length == 2")
    person.until(f"return Number(document.querySelector('#scrub').max) > {number + 3}")
    person.run("navigator.getGamepads = () => [null]")
    person.until("return !document.querySelector('.pad .held')")


def test_the_page_reports_a_slow_machine_and_marks_steps_off_the_card(
    browser, slow_scheduler, clips
):
    with served(slow_scheduler, clips) as address, visiting(browser, address) as one:
        marked = "return [...document.querySelectorAll('#play-steps label[data-unplayable]')]"
        assert one.run(f"{marked}.map((label) => label.innerText.trim())") == ["1"]
        slow = "Slow machine: 7 frames a second"
        one.start(5)
        assert one.note == ""
        one.key("ArrowRight", True)
        one.until(f"return document.querySelector('#note').textContent == '{slow}'")
        one.key("ArrowRight", False)
        one.settle()  # the note of the chosen steps
        one.start(9)
        assert one.note == slow  # for as long as the machine is slow
        choose = "[...document.querySelectorAll('#play-steps input')].at(-1).click()"
        one.run(choose)
        one.until("return document.querySelector('#note').textContent.includes('does not list 1 ')")
        one.run("window.play.setFps(3)")
        one.hold("ArrowRight", 2)
        one.start(5)
        assert one.note == ""


def test_a_model_without_a_card_has_no_marks(person):
    assert (
        person.run("return document.querySelectorAll('[data-unplayable], [data-marked]').length")
        == 0
    )


def test_a_key_shows_of_which_patches_the_model_is_unsure_and_hides_it_again(person):
    hidden = "return document.querySelector('#unsure').hidden"
    person.hold("ArrowRight", 2)
    assert person.run(hidden)
    person.key("KeyU", True)
    person.key("ArrowRight", True)  # the first frames come before it is compiled
    person.until(hidden.replace("return ", "return !"))
    person.key("ArrowRight", False)
    person.settle()
    shown = "const c = document.querySelector('#unsure'); return "
    assert person.run(shown + "[c.width, c.height]") == [8, 8]
    person.key("KeyU", True)
    assert person.run(hidden)
    person.hold("ArrowRight", 2)
    assert person.run(hidden)


def test_what_if_is_shown_and_chosen(person):
    person.start(5)
    person.click("whatif")
    person.until("return document.querySelectorAll('#futures-grid canvas').length == 6")
    person.run("document.querySelectorAll('#futures-grid button')[4].click()")
    person.until("return document.querySelector('#place').textContent == '9 / 9'")


def test_record_and_download(person, tmp_path):
    person.start(5)
    person.click("play-record")
    person.until("return !document.querySelector('#live').hidden")
    person.hold("ArrowRight", 4)
    person.click("play-record")
    person.until("return document.querySelector('#live').hidden")
    for button, suffix in (("play-npz", "npz"), ("play-mp4", "mp4")):
        person.click(button)
        link = person.until(f"return document.querySelector('#note a[download$={suffix}]')?.href")
        raw = urllib.request.urlopen(link).read()
        assert len(raw) > 1000
        if suffix == "npz":
            (tmp_path / "a.npz").write_bytes(raw)
            with np.load(tmp_path / "a.npz") as saved:
                assert set(saved["actions"][1:].tolist()) == {7}


def test_two_players_have_their_own_worlds(person, browser, address, tmp_path):
    """In two windows: a hidden tab releases its keys."""
    other = launched(tmp_path)
    try:
        second = Person(other, address)
        person.start(5)
        second.start(80)
        person.key("ArrowRight", True)
        second.key("ArrowLeft", True)
        for one in (person, second):
            one.until("return Number(document.querySelector('#scrub').max) >= 8")
        person.key("ArrowRight", False)
        second.key("ArrowLeft", False)
        assert person.picture != second.picture
    finally:
        other.quit()


def test_touch_buttons_work_and_the_page_fits_a_phone(person, browser):
    size = dict(width=390, height=844, deviceScaleFactor=2, mobile=True)
    browser.switch_to.window(person.tab)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    person.start(5)
    assert person.run("return document.documentElement.scrollWidth <= innerWidth")
    boxes = person.run(
        "return [...document.querySelectorAll('#stage button, #stage canvas')]"
        ".filter((e) => e.offsetParent).map((e) => e.getBoundingClientRect().right)"
    )
    assert max(boxes) <= 390
    press = (
        "document.querySelector('[data-key=right]').dispatchEvent("
        "new PointerEvent(arguments[0], {pointerId: 1, bubbles: true}))"
    )
    person.run(press, "pointerdown")
    person.until("return Number(document.querySelector('#scrub').max) >= 3")
    person.run(press, "pointerup")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_bad_picture_is_reported_on_the_page(person):
    person.run("window.play.sendPicture(new File(['hello'], 'a.png'))")
    person.until(
        "return /not a readable picture/.test(document.querySelector('#note.bad')?.textContent)"
    )
    person.run("window.play.sendPicture(new File([new Uint8Array(5e6)], 'a.png'))")
    person.until("return /at most 4 MB/.test(document.querySelector('#note.bad')?.textContent)")
    assert re.search(r"\d", person.place)
    person.hold("ArrowRight", 2)


def test_a_pad_is_played_with_its_own_keys(browser, pad_scheduler, pad_clips):
    """KeyX, otherwise forward, is this game's button A; FIRE has no key."""
    with served(pad_scheduler, pad_clips) as address, visiting(browser, address) as one:
        one.start(0)
        lit = "return [...document.querySelectorAll('.pad .held')].map((b) => b.dataset.key).join()"
        names = (
            "return [...document.querySelectorAll('.pad button')].map((b) => b.innerText).join()"
        )
        assert one.run(names).split() == ["A", "X,LEFT", "←,FIRE"]
        assert "X" not in one.run("return document.querySelector('.hint').innerText").split()

        one.key("KeyX", True)
        one.until("return Number(document.querySelector('#scrub').max) >= 2")
        one.key("ArrowLeft", True)
        touch = (
            "document.querySelector('[data-key=\"#2\"]').dispatchEvent("
            "new PointerEvent(arguments[0], {pointerId: 1, bubbles: true}))"
        )
        one.run(touch, "pointerdown")
        assert one.run(lit) == "KeyX,ArrowLeft,#2"
        frames = one.run("return window.playFrames")
        one.until(f"return window.playFrames >= {frames + 4}")
        one.run(touch, "pointerup")
        one.key("KeyX", False)
        one.key("ArrowLeft", False)
        assert one.run(lit) == ""

        pad = "const on = arguments[0]; navigator.getGamepads = () => [on && {axes: [-1, 0], "
        pad += "buttons: [{pressed: false}, {pressed: true}]}]"
        one.run(pad, True)  # the remaining controls, A and FIRE, are its buttons 0 and 1
        one.until(f"return (() => {{ {lit} }})() == 'ArrowLeft,#2'")
        frames = one.run("return window.playFrames")
        one.until(f"return window.playFrames >= {frames + 2}")
        one.run(pad, False)
        one.until("return !document.querySelector('.pad .held')")
        one.settle()
        one.click("play-npz")
        link = one.until("return document.querySelector('#note a[download$=npz]')?.href")
        with np.load(io.BytesIO(urllib.request.urlopen(link).read())) as saved:
            assert {1, 6, 7} <= set(saved["actions"][1:].tolist())

        one.click("whatif")
        one.until("return document.querySelectorAll('#futures-grid canvas').length == 4")
        labels = "[...document.querySelectorAll('#futures-grid button')].map((b) => b.innerText)"
        assert one.run(f"return {labels}") == ["NOOP", "A", "LEFT", "FIRE"]
