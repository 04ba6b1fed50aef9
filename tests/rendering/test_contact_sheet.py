"""Every frame is sharp and in its place, and prompts are marked."""

import numpy as np
import pytest

from cwm_jax.errors import UserError
from cwm_jax.rendering import arrow_keys, contact_sheet


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def clips(samples=2, length=5, side=17):
    real = noise(samples, length, side, side, 3, seed=1)
    generated = noise(samples, length, side, side, 3, seed=2)
    actions = np.arange(samples * length).reshape(samples, length) % 15
    return real, generated, actions


def corners(picture, piece):
    """Where `picture` contains the exact `piece`: list of (y, x)."""
    height, width = piece.shape[:2]
    ys, xs = np.nonzero((picture[:, :, :] == piece[0, 0]).all(-1))
    return [
        (y, x)
        for y, x in zip(ys, xs, strict=True)
        if np.array_equal(picture[y : y + height, x : x + width], piece)
    ]


@pytest.mark.parametrize("samples", [1, 3, 11])
@pytest.mark.parametrize("with_real", [True, False])
def test_every_frame_and_panel_is_found_enlarged_exactly(samples, with_real):
    real, generated, actions = clips(samples)
    pages = list(
        contact_sheet.side_by_side(real if with_real else None, generated, actions, scale=3)
    )
    assert len(pages) == 5
    for t, page in enumerate(pages):
        assert page.dtype == np.uint8
        assert page.shape == pages[0].shape
        assert page.shape[0] % 2 == page.shape[1] % 2 == 0
        for sample in range(samples):
            ((y, x),) = corners(page, contact_sheet.enlarged(generated[sample, t], 3))
            panel = arrow_keys.keyboard_panel(int(actions[sample, t]), width=64)
            below = y + 3 * 17 + contact_sheet.GAP
            assert np.array_equal(page[below : below + len(panel), x : x + 64], panel)
            if with_real:
                ((real_y, real_x),) = corners(page, contact_sheet.enlarged(real[sample, t], 3))
                assert (real_y, real_x) == (y - 3 * 17 - contact_sheet.GAP, x)


def test_enlarging_repeats_pixels():
    frame = noise(5, 7, 3)
    large = contact_sheet.enlarged(frame, 3)
    assert large.shape == (15, 21, 3)
    for dy in range(3):
        for dx in range(3):
            assert np.array_equal(large[dy::3, dx::3], frame)


def test_given_frames_and_only_they_have_a_border():
    real, generated, actions = clips(samples=2)
    pages = contact_sheet.side_by_side(real, generated, actions, n_prompt=2, scale=2)
    for t, page in enumerate(pages):
        for frames, bordered in ((generated, t < 2), (real, False)):
            ((y, x),) = corners(page, contact_sheet.enlarged(frames[0, t], 2))
            around = page[y - 1, x : x + 34]
            assert (around == arrow_keys.ACCENT).all() == bordered


def test_images_are_rendered_only_on_demand(monkeypatch):
    calls = []
    render = contact_sheet.Sheet.render
    monkeypatch.setattr(
        contact_sheet.Sheet, "render", lambda *args, **kw: calls.append(1) or render(*args, **kw)
    )
    pages = contact_sheet.side_by_side(*clips())
    assert not calls
    next(pages)
    assert len(calls) == 1


@pytest.mark.parametrize("samples", [1, 8, 9, 61, 300, 701])
def test_any_number_of_samples_fits_the_decoders_limit(samples):
    layout = contact_sheet.Sheet.fitting(samples, (64, 64), with_real=True)
    assert max(layout.shape) <= contact_sheet.MAX_SIDE
    places = {layout._corner(sample) for sample in range(samples)}
    assert len(places) == samples
    if samples <= 8:
        assert len({y for y, _ in places}) == 1
        assert layout.scale == 3


def test_mistakes_are_named():
    real, generated, actions = clips()
    cases = [
        ("uint8", (real, generated.astype(np.float32), actions)),
        ("real frames are", (real[:, :3], generated, actions)),
        ("actions are", (real, generated, actions[:, 1:])),
        ("uint8", (real[0], generated[0], actions[0])),
        ("uint8", (None, generated[:, :0], actions[:, :0])),
    ]
    for message, arguments in cases:
        with pytest.raises(UserError, match=message):
            contact_sheet.side_by_side(*arguments)
    with pytest.raises(UserError, match="enlarged by 0"):
        contact_sheet.side_by_side(real, generated, actions, scale=0)
    with pytest.raises(UserError, match="fewer samples"):
        contact_sheet.Sheet.fitting(100_003, (64, 64), with_real=True)


def test_grid_shows_first_and_last_and_evenly_between():
    real, generated, _ = clips(samples=2, length=31)
    picture = contact_sheet.grid(real, generated, n_prompt=1, scale=1, max_columns=4)
    shown = [t for t in range(31) if corners(picture, generated[1, t])]
    assert shown == [0, 10, 20, 30]
    for sample in range(2):
        lefts = []
        for t in shown:
            ((y, x),) = corners(picture, generated[sample, t])
            ((real_y, real_x),) = corners(picture, real[sample, t])
            assert (real_y, real_x) == (y - 17 - contact_sheet.GAP, x)
            assert (picture[y - 1, x : x + 17] == arrow_keys.ACCENT).all() == (t == 0)
            lefts.append(x)
        assert lefts == sorted(lefts)


def test_grid_of_few_frames_shows_each_once():
    _, generated, _ = clips(samples=3, length=3)
    picture = contact_sheet.grid(None, generated, scale=2)
    for sample in range(3):
        for t in range(3):
            assert len(corners(picture, contact_sheet.enlarged(generated[sample, t], 2))) == 1
