"""The server's protocol, with correct and malicious clients."""

import contextlib
import dataclasses
import errno
import json
import struct
import time

import numpy as np
import pytest
from fastapi.testclient import TestClient
from pictures import file_of, noise
from starlette.websockets import WebSocketDisconnect

from cwm_jax import controls
from cwm_jax.controls import Control, Controls
from cwm_jax.errors import UserError
from cwm_jax.play.web import launch, loading_page, server
from cwm_jax.play.web.app_state import Rules, Studio
from cwm_jax.play.web.player import Player

HEADER = struct.Struct("<BBhHHIId")


class Guest:
    """A player who reads the server's messages."""

    def __init__(self, socket):
        self.socket = socket
        self.number = self.total = self.action = None

    def send(self, what, **fields):
        self.socket.send_text(json.dumps({"do": what, **fields}))

    def next(self):
        message = self.socket.receive()
        if message["type"] == "websocket.close":
            raise WebSocketDisconnect(message["code"])
        if message.get("text") is not None:
            return json.loads(message["text"])
        raw = message["bytes"]
        if raw[0] == 1:  # a frame and its header
            _, _, self.action, self.steps, self.window, self.number, self.total, self.stamp = (
                HEADER.unpack_from(raw)
            )
        return raw

    def receive(self, what):
        """The next event of this name; frames before it are skipped."""
        while True:
            message = self.next()
            if isinstance(message, dict):
                assert what == message["event"] or message["event"] != "error", message
                if message["event"] == what:
                    return message

    def frame(self):
        """Pixels of the next frame."""
        while isinstance(message := self.next(), dict):
            assert message["event"] not in ("error", "fault"), message
        assert message[0] == 1
        return np.frombuffer(message, np.uint8, offset=HEADER.size).reshape(64, 64, 3)

    def generate(self, action, count=1):
        """Frames generated while a key is held."""
        self.send("keys", action=action)
        frames = [self.frame() for _ in range(count)]
        self.send("keys", action=4)
        return frames

    def halt(self):
        """Waits until no more frames arrive."""
        self.send("settings", auto=False)
        self.send("clear")
        self.receive("recording")


@pytest.fixture
def new_client(scheduler, clips):
    """new_client(…rules, auth=…): a test client of a server that is open."""
    with contextlib.ExitStack() as stack:

        def build(*, auth=None, opened=True, device=scheduler, **rules):
            studio = Studio(Rules(**{"fps": 60, "steps": (2, 1), **rules}))
            if opened:
                studio.open(device, clips, title="tiny", demo=False)
            client = TestClient(server.make_app(studio, auth=auth))
            client.studio = studio
            return stack.enter_context(client)

        yield build


@contextlib.contextmanager
def guest(client, **headers):
    with client.websocket_connect("/play/socket", headers=headers) as socket:
        one = Guest(socket)
        hello = one.receive("hello")
        assert hello["token"] in client.studio.players
        one.token, one.playable = hello["token"], hello["playable"]
        yield one


@contextlib.contextmanager
def started(client, clip=5, prompt=2, seed=9):
    with guest(client) as one:
        one.frame()  # of the random clip that every player starts with
        one.send("start", clip=clip, prompt=prompt, seed=seed)
        assert one.receive("started") == dict(event="started", seed=seed, clip=clip, given=prompt)
        one.frame()
        yield one


def test_the_page_and_its_files_are_served(new_client):
    client = new_client()
    page = client.get("/")
    assert page.status_code == 200
    assert "play.js" in page.text
    for name in ("play.js", "play.css", "stage.html"):
        assert client.get(f"/play/static/{name}").status_code == 200
    assert client.get("/play/static/../player.py").status_code == 404


def test_held_keys_generate_frames_and_the_stamp_is_returned_once(new_client):
    with started(new_client()) as one:
        one.send("keys", action=7, stamp=123.5)
        one.frame()
        assert (one.action, one.stamp, one.number) == (7, 123.5, 2)
        one.frame()
        assert (one.action, one.stamp, one.number) == (7, 0, 3)
        one.send("keys", action=4)
        one.halt()
        one.send("settings", auto=True)
        one.frame()
        assert one.action == 4


def test_patches_follow_each_frame_where_they_are_asked_for_and_change_no_frame(new_client):
    one_and_all = []
    for wanted in (False, True):
        with started(new_client()) as one:
            one.send("settings", unsure=wanted, step_mode=True, steps=2)
            one.send("start", clip=0, seed=5)
            one.receive("started")
            one.frame()
            frames, seen = [], []
            deadline = time.monotonic() + 60
            while len(frames) < 4 or (wanted and not seen and time.monotonic() < deadline):
                one.send("keys", action=7)
                one.send("keys", action=4)
                frames.append(one.frame())
                one.send("record", on=True)  # answered at once: nothing else is on its way
                message = one.next()
                while not isinstance(message, dict) or message["event"] != "recording":
                    seen += [message] if message[:1] == b"\x03" else []
                    message = one.next()
            one_and_all.append(frames[:4])
            assert bool(seen) == wanted
            for message in seen:
                assert (message[1:3], len(message)) == (bytes([8, 8]), 3 + 64)
    np.testing.assert_array_equal(*one_and_all)


def test_a_tap_that_is_over_before_the_frame_begins_counts_for_one_frame(new_client):
    with started(new_client()) as one:
        one.send("settings", fps=1)
        one.generate(7, 1)
        one.halt()
        before = one.total
        one.send("keys", action=5)
        one.send("keys", action=4)
        while one.total == before:
            one.frame()
        assert one.action in (5, 7)


def test_step_mode_generates_one_frame_per_press(new_client):
    with started(new_client()) as one:
        one.send("settings", step_mode=True)
        for number in (2, 3):
            one.send("keys", action=8)
            one.frame()
            assert (one.number, one.action) == (number, 8)
            one.halt()
        one.send("keys", action=0)
        one.frame()
        assert (one.number, one.action) == (4, 0)
        one.halt()
        one.send("wait")
        one.frame()
        assert (one.number, one.action) == (5, 4)


def test_pinned_steps_are_used(new_client):
    with started(new_client()) as one:
        for steps in (1, 2):
            one.send("settings", steps=steps)
            one.send("settings", step_mode=True)
            one.send("keys", action=7)
            one.frame()
            assert one.steps == steps


def test_a_slow_machine_is_reported_and_the_rate_is_lowered(new_client, slow_scheduler):
    with started(new_client(device=slow_scheduler)) as one:
        assert one.playable == [2]
        one.send("keys", action=7)
        slow = "Slow machine: 7 frames a second"
        assert one.receive("rate") == dict(event="rate", fps=7, text=slow)
        one.frame()
        began = time.monotonic()
        for _ in range(4):
            one.frame()
        assert time.monotonic() - began > 3 / 7  # 60 are requested
        assert one.steps == 2
        one.send("settings", fps=5)
        assert one.receive("rate") == dict(event="rate", fps=5, text="")
        one.send("settings", fps=60, steps=1)  # a player may choose what the card does not list
        off = "1 step each: not playable by the model's card"
        assert one.receive("rate")["text"] == f"Slow machine: 9 frames a second, {off}"
        one.send("settings", step_mode=True)
        one.halt()
        one.send("keys", action=8)
        assert one.receive("rate")["text"] == ""  # there is no rate in step mode


def test_a_machine_below_the_floor_leaves_the_card_and_reports_it(new_client, slow_scheduler):
    slow_scheduler.governor._step_seconds = 0.055
    with started(new_client(device=slow_scheduler)) as one:
        one.send("settings", fps=5)
        one.send("keys", action=7)
        off = "1 step each: not playable by the model's card"
        assert one.receive("rate")["text"] == f"Slow machine: 5 frames a second, {off}"
        one.frame()
        assert one.steps == 1


def test_without_a_card_no_rate_is_lowered(new_client, scheduler, monkeypatch):
    monkeypatch.setattr(scheduler.governor, "note", lambda **_: None)
    monkeypatch.setattr(scheduler.governor, "_step_seconds", 1.0)
    with started(new_client()) as one:
        assert one.playable is None
        one.send("keys", action=7)
        for _ in range(30):
            message = one.next()
            assert not isinstance(message, dict), message


def test_rewind_share_and_replay_over_the_wire(new_client):
    client = new_client()
    with started(client) as one, started(client, clip=80, seed=1) as other:
        frames = one.generate(7, 6)
        one.halt()
        one.send("rewind", to=4)
        assert np.array_equal(one.frame(), frames[2])
        one.generate(1, 3)
        one.halt()
        one.send("rewind", to=7)
        last = one.frame()
        one.send("share")
        code = one.receive("code")["code"]
        other.send("replay", code=code)
        other.receive("started")
        shown = [other.frame() for _ in range(7)]
        assert np.array_equal(shown[-1], last)
        assert np.array_equal(shown[3], frames[2])
        assert "are identical" in other.receive("replayed")["text"]


def test_a_key_takes_over_from_a_replay(new_client):
    with started(new_client()) as one:
        one.generate(7, 6)
        one.halt()
        last = one.total
        one.send("share")
        code = one.receive("code")["code"]
        one.send("settings", fps=1)
        one.send("replay", code=code)
        one.receive("started")
        one.frame()
        one.send("keys", action=1)
        while one.action != 1:
            one.frame()
        assert one.total < last
        one.send("keys", action=4)


def test_what_if_and_choosing(new_client):
    with started(new_client()) as one:
        one.generate(7, 2)
        one.halt()
        one.send("what_if", frames=3)
        message = one.receive("branches")
        raw = one.next()
        assert raw[0] == 2
        futures = np.frombuffer(raw, np.uint8, offset=1).reshape(6, 3, 64, 64, 3)
        one.send("choose", branch=4)
        assert np.array_equal(one.frame(), futures[4, -1])
        assert one.action == message["actions"][4]


def test_a_recording_begins_again_where_its_frames_are_replaced(new_client):
    with started(new_client()) as one:
        one.generate(7, 4)
        one.halt()
        at = one.number
        one.send("record", on=True)
        assert one.receive("recording")["start"] == at
        one.generate(7, 3)
        one.send("rewind", to=at - 2)
        while one.number != at - 2:
            one.frame()
        one.send("keys", action=7)
        message = one.receive("recording")
        one.send("keys", action=4)
        assert (message["on"], message["start"]) == (True, at - 1)


def test_files_of_a_session_are_its_own_and_end_with_it(new_client):
    client = new_client()
    with started(client) as one, started(client) as other:
        one.generate(7, 3)
        one.halt()
        one.send("record", on=True)
        one.receive("recording")
        one.generate(7, 3)
        one.halt()
        one.send("record", on=True)
        one.receive("recording")
        links = []
        for kind in ("npz", "mp4"):
            one.send("save", kind=kind)
            message = one.receive("file")
            links.append(f"/play/files/{message['token']}/{message['name']}")
            answer = client.get(links[-1])
            assert answer.status_code == 200
            assert "attachment" in answer.headers["content-disposition"]
        assert client.get(links[0].replace(one.token, other.token)).status_code == 404
        for name in ("../../../etc/passwd", "..%2f..%2fpyproject.toml", "session9.mp4", ""):
            assert client.get(f"/play/files/{one.token}/{name}").status_code == 404
    deadline = time.monotonic() + 5
    while client.studio.players and time.monotonic() < deadline:
        time.sleep(0.02)
    assert client.get(links[0]).status_code == 404


def test_gradio_serves_no_files_of_this_machine(new_client):
    client = new_client()
    for name in ("pyproject.toml", "play.py", "../../etc/passwd"):
        assert client.get(f"/gradio_api/file={name}").status_code in (403, 404)


def test_a_picture_starts_a_world(new_client):
    with started(new_client()) as one:
        pixels = noise(64, 64)
        one.socket.send_bytes(file_of(pixels))
        assert one.receive("started")["clip"] is None
        assert np.array_equal(one.frame(), pixels)
        one.generate(7, 2)


BAD = [
    ("not json", "is not valid"),
    ("[" * 30_000, "is not valid"),
    ("[1, 2]", "is not valid"),
    ("{}", "is not valid"),
    ('"do"', "is not valid"),
    ('{"do": null}', "no command 'None'"),
    ('{"do": "__class__"}', "no command"),
    ('{"do": {"a": 1}}', "no command"),
    ("x" * 70_000, "70,000 characters"),
    ('{"do": "keys"}', "action is 'None'"),
    ('{"do": "keys", "action": 15}', "action is '15'; it must be a whole number 0…14"),
    ('{"do": "keys", "action": -1}', "whole number 0…14"),
    ('{"do": "keys", "action": true}', "whole number"),
    ('{"do": "keys", "action": 7, "stamp": "now"}', "must be a number"),
    ('{"do": "keys", "action": 7, "stamp": NaN}', "must be a number"),
    ('{"do": "start", "clip": 99999}', "clip is '99999'"),
    ('{"do": "start", "clip": 1, "prompt": 33}', "prompt is '33'"),
    ('{"do": "start", "clip": 1, "seed": -1}', "seed is '-1'"),
    ('{"do": "start", "speed": 1}', "unexpected keyword argument 'speed'"),
    ('{"do": "settings", "fps": 0}', "fps is '0'"),
    ('{"do": "settings", "steps": 3}', "3 DDIM steps: choose one of"),
    ('{"do": "settings", "steps": [1]}', "DDIM steps: choose one of"),
    ('{"do": "settings", "steps": 1.0}', "1.0 DDIM steps: choose one of"),
    ('{"do": "settings", "steps": true}', "True DDIM steps: choose one of"),
    ('{"do": "settings", "steps": []}', "[] DDIM steps: choose one of"),
    ('{"do": "settings", "auto": "false"}', "auto is 'false'; it must be true or false"),
    ('{"do": "rewind", "to": 999}', "no frame 999"),
    ('{"do": "rewind", "to": -1}', "to is '-1'"),
    ('{"do": "what_if", "frames": 1000}', "frames is '1000'"),
    ('{"do": "choose", "branch": 0}', "no branch 0"),
    ('{"do": "replay", "code": "CWM2-abc"}', "damaged"),
    ('{"do": "replay", "code": "CWM1-abc"}', "earlier version"),
    ('{"do": "replay", "code": 5}', "not a share code"),
    ('{"do": "save", "kind": "exe"}', "mp4 or npz"),
    ('{"do": "picture", "raw": "abc"}', "as bytes"),
]


def test_bad_messages_are_answered_and_play_continues(new_client):
    with started(new_client()) as one:
        for text, answer in BAD:
            one.socket.send_text(text)
            assert answer in one.receive("error")["text"], text
        for raw, answer in (
            (b"", "not a readable picture"),
            (file_of(np.zeros((4000, 4000, 3), np.uint8)), "4000×4000"),
        ):
            one.socket.send_bytes(raw)
            assert answer in one.receive("error")["text"]
        one.generate(7, 2)


def test_too_many_commands_are_refused_but_rewinds_are_merged():
    player = Player(None, Studio(Rules()))
    for to in range(1000):
        player._take({"text": json.dumps({"do": "rewind", "to": to})})
    for _ in range(31):
        player._take({"text": '{"do": "share"}'})
    with pytest.raises(UserError, match="too many"):
        player._take({"text": '{"do": "share"}'})


def test_a_full_server_reports_it_and_accepts_players_later(new_client):
    client = new_client(players=1)
    with guest(client), client.websocket_connect("/play/socket") as socket:
        assert json.loads(socket.receive_text()) == dict(
            event="full", text="All places are taken (1)."
        )
        with pytest.raises(WebSocketDisconnect):
            socket.receive_text()
    deadline = time.monotonic() + 5
    while client.studio.players and time.monotonic() < deadline:
        time.sleep(0.02)
    with guest(client) as one:
        one.frame()


def test_idle_players_are_disconnected_with_their_share_code(new_client, scheduler, clips):
    client = new_client(idle_seconds=0.3)
    with started(client) as one:
        one.generate(7, 2)
        code = one.receive("idle")["code"]
        with pytest.raises(WebSocketDisconnect):
            one.next()
    assert not client.studio.players
    with guest(new_client()) as again:
        again.frame()
        again.send("replay", code=code)
        assert again.receive("replayed")


def test_a_held_key_is_not_idle(new_client):
    with started(new_client(idle_seconds=0.2)) as one:
        one.send("settings", fps=10)
        one.send("keys", action=7)
        for _ in range(6):
            one.frame()
        one.send("keys", action=4)
        assert one.receive("idle")


def test_a_full_disk_is_reported_and_play_continues(new_client, monkeypatch):
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with started(new_client()) as one:
        for place, command in (
            ("session.saving.write_numbers", "save"),
            ("session.history.History.append", "wait"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(f"cwm_jax.play.{place}", full)
                one.send(command, **({"kind": "npz"} if command == "save" else {}))
                while (message := one.next())["event"] != "error":
                    pass
                assert "No space left" in message["text"]
        one.generate(7, 2)


def test_commands_without_a_session_are_refused(new_client, monkeypatch, clips):
    def damaged(_source):
        raise UserError("record 3 is damaged")

    monkeypatch.setattr(clips, "load", damaged)
    with guest(new_client()) as one:
        for command in (None, "share", "save", "what_if", "rewind"):
            if command:
                one.send(command)
            wanted = "no session yet" if command else "damaged"
            assert wanted in one.receive("error")["text"]


def test_players_who_disconnect_during_a_frame_leave_nothing(new_client):
    client = new_client()
    for _ in range(5):
        with guest(client) as one:
            one.frame()
            one.send("settings", auto=True)
            one.frame()
    deadline = time.monotonic() + 10
    while client.studio.players and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not client.studio.players


def test_other_sites_and_users_without_login_get_no_socket(new_client):
    client = new_client()
    other_site = dict(headers={"origin": "http://evil.example"})
    with client.websocket_connect("/play/socket?key=guessed", **other_site) as socket:
        assert "does not recognise" in socket.receive_json()["text"]
        with pytest.raises(WebSocketDisconnect):
            socket.receive_json()
    assert not client.studio.players
    with guest(client, origin="http://testserver") as one:
        one.frame()

    answer = client.get("/play/key", **other_site)  # browsers hide it from that site
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.headers["cache-control"] == "no-store"
    key = answer.json()["key"]
    with client.websocket_connect(f"/play/socket?key={key}", **other_site) as socket:
        assert socket.receive_json()["event"] != "fault"

    client = new_client(auth=("anna", "secret"))
    with pytest.raises(WebSocketDisconnect), guest(client):
        pass
    assert client.get("/play/key").status_code == 403
    assert client.post("/login", data=dict(username="anna", password="no")).status_code == 400
    assert client.post("/login", data=dict(username="anna", password="secret")).status_code == 200
    with guest(client) as one:
        one.frame()


def test_the_stages_of_the_start_and_errors_are_sent(new_client):
    client = new_client(opened=False)
    client.studio.stage = "Loading the checkpoint …"
    with client.websocket_connect("/play/socket") as socket:
        one = Guest(socket)
        assert one.receive("progress")["text"] == "Loading the checkpoint …"
        client.studio.fault = "it does not fit"
        assert one.receive("fault")["text"] == "it does not fit"


def test_a_port_in_use_and_wrong_options_are_reported():
    with loading_page.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}.*--port"):
            loading_page.bind("127.0.0.1", port)
    with pytest.raises(UserError, match="cannot listen on no"):
        loading_page.bind("no.such.host", 0)
    options = dict(
        checkpoint=None, step=None, data=None, host="", port=0, share=False, auth=None, fps=15,
        players=8, idle_minutes=5.0,
    )  # fmt: skip
    launch.Options(**options)
    for change in (dict(fps=0), dict(players=0), dict(port=70_000), dict(idle_minutes=0.0)):
        with pytest.raises(UserError, match=next(iter(change)).replace("_", "-")):
            launch.Options(**options | change)


def test_a_checkpoint_that_does_not_fit_is_reported(engine):
    known = controls.procgen("coinrun")
    launch.check_fits(engine.network, "here", known, "data")
    for change in (
        dict(image_size=32),
        dict(num_actions=4),
        dict(action_encoding="buttons", num_actions=8),
        dict(max_frames=1),
    ):
        with pytest.raises(UserError, match="here has"):
            launch.check_fits(dataclasses.replace(engine.network, **change), "here", known, "data")


def test_data_of_another_game_is_reported(engine, pad_clips):
    with pytest.raises(UserError, match=r"data is of pad game: 64, 3, buttons.*--data"):
        launch.check_fits(engine.network, "here", pad_clips.known, "data")
    pad = dataclasses.replace(engine.network, num_actions=3, action_encoding="buttons")
    launch.check_fits(pad, "here", pad_clips.known, "data")
    many = Controls("many", "one_hot", tuple(Control(str(i)) for i in range(257)))
    with pytest.raises(UserError, match="data has 257 actions"):
        launch.check_size(many, "data")


def test_buttons_are_held_together(pad_scheduler, pad_clips):
    studio = Studio(Rules(fps=60, steps=(1,)))
    studio.open(pad_scheduler, pad_clips, title="pad", demo=False)
    with (
        TestClient(server.make_app(studio)) as client,
        client.websocket_connect("/play/socket") as socket,
    ):
        one = Guest(socket)
        assert one.receive("hello")["controls"] == pad_clips.known.to_json() | {
            "idle": 0,
            "procgen": False,
        }
        one.frame()
        for action in (5, 4, 7):
            one.send("keys", action=action)
            while one.action != action:
                one.frame()
        one.send("keys", action=0)
        one.halt()
        before = one.total
        one.send("wait")
        one.frame()
        assert (one.action, one.total) == (0, before + 1)
        for wrong in (-1, 8):
            one.send("keys", action=wrong)
            assert "whole number 0…7" in one.next()["text"]
        one.send("what_if", frames=1)
        message = one.receive("branches")
        assert (message["actions"], message["names"]) == (
            [0, 1, 2, 4],
            ["NOOP", "A", "LEFT", "FIRE"],
        )
