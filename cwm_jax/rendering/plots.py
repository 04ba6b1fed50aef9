"""Plots a run's metrics."""

import os
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from cwm_jax.errors import UserError
from cwm_jax.files import written_whole

Series = Mapping[str, tuple[np.ndarray, np.ndarray]]  # name → steps, values; both float [n]

_INK, _FAINT = "#2b303b", "#8a91a0"
_COLOURS = ("#2f6fb0", "#d98a00", "#3a9a76", "#b0476c")
_MANY = 80  # longer series are smoothed; points of shorter ones are marked


def curves(series: Series, out_png: str | os.PathLike) -> None:
    """Plots a run's losses over its steps and, where there are any, PSNR below.

    A name ending in `loss` is a loss, one in `psnr` a PSNR in dB; others are not plotted. Long
    series are shown raw (faint) and smoothed; short ones, such as validation, point by point.

    Args:
        series: for each name, steps and values; values that are not finite are left out.
        out_png: where to write.

    Raises:
        UserError: there is no loss to plot, or `out_png` cannot be written.
    """
    losses = {name: xy for name, xy in series.items() if name.endswith("loss") and len(xy[0])}
    psnrs = {name: xy for name, xy in series.items() if name.endswith("psnr") and len(xy[0])}
    if not losses:
        raise UserError(f"no loss to plot among {sorted(series) or 'no numbers at all'}")
    figure = Figure(figsize=(8, 7 if psnrs else 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if psnrs else 1, sharex=True, squeeze=False)[:, 0]
    _plot(axes[0], losses, "loss")
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    if psnrs:
        _plot(axes[1], psnrs, "PSNR (dB)")
    axes[-1].set_xlabel("step", color=_INK)
    with written_whole(out_png) as temporary:
        figure.savefig(temporary, format="png")


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean of each value and its neighbours, up to a sixtieth of the series on either side.

    Near the start the window shrinks evenly on both sides, or the steep first fall of a loss
    would appear too high; near the end it covers past values only, for a stable last value.
    """
    count, reach = len(values), len(values) // 60
    place = np.arange(count)
    behind = np.minimum(place, reach)
    ahead = np.minimum(behind, count - 1 - place)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[place + ahead + 1] - total[place - behind]) / (ahead + behind + 1)


def _plot(axes: Axes, series: Series, label: str) -> None:
    for (name, (steps, values)), colour in zip(sorted(series.items()), _COLOURS * 8, strict=False):
        steps, values = np.asarray(steps, float), np.asarray(values, float)
        steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
        if len(values) > _MANY:
            axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
            axes.plot(steps, smoothed(values), color=colour, linewidth=1.8, label=name)
        else:
            axes.plot(
                steps, values, color=colour, linewidth=1.4, marker="o", markersize=4, label=name
            )
    axes.set_ylabel(label, color=_INK)
    axes.grid(which="major", color="#e4e7ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
