"""LPIPS against its authors' package."""

import json

import jax
import numpy as np
import pytest
from lpips_case import REFERENCE, pictures, weights

from cwm_jax.errors import UserError
from cwm_jax.evaluation import lpips


@pytest.fixture(scope="module")
def net() -> lpips.Lpips:
    return lpips.from_arrays(weights(), "random")


def test_distances_are_those_of_the_authors_package(net):
    (wanted,) = json.loads(REFERENCE.read_text()).values()
    np.testing.assert_allclose(lpips.distances(net, *pictures()), wanted, rtol=0, atol=1e-6)


def test_identical_pictures_have_no_distance_at_all(net):
    a, b = pictures()
    found = lpips.distances(net, a, np.where(np.arange(12).reshape(-1, 1, 1, 1) % 2, a, b))
    assert (found[1::2] == 0).all()
    assert (found[::2] > 0).all()


def test_uint8_pictures_of_any_number_are_measured_each_by_itself(net):
    rng = np.random.default_rng(0)
    a, b = rng.integers(256, size=(2, 5, 15, 64, 64, 3)).astype(np.uint8)  # 75: two calls
    found = lpips.distances(net, a, b)
    assert found.shape == (5, 15)
    some = lpips.distances(net, a[4, 12:], b[4, 12:])
    np.testing.assert_allclose(found[4, 12:], some, rtol=1e-5)
    as_floats = lpips.distances(net, a[0, :1] / np.float32(127.5) - 1, b[0, :1] / 127.5 - 1)
    np.testing.assert_allclose(found[0, :1], as_floats, rtol=1e-5)
    assert lpips.distances(net, a[:0], b[:0]).shape == (0, 15)


def test_pictures_that_cannot_be_measured_are_refused(net):
    a, b = pictures()
    with pytest.raises(UserError, match=r"30×64 pixels.*31×31"):
        lpips.distances(net, a[:, :30], b[:, :30])
    assert np.isfinite(lpips.distances(net, a[:1, :31, :31], b[:1, :31, :31])).all()
    with pytest.raises(UserError, match="one size"):
        lpips.distances(net, a, b[:, :40])
    b[3, 5, 6, 1] = np.nan
    with pytest.raises(UserError, match=r"\(3,\) is not finite"):
        lpips.distances(net, a, b)


def test_nan_is_never_a_distance_of_zero(net):
    a, b = pictures()
    a[:, 0, 0] = b[:, 0, 0] = np.nan
    assert np.isnan(jax.device_get(lpips._distance(net.params, a, b))).all()
