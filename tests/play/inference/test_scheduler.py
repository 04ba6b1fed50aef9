"""The device is shared fairly, and the governor reaches the rate."""

import threading
import time

import numpy as np
import pytest

from cwm_jax.play.inference.engine import Engine
from cwm_jax.play.inference.governor import FLOOR, FrameRate, Governor
from cwm_jax.play.inference.scheduler import Scheduler
from cwm_jax.play.web.app_state import Rules, Studio


class Counting:
    """Generates blank frames slowly; records the players of each batch."""

    steps = automatic = (4, 1)
    slots, fingerprint, playable = 7, b"counting", None

    def __init__(self, ready=(1, 2, 4), seconds=0.002):
        self.batches, self._ready, self._seconds = [], ready, seconds
        self.compiled = []

    def ready(self, steps):
        return self._ready

    def compile(self, steps, lanes):
        self.compiled.append((steps, lanes))

    def fresh(self):
        return 0

    def append(self, cache, frame, action):
        return cache + 1

    def generate(self, wanted, steps, lanes):
        time.sleep(self._seconds)
        self.batches.append(([lane.seed for lane in wanted], steps, lanes))
        return np.zeros((len(wanted), 64, 64, 3), np.uint8)


def order(scheduler, player, number=0, steps=1, lanes=None, action=lambda: 7):
    return scheduler.generate(0, action, seed=player, number=number, steps=steps, lanes=lanes)


def test_waiting_players_share_a_batch_and_all_are_served():
    generator = Counting()
    with Scheduler(generator) as scheduler:
        counts = dict.fromkeys(range(8), 0)
        stop = time.monotonic() + 0.6

        def play(player):
            while time.monotonic() < stop:
                order(scheduler, player).result(timeout=5)
                counts[player] += 1

        threads = [threading.Thread(target=play, args=(player,)) for player in counts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(counts.values()) <= 1.5 * min(counts.values())
    assert max(len(players) for players, *_ in generator.batches) == 4
    assert all(len(players) <= lanes for players, _, lanes in generator.batches)


def test_different_steps_and_recorded_lanes_are_not_mixed():
    generator = Counting(seconds=0.05)
    with Scheduler(generator) as scheduler:
        first = order(scheduler, 0)
        time.sleep(0.02)  # the others wait meanwhile
        rest = [order(scheduler, 1), order(scheduler, 2, steps=4), order(scheduler, 3)]
        rest += [order(scheduler, 4, lanes=4), order(scheduler, 5)]
        for future in (first, *rest):
            future.result(timeout=5)
    assert generator.batches == [([0], 1, 1), ([1, 3, 5], 1, 4), ([2], 4, 1), ([4], 1, 4)]


def test_smaller_batches_are_used_until_larger_ones_are_compiled():
    generator = Counting(ready=(1,))
    with Scheduler(generator) as scheduler:
        futures = [order(scheduler, player) for player in range(3)]
        assert {future.result(timeout=5).program.lanes for future in futures} == {1}
        scheduler.want_lanes(3)
        scheduler.want_lanes(3)
        time.sleep(0.1)
    assert sorted(generator.compiled) == [(1, 1), (1, 4), (4, 1), (4, 4)]


def test_the_latest_key_counts():
    generator = Counting(seconds=0.05)
    pressed = [1]
    with Scheduler(generator) as scheduler:
        first = order(scheduler, 0)
        time.sleep(0.02)
        second = order(scheduler, 1, action=lambda: pressed[0])
        pressed[0] = 8  # after the order, before the generation
        assert second.result(timeout=5).action == 8
        first.result(timeout=5)


def test_orders_of_players_who_left_are_dropped():
    generator = Counting(seconds=0.05)
    with Scheduler(generator) as scheduler:
        first = order(scheduler, 0)
        time.sleep(0.02)
        gone = order(scheduler, 1)
        gone.cancel()
        last = order(scheduler, 2)
        first.result(timeout=5)
        last.result(timeout=5)
    assert [players for players, *_ in generator.batches][-1] in ([2], [1, 2])


def test_an_error_reaches_its_batch_and_the_scheduler_continues():
    generator = Counting()
    generator.generate, good = None, generator.generate  # calling it raises TypeError
    with Scheduler(generator) as scheduler:
        with pytest.raises(TypeError):
            order(scheduler, 0).result(timeout=5)
        generator.generate = good
        assert order(scheduler, 1).result(timeout=5).cache == 1


def test_a_failed_compilation_is_reported():
    generator = Counting()

    def fails(steps, lanes):
        raise MemoryError("no room")

    generator.compile = fails
    with Scheduler(generator) as scheduler:
        assert scheduler.first_program.wait(timeout=5)
        assert isinstance(scheduler.fault, MemoryError)
        studio = Studio(Rules())
        studio.open(scheduler, None, title="", demo=False)
        assert not studio.is_open


def test_players_from_before_the_device_was_ready_share_a_batch():
    generator, studio = Counting(ready=(1,)), Studio(Rules())
    for _ in range(3):
        assert studio.enter(None)
    with Scheduler(generator) as scheduler:
        studio.open(scheduler, None, title="", demo=False)
        time.sleep(0.1)
    assert sorted(generator.compiled) == [(1, 1), (1, 4), (4, 1), (4, 4)]


def test_a_later_failed_compilation_ends_nothing():
    generator = Counting(ready=(1,))
    with Scheduler(generator) as scheduler:
        assert scheduler.first_program.wait(timeout=5)
        compiled = threading.Event()

        def fails(steps, lanes):
            compiled.set()
            raise MemoryError("no room")

        generator.compile = fails
        scheduler.want_lanes(8)
        assert compiled.wait(timeout=5)
        assert order(scheduler, 1).result(timeout=5)
        assert scheduler.fault is None


def test_more_steps_than_the_usual_ones_are_never_chosen_automatically():
    generator = Counting(seconds=0)  # fast enough for all four
    generator.automatic = (1,)
    with Scheduler(generator) as scheduler:
        order(scheduler, 0, steps=4).result(timeout=5)  # a player may choose them
        assert generator.batches[0][1] == 4
        assert scheduler.choose_steps(fps=1) == 1


def test_the_automatic_steps_of_an_engine(engine, params):
    found = lambda usual: Engine(engine.network, params, steps=(10, 4, 2, 1), usual=usual).automatic
    assert [found(n) for n in (1, 3, 4, 100)] == [(1,), (2, 1), (4, 2, 1), (10, 4, 2, 1)]
    assert Engine(engine.network, params, steps=(4, 2), usual=1).automatic == (2,)


def governed(pass_seconds, fps, seconds=20.0):
    """The steps after a while on a device that needs so long for a denoising step."""
    now = [0.0]
    governor = Governor((10, 4, 2, 1), clock=lambda: now[0])
    changes = [governor.steps]
    while now[0] < seconds:
        steps = governor.choose(fps, (10, 4, 2, 1))
        took = pass_seconds * (steps + 2)
        now[0] += max(took, 1 / fps)
        governor.note(steps=steps, seconds=took)
        if steps != changes[-1]:
            changes.append(steps)
    return governor, changes


@pytest.mark.parametrize(
    ("step_ms", "expected"), [(0.1, 10), (3.5, 10), (7.5, 4), (12, 2), (19, 1), (90, 1)]
)
def test_the_governor_chooses_the_most_steps_that_reach_the_rate(step_ms, expected):
    governor, changes = governed(step_ms / 1000, fps=15)
    assert governor.steps == expected
    assert len(changes) <= 2  # it is stable


def test_the_governor_follows_the_load():
    governor, _ = governed(0.0035, fps=15)
    assert governor.steps == 10
    for _ in range(30):
        governor.note(steps=10, seconds=0.3)
    governor._clock = lambda: 100.0
    assert governor.choose(15, (10, 4, 2, 1)) < 10


def test_a_slow_start_does_not_leave_fewer_steps_than_the_device_reaches():
    now, used = [0.0], []
    governor = Governor((2, 1), clock=lambda: now[0])
    for step_seconds in [0.040] * 30 + [0.014] * 100:
        now[0] += 1 / 15
        used.append(governor.choose(15, (2, 1)))
        governor.note(steps=used[-1], seconds=step_seconds * (used[-1] + 2))
    assert used[30] == 1
    assert used[-1] == 2  # 56 of 67 ms


def test_the_governor_chooses_only_compiled_programs():
    governor, _ = governed(0.019, fps=15)
    for _ in range(30):
        governor.note(steps=1, seconds=0.001)
    governor._clock = lambda: 100.0
    assert governor.choose(15, (4, 1)) == 4  # though 10 would be fast enough
    for _ in range(30):
        governor.note(steps=4, seconds=1.0)
    governor._clock = lambda: 200.0
    assert governor.choose(15, (10, 2)) == 2
    governor._clock = lambda: 300.0
    assert governor.choose(15, ()) == 2


CHOICES = (10, 4, 2, 1)


class Machine:
    """A device that needs so many seconds for a denoising step, called as by `play.Player`."""

    def __init__(self, pass_seconds, *, playable=None, fps=15, choices=CHOICES):
        self.now, self.pass_seconds, self.choices = 0.0, pass_seconds, choices
        self.governor = Governor(choices, lambda: self.now, playable=playable)
        self.rate = FrameRate(fps, lowers=playable is not None)

    def play(self, *, fps=15, pinned=0, frames=300):
        """The pairs (steps, frames a second) that were used, without consecutive repeats."""
        used = []
        for _ in range(frames):
            steps = pinned or self.governor.choose(fps, self.choices)
            pair = steps, self.rate.choose(fps, steps)
            took = self.pass_seconds * (steps + 2)
            self.now += max(took, 1 / pair[1])
            self.governor.note(steps=steps, seconds=took)
            self.rate.note(took)
            if not used or used[-1] != pair:
                used.append(pair)
        return used


@pytest.mark.parametrize(
    ("step_ms", "playable", "steps", "fps"),
    [
        (5, (1, 2, 4), 4, 15),  # 10 would reach the rate too, but is not on the card
        (12, (1, 2, 4), 2, 15),
        (19, (1, 2, 4), 1, 15),
        (19, (2, 4), 2, 11),  # 1 would reach the rate
        (40, (2, 4), 2, 5),
        (48, (2, 4), 1, 6),  # 2 steps reach 4.7 frames a second, which is below the floor
        (98, (2, 4), 1, 3),  # nothing reaches the floor: the highest rate
        (400, (2, 4), 1, 1),
        (40, (10,), 2, 5),  # of those not on the card, the most that reach the floor
        (14, (10,), 10, 5),
        (200, (1,), 1, 1),
    ],
)
def test_the_rate_is_lowered_to_the_floor_before_the_card_is_left(step_ms, playable, steps, fps):
    machine = Machine(step_ms / 1000, playable=playable)
    used = machine.play()
    assert used[-1] == (steps, fps)
    outside = [n for n, _ in used if n not in playable]
    assert bool(outside) == (steps not in playable)
    if fps >= FLOOR:
        assert fps * step_ms / 1000 * (steps + 2) <= 0.9


@pytest.mark.parametrize("step_ms", [0.1, 7.5, 19, 90, 400])
def test_without_a_card_the_requested_rate_stays(step_ms):
    machine = Machine(step_ms / 1000)
    used = machine.play()
    assert {fps for _, fps in used} == {15}
    _, before = governed(step_ms / 1000, fps=15)
    assert [steps for steps, _ in used] == before


def test_a_rate_that_was_lowered_rises_with_the_machine_and_the_steps_after_it():
    machine = Machine(0.098, playable=(2, 4))
    assert machine.play()[-1] == (1, 3)
    machine.pass_seconds = 0.03
    assert machine.play()[-1][0] == 2
    machine.pass_seconds = 0.003
    used = machine.play()
    assert used[-1] == (4, 15)
    assert all(steps in (2, 4) for steps, _ in used)


def test_the_rate_is_stable_on_an_unstable_machine():
    machine = Machine(0.03, playable=(2, 4))
    machine.play()
    rng = np.random.default_rng(0)
    used = set()
    for share in rng.uniform(0.9, 1.1, 400):
        machine.pass_seconds = 0.03 * share
        used |= set(machine.play(frames=1))
    assert len(used) <= 2


def test_a_few_slow_frames_neither_lower_the_rate_nor_leave_the_card():
    """Such as those of what-if, which generates several futures at once, and of a rewind."""
    machine = Machine(0.012, playable=(2, 4))
    machine.play()
    for _ in range(8):
        machine.governor.note(steps=2, seconds=0.4)
    for _ in range(2):
        machine.rate.note(1.0)
    assert machine.play() == [(2, 15)]


def test_the_requested_rate_is_the_upper_limit():
    machine = Machine(0.03, playable=(2,))
    assert machine.play()[-1] == (2, 7)
    assert machine.play(fps=3)[-1] == (2, 3)
    assert machine.play(fps=3)[0] == (2, 3)
    assert not machine.rate.lowered
    assert machine.play(fps=15)[-1] == (2, 7)
    assert machine.rate.lowered
    assert machine.play(fps=20)[0] == (2, 7)  # never 20
    assert machine.play(fps=15, pinned=10, frames=60)[-1] == (10, 2)  # a player may choose any


def test_where_only_steps_off_the_card_are_compiled_these_are_used():
    machine = Machine(0.019, playable=(2, 4))
    machine.choices = (1,)
    assert machine.play()[-1][0] == 1


def test_the_automatic_steps_of_an_engine_with_a_card(engine, params):
    def found(playable, usual=1000, steps=CHOICES):
        one = Engine(engine.network, params, steps=steps, usual=usual, playable=playable)
        return one.steps, one.automatic

    assert found((1, 2, 4)) == (CHOICES, (4, 2, 1))
    assert found((1, 2, 4), usual=2) == (CHOICES, (2, 1))
    assert found((2, 4)) == (CHOICES, (4, 2, 1))  # 1 for a machine that is far too slow
    assert found((4, 10), usual=2) == (CHOICES, (4, 2, 1))
    assert found((3, 30), usual=4) == ((*CHOICES, 3), (2, 1, 3))


class Unsure(Counting):
    """Is unsure of what it has compiled; notes what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked, self.can = [], set()

    def compile_unsure(self, steps):
        self.can.add(steps)

    def unsure(self, wanted, steps):
        self.asked.append((wanted.seed, steps))
        return np.full((8, 8), wanted.seed) if steps in self.can else None


def test_an_overlay_is_made_for_those_alone_who_ask_and_costs_the_others_nothing():
    generator = Unsure()
    with Scheduler(generator) as scheduler:
        assert order(scheduler, 1).result(timeout=5).unsure is None
        assert not generator.asked
        assert not generator.can
        wanted = lambda: scheduler.generate(0, lambda: 7, seed=3, number=0, steps=1, unsure=True)
        deadline = time.monotonic() + 5
        while (found := wanted().result(timeout=5).unsure) is None:
            assert time.monotonic() < deadline
        assert (found == 3).all()
        assert {seed for seed, _ in generator.asked} == {3}
        assert generator.can == {1}
