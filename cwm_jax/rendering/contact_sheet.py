"""Real and generated frames side by side: images of a video with keys, and contact sheets."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np
from einops import repeat
from PIL import Image, ImageDraw

from cwm_jax import controls
from cwm_jax.controls import Controls
from cwm_jax.errors import UserError
from cwm_jax.rendering import key_panel
from cwm_jax.rendering.arrow_keys import ACCENT, BACKDROP, BRIGHT, DIM, LINE, font

GAP = 6  # pixels around every picture, also for the border that marks a prompt frame
BORDER = 2
GUTTER = 22  # the strip at the left that holds the words "real" and "generated"
FOOTER = 28
MAX_SIDE = 4096  # pixels; the usual limit of hardware decoders of H.264
FEW = 8  # up to so many samples are in one row
_TEXT = 12
_COINRUN = controls.procgen("coinrun")


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Layout of a video image of several samples.

    Each sample is a column: the real frame (where there is one) over the generated frame over
    the keys. More than a few samples wrap into a grid of rows.

    Fields:
        samples: how many samples, at least 1.
        frame_shape: height and width of a game frame, in pixels.
        with_real: whether real frames are shown.
        scale: whole number by which frames are enlarged.
        columns: samples in one row of the grid.
        known: the game's controls, whose keys are shown.
    """

    samples: int
    frame_shape: tuple[int, int]
    with_real: bool
    scale: int
    columns: int
    known: Controls = _COINRUN

    @classmethod
    def fitting(
        cls,
        samples: int,
        frame_shape: tuple[int, int],
        *,
        with_real: bool,
        scale: int = 3,
        known: Controls = _COINRUN,
    ) -> "Sheet":
        """The sheet for so many samples, at `scale` or the largest smaller scale within `MAX_SIDE`.

        Raises:
            UserError: they do not fit even unscaled.
        """
        if scale < 1:
            raise UserError(f"frames cannot be enlarged by {scale}; use 1 or more")
        for smaller in range(scale, 0, -1):
            tile_height, tile_width = cls(1, frame_shape, with_real, smaller, 1, known)._tile
            wide = round(math.sqrt(samples * 16 / 9 * tile_height / tile_width))
            widest = (MAX_SIDE - GUTTER) // tile_width
            columns = min(samples if samples <= FEW else wide, samples, widest)
            sheet = cls(samples, frame_shape, with_real, smaller, max(columns, 1), known)
            if max(sheet.shape[:2]) <= MAX_SIDE:
                return sheet
        raise UserError(
            f"{samples} samples do not fit in one video of {MAX_SIDE}×{MAX_SIDE} pixels; "
            "write fewer samples to a file"
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """[height, width, 3] of a video image; both sides are even, as yuv420p needs."""
        tile_height, tile_width = self._tile
        height = GAP + math.ceil(self.samples / self.columns) * tile_height + FOOTER
        width = GUTTER + self.columns * tile_width
        return height + height % 2, width + width % 2, 3

    def render(
        self,
        generated_BHWC: np.ndarray,
        actions_B: np.ndarray,
        *,
        real_BHWC: np.ndarray | None = None,
        given: bool = False,
        caption: str = "",
    ) -> np.ndarray:
        """One video image.

        Args:
            generated_BHWC: uint8 frames, one a sample.
            actions_B: the action that led into each frame; -1 for none.
            real_BHWC: uint8 frames as they really were, where the sheet is `with_real`.
            given: the frames are from the prompt, not generated: they get a border.
            caption: shown at the bottom.

        Returns:
            uint8 [*shape].
        """
        page = self._background.copy()
        frame_height, frame_width = (side * self.scale for side in self.frame_shape)
        for sample in range(self.samples):
            y, x = self._corner(sample)
            if self.with_real:
                _paste(page, enlarged(real_BHWC[sample], self.scale), y, x)
                y += frame_height + GAP
            if given:
                _border(page, y, x, frame_height, frame_width)
            _paste(page, enlarged(generated_BHWC[sample], self.scale), y, x)
            action = int(actions_B[sample])
            panel = key_panel.render(self.known, action, width=max(frame_width, 64))
            _paste(page, panel, y + frame_height + GAP, x)
        _paste(page, _footer(page.shape[1], caption, given), page.shape[0] - FOOTER, 0)
        return page

    @property
    def _tile(self) -> tuple[int, int]:
        """Height and width of one sample, with the gaps after it."""
        height, width = (side * self.scale for side in self.frame_shape)
        panel = key_panel.height(self.known, max(width, 64))
        return (height + GAP) * (1 + self.with_real) + panel + GAP, max(width, 64) + GAP

    def _corner(self, sample: int) -> tuple[int, int]:
        row, column = divmod(sample, self.columns)
        tile_height, tile_width = self._tile
        return GAP + row * tile_height, GUTTER + column * tile_width

    @functools.cached_property
    def _background(self) -> np.ndarray:
        """The constant part of every image: the words at the left and the thin lines."""
        page = Image.new("RGB", self.shape[1::-1], BACKDROP)
        frame_height = self.frame_shape[0] * self.scale
        tile_height = self._tile[0]
        canvas = ImageDraw.Draw(page)
        words = ("real", "generated") if self.with_real else ("generated",)
        for row in range(math.ceil(self.samples / self.columns)):
            top = GAP + row * tile_height
            for word in words:
                _write_upright(page, word, top, frame_height)
                top += frame_height + GAP
            bottom = GAP + (row + 1) * tile_height - GAP // 2 - 1
            canvas.line((GUTTER, bottom, page.width - GAP - 1, bottom), fill=LINE)
        return np.array(page)


def side_by_side(
    real: np.ndarray | None,
    generated: np.ndarray,
    actions: np.ndarray,
    *,
    n_prompt: int = 0,
    scale: int = 3,
) -> Iterator[np.ndarray]:
    """Video images, rendered one at a time on demand.

    Args:
        real: uint8 [B, T, H, W, 3], or None to show generated frames alone.
        generated: uint8 [B, T, H, W, 3]; its first `n_prompt` frames were given.
        actions: int [B, T], the action that led into each frame; -1 for none.
        n_prompt: how many frames were given rather than generated; they get a border.
        scale: whole number by which frames are enlarged, if the samples fit.

    Returns:
        An iterator of T uint8 images [H', W', 3] with even sides, for `write_mp4`.

    Raises:
        UserError: shapes or dtypes disagree, or there are too many samples for one video.
    """
    _checked(real, generated)
    samples, length = generated.shape[:2]
    if actions.shape != (samples, length):
        raise UserError(f"actions are {actions.shape}; they must be {(samples, length)}")
    sheet = Sheet.fitting(samples, generated.shape[2:4], with_real=real is not None, scale=scale)
    return (
        sheet.render(
            generated[:, t],
            actions[:, t],
            real_BHWC=None if real is None else real[:, t],
            given=t < n_prompt,
            caption=f"{t + 1} / {length}",
        )
        for t in range(length)
    )


def grid(
    real: np.ndarray | None,
    generated: np.ndarray,
    *,
    n_prompt: int = 0,
    scale: int = 2,
    max_columns: int = 12,
) -> np.ndarray:
    """A contact sheet: for each sample a row of real frames over a row of generated ones.

    Args:
        real, generated, n_prompt: as for `side_by_side`.
        scale: whole number by which frames are enlarged.
        max_columns: of more frames, so many are shown, evenly spaced from the first to the last.

    Returns:
        uint8 image [H', W', 3]; the numbers above the columns count frames from 1.

    Raises:
        UserError: shapes or dtypes disagree.
    """
    kinds = _checked(real, generated)
    samples, length, height, width, _ = generated.shape
    rows = [(word, frames[sample]) for sample in range(samples) for word, frames in kinds]
    times = np.linspace(0, length - 1, min(length, max_columns)).round().astype(int)
    height, width = height * scale, width * scale
    lefts = [GUTTER + column * (width + GAP) for column in range(len(times))]
    tops = [GUTTER + i * (height + GAP) + i // len(kinds) * GAP for i in range(len(rows))]

    sheet = Image.new("RGB", (lefts[-1] + width + GAP, tops[-1] + height + GAP), BACKDROP)
    for x, t in zip(lefts, times, strict=True):
        place = (x + width / 2, GUTTER / 2)
        ImageDraw.Draw(sheet).text(place, str(t + 1), DIM, font(_TEXT), anchor="mm")
    for y, (word, _) in zip(tops, rows, strict=True):
        _write_upright(sheet, word, y, height)
    pixels = np.array(sheet)
    for y, (word, frames) in zip(tops, rows, strict=True):
        for x, t in zip(lefts, times, strict=True):
            if t < n_prompt and word == "generated":
                _border(pixels, y, x, height, width)
            _paste(pixels, enlarged(frames[t], scale), y, x)
    return pixels


def enlarged(frame: np.ndarray, scale: int) -> np.ndarray:
    """Enlarges [H, W, 3] by repeating pixels: pixel art stays sharp."""
    return repeat(frame, "h w c -> (h down) (w across) c", down=scale, across=scale)


def _checked(real, generated) -> list[tuple[str, np.ndarray]]:
    """The rows of pictures by name, after checking that their shapes match."""
    kinds = (
        [("generated", generated)] if real is None else [("real", real), ("generated", generated)]
    )
    for name, frames in kinds:
        if (
            frames.ndim != 5
            or frames.shape[-1] != 3
            or 0 in frames.shape
            or frames.dtype != np.uint8
        ):
            raise UserError(
                f"{name} frames are {frames.dtype} {frames.shape}; "
                "they must be uint8 [samples, time, height, width, 3]"
            )
    if real is not None and real.shape != generated.shape:
        raise UserError(f"real frames are {real.shape} and generated ones {generated.shape}")
    return kinds


def _paste(canvas: np.ndarray, picture: np.ndarray, y: int, x: int) -> None:
    height, width = picture.shape[:2]
    canvas[y : y + height, x : x + width] = picture


def _border(canvas: np.ndarray, y: int, x: int, height: int, width: int) -> None:
    """Paints a border around the place of a picture of this size."""
    canvas[y - BORDER : y + height + BORDER, x - BORDER : x + width + BORDER] = ACCENT


def _write_upright(canvas: Image.Image, word: str, top: int, height: int) -> None:
    """Writes a vertical word in the gutter, centred beside a picture."""
    strip = Image.new("RGB", (height, GUTTER - BORDER), BACKDROP)
    place = (height / 2, strip.height / 2)
    ImageDraw.Draw(strip).text(place, word, DIM, font(_TEXT), anchor="mm")
    canvas.paste(strip.transpose(Image.Transpose.ROTATE_90), (0, top))


def _footer(width: int, caption: str, given: bool) -> np.ndarray:
    footer = Image.new("RGB", (width, FOOTER), BACKDROP)
    canvas = ImageDraw.Draw(footer)
    canvas.text((GUTTER, FOOTER / 2), caption, BRIGHT, font(_TEXT), anchor="lm")
    if given:
        after = GUTTER + font(_TEXT).getlength(caption + "  ")
        canvas.text((after, FOOTER / 2), "given", ACCENT, font(_TEXT), anchor="lm")
    return np.array(footer)
