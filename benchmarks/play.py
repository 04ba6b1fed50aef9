"""The cost of play: frames a second, key-to-frame times, fairness, and leaks.

    python -m benchmarks.play --checkpoint runs/debug [--seconds 10] [--sessions 200]
        [--frames 10000] [--only pace,players,sessions,memory]

A server in this process serves clients over real sockets, like browsers.
"""

import argparse
import contextlib
import gc
import json
import os
import socket
import struct
import threading
import time
from pathlib import Path

import numpy as np
import uvicorn
from websockets.sync.client import connect

from benchmarks import machine
from cwm_jax.checkpoints import formats
from cwm_jax.errors import shown_to_user
from cwm_jax.files import model_flag
from cwm_jax.play.inference.engine import Engine
from cwm_jax.play.inference.scheduler import Scheduler
from cwm_jax.play.session.prompt_sources import ClipPrompts
from cwm_jax.play.web import loading_page, server
from cwm_jax.play.web.app_state import Rules, Studio

_STAMP = struct.Struct("<d")
_STEPS = (10, 4, 2, 1)
_EMBEDDED = Path(__file__).parents[1] / "assets" / "coinrun"


class Client:
    """Holds a key now and then, and records when frames arrive."""

    def __init__(self, address: str, **settings):
        self.socket = connect(address, max_size=None).__enter__()
        self.send("settings", **settings)
        self.frames, self.delays, self.steps = 0, [], []
        self._frame()

    def send(self, what: str, **fields) -> None:
        self.socket.send(json.dumps({"do": what, **fields}))

    def _frame(self) -> None:
        while isinstance(message := self.socket.recv(timeout=60), str):
            if json.loads(message)["event"] in ("error", "full", "fault"):
                raise RuntimeError(message)
        self.frames += 1
        self.steps.append(int.from_bytes(message[2:4], "little"))
        (stamp,) = _STAMP.unpack_from(message, 16)
        if stamp:
            self.delays.append(time.perf_counter() - stamp)

    def play(self, seconds: float) -> float:
        """Presses another key every 0.37 s; frames a second."""
        began, pressed, count = time.perf_counter(), 0.0, self.frames
        while (now := time.perf_counter()) - began < seconds:
            if now - pressed > 0.37:
                pressed = now
                self.send("keys", action=(7, 8, 1, 2)[len(self.delays) % 4], stamp=now)
            self._frame()
        return (self.frames - count) / (time.perf_counter() - began)


@contextlib.contextmanager
def served(engine: Engine, *, fps: int, players: int):
    """The socket's address, and the studio, of a running server."""
    with Scheduler(engine) as scheduler:
        studio = Studio(Rules(fps=fps, players=players, steps=_STEPS, idle_seconds=1e6))
        studio.open(scheduler, ClipPrompts(_EMBEDDED), title="benchmark", demo=False)
        app = loading_page.Opening(lambda: server.make_app(studio), print)
        with loading_page.bind("127.0.0.1", 0) as listener:
            running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
            thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
            thread.start()
            while app._app is None:
                time.sleep(0.1)
            try:
                yield f"ws://127.0.0.1:{listener.getsockname()[1]}/play/socket", studio
            finally:
                running.should_exit = True
                thread.join()  # before the scheduler, which it waits for, is removed


def _compiled(engine: Engine, lanes=(1,)) -> None:
    for steps in _STEPS:
        for count in lanes:
            began = time.perf_counter()
            engine.compile(steps, count)
            print(f"compiled {steps} steps, {count} lanes: {time.perf_counter() - began:.1f} s")


def _shown(client: Client, rate: float) -> str:
    p50, p95 = np.percentile(client.delays, [50, 95]) * 1e3
    return (
        f"{rate:5.1f} frames/s, key to frame p50 {p50:.0f} ms, p95 {p95:.0f} ms, "
        f"median {np.median(client.steps):.0f} DDIM steps"
    )


def pace(engine: Engine, args) -> None:
    """One player: at the page's rate with the governor, and at full speed for each S."""
    _compiled(engine)
    with served(engine, fps=15, players=8) as (address, _):
        for name, settings in (
            ("governor, 15 fps", dict(fps=15)),
            *((f"S={n}, unbounded", dict(fps=60, steps=n)) for n in _STEPS),
        ):
            client = Client(address, **settings)
            client.play(2)
            client.delays.clear()
            print(f"{name:18} {_shown(client, client.play(args.seconds))}")
            client.socket.close()


def players(engine: Engine, args) -> None:
    """Eight players in parallel, at full speed with S = 1."""
    _compiled(engine, (1, 8))
    with served(engine, fps=60, players=8) as (address, _):
        clients = [Client(address, fps=60, steps=1) for _ in range(8)]
        counts = []

        def play(client):
            counts.append((client.play(args.seconds), client))

        threads = [threading.Thread(target=play, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rates = [rate for rate, _ in counts]
        for rate, client in counts:
            print(_shown(client, rate))
        print(f"all {sum(rates):.1f} frames/s, max/min {max(rates) / min(rates):.2f}")
        for client in clients:
            client.socket.close()


def sessions(engine: Engine, args) -> None:
    """Opens sessions, generates a few frames, drops the connection without closing it."""
    _compiled(engine)
    with served(engine, fps=60, players=8) as (address, studio):
        for number in range(args.sessions + 1):
            client = Client(address, fps=60, steps=1)
            client.send("settings", auto=True)
            for _ in range(3):
                client._frame()
            client.socket.socket.shutdown(socket.SHUT_RDWR)  # without a close message
            while studio.players:
                time.sleep(0.005)
            client.socket.close()  # ends the client's own threads
            if number % (args.sessions // 4) == 0:
                _left(f"{number} sessions", studio)


def memory(engine: Engine, args) -> None:
    """One long session."""
    _compiled(engine)
    with served(engine, fps=60, players=8) as (address, studio):
        client = Client(address, fps=60, steps=1)
        client.send("settings", auto=True)
        while client.frames <= args.frames:
            client._frame()
            if client.frames % (args.frames // 5) == 1:
                _left(f"{client.frames - 1} frames", studio)


def _left(what: str, studio: Studio) -> None:
    gc.collect()
    megabytes = machine.resident_bytes() / 2**20
    files = len(os.listdir("/proc/self/fd"))
    print(
        f"{what:14} {megabytes:7.0f} MiB resident, {files} open files, "
        f"{threading.active_count()} threads, {len(studio.players)} players",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=model_flag, required=True)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--only", default="pace,players,sessions,memory")
    args = parser.parse_args()
    trained = formats.load(args.checkpoint)
    engine = Engine(trained.network, trained.params, steps=_STEPS)
    for name in args.only.split(","):
        print(f"--- {name}", flush=True)
        globals()[name](engine, args)


if __name__ == "__main__":
    with shown_to_user():
        main()
