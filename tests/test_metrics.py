<<<<<<< HEAD
"""PSNR and SSIM on the device against scikit-image, and PSNR of masked pixels by hand."""

import jax
=======
"""Picture quality against scikit-image."""

>>>>>>> main
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cwm_jax import metrics


<<<<<<< HEAD
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
    assert metrics.psnr(a, b) == pytest.approx(wanted, abs=1e-4)
    wanted = structural_similarity(
        a.astype(np.float64), b.astype(np.float64), channel_axis=-1, data_range=1
    )
    assert metrics.ssim(a, b) == pytest.approx(wanted, abs=1e-5)


def test_each_picture_of_a_stack_is_measured_by_itself():
    kinds = "near", "noisy", "other"
    a, b = (np.stack(x) for x in zip(*map(pictures, kinds), strict=True))
    for metric in (metrics.mse, metrics.psnr, metrics.ssim):
        stacked = jax.jit(metric)(a[None], b[None])
        assert stacked.shape == (1, 3)
        single = [metric(*pictures(kind)) for kind in kinds]
        np.testing.assert_allclose(stacked[0], single, rtol=1e-5)


def test_equal_pictures_have_infinite_psnr_and_an_ssim_of_one():
    a, _ = pictures("near")
    assert metrics.psnr(a, a) == np.inf
    assert metrics.ssim(a, a) == pytest.approx(1, abs=1e-6)


def test_a_masked_error_counts_only_the_pixels_of_the_mask():
    a, b = pictures("noisy")
    mask = np.random.default_rng(1).random(a.shape[:2]) < 0.1
    wanted = np.square(a[mask].astype(np.float64) - b[mask]).mean()
    assert metrics.masked_mse(a, b, mask) == pytest.approx(wanted, rel=1e-5)
    assert metrics.masked_mse(a, b, np.ones_like(mask)) == pytest.approx(
        float(metrics.mse(a, b)), rel=1e-5
    )
    assert np.isnan(metrics.masked_mse(a, b, np.zeros_like(mask)))
=======
@pytest.mark.parametrize("noise", [1, 20, 200])
def test_equal_to_scikit_image(noise):
    rng = np.random.default_rng(noise)
    real = rng.integers(0, 256, (2, 3, 23, 31, 3)).astype(np.float64) / 255
    real[0] = np.linspace(0, 1, 31)[:, None]  # a smooth one too, where variances are small
    other = (real + rng.normal(0, noise / 255, real.shape)).clip(0, 1)
    psnr, ssim = metrics.psnr(real, other), metrics.ssim(real, other)
    for place in np.ndindex(2, 3):
        a, b = real[place], other[place]
        assert psnr[place] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-4)
        expected = structural_similarity(a, b, data_range=1, channel_axis=-1)
        assert ssim[place] == pytest.approx(expected, abs=1e-5)


def test_a_picture_equals_itself():
    picture = np.random.default_rng(0).random((1, 16, 16, 3)).astype(np.float32)
    assert np.isposinf(metrics.psnr(picture, picture)).all()
    np.testing.assert_allclose(metrics.ssim(picture, picture), 1, atol=1e-6)
>>>>>>> main
