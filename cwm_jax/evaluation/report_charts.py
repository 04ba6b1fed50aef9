"""Results as charts, each for a light and for a dark page."""

import io
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure


class Theme(NamedTuple):
    """Colours on a page."""

    ink: str
    faint: str
    grid: str
    paper: str
    model: str
    second: str
    floor: str
    ceiling: str


LIGHT = Theme(
    "#2b303b", "#6b7280", "#e4e7ec", "#ffffff", "#2f6fb0", "#7fa9d4", "#c2573a", "#3a9a76"
)
DARK = Theme("#e3e6ec", "#9aa3b2", "#333945", "#1b1e25", "#6aa9e9", "#41709f", "#e0836a", "#63c29c")
_DPI = 130
RANKS = ("where", "beyond", "when", "which")  # the rank correlations of `uncertainty.summary`


def both(draw: Callable[[Mapping, Theme], Figure], results: Mapping) -> tuple[bytes, bytes]:
    """A chart as PNG for the light page and for the dark one; their paper is transparent."""
    return _png(draw(results, LIGHT)), _png(draw(results, DARK))


def quality(results: Mapping, theme: Theme) -> Figure:
    """PSNR, SSIM, PSNR of motion and LPIPS by frame, with the floors."""
    first, *others = results["rollout"].items()
    labels = {
        "psnr": "PSNR (dB)",
        "ssim": "SSIM",
        "psnr_motion": "PSNR of what moved (dB)",
        "lpips": "LPIPS (lower is better)",
    }
    labels = {name: label for name, label in labels.items() if name in first[1]["model"]}
    figure, axes = _figure(theme, len(labels), width=11, height=3.4)
    for ax, (measure, label) in zip(axes, labels.items(), strict=True):
        ax.set_title(label, color=theme.ink, fontsize=10, loc="left")
        ax.set_xlabel("frame after the prompt", color=theme.faint, fontsize=9)
        for name, colour, text in (
            ("reconstruction", theme.ceiling, "reconstruction"),
            ("blur", theme.faint, "blurred real frames"),
            ("copy_last", theme.floor, "copy last frame"),
            ("model", theme.model, f"model, {given(first[0])}"),
        ):
            _band(ax, first[1][name][measure]["by_frame"], colour, text)
        for prompt, sides in others:
            text = f"model, {given(prompt)}"
            _band(ax, sides["model"][measure]["by_frame"], theme.second, text, style="--")
    # Under all of them, where no line is hidden by it.
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], names[::-1], loc="outside lower center", ncols=len(names), **_legend(theme)
    )
    return figure


def control(results: Mapping, theme: Theme) -> Figure:
    """ΔPSNR by frame."""
    figure, (ax,) = _figure(theme, 1, width=5.4, height=3.1)
    ax.axhline(0, color=theme.floor, linewidth=1)
    series = results["control"]
    _band(ax, series["delta_psnr_motion"]["by_frame"], theme.second, "what moved", style="--")
    _band(ax, series["delta_psnr"]["by_frame"], theme.model, "whole frame")
    ax.set_title("ΔPSNR (dB): true minus random actions", color=theme.ink, fontsize=10, loc="left")
    ax.set_xlabel("frame after the prompt", color=theme.faint, fontsize=9)
    ax.legend(**_legend(theme))
    return figure


def confusion(results: Mapping, theme: Theme) -> Figure:
    """Which action was read where which was pressed: on drawn frames, and on real ones."""
    figure, axes = _figure(theme, 2, width=8.6, height=4.3)
    names = results["probe"]["groups"]
    shades = LinearSegmentedColormap.from_list("", [theme.paper, theme.model])
    for ax, (key, title) in zip(axes, (("drawn", "drawn"), ("real", "real")), strict=True):
        counts = np.array(results["probe"][key]["confusion"], float)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        ax.imshow(shares, cmap=shades, vmin=0, vmax=1)
        ax.set_title(f"read from {title} frames", color=theme.ink, fontsize=10, loc="left")
        ax.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(names)), names if key == "drawn" else [""] * len(names))
        ax.tick_params(length=0)
        ax.grid(False)
        ax.spines[:].set_visible(False)
        for (row, column), share in np.ndenumerate(shares):
            known = counts[row].sum() > 0
            text = f"{share:.0%}" if known else "–"
            colour = theme.paper if share > 0.55 else theme.ink if share >= 0.005 else theme.faint
            ax.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    axes[0].set_ylabel("pressed", color=theme.faint, fontsize=9)
    return figure


def drift(results: Mapping, theme: Theme) -> Figure:
    """Patch distance, sharpness, contrast, colour and LPIPS to real frames over a long rollout."""
    by_window = dict(results["drift"]["by_window"])
    titles = {
        "patch_distance": "patch distance",
        "sharpness": "sharpness (real = 1)",
        "contrast": "contrast (real = 1)",
        "colour_shift": "shift of mean colour",
    }
    if nearest := results["drift"].get("nearest_real"):
        by_window["nearest_real"] = nearest["by_window"]
        titles["nearest_real"] = "LPIPS to the nearest"
    figure, axes = _figure(theme, len(titles), width=11, height=2.9)
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        found = by_window[name]
        _band(ax, found, theme.model, "model", x=found["frame"])
        ax.axhline(found["real"], color=theme.ceiling, linewidth=1)
        for limit in filter(None, found["limits"]):
            ax.axhline(limit, color=theme.floor, linewidth=1)
        ax.set_ylim(bottom=0)
        ax.set_title(title, color=theme.ink, fontsize=10, loc="left")
        ax.set_xlabel("first frame of 16", color=theme.faint, fontsize=9)
    return figure


def uncertainty(results: Mapping, theme: Theme) -> Figure:
    """Signs of uncertainty and the error by time and by patch, and how they rank the errors."""
    found = results["uncertainty"]
    colours = {
        "spread": theme.model,
        "instability": theme.ceiling,
        "change": theme.faint,
        "error": theme.floor,
    }
    figure, (time, ranks, *maps) = _figure(theme, 4, width=11, height=3.2)
    time.set_title("by time (of 255)", color=theme.ink, fontsize=10, loc="left")
    time.set_xlabel("frame after the prompt", color=theme.faint, fontsize=9)
    ranks.set_title("rank correlation with the error", color=theme.ink, fontsize=10, loc="left")
    ranks.axvline(0, color=theme.faint, linewidth=1)
    names = [name for name in colours if name in found]
    for i, name in enumerate(names):
        _band(time, found[name]["by_frame"], colours[name], name)
        for j, kind in enumerate(RANKS):
            if kind in found[name]:
                mean, low, high = (found[name][kind][x] for x in ("mean", "low", "high"))
                place = -j - 0.22 * (i - 1)
                ranks.plot([low, high], [place] * 2, color=colours[name], linewidth=1.6)
                ranks.plot([mean], [place], "o", color=colours[name], markersize=4)
    ranks.set_yticks([-j for j in range(len(RANKS))], RANKS)
    shades = LinearSegmentedColormap.from_list("", [theme.paper, theme.floor])
    for ax, name in zip(maps, ("spread", "error"), strict=True):
        ax.imshow(np.array(found[name]["by_patch"], float), cmap=shades, vmin=0)
        ax.set_title(f"{name} by patch", color=theme.ink, fontsize=10, loc="left")
        ax.axis("off")
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), **_legend(theme))
    return figure


def given(prompt: str) -> str:
    count = prompt.removeprefix("prompt_")
    return f"{count} frame{'' if count == '1' else 's'} given"


def _figure(theme: Theme, panels: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.set_facecolor("none")
        ax.grid(color=theme.grid, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.xaxis.get_major_locator().set_params(integer=True)  # frames
        ax.tick_params(colors=theme.ink, labelsize=8, color=theme.faint)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(theme.faint)
    return figure, axes


def _legend(theme: Theme) -> dict:
    return dict(frameon=False, labelcolor=theme.ink, fontsize=8)


def _band(ax: Axes, series: Mapping, colour: str, label: str, *, x=None, style: str = "-") -> None:
    """A line in its interval; a single point is drawn as one."""
    mean, low, high = (np.array(series[name], float) for name in ("mean", "low", "high"))
    x = np.arange(1, len(mean) + 1) if x is None else x
    marker = "o" if len(mean) == 1 else None
    ax.plot(x, mean, style, color=colour, linewidth=1.8, marker=marker, label=label)
    ax.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()
