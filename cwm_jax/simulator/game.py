"""The parent's side of the simulator: recordings and replays of levels."""

import contextlib
import dataclasses
import io
import json
import subprocess
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cwm_jax.coinrun import FRAME_SHAPE, GAMES, NUM_ACTIONS
from cwm_jax.data.records import FRAME_BYTES, Episode
from cwm_jax.errors import UserError

_WORKER = Path(__file__).with_name("worker.py")
POLICIES = ("random", "sticky")
DIFFICULTIES = ("easy", "hard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording:
    """One worker's recording job.

    Fields:
        game: one of `GAMES`.
        first_level, num_levels: level seeds first_level … first_level + num_levels − 1.
        policy: weight of each policy; each episode's policy is sampled by weight.
        seed: of the choice of levels and of all actions.
        records: chunks to record.
        chunk: frames in a chunk; an episode is cut into such chunks from its start.
        min_chunk: a shorter remainder of an episode is dropped.
        num_envs: episodes played at once. Few, so that a shard contains whole episodes and not
            only their first frames.
    """

    game: str
    first_level: int
    num_levels: int
    policy: Mapping[str, float]
    seed: Sequence[int]
    records: int
    chunk: int = 160
    min_chunk: int = 32
    num_envs: int = 8
    difficulty: str = "hard"


class Chunk(NamedTuple):
    """A piece of one episode, with the simulator's rewards and ends."""

    episode: Episode
    rewards: np.ndarray  # float32 [T], what action i earned
    done: np.ndarray  # bool [T], whether action i ended the level
    level_seed: int
    start: int  # number of the chunk's first frame in its level


class Replay(NamedTuple):
    """A level played with given actions."""

    frames: np.ndarray  # uint8 [n + 1, 64, 64, 3], the level's first frame and one an action
    rewards: np.ndarray  # float32 [n], or [n + 1] where the last action ended the level
    ended: bool  # the level ended; actions after that were not played


class Seen(NamedTuple):
    """The result of a step of N levels."""

    frames: np.ndarray  # uint8 [N, 64, 64, 3]; of a level that has ended, its last
    rewards: np.ndarray  # float32 [N], what the last actions earned
    over: np.ndarray  # bool [N], levels that have ended


class Simulator:
    """A simulator process, as a context manager that ends it. For one thread at a time.

    It has a session of its own, so that Ctrl-C at the terminal reaches only the parent, which
    then ends the process.

    Args:
        python: of the simulator's environment, see `venv.ensure`.
    """

    def __init__(self, python: Path):
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._worker = subprocess.Popen(
            [str(python), "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
        )

    def __enter__(self) -> "Simulator":
        return self

    def __exit__(self, *_) -> None:
        self._worker.kill()
        self._worker.wait()
        with contextlib.suppress(BrokenPipeError):  # the process exited before it read the job
            self._worker.stdin.close()
        self._worker.stdout.close()
        self._stderr.close()

    def record(self, recording: Recording) -> Iterator[Chunk]:
        """Plays a recording; the same one gives the same chunks. Iterate it to its end.

        Raises:
            UserError: the process failed, with its last line; or a thousand episodes in a
                row were all too short for a chunk.
        """
        self._ask({"do": "record", **dataclasses.asdict(recording)})
        for _ in range(recording.records):
            head = json.loads(self._line())
            if "fault" in head:
                raise UserError(head["fault"])
            yield self._chunk(head)

    def replay(
        self, game: str, runs: Sequence[tuple[int, Sequence[int]]], *, difficulty: str = "hard"
    ) -> list[Replay]:
        """Plays levels from their start under these actions.

        Args:
            game: one of `GAMES`.
            runs: (level seed, actions 0…14) of each.

        Raises:
            UserError: for a game or an action that does not exist, or a process that failed.
        """
        check_game(game)
        for _, actions in runs:
            if wrong := [a for a in actions if not 0 <= a < NUM_ACTIONS]:
                raise UserError(f"action {wrong[0]}: {game} has 0…{NUM_ACTIONS - 1}")
        plain = [{"level_seed": int(s), "actions": [int(a) for a in acts]} for s, acts in runs]
        self._ask({"do": "replay", "game": game, "difficulty": difficulty, "runs": plain})
        with np.load(io.BytesIO(self._bytes(int(self._line())))) as arrays:
            return [
                Replay(arrays[f"frames_{i}"], arrays[f"rewards_{i}"], bool(arrays[f"ended_{i}"]))
                for i in range(len(runs))
            ]

    def play(
        self, game: str, levels: Sequence[int], *, difficulty: str = "hard"
    ) -> Generator[Seen, Sequence[int], None]:
        """Plays levels by actions that depend on the frames: a generator to send actions to.

            playing = simulator.play("coinrun", range(4))
            seen = next(playing)
            seen = playing.send([7, 7, 7, 7])
            playing.close()

        Args:
            levels: level seeds, one or more.

        Raises:
            UserError: for a game or an action that does not exist, or a process that failed.
        """
        check_game(game)
        job = {"do": "play", "game": game, "difficulty": difficulty}
        self._ask(job | {"levels": [int(level) for level in levels]})
        try:
            while True:
                actions = yield self._seen(len(levels))
                if wrong := [a for a in actions if not 0 <= a < NUM_ACTIONS]:
                    raise UserError(f"action {wrong[0]}: {game} has 0…{NUM_ACTIONS - 1}")
                self._ask([int(action) for action in actions])
        finally:
            self._ask(None)

    def _seen(self, levels: int) -> Seen:
        frames = np.frombuffer(self._bytes(levels * FRAME_BYTES), np.uint8)
        rewards = np.frombuffer(self._bytes(levels * 4), np.float32)
        over = np.frombuffer(self._bytes(levels), bool)
        return Seen(frames.reshape(levels, *FRAME_SHAPE), rewards, over)

    def _ask(self, job: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has exited; reading reports the reason
            self._worker.stdin.write(json.dumps(job).encode() + b"\n")
            self._worker.stdin.flush()

    def _chunk(self, head: dict[str, Any]) -> Chunk:
        size = head["frames"]
        raw, at = self._bytes(size * (FRAME_BYTES + 8)), size * FRAME_BYTES
        frames = np.frombuffer(raw, np.uint8, at).reshape(size, *FRAME_SHAPE)
        actions = np.frombuffer(raw, np.int32, size, offset=at)
        rewards = np.frombuffer(raw, np.float32, size, offset=at + 4 * size)
        done = np.zeros(size, bool)
        done[-1] = head["ended"]
        return Chunk(Episode(frames, actions), rewards, done, head["level_seed"], head["start"])

    def _line(self) -> bytes:
        line = self._worker.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._broken()
        return line

    def _bytes(self, size: int) -> bytes:
        raw = self._worker.stdout.read(size)
        if len(raw) != size:
            raise self._broken()
        return raw

    def _broken(self) -> UserError:
        code = self._worker.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return UserError(
            f"the simulator's process ended with code {code}: {(lines or ['no message'])[-1]}"
        )


def check_game(game: str) -> None:
    if game not in GAMES:
        raise UserError(f"Procgen has no game {game!r}; it has {', '.join(GAMES)}")
