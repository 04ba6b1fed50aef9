"""The clips that a session starts from, as PNG strips: each record's frames, one below the other.

The numbers of clips are those of the Python page with the same data, so share codes go both ways.
"""

import base64
import io
import json

import numpy as np
from PIL import Image

from cwm_jax.play.session.prompt_sources import ClipPrompts

GALLERY = 12  # clips to choose from
ROWS = 8  # frames of each that the gallery shows
LEVEL = 9  # of compression


def files(prompts: ClipPrompts) -> dict[str, bytes]:
    """records/N.png for each record, gallery.png, and what they are: clips.json, gallery.json."""
    episodes, found, records = prompts.episodes, {}, []
    for number in range(len(episodes)):
        episode = episodes[number]
        name = f"records/{number}.png"
        found[name] = _png(episode.frames.reshape(-1, *episode.frames.shape[2:]))
        actions = np.asarray(episode.actions).astype(np.uint8).tobytes().hex()
        records.append({"file": name, "frames": len(episode), "actions": actions})
    places = [list(map(int, prompts.clips.locate(clip))) for clip in range(len(prompts))]
    found["clips"] = _json({"records": records, "clips": places})
    chosen = gallery(prompts)
    strips = [prompts.clips.batch([clip])["frames"][0, :ROWS] for clip in chosen]
    found["gallery.png"] = _png(np.concatenate([s.reshape(-1, *s.shape[2:]) for s in strips], 1))
    found["gallery"] = _json({"clips": chosen, "rows": ROWS})
    return found


def gallery(prompts: ClipPrompts) -> list[int]:
    """Clips that look least alike: of each record the one in which most moves at the start.

    The first is that with most movement of all; each further one is farthest from those before.
    """
    lively = sorted(_liveliest(prompts), reverse=True)
    looks = {clip: _look(prompts, clip) for _, clip in lively}
    chosen = [lively[0][1]]
    while len(chosen) < min(GALLERY, len(looks)):
        distance = lambda clip: min(np.abs(looks[clip] - looks[c]).mean() for c in chosen)
        chosen.append(max((clip for clip in looks if clip not in chosen), key=distance))
    return chosen


def _liveliest(prompts: ClipPrompts) -> list[tuple[float, int]]:
    best = []
    for number in range(len(prompts.episodes)):
        if clips := prompts.clips.of_episode(number):
            best.append(max((_movement(prompts, clip), clip) for clip in clips))
    return best


def _look(prompts: ClipPrompts, clip: int) -> np.ndarray:
    return prompts.clips.batch([clip])["frames"][0, 0, ::4, ::4].astype(np.float32)


def _movement(prompts: ClipPrompts, clip: int) -> float:
    frames = prompts.clips.batch([clip])["frames"][0, :ROWS].astype(np.float32)
    return float(np.abs(np.diff(frames, axis=0)).mean())


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=LEVEL)
    return out.getvalue()


def _json(value) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def data_url(svg: bytes) -> str:
    """A picture as part of a page."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
