"""The kernel of the displacements' errors, interpreted, against the formula in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax.diffusion import displacement
from cwm_jax.models.config import Reach
from cwm_jax.models.kernels import patch_errors


def frames(*shape):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32) for _ in range(2)]


def formula(last, target, reach):
    """Summed squared errors of frames [F, H, W, C], pixel by pixel."""
    _, H, W, C = last.shape
    p, down, across = reach.patch, reach.down, reach.across
    padded = np.pad(last, [(0, 0), (down, down), (across, across), (0, 0)], mode="edge")
    found = []
    for y in range(2 * down + 1):
        for x in range(2 * across + 1):
            squares = np.square(padded[:, y : y + H, x : x + W] - target)
            found.append(squares.reshape(-1, H // p, p, W // p, p, C).sum((2, 4, 5)))
    return np.stack(found, axis=-1)


@pytest.mark.parametrize(
    ("shape", "reach"),
    [
        ((3, 64, 64, 3), Reach(1, 4, 4)),
        ((1, 32, 32, 3), Reach(8, 4, 4)),
        ((2, 16, 64, 3), Reach(12, 12, 4)),
        ((1, 32, 32, 3), Reach(2, 16, 4)),
        ((1, 32, 32, 3), Reach(0, 0, 4)),
        ((2, 16, 64, 3), Reach(20, 1, 4)),  # farther than the frame's height
        ((1, 16, 16, 1), Reach(3, 2, 2)),
        ((1, 64, 48, 3), Reach(2, 3, 4)),
        ((1, 24, 24, 2), Reach(1, 2, 3)),
    ],
    ids=str,
)
def test_errors_are_those_of_the_formula(shape, reach):
    last, target = frames(*shape)
    assert patch_errors.fits(shape, reach)
    found = patch_errors.errors(last, target, reach, interpret=True)
    wanted = formula(np.asarray(last, np.float64), np.asarray(target, np.float64), reach)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_on_a_gpu_the_kernel_computes_what_fits(monkeypatch):
    kernel = functools.partial(patch_errors.errors, interpret=True)
    calls = []
    counted = lambda *args, **how: calls.append(args) or kernel(*args, **how)
    monkeypatch.setattr(patch_errors, "errors", counted)
    on_gpu = lambda *args, cuda, default: cuda(*args)
    for shape, fits in (((2, 3, 32, 32, 3), True), ((2, 3, 24, 32, 3), False)):
        last, target = frames(*shape)
        reach = Reach(3, 2, 4)
        wanted = displacement.errors(last, target, reach)
        with monkeypatch.context() as patched:
            patched.setattr(jax.lax, "platform_dependent", on_gpu)
            calls.clear()
            found = displacement.errors(last, target, reach)
        assert len(calls) == fits
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "patch", "fits"),
    [
        ((12, 64, 64, 3), 4, True),
        ((12, 64, 64, 3), 8, False),  # 192 numbers of a patch
        ((12, 24, 32, 3), 4, False),  # 48 patches
    ],
)
def test_shapes_that_fit(shape, patch, fits):
    assert patch_errors.fits(shape, Reach(8, 4, patch)) == fits


def test_no_gradient_flows_through_the_errors():
    last, target = frames(1, 32, 32, 3)
    total = lambda last: displacement.errors(last, target, Reach(1, 1, 4)).sum()
    assert not jax.grad(total)(last).any()
