"""One player on a WebSocket: keys and commands in, frames out, see `messages`."""

import asyncio
import contextlib
import inspect
import json
import secrets
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
from cwm_jax.play.web import messages
from cwm_jax.play.web.app_state import Downloads, Studio
from cwm_jax.play.web.keys import Keys

MAX_FPS = 60
_MAX_WAITING = 32  # commands not yet processed


class Player:
    """A player's connection; `run` lasts as long as it does."""

    def __init__(self, socket: WebSocket, studio: Studio):
        self._socket, self._studio = socket, studio
        self._token: str | None = None
        self._session: Session | None = None
        self._keys = Keys(NO_ACTION)  # until the game is known
        self._auto = self._step_mode = self._unsure = False
        self._fps, self._pinned = studio.rules.fps, 0
        self._rate: FrameRate | None = None  # until the device is ready
        self._slow = ""  # the page's message on a rate below the chosen one
        self._commands: deque[tuple[str, dict]] = deque()
        self._wake = asyncio.Event()
        self._due = self._began = self._sent = (
            0.0  # due time of the next frame; times of the last one
        )
        self._recorded: tuple[int, int | None] | None = (
            None  # first frame, and the end once stopped
        )
        self._files_made = 0
        self.downloads = Downloads()
        self._over = False

    async def run(self) -> None:
        """Plays until the connection ends for any reason; then frees all resources."""
        self._token = self._studio.enter(self)
        if self._token is None:
            await self._send("full", text=f"All places are taken ({self._studio.rules.players}).")
            await self._socket.close(1013)
            return
        reader = None
        try:
            if not await self._opened():
                return
            self._keys = Keys(self._known.idle)
            card = self._studio.scheduler.generator.playable
            self._rate = FrameRate(self._fps, lowers=card is not None)
            await self._send_hello()
            reader = asyncio.create_task(self._read())
            self._commands.append(("start", {}))
            await self._play()
        except (WebSocketDisconnect, RuntimeError, OSError):
            pass  # the connection ended, possibly during a frame
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
        """Sends the stages of the start until the device is ready; False if the start fails."""
        sent = None
        while not self._studio.is_open:
            if self._studio.fault:
                await self._send("fault", text=self._studio.fault)
                await self._socket.close(1011)
                return False
            if sent != self._studio.stage:
                sent = self._studio.stage
                await self._send("progress", text=sent)
            await asyncio.sleep(0.1)
        return True

    async def _send_hello(self) -> None:
        studio = self._studio
        await self._send(
            "hello",
            token=self._token,
            title=studio.title,
            demo=studio.demo,
            clips=len(studio.prompts),
            steps=list(studio.scheduler.generator.steps),
            playable=studio.scheduler.generator.playable,
            fps=self._fps,
            controls=self._known.to_json()
            | {"idle": self._known.idle, "procgen": self._known.is_procgen},
        )

    @property
    def _known(self) -> Controls:
        return self._studio.prompts.known

    async def _read(self) -> None:
        """Processes messages until the connection ends or is idle for too long."""
        try:
            while True:
                message = await self._next_message()
                if message["type"] == "websocket.disconnect":
                    return
                try:
                    self._take(message)
                except UserError as error:
                    await self._send("error", text=str(error))
                self._wake.set()
        except TimeoutError:
            code = self._session.recipe().encoded if self._session else ""
            await self._send("idle", text="This session was idle and has ended.", code=code)
            await self._socket.close(1000)
        finally:
            self._over = True
            self._wake.set()

    async def _next_message(self) -> dict:
        """Raises TimeoutError if the player sends nothing, holds no key and watches no replay."""
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
        name, fields = messages.command(message.get("text") or "")
        if name == "keys":  # at once, so that the next frame uses it
            lowest = min(0, self._known.idle)
            action = messages.whole(fields, "action", lowest, self._known.num_values - 1)
            self._keys.press(action, messages.number(fields, "stamp"))
        elif isinstance(name, str) and hasattr(self, f"_do_{name}"):
            self._queue(name, fields)
        else:
            raise UserError(f"there is no command {str(name)[:40]!r}")

    def _queue(self, name: str, fields: dict) -> None:
        if self._commands and name == self._commands[-1][0] == "rewind":
            self._commands.pop()  # only the last of consecutive ones matters
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
                await self._wait_for_message(None)
            elif (early := self._due - clock()) > 0:
                await self._wait_for_message(early)
            else:
                period = 1 / min(self._fps, self._rate.fps)
                # Catches up after a late frame, but not after a pause.
                due = self._due if -early < period else clock()
                self._began, self._due = max(due, self._sent), due + period
                await self._guarded(self._frame)

    async def _wait_for_message(self, seconds: float | None) -> None:
        """Waits for a message, at most so many seconds."""
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)

    async def _guarded(self, act: Callable[..., Awaitable[None]], **fields) -> None:
        """Sends the player an error of theirs, of the device or of the disk, and continues."""
        try:
            await act(**fields)
        except UserError as error:
            self._halt()
            await self._send("error", text=str(error))
        except jax.errors.JaxRuntimeError as error:
            self._halt()
            await self._send("error", text=f"the device failed: {str(error).splitlines()[0][:200]}")
        except OSError as error:
            self._halt()
            await self._send(
                "error", text=f"nothing more can be kept on disk: {error.strerror or error}"
            )

    def _halt(self) -> None:
        self._keys.release()
        self._auto = False

    def _wants_frame(self) -> bool:
        return self._presses() or (self._auto and not self._step_mode)

    def _presses(self) -> bool:
        """Whether a key requests a frame."""
        return self._keys.tapped is not None if self._step_mode else self._keys.down

    async def _frame(self) -> None:
        """The next frame: of a replay, or of the player's own keys if any is pressed."""
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
        generated = await self._session.step(take, steps=steps, unsure=self._unsure)
        await self._keep_recording()
        await self._show(generated.frame)
        await self._show_unsure(generated.unsure)
        self._sent = asyncio.get_running_loop().time()
        self._rate.note(self._sent - self._began)

    def _steps(self) -> int:
        return self._pinned or self._studio.scheduler.choose_steps(self._fps)

    async def _adapt_rate(self, steps: int) -> None:
        """Lowers the frame rate where the device is too slow for it, and informs the page."""
        fps = self._rate.choose(self._fps, steps)
        playable = self._studio.scheduler.generator.playable
        outside = playable is not None and steps not in playable
        slow = ""
        if not self._step_mode and (self._rate.lowered or (outside and not self._pinned)):
            slow = f"Slow machine: {_count(fps, 'frame')} a second"
            slow += f", {_count(steps, 'step')} each: not playable by the model's card" * outside
        if slow != self._slow:
            self._slow = slow
            await self._send("rate", fps=fps, text=slow)

    async def _keep_recording(self) -> None:
        """After a rewind, a new frame replaces recorded ones: then the recording begins with it.

        A recording that has stopped is discarded.
        """
        if self._recorded is None:
            return
        at, (start, end) = self._session.at, self._recorded
        if end is not None and at < end:
            await self._do_clear()
        elif end is None and at <= start:
            await self._do_record()

    async def _replay_frame(self) -> None:
        try:
            generated = await self._session.replay_step(unsure=self._unsure)
        finally:
            frame = self._session.history.frame(self._session.at)
            await self._show(frame)
        await self._show_unsure(generated.unsure)
        if not self._session.to_replay:
            text = f"Replayed: all {self._session.at + 1} frames are identical."
            await self._send("replayed", text=text, steps=generated.program.steps)

    async def _show(self, frame_HWC: np.ndarray) -> None:
        stamp, self._keys.frame_stamp = self._keys.frame_stamp, 0.0
        await self._socket.send_bytes(messages.frame(self._session, frame_HWC, stamp))

    async def _show_unsure(self, patches_hw: np.ndarray | None) -> None:
        if patches_hw is not None:
            await self._socket.send_bytes(messages.unsure(patches_hw))

    async def _send(self, event: str, **fields) -> None:
        await self._socket.send_text(json.dumps({"event": event, **fields}))

    @property
    def _played(self) -> Session:
        if self._session is None:
            raise UserError("no session yet: start one first")
        return self._session

    async def _begin(self, session: Session) -> None:
        if self._session:
            self._session.close()
        self._session, self._recorded = session, None
        self._keys.release()
        source = session.prompt.source
        clip = source.number if isinstance(source, ClipSource) else None
        given = session.history.given
        await self._send("started", seed=session.seed, clip=clip, given=given)
        await self._show(session.history.frame(session.at))

    async def _do_start(self, clip=None, prompt=prompt_sources.USUAL_PROMPT, seed=None) -> None:
        """A new session from a clip; a random one where `clip` is null."""
        fields = dict(clip=clip, prompt=prompt, seed=seed)
        clips, longest = len(self._studio.prompts), prompt_sources.MAX_PROMPT
        if clip is None:
            clip = secrets.randbelow(clips)
        else:
            messages.whole(fields, "clip", 0, clips - 1)
        source = ClipSource(clip, messages.whole(fields, "prompt", 1, longest))
        seed = None if seed is None else messages.whole(fields, "seed", 0, 2**32 - 1)
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
            self._fps = messages.whole(dict(fps=fps), "fps", 1, MAX_FPS)
        if steps is not None:
            choices = self._studio.scheduler.generator.steps
            is_whole = isinstance(steps, int) and not isinstance(steps, bool)
            if not is_whole or steps not in (0, *choices):
                raise UserError(f"{steps!r} DDIM steps: choose one of {list(choices)}, or 0")
            self._pinned = steps
        if auto is not None:
            self._auto = messages.flag(dict(auto=auto), "auto")
        if step_mode is not None:
            self._step_mode = messages.flag(dict(step_mode=step_mode), "step_mode")
            self._keys.release()
        if unsure is not None:
            self._unsure = messages.flag(dict(unsure=unsure), "unsure")

    async def _do_wait(self) -> None:
        """One frame without a key."""
        self._keys.tap_idle()

    async def _do_rewind(self, to=0) -> None:
        """Shows an earlier (or later) frame and stops there."""
        self._halt()
        self._played.rewind(messages.whole(dict(to=to), "to", 0, 2**31))
        await self._show(self._played.history.frame(self._played.at))

    async def _do_what_if(self, frames=8) -> None:
        """The next frames under each action that differs."""
        self._auto = False
        count = messages.whole(dict(frames=frames), "frames", 1, MAX_FUTURE)
        await self._send("thinking", text=f"Generating {count} frames of each future …")
        branches = await self._played.what_if(count, steps=self._steps())
        actions = [branch.action for branch in branches]
        names = [self._known.name(action) for action in actions]
        await self._send("branches", actions=actions, names=names, frames=count)
        frames = (frame for branch in branches for frame in branch.frames)
        await self._socket.send_bytes(messages.branches(frames))

    async def _do_choose(self, branch=0) -> None:
        """Continues from the end of a branch of what-if."""
        self._played.choose(messages.whole(dict(branch=branch), "branch", 0, 99))
        await self._show(self._played.history.frame(self._played.at))

    async def _do_share(self) -> None:
        """The session's share code up to the shown frame."""
        await self._send("code", code=self._played.recipe().encoded)

    async def _do_replay(self, code="") -> None:
        """A new session, replayed from a share code."""
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
        await self._send("recording", on=bool(on), start=self._recorded and self._recorded[0])

    async def _do_clear(self) -> None:
        """Discards the recording."""
        self._recorded = None
        await self._send("recording", on=False, start=None)

    async def _do_save(self, kind="mp4") -> None:
        """Writes the recording, or else the whole session, to a file for download."""
        if kind not in ("mp4", "npz"):
            raise UserError(f"a session is saved as mp4 or npz, not {str(kind)[:20]!r}")
        start, stop = self._recorded or (0, None)
        total = len(self._played.history)
        start, stop = min(start, total - 1), min(stop or total, total)
        stop = max(stop, start + 1)
        await self._send("thinking", text=f"Writing {_count(stop - start, 'frame')} …")
        self._files_made += 1
        path = self.downloads.new(f"session{self._files_made}.{kind}")
        if kind == "mp4":
            write = lambda: saving.write_video(
                self._session, path, start=start, stop=stop, fps=self._fps
            )
        else:
            write = lambda: saving.write_numbers(self._session, path, start=start, stop=stop)
        await asyncio.to_thread(write)
        await self._send("file", token=self._token, name=path.name)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
