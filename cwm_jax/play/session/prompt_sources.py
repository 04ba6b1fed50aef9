"""Prompts of sessions: the first frames of a real clip, or a user's picture."""

import dataclasses
import io
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from cwm_jax import controls
from cwm_jax.coinrun import IMAGE_SIZE, NO_ACTION
from cwm_jax.data import pictures, splits
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError

USUAL_PROMPT = 4  # frames; a single one does not show the player's speed
MAX_PROMPT = 32
MAX_SIDE = 1024  # pixels of a picture; larger ones are refused before they are decoded
MAX_PICTURE_BYTES = 4 << 20
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")


class ClipSource(NamedTuple):
    """The first `frames` frames of clip `number` of the validation split."""

    number: int
    frames: int


class PictureSource(NamedTuple):
    """A picture, PNG bytes of 64×64 pixels."""

    png: bytes


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Given frames, and their source."""

    frames_PHWC: np.ndarray  # uint8
    actions_P: np.ndarray  # int32, the action that led into each, −1 for none
    source: ClipSource | PictureSource

    @property
    def checksum(self) -> int:
        return zlib.crc32(self.frames_PHWC.tobytes() + self.actions_P.astype("<i4").tobytes())


class ClipPrompts:
    """Prompts from the clips of a dataset's validation split, and the game's controls."""

    def __init__(self, folder: Path | str):
        config = DataConfig(dir=str(folder), clip_len=MAX_PROMPT)
        self.known = controls.read(folder)
        num_actions = self.known.num_values
        self.episodes = splits.open_episodes(config, "val", num_actions=num_actions)
        self.clips = splits.open_clips(config, "val", num_actions=num_actions)

    def __len__(self) -> int:
        return len(self.clips)

    def load(self, source: ClipSource | PictureSource) -> Prompt:
        """Raises `UserError` for a clip or number of frames that does not exist."""
        if isinstance(source, PictureSource):
            return _from_png(source)
        if not 0 <= source.number < len(self):
            raise UserError(f"there is no clip {source.number}: clips are 0…{len(self) - 1}")
        if not 1 <= source.frames <= MAX_PROMPT:
            raise UserError(f"{source.frames} prompt frames: choose 1…{MAX_PROMPT}")
        batch = self.clips.batch([source.number])
        taken = slice(0, source.frames)
        return Prompt(batch["frames"][0, taken], batch["actions"][0, taken], source)


def from_picture(raw: bytes) -> Prompt:
    """A prompt of one frame from an uploaded file: its middle square, scaled down.

    Raises:
        UserError: it is not a picture, or too large.
    """
    if len(raw) > MAX_PICTURE_BYTES:
        raise UserError(
            f"the picture has {len(raw):,} bytes; at most {MAX_PICTURE_BYTES:,} are accepted"
        )
    try:
        picture = Image.open(io.BytesIO(raw), formats=_FORMATS)
        if max(picture.size) > MAX_SIDE:
            raise UserError(
                f"the picture has {picture.width}×{picture.height} pixels; "
                f"at most {MAX_SIDE}×{MAX_SIDE} are accepted, and 64×64 are used"
            )
        picture = pictures.as_shown(picture)
    except Image.DecompressionBombError:  # Pillow's own limit, reached before the size is known
        raise UserError(
            f"the picture is far too large: at most {MAX_SIDE}×{MAX_SIDE} pixels are accepted, and "
            f"64×64 are used"
        ) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError):
        raise UserError("that file is not a readable picture: send a PNG or JPEG") from None
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
        box = left, top, left + side, top + side
        picture = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX, box=box)
    png = io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    return _from_png(PictureSource(png.getvalue()))


def _from_png(source: PictureSource) -> Prompt:
    try:
        picture = Image.open(io.BytesIO(source.png), formats=("PNG",))
        if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
            raise UserError(f"the picture is {picture.size}, not {(IMAGE_SIZE, IMAGE_SIZE)}")
        frame = np.array(pictures.as_shown(picture))
    except Image.DecompressionBombError:
        raise UserError(
            f"the picture in it is far too large, not {(IMAGE_SIZE, IMAGE_SIZE)}"
        ) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise UserError("the picture in it cannot be read") from None
    return Prompt(frame[None], np.array([NO_ACTION], np.int32), source)
