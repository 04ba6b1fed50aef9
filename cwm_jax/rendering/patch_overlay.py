"""A number for each patch of a frame, shown as a red tint over it."""

import numpy as np

TINT = np.float32([255, 40, 20])
_STRONGEST = 0.75  # share of the tint where a number reaches the top of the scale


def tinted(frames_THWC: np.ndarray, values_Thw: np.ndarray, *, most: float) -> np.ndarray:
    """Frames with their patches tinted: not at all at 0, most strongly from `most` on; uint8.

    Args:
        values_Thw: not negative; NaN is shown as 0.
    """
    height, width = frames_THWC.shape[1] // values_Thw.shape[1], frames_THWC.shape[2]
    width //= values_Thw.shape[2]
    share = _STRONGEST * np.clip(np.nan_to_num(values_Thw) / most, 0, 1)
    share = share.repeat(height, axis=1).repeat(width, axis=2)[..., None].astype(np.float32)
    return np.rint(frames_THWC * (1 - share) + TINT * share).astype(np.uint8)


def rows(strips: list[np.ndarray], *, scale: int = 2, gap: int = 4) -> np.ndarray:
    """Strips of frames [T, H, W, C], one below another, as one picture on white."""
    lines = []
    for strip in strips:
        large = strip.repeat(scale, axis=1).repeat(scale, axis=2)
        framed = np.pad(large, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
        lines.append(np.concatenate(list(framed), axis=1))
    return np.concatenate(lines)
