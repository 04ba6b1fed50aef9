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
    chosen = liveliest(prompts)
    strips = [prompts.clips.batch([clip])["frames"][0, :ROWS] for clip in chosen]
    found["gallery.png"] = _png(np.concatenate([s.reshape(-1, *s.shape[2:]) for s in strips], 1))
    found["gallery"] = _json({"clips": chosen, "rows": ROWS})
    return found


def liveliest(prompts: ClipPrompts) -> list[int]:
    """Of the records with most movement, the clip in which most moves at the start."""
    best = []
    for number in range(len(prompts.episodes)):
        clips = list(prompts.clips.of_episode(number))
        if clips:
            best.append(max((_movement(prompts, clip), clip) for clip in clips))
    return [clip for _, clip in sorted(best, reverse=True)[:GALLERY]]


def _movement(prompts: ClipPrompts, clip: int) -> float:
    frames = prompts.clips.batch([clip])["frames"][0, :ROWS].astype(np.float32)
    return float(np.abs(np.diff(frames, axis=0)).mean())


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return out.getvalue()


def _json(value) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def data_url(svg: bytes) -> str:
    """A picture as part of a page."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
