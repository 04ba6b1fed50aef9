"""Plots of the available series, smoothed without bias, without global state."""

import numpy as np
import pytest
from PIL import Image

from cwm_jax.errors import UserError
from cwm_jax.rendering import plots


def series(count, value=lambda step: 1 / step):
    steps = np.arange(1, count + 1, dtype=float)
    return steps, value(steps)


def plotted(tmp_path, **named):
    path = tmp_path / "curves.png"
    plots.curves({name.replace("_", "/"): xy for name, xy in named.items()}, path)
    return np.array(Image.open(path).convert("RGB")).astype(int)


def test_each_series_has_its_colour(tmp_path):
    def has(picture, colour):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return (np.abs(picture - wanted).max(-1) <= 3).any()

    blue, orange = plots._COLOURS[:2]
    alone = plotted(tmp_path, train_loss=series(997))
    both = plotted(tmp_path, train_loss=series(997), val_loss=series(7))
    assert has(alone, blue)
    assert not has(alone, orange)
    assert has(both, orange)


def test_psnr_gets_axes_of_its_own_and_other_metrics_none(tmp_path):
    without = plotted(tmp_path, train_loss=series(13))
    other = plotted(tmp_path, train_loss=series(13), train_lr=series(13))
    with_psnr = plotted(tmp_path, train_loss=series(13), rollout_psnr=series(3))
    assert np.array_equal(without, other)
    assert with_psnr.shape[0] > without.shape[0]


def test_values_that_are_not_finite_and_single_points_are_accepted(tmp_path):
    holes = series(211)
    holes[1][[0, 100, 210]] = np.nan, np.inf, -np.inf
    plotted(tmp_path, train_loss=holes, val_loss=series(1), rollout_psnr=(np.ones(1), [np.nan]))


def test_smoothing_keeps_constants_and_straight_lines_but_reduces_noise():
    line = np.linspace(3, 1, 601)
    assert np.allclose(plots.smoothed(np.full(601, 2.5)), 2.5)
    assert np.allclose(plots.smoothed(line)[:590], line[:590])
    noise = np.random.default_rng(0).normal(size=601)
    assert plots.smoothed(noise)[20:].std() < 0.4
    assert len(plots.smoothed(np.ones(1))) == 1


def test_nothing_to_plot_is_an_error(tmp_path):
    for nothing in ({}, {"train/lr": series(5)}, {"train/loss": (np.zeros(0), np.zeros(0))}):
        with pytest.raises(UserError, match="no loss to plot"):
            plots.curves(nothing, tmp_path / "curves.png")
