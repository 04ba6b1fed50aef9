"""PSNR and SSIM on the device against scikit-image, and PSNR of masked pixels by hand."""

import jax
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cwm_jax.evaluation import image_metrics


def pictures(kind):
    """Two pictures [H, W, 3] in [0, 1] that resemble each other."""
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.normal(size=(61, 67, 3)), axis=1)
    a = (smooth - smooth.min()) / np.ptp(smooth)
    b = {
        "near": a + rng.normal(scale=1e-3, size=a.shape),
        "noisy": a + rng.normal(scale=0.2, size=a.shape),
        "other": rng.random(a.shape),
        "dark": np.zeros_like(a),
        "flat": np.full_like(a, 0.5),
    }[kind].clip(0, 1)
    return a.astype(np.float32), b.astype(np.float32)


@pytest.mark.parametrize("kind", ["near", "noisy", "other", "dark", "flat"])
def test_psnr_and_ssim_are_those_of_scikit_image(kind):
    a, b = pictures(kind)
    wanted = peak_signal_noise_ratio(a.astype(np.float64), b.astype(np.float64), data_range=1)
    assert image_metrics.psnr(a, b) == pytest.approx(wanted, abs=1e-4)
    wanted = structural_similarity(
        a.astype(np.float64), b.astype(np.float64), channel_axis=-1, data_range=1
    )
    assert image_metrics.ssim(a, b) == pytest.approx(wanted, abs=1e-5)


def test_each_picture_of_a_stack_is_measured_by_itself():
    kinds = "near", "noisy", "other"
    a, b = (np.stack(x) for x in zip(*map(pictures, kinds), strict=True))
    for metric in (image_metrics.mse, image_metrics.psnr, image_metrics.ssim):
        stacked = jax.jit(metric)(a[None], b[None])
        assert stacked.shape == (1, 3)
        single = [metric(*pictures(kind)) for kind in kinds]
        np.testing.assert_allclose(stacked[0], single, rtol=1e-5)


def test_equal_pictures_have_infinite_psnr_and_an_ssim_of_one():
    a, _ = pictures("near")
    assert image_metrics.psnr(a, a) == np.inf
    assert image_metrics.ssim(a, a) == pytest.approx(1, abs=1e-6)


def test_a_masked_error_counts_only_the_pixels_of_the_mask():
    a, b = pictures("noisy")
    mask = np.random.default_rng(1).random(a.shape[:2]) < 0.1
    wanted = np.square(a[mask].astype(np.float64) - b[mask]).mean()
    assert image_metrics.masked_mse(a, b, mask) == pytest.approx(wanted, rel=1e-5)
    assert image_metrics.masked_mse(a, b, np.ones_like(mask)) == pytest.approx(
        float(image_metrics.mse(a, b)), rel=1e-5
    )
    assert np.isnan(image_metrics.masked_mse(a, b, np.zeros_like(mask)))
