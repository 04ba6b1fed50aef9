"""Differences clip by clip, and rankings that contradict each other."""

import numpy as np
import pytest

from cwm_jax.evaluation import paired
from cwm_jax.evaluation.frame_scores import Scores


def scores(seed, *, psnr=0.0, lpips=0.0):
    """Scores of 20 clips that differ far more from each other than `psnr` and `lpips` do."""
    level = np.random.default_rng(0).normal(size=(20, 1))
    noise = np.random.default_rng(seed).normal(scale=0.01, size=(20, 6))
    nothing = np.full((20, 6), np.nan)
    return Scores(20 + 5 * level + psnr + noise, 0.5 + noise, nothing, 0.3 + lpips + level + noise)


def difference(a, b, horizons=(2, 6)):
    return paired.difference(paired.by_clip(a, horizons), paired.by_clip(b, horizons))


def test_a_difference_smaller_than_that_between_clips_is_found():
    found = difference(scores(1, psnr=0.1), scores(2))["psnr"]
    for h in ("2", "6"):
        assert 0.08 < found[h]["low"] < found[h]["mean"] < found[h]["high"] < 0.12


def test_means_are_of_the_frames_up_to_the_horizon_and_capped():
    whole = scores(1)
    whole.psnr[3, :2] = np.inf, 20
    assert paired.by_clip(whole, (2,))["psnr"]["2"][3] == 40


def test_a_measure_or_horizon_that_one_side_lacks_is_left_out():
    one, other = scores(1), scores(2)._replace(lpips=None)
    assert "lpips" not in difference(one, other)
    found = paired.difference(paired.by_clip(one, (2, 6)), paired.by_clip(one, (6,)))
    assert set(found["ssim"]) == {"6"}
    with_nothing = {"psnr": {"6": [1.0, None, 3.0]}}
    found = paired.difference(with_nothing, {"psnr": {"6": [0.0, 5.0, None]}})
    assert found["psnr"]["6"]["mean"] == 1


def sentences(found):
    return list(paired.contradictions(found, ["2", "6"], one="a", other="b"))


def test_a_blurred_side_that_psnr_prefers_is_named_with_both_differences():
    blurred, sharp = scores(1, psnr=1, lpips=0.2), scores(2)
    found = sentences(difference(blurred, sharp))
    assert [line[:10] for line in found] == ["frames 1…2", "frames 1…6"]
    for line in found:
        assert "LPIPS ranks b above a, " in line
        assert "PSNR +1." in line
        assert "LPIPS +0." in line
    swapped = sentences(difference(sharp, blurred))
    assert all("LPIPS ranks a above b, " in line and "PSNR -1." in line for line in swapped)


def test_agreement_nan_and_a_missing_lpips_contradict_nothing():
    better, worse = scores(1, psnr=1, lpips=-0.2)._replace(ssim=None), scores(2)
    assert not sentences(difference(better, worse))
    assert not sentences(difference(better._replace(lpips=None), worse))
    found = difference(scores(1, psnr=1, lpips=0.2), scores(2))
    unknown = dict.fromkeys(("mean", "low", "high"))
    assert not sentences(found | {"lpips": dict.fromkeys(("2", "6"), unknown)})
    assert not sentences(found | {"psnr": dict.fromkeys(("2", "6"), unknown), "ssim": {}})


@pytest.mark.parametrize("certain", [True, False])
def test_an_interval_that_contains_zero_is_reported(certain):
    found = {
        "psnr": {"6": dict(mean=1.0, low=0.5, high=1.5)},
        "lpips": {"6": dict(mean=0.1, low=0.05 if certain else -0.05, high=0.2)},
    }
    (line,) = paired.contradictions(found, ["6"], one="a", other="b")
    assert ("contains 0" in line) != certain
