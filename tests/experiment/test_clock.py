"""The minutes of a run and its learning rate, over several starts."""

import pytest

from cwm_jax.experiment.clock import Clock


class Hand:
    """Advances a clock."""

    seconds = 100.0

    def __call__(self):
        return self.seconds


def test_the_rate_is_constant_then_falls_to_zero_with_the_last_minute():
    hand = Hand()
    clock = Clock(10, 0.4, now=hand)
    rates = []
    for minute in (0, 3, 6, 7, 8, 10, 12):
        hand.seconds = 100 + 60 * minute
        rates.append(clock.rate)
    assert rates == pytest.approx([1, 1, 1, 0.75, 0.5, 0, 0])
    assert clock.is_over


def test_time_between_starts_does_not_count():
    hand = Hand()
    clock = Clock(10, 0.5, now=hand)
    hand.seconds += 120
    saved = clock.seconds
    hand.seconds += 10_000
    clock = Clock(10, 0.5, now=hand)
    clock.resume(saved)
    hand.seconds += 60
    assert clock.seconds == 180
    assert clock.share == pytest.approx(0.3)
    assert not clock.is_over


def test_without_minutes_it_only_counts():
    hand = Hand()
    clock = Clock(0, 0.5, now=hand)
    hand.seconds += 1e9
    assert (clock.share, clock.rate, clock.is_over) == (0, 1, False)


def test_without_decay_the_rate_stays():
    hand = Hand()
    clock = Clock(1, 0, now=hand)
    hand.seconds += 59
    assert clock.rate == 1
