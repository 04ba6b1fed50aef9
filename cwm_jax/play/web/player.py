"""One player at the other end of a WebSocket: keys and commands in, frames out.

In, as JSON text of at most 64 KiB: `{"do": NAME, …}`, see the methods `_do_…`; as bytes: a picture
to start from. Out, as JSON text: `{"say": NAME, …}`; as bytes: a frame, see `_HEADER`; after it,
where the page asked for `unsure`, its patches, see `_PATCHES`; or after `{"say": "branches", …}`
the frames of what-if.
"""

import asyncio
import contextlib
import inspect
import json
import secrets
import struct
from collections import deque
from collections.abc import Awaitable, Callable

import jax
import numpy as np
from fastapi import WebSocket, WebSocketDisconnect

from cwm_jax.coinrun import NO_ACTION
from cwm_jax.controls import Controls
from cwm_jax.errors import UserError
from cwm_jax.play.inference.governor import FrameRate
from cwm_jax.play.session import prompt_sources, saving, share_code
from cwm_jax.play.session.prompt_sources import ClipSource
from cwm_jax.play.session.session import MAX_FUTURE, Session
from cwm_jax.play.web.app_state import Downloads, Studio

MAX_TEXT = 64 << 10
MAX_FPS = 60
_MAX_WAITING = 32  # commands that were not yet seen to
# kind (1: frame), lanes, action, DDIM steps, window, number, frames in all, stamp of the key
_HEADER = struct.Struct("<BBhHHIId")
# kind (3: of which patches the model is unsure), rows, columns; then a byte for each patch
_PATCHES = struct.Struct("<BBB")
_FRAME, _BRANCHES, _UNSURE = 1, 2, 3


class Keys:
    """What is held down, and what was tapped since the last frame; asked by the device's thread.

    Args:
        idle: the action while nothing is held.
    """

    def __init__(self, idle: int):
        self._idle = idle
        self.held, self.tapped = idle, None
        self._stamp = self.drawn_stamp = 0.0

    @property
    def down(self) -> bool:
        """Whether a key is held, or was tapped since the last frame."""
        return self.held != self._idle or self.tapped is not None

    def press(self, action: int, stamp: float) -> None:
        self.held, self._stamp = action, stamp
        if action != self._idle:
            self.tapped = action

    def release(self) -> None:
        self.held, self.tapped = self._idle, None

    def tap_idle(self) -> None:
        """Asks for one frame without a key."""
        self.tapped = self._idle

    def take(self, ordered: int) -> int:
        """The action for the frame that is now begun.

        Args:
            ordered: what was held when the frame was ordered, for a key let go since.
        """
        tapped = self.take_tap()
        if self.held != self._idle:
            return self.held
        return ordered if tapped is None else tapped

    def take_tap(self) -> int | None:
        """What was last pressed since the last frame, if anything was; for one frame."""
        tapped, self.tapped = self.tapped, None
        self.drawn_stamp, self._stamp = self._stamp or self.drawn_stamp, 0.0
        return tapped


class Player:
    """A person's connection; `run` lasts as long as it does."""

    def __init__(self, socket: WebSocket, studio: Studio):
        self._socket, self._studio = socket, studio
        self._token: str | None = None
        self._session: Session | None = None
        self._keys = Keys(NO_ACTION)  # until the game is known
        self._auto = self._step_mode = self._unsure = False
        self._fps, self._pinned = studio.rules.fps, 0
        self._rate: FrameRate | None = None  # until the device is there
        self._slow = ""  # what the page shows of a rate that is lower than the chosen one
        self._commands: deque[tuple[str, dict]] = deque()
        self._wake = asyncio.Event()
        self._due = self._began = self._sent = 0.0  # when the next frame is due; of the last one
        self._recorded: tuple[int, int | None] | None = None  # first frame, end where it stopped
        self._files_made = 0
        self.downloads = Downloads()
        self._over = False

    async def run(self) -> None:
        """Plays until the connection ends, however it ends; frees all that the player held."""
        self._token = self._studio.enter(self)
        if self._token is None:
            await self._say("full", text=f"All places are taken ({self._studio.rules.players}).")
            await self._socket.close(1013)
            return
        reader = None
        try:
            if not await self._opened():
                return
            self._keys = Keys(self._known.idle)
            card = self._studio.scheduler.drawer.playable
            self._rate = FrameRate(self._fps, lowers=card is not None)
            await self._hello()
            reader = asyncio.create_task(self._read())
            self._commands.append(("start", {}))
            await self._play()
        except (WebSocketDisconnect, RuntimeError, OSError):
            pass  # the connection is gone, perhaps in the middle of a frame
        finally:
            if reader:
                reader.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await reader
            self._studio.leave(self._token)
            if self._session:
                self._session.close()
            self.downloads.close()

    async def _opened(self) -> bool:
        """Tells how the start goes on until the device is there; False where it never will be."""
        told = None
        while not self._studio.is_open:
            if self._studio.fault:
                await self._say("fault", text=self._studio.fault)
                await self._socket.close(1011)
                return False
            if told != self._studio.stage:
                told = self._studio.stage
                await self._say("progress", text=told)
            await asyncio.sleep(0.1)
        return True

    async def _hello(self) -> None:
        studio = self._studio
        await self._say(
            "hello",
            token=self._token,
            title=studio.title,
            demo=studio.demo,
            clips=len(studio.prompts),
            steps=list(studio.scheduler.drawer.steps),
            playable=studio.scheduler.drawer.playable,
            fps=self._fps,
            controls=self._known.to_json()
            | {"idle": self._known.idle, "procgen": self._known.is_procgen},
        )

    @property
    def _known(self) -> Controls:
        return self._studio.prompts.known

    async def _read(self) -> None:
        """Takes in messages until the connection ends or nothing comes for too long."""
        try:
            while True:
                message = await self._next_message()
                if message["type"] == "websocket.disconnect":
                    return
                try:
                    self._take(message)
                except UserError as error:
                    await self._say("error", text=str(error))
                self._wake.set()
        except TimeoutError:
            code = self._session.recipe().encoded if self._session else ""
            await self._say("idle", text="This session was idle and has ended.", code=code)
            await self._socket.close(1000)
        finally:
            self._over = True
            self._wake.set()

    async def _next_message(self) -> dict:
        """Raises TimeoutError for one who sends nothing, holds no key and watches no replay."""
        receiving = asyncio.ensure_future(self._socket.receive())
        try:
            while not (await asyncio.wait([receiving], timeout=self._studio.rules.idle_seconds))[0]:
                if not (self._keys.down or (self._session and self._session.to_replay)):
                    raise TimeoutError
            return receiving.result()
        finally:
            receiving.cancel()

    def _take(self, message: dict) -> None:
        if (raw := message.get("bytes")) is not None:
            self._queue("picture", {"raw": raw})
            return
        text = message.get("text") or ""
        if len(text) > MAX_TEXT:
            raise UserError(f"a message of {len(text):,} letters; at most {MAX_TEXT:,} are read")
        try:
            fields = json.loads(text)
            name = fields.pop("do")
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
            raise UserError('that message makes no sense: wanted JSON, {"do": NAME, …}') from None
        if name == "keys":  # at once: a frame that is begun later takes it into account
            lowest = min(0, self._known.idle)
            action = _whole(fields, "action", lowest, self._known.num_values - 1)
            self._keys.press(action, _number(fields, "stamp"))
        elif isinstance(name, str) and hasattr(self, f"_do_{name}"):
            self._queue(name, fields)
        else:
            raise UserError(f"there is no command {str(name)[:40]!r}")

    def _queue(self, name: str, fields: dict) -> None:
        if self._commands and name == self._commands[-1][0] == "rewind":
            self._commands.pop()  # only the last of a row matters
        if len(self._commands) >= _MAX_WAITING:
            raise UserError("too many commands at once; that one was dropped")
        try:
            inspect.signature(getattr(self, f"_do_{name}")).bind(**fields)
        except TypeError as error:
            raise UserError(f"command {name}: {error}") from None
        self._commands.append((name, fields))

    async def _play(self) -> None:
        clock = asyncio.get_running_loop().time
        while not self._over:
            if self._commands:
                name, fields = self._commands.popleft()
                await self._guarded(getattr(self, f"_do_{name}"), **fields)
            elif not (self._session and (self._session.to_replay or self._wants_frame())):
                await self._awakened(None)
            elif (early := self._due - clock()) > 0:
                await self._awakened(early)
            else:
                period = 1 / min(self._fps, self._rate.fps)
                # What a late frame lost is made up for, a pause is not.
                due = self._due if -early < period else clock()
                self._began, self._due = max(due, self._sent), due + period
                await self._guarded(self._frame)

    async def _awakened(self, seconds: float | None) -> None:
        """Waits for a message, but no longer than so many seconds."""
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)

    async def _guarded(self, act: Callable[..., Awaitable[None]], **fields) -> None:
        """Tells the player of a mistake, or of a fault of device or disk, and goes on."""
        try:
            await act(**fields)
        except UserError as error:
            self._halt()
            await self._say("error", text=str(error))
        except jax.errors.JaxRuntimeError as error:
            self._halt()
            await self._say("error", text=f"the device failed: {str(error).splitlines()[0][:200]}")
        except OSError as error:
            self._halt()
            await self._say(
                "error", text=f"nothing more can be kept on disk: {error.strerror or error}"
            )

    def _halt(self) -> None:
        self._keys.release()
        self._auto = False

    def _wants_frame(self) -> bool:
        return self._presses() or (self._auto and not self._step_mode)

    def _presses(self) -> bool:
        """Whether a key asks for a frame."""
        return self._keys.tapped is not None if self._step_mode else self._keys.down

    async def _frame(self) -> None:
        """The next frame of a replay, or, for whoever presses a key, one of their own."""
        if self._session.to_replay and not self._presses():
            await self._replay_frame()
            return
        keys, ordered = self._keys, self._keys.held
        if self._step_mode:
            tap = keys.take_tap()
            take = lambda: tap
        else:
            take = lambda: keys.take(ordered)
        steps = self._steps()
        await self._adapt_rate(steps)
        drawn = await self._session.step(take, steps=steps, unsure=self._unsure)
        await self._show(drawn.frame)
        await self._show_unsure(drawn.unsure)
        self._sent = asyncio.get_running_loop().time()
        self._rate.note(self._sent - self._began)

    def _steps(self) -> int:
        return self._pinned or self._studio.scheduler.choose_steps(self._fps)

    async def _adapt_rate(self, steps: int) -> None:
        """Lowers the frame rate where the device does not hold it, and reports it to the page."""
        fps = self._rate.choose(self._fps, steps)
        playable = self._studio.scheduler.drawer.playable
        outside = playable is not None and steps not in playable
        slow = ""
        if not self._step_mode and (self._rate.lowered or (outside and not self._pinned)):
            slow = f"Slow machine: {_count(fps, 'frame')} a second"
            slow += f", {_count(steps, 'step')} each: not playable by the model's card" * outside
        if slow != self._slow:
            self._slow = slow
            await self._say("rate", fps=fps, text=slow)

    async def _replay_frame(self) -> None:
        try:
            drawn = await self._session.replay_step(unsure=self._unsure)
        finally:
            frame = self._session.history.frame(self._session.at)
            await self._show(frame)
        await self._show_unsure(drawn.unsure)
        if not self._session.to_replay:
            text = f"Drawn again, all {self._session.at + 1} frames, to the very same pixels."
            await self._say("replayed", text=text, steps=drawn.program.steps)

    async def _show(self, frame_HWC: np.ndarray) -> None:
        session = self._session
        at, total = session.at, len(session.history)
        steps, lanes = session.history.programs[at] or (0, 0)
        header = _HEADER.pack(
            _FRAME, lanes, session.history.actions[at], steps, session.window, at, total,
            self._keys.drawn_stamp,
        )  # fmt: skip
        self._keys.drawn_stamp = 0.0
        await self._socket.send_bytes(header + frame_HWC.tobytes())

    async def _show_unsure(self, patches_hw: np.ndarray | None) -> None:
        if patches_hw is not None:
            values = np.clip(np.nan_to_num(patches_hw), 0, 255).astype(np.uint8)
            header = _PATCHES.pack(_UNSURE, *values.shape)
            await self._socket.send_bytes(header + values.tobytes())

    async def _say(self, what: str, **fields) -> None:
        await self._socket.send_text(json.dumps({"say": what, **fields}))

    @property
    def _played(self) -> Session:
        if self._session is None:
            raise UserError("no world has begun yet: start one first")
        return self._session

    async def _begin(self, session: Session) -> None:
        if self._session:
            self._session.close()
        self._session, self._recorded = session, None
        self._keys.release()
        source = session.prompt.source
        clip = source.number if isinstance(source, ClipSource) else None
        given = session.history.given
        await self._say("started", seed=session.seed, clip=clip, given=given)
        await self._show(session.history.frame(session.at))

    async def _do_start(self, clip=None, prompt=prompt_sources.USUAL_PROMPT, seed=None) -> None:
        """A new session from a clip; a random one where `clip` is null."""
        fields = dict(clip=clip, prompt=prompt, seed=seed)
        count = len(self._studio.prompts)
        number = secrets.randbelow(count) if clip is None else _whole(fields, "clip", 0, count - 1)
        source = ClipSource(number, _whole(fields, "prompt", 1, prompt_sources.MAX_PROMPT))
        seed = None if seed is None else _whole(fields, "seed", 0, 2**32 - 1)
        loaded = await asyncio.to_thread(self._studio.prompts.load, source)
        await self._begin(Session(self._studio.scheduler, loaded, self._known, seed=seed))

    async def _do_picture(self, raw=b"") -> None:
        """A new session from an uploaded picture."""
        if not isinstance(raw, bytes):
            raise UserError("a picture is sent as bytes, not as text")
        loaded = await asyncio.to_thread(prompt_sources.from_picture, raw)
        await self._begin(Session(self._studio.scheduler, loaded, self._known))

    async def _do_settings(
        self, fps=None, steps=None, auto=None, step_mode=None, unsure=None
    ) -> None:
        """Any of: frames a second, DDIM steps (0: the governor picks), auto-run, step mode, and
        whether each frame is followed by the patches of which the model is unsure.
        """
        if fps is not None:
            self._fps = _whole(dict(fps=fps), "fps", 1, MAX_FPS)
        if steps is not None:
            choices = self._studio.scheduler.drawer.steps
            if steps and steps not in choices:
                raise UserError(f"{steps!r} DDIM steps: choose of {list(choices)}, or 0")
            self._pinned = steps
        if auto is not None:
            self._auto = bool(auto)
        if step_mode is not None:
            self._step_mode = bool(step_mode)
            self._keys.release()
        if unsure is not None:
            self._unsure = bool(unsure)

    async def _do_wait(self) -> None:
        """One frame without a key."""
        self._keys.tap_idle()

    async def _do_rewind(self, to=0) -> None:
        """Shows an earlier (or later) frame and halts there."""
        self._halt()
        self._played.rewind(_whole(dict(to=to), "to", 0, 2**31))
        await self._show(self._played.history.frame(self._played.at))

    async def _do_what_if(self, frames=8) -> None:
        """The next frames under each action that differs."""
        self._auto = False
        count = _whole(dict(frames=frames), "frames", 1, MAX_FUTURE)
        await self._say("thinking", text=f"Drawing {count} frames of each future …")
        branches = await self._played.what_if(count, steps=self._steps())
        actions = [branch.action for branch in branches]
        names = [self._known.name(action) for action in actions]
        await self._say("branches", actions=actions, names=names, frames=count)
        pixels = b"".join(frame.tobytes() for branch in branches for frame in branch.frames)
        await self._socket.send_bytes(bytes([_BRANCHES]) + pixels)

    async def _do_choose(self, branch=0) -> None:
        """Goes on where a branch of what-if ended."""
        self._played.choose(_whole(dict(branch=branch), "branch", 0, 99))
        await self._show(self._played.history.frame(self._played.at))

    async def _do_share(self) -> None:
        """The session's share code, up to the frame that is shown."""
        await self._say("code", code=self._played.recipe().encoded)

    async def _do_replay(self, code="") -> None:
        """A new session, drawn from a share code."""
        self._halt()
        recipe = share_code.decode(str(code))
        session = await asyncio.to_thread(
            Session.from_recipe, self._studio.scheduler, self._studio.prompts, recipe
        )
        await self._begin(session)

    async def _do_record(self, on=True) -> None:
        """Marks where a recording begins or ends."""
        at = self._played.at
        if on:
            self._recorded = at, None
        elif self._recorded:
            self._recorded = self._recorded[0], at + 1
        await self._say("recording", on=bool(on), start=self._recorded and self._recorded[0])

    async def _do_clear(self) -> None:
        """Forgets the recording."""
        self._recorded = None
        await self._say("recording", on=False, start=None)

    async def _do_save(self, kind="mp4") -> None:
        """Writes the recording, or else the whole session, to a file to be downloaded."""
        if kind not in ("mp4", "npz"):
            raise UserError(f"a session is saved as mp4 or npz, not {str(kind)[:20]!r}")
        start, stop = self._recorded or (0, None)
        total = len(self._played.history)
        start, stop = min(start, total - 1), min(stop or total, total)
        stop = max(stop, start + 1)
        await self._say("thinking", text=f"Writing {stop - start} frames …")
        self._files_made += 1
        path = self.downloads.new(f"session{self._files_made}.{kind}")
        if kind == "mp4":
            write = lambda: saving.write_film(
                self._session, path, start=start, stop=stop, fps=self._fps
            )
        else:
            write = lambda: saving.write_numbers(self._session, path, start=start, stop=stop)
        await asyncio.to_thread(write)
        await self._say("file", token=self._token, name=path.name)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _whole(fields: dict, name: str, low: int, high: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{name} is {str(value)[:40]!r}; it must be a whole number {low}…{high}")
    return value


def _number(fields: dict, name: str) -> float:
    value = fields.get(name, 0)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e15:
        raise UserError(f"{name} is {str(value)[:40]!r}; it must be a number")
    return float(value)
