"""Picture quality against scikit-image."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cwm_jax import metrics


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
