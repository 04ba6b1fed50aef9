"""How well a model's heads predict the reward and the end of an episode, on held-out levels.

For each frame of a record the heads give two probabilities: that the action pressed at it earns a
reward, and that it ends the episode. Frames are real (`of_records`), or the model's own
(`of_rollouts`). The floor of precision and recall is the base rate: an uninformed head
reaches no more.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cwm_jax.coinrun import NO_ACTION, to_model
from cwm_jax.data.clips import Episodes
from cwm_jax.data.records import Episode
from cwm_jax.diffusion.denoiser import bind
from cwm_jax.errors import UserError
from cwm_jax.evaluation import bootstrap
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import Params
from cwm_jax.sampling.sampler import SamplerConfig
from cwm_jax.sampling.worlds import WorldGenerator

HEADS = ("reward", "end")
THRESHOLD = 0.5
PROMPT = 4  # real frames that a rollout starts from
_CLIPS_AT_ONCE = 16


class Predicted(NamedTuple):
    """Predictions and outcomes of the frames of one record or rollout, each [T]."""

    probability: dict[str, np.ndarray]  # by head, float32
    happened: dict[str, np.ndarray]  # by head, bool


class Window(NamedTuple):
    """A clip of a record that fits the network's window."""

    start: int
    counted: int  # the first of its frames that no earlier window counted


def check(network: DiTConfig, path) -> None:
    """Raises a UserError for a model without heads."""
    if not network.heads:
        raise UserError(
            f"{path} has no heads, which predict rewards and ends of episodes: train with "
            "--config.model.heads=True, or add them with `python -m cwm_jax.tools.heads`"
        )


def windows(length: int, size: int) -> Iterator[Window]:
    """Clips of `size` frames that cover a record; all but the first overlap the one before."""
    step = size - size // 3
    starts = [*range(0, max(1, length - size), step), max(0, length - size)]
    counted = 0
    for start in dict.fromkeys(starts):
        yield Window(start, counted)
        counted = start + size


@functools.partial(jax.jit, static_argnames="network")
def _probabilities(params, frames_BTHWC, actions_BT, pressed_BT, *, network: DiTConfig):
    denoiser = bind(network, params)
    level = SamplerConfig.context_level
    stream = denoiser.context_stream(to_model(frames_BTHWC), actions_BT, level)
    outcomes = denoiser.net.outcomes(denoiser.net.scene(stream), pressed_BT)
    return jnp.stack([jax.nn.softmax(outcomes.reward)[..., 2], jax.nn.sigmoid(outcomes.end)])


def read(network: DiTConfig, params: Params, episodes: Sequence[Episode]) -> list[np.ndarray]:
    """Probabilities of reward and of the end at each frame of real episodes, float32 [2, T] each.

    Raises:
        UserError: an episode is shorter than the network's window.
    """
    size = network.max_frames
    jobs = [(n, w) for n, episode in enumerate(episodes) for w in windows(len(episode), size)]
    found = [np.zeros((2, len(episode)), np.float32) for episode in episodes]
    for first in range(0, len(jobs), _CLIPS_AT_ONCE):
        batch = jobs[first : first + _CLIPS_AT_ONCE]
        filled = batch + batch[-1:] * (_CLIPS_AT_ONCE - len(batch))
        clips = [_clip(episodes[n], window.start, size) for n, window in filled]
        arrays = (np.stack(parts) for parts in zip(*clips, strict=True))
        predicted = np.asarray(_probabilities(params, *arrays, network=network))
        for (n, window), predicted_2T in zip(batch, np.moveaxis(predicted, 1, 0), strict=False):
            stop = min(window.start + size, len(episodes[n]))
            kept = slice(window.counted - window.start, stop - window.start)
            found[n][:, window.counted : stop] = predicted_2T[:, kept]
    return found


def _clip(episode: Episode, start: int, size: int):
    """Frames, actions that led into them and those pressed at them; a short one is padded."""
    frames = episode.frames[start : start + size]
    pressed = episode.actions[start : start + size]
    led_in = np.append(np.int32(NO_ACTION), pressed[:-1])
    pad = size - len(frames)
    padded = lambda x: np.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1), mode="edge")
    return padded(frames), padded(led_in), padded(pressed)


def of_records(
    network: DiTConfig, params: Params, episodes: Episodes, numbers: Sequence[int]
) -> list[Predicted]:
    """Predictions of the heads and true outcomes of records; those without outcomes are left out.

    Raises:
        UserError: none of the records has rewards and ends.
    """
    read_in = [episodes[number] for number in numbers]
    known = [episode for episode in read_in if episode.outcomes is not None]
    if not known:
        raise UserError("none of the records has rewards and ends of episodes to measure against")
    return [
        Predicted(dict(zip(HEADS, predicted, strict=True)), happened(episode))
        for predicted, episode in zip(read(network, params, known), known, strict=True)
    ]


def of_rollouts(
    generator: WorldGenerator, episodes: Episodes, numbers: Sequence[int], *, ahead: int, seed: int
) -> list[Predicted]:
    """Predictions of the heads for `ahead` generated frames, under the recorded actions.

    Rollouts start from `PROMPT` real frames: if the episode of a record ends, so that its last
    action ends it; else anywhere. Records that are too short are left out.

    Raises:
        UserError: no record is long enough.
    """
    rng, jobs = np.random.default_rng(seed), []
    for number in numbers:
        episode = episodes[number]
        spare = len(episode) - PROMPT - ahead + 1
        if episode.outcomes is None or spare < 0:
            continue
        ends = bool(episode.outcomes.done[-1])
        jobs.append((episode, spare if ends else int(rng.integers(spare + 1))))
    if not jobs:
        raise UserError(
            f"no record with outcomes has the {PROMPT + ahead - 1} frames that this needs"
        )
    found = []
    for first in range(0, len(jobs), _CLIPS_AT_ONCE):
        batch = jobs[first : first + _CLIPS_AT_ONCE]
        found += _rolled_out(generator, batch, ahead, seed + first)[: len(batch)]
    return found


def _rolled_out(
    generator: WorldGenerator, jobs: Sequence, ahead: int, seed: int
) -> list[Predicted]:
    filled = [*jobs, *[jobs[-1]] * (_CLIPS_AT_ONCE - len(jobs))]
    prompts = [_clip(episode, start, PROMPT) for episode, start in filled]
    frames, led_in, _ = (np.stack(parts) for parts in zip(*prompts, strict=True))
    steps = [slice(start + PROMPT - 1, start + PROMPT - 1 + ahead) for _, start in filled]
    actions = np.stack([e.actions[step] for (e, _), step in zip(filled, steps, strict=True)])
    worlds = generator.begin(frames, led_in, [seed + i for i in range(len(filled))])
    predicted = jax.device_get(generator.rollout(worlds, actions)[2])
    return [
        Predicted(
            {"reward": predicted.positive[i], "end": predicted.end[i]},
            {head: values[step] for head, values in happened(episode).items()},
        )
        for i, ((episode, _), step) in enumerate(zip(filled, steps, strict=True))
    ]


def happened(episode: Episode) -> dict[str, np.ndarray]:
    """At which frames an action earned a reward or ended the episode, bool [T] each."""
    return {"reward": episode.outcomes.rewards > 0, "end": episode.outcomes.done}


def summary(predicted: Sequence[Predicted], threshold: float = THRESHOLD) -> dict:
    """Precision, recall and base rate of each head, frame by frame and event by event.

    Frame by frame: a frame is positive if its probability is `threshold` or more. Event by event,
    as an environment uses the heads: the first positive frame of a record counts, and is right
    within `NEAR` frames of the real one. Intervals are of resampled records.
    """
    return {
        head: {
            "frames": _scores(*_frame_counts(predicted, head, threshold)),
            "events": _scores(*_event_counts(predicted, head, threshold)),
        }
        for head in HEADS
    }


NEAR = 2  # largest distance in frames between an event and its detection


def _frame_counts(predicted: Sequence[Predicted], head: str, threshold: float):
    """By record: true positives, predicted positives, real positives, and all frames."""
    rows = []
    for record in predicted:
        named, real = record.probability[head] >= threshold, record.happened[head]
        rows.append((np.sum(named & real), named.sum(), real.sum(), len(real)))
    return np.array(rows, float).T


def _event_counts(predicted: Sequence[Predicted], head: str, threshold: float):
    """The same of events: at most one is predicted, and at most one happens in a record."""
    rows = []
    for record in predicted:
        (named,) = np.nonzero(record.probability[head] >= threshold)
        (real,) = np.nonzero(record.happened[head])
        right = len(named) and len(real) and abs(named[0] - real[0]) <= NEAR
        rows.append((bool(right), len(named) > 0, len(real) > 0, 1))
    return np.array(rows, float).T


def _scores(right_B, named_B, real_B, all_B) -> dict:
    precision = bootstrap.of_ratio(right_B, named_B)
    recall = bootstrap.of_ratio(right_B, real_B)
    counts = {"named": int(named_B.sum()), "real": int(real_B.sum()), "of": int(all_B.sum())}
    return {
        "precision": precision._asdict(),
        "recall": recall._asdict(),
        "base_rate": float(real_B.sum() / all_B.sum()),
        **counts,
    }


def best_threshold(predicted: Sequence[Predicted], head: str) -> float:
    """The threshold with the highest F1 for events."""
    tried = np.unique(np.concatenate([record.probability[head] for record in predicted]).round(3))
    tried = tried[(tried > 0.01) & (tried < 0.99)]

    def f1(threshold: float) -> float:
        right, named, real, _ = _event_counts(predicted, head, threshold).sum(1)
        return 2 * right / max(1, named + real)

    return float(max(tried, key=f1)) if len(tried) else THRESHOLD


def table(title: str, results: dict) -> str:
    """The numbers of `summary`, as lines for the terminal."""
    lines = [f"{title}: precision, recall, base rate"]
    for head, kinds in results.items():
        for kind, found in kinds.items():
            precision, recall = (
                "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**found[name])
                for name in ("precision", "recall")
            )
            lines.append(
                f"  {head} by {kind}: {precision}, {recall}, {found['base_rate']:.4f} "
                f"({found['named']} named, {found['real']} real, of {found['of']})"
            )
    return "\n".join(lines)
