"""The device is shared fairly, and the governor holds the rate."""

import threading
import time

import numpy as np
import pytest

from cwm_jax.play.inference.engine import Engine
from cwm_jax.play.inference.governor import FLOOR, FrameRate, Governor
from cwm_jax.play.inference.scheduler import Scheduler
from cwm_jax.play.web.app_state import Rules, Studio


class Counting:
    """Draws nothing, slowly; notes which players' frames it drew together."""

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

    def remember(self, memory, frame, action):
        return memory + 1

    def draw(self, wanted, steps, lanes):
        time.sleep(self._seconds)
        self.batches.append(([lane.seed for lane in wanted], steps, lanes))
        return np.zeros((len(wanted), 64, 64, 3), np.uint8)


def order(scheduler, player, number=0, steps=1, lanes=None, action=lambda: 7):
    return scheduler.draw(0, action, seed=player, number=number, steps=steps, lanes=lanes)


def test_those_who_wait_together_are_drawn_together_and_nobody_starves():
    drawer = Counting()
    with Scheduler(drawer) as scheduler:
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
    assert max(len(players) for players, *_ in drawer.batches) == 4
    assert all(len(players) <= lanes for players, _, lanes in drawer.batches)


def test_different_steps_and_recorded_lanes_are_not_mixed():
    drawer = Counting(seconds=0.05)
    with Scheduler(drawer) as scheduler:
        first = order(scheduler, 0)
        time.sleep(0.02)  # the others wait meanwhile
        rest = [order(scheduler, 1), order(scheduler, 2, steps=4), order(scheduler, 3)]
        rest += [order(scheduler, 4, lanes=4), order(scheduler, 5)]
        for future in (first, *rest):
            future.result(timeout=5)
    assert drawer.batches == [([0], 1, 1), ([1, 3, 5], 1, 4), ([2], 4, 1), ([4], 1, 4)]


def test_until_larger_batches_are_compiled_smaller_ones_serve():
    drawer = Counting(ready=(1,))
    with Scheduler(drawer) as scheduler:
        futures = [order(scheduler, player) for player in range(3)]
        assert {future.result(timeout=5).program.lanes for future in futures} == {1}
        scheduler.want_lanes(3)
        scheduler.want_lanes(3)
        time.sleep(0.1)
    assert sorted(drawer.compiled) == [(1, 1), (1, 4), (4, 1), (4, 4)]


def test_the_latest_key_counts():
    drawer = Counting(seconds=0.05)
    pressed = [1]
    with Scheduler(drawer) as scheduler:
        first = order(scheduler, 0)
        time.sleep(0.02)
        second = order(scheduler, 1, action=lambda: pressed[0])
        pressed[0] = 8  # after the order, before the drawing
        assert second.result(timeout=5).action == 8
        first.result(timeout=5)


def test_one_who_has_left_is_not_drawn():
    drawer = Counting(seconds=0.05)
    with Scheduler(drawer) as scheduler:
        first = order(scheduler, 0)
        time.sleep(0.02)
        gone = order(scheduler, 1)
        gone.cancel()
        last = order(scheduler, 2)
        first.result(timeout=5)
        last.result(timeout=5)
    assert [players for players, *_ in drawer.batches][-1] in ([2], [1, 2])


def test_a_fault_reaches_those_it_hit_and_the_device_goes_on():
    drawer = Counting()
    drawer.draw, good = None, drawer.draw  # calling it raises TypeError
    with Scheduler(drawer) as scheduler:
        with pytest.raises(TypeError):
            order(scheduler, 0).result(timeout=5)
        drawer.draw = good
        assert order(scheduler, 1).result(timeout=5).memory == 1


def test_a_program_that_cannot_be_compiled_is_told():
    drawer = Counting()

    def fails(steps, lanes):
        raise MemoryError("no room")

    drawer.compile = fails
    with Scheduler(drawer) as scheduler:
        assert scheduler.first_program.wait(timeout=5)
        assert isinstance(scheduler.fault, MemoryError)
        studio = Studio(Rules())
        studio.open(scheduler, None, title="", demo=False)
        assert not studio.is_open


def test_players_who_came_before_the_device_are_drawn_together():
    drawer, studio = Counting(ready=(1,)), Studio(Rules())
    for _ in range(3):
        assert studio.enter(None)
    with Scheduler(drawer) as scheduler:
        studio.open(scheduler, None, title="", demo=False)
        time.sleep(0.1)
    assert sorted(drawer.compiled) == [(1, 1), (1, 4), (4, 1), (4, 4)]


def test_a_later_program_that_cannot_be_compiled_ends_nothing():
    drawer = Counting(ready=(1,))
    with Scheduler(drawer) as scheduler:
        assert scheduler.first_program.wait(timeout=5)
        compiled = threading.Event()

        def fails(steps, lanes):
            compiled.set()
            raise MemoryError("no room")

        drawer.compile = fails
        scheduler.want_lanes(8)
        assert compiled.wait(timeout=5)
        assert order(scheduler, 1).result(timeout=5)
        assert scheduler.fault is None


def test_more_steps_than_the_model_does_best_with_are_never_chosen_unasked():
    drawer = Counting(seconds=0)  # there would be time for all four
    drawer.automatic = (1,)
    with Scheduler(drawer) as scheduler:
        order(scheduler, 0, steps=4).result(timeout=5)  # a player who asks has them
        assert drawer.batches[0][1] == 4
        assert scheduler.choose_steps(fps=1) == 1


def test_which_steps_an_engine_draws_with_unasked(engine, params):
    found = lambda usual: Engine(engine.network, params, steps=(10, 4, 2, 1), usual=usual).automatic
    assert [found(n) for n in (1, 3, 4, 100)] == [(1,), (2, 1), (4, 2, 1), (10, 4, 2, 1)]
    assert Engine(engine.network, params, steps=(4, 2), usual=1).automatic == (2,)


def governed(pass_seconds, fps, seconds=20.0):
    """The steps in use after a while on a device that needs so long for a pass."""
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
    ("pass_ms", "expected"), [(0.1, 10), (3.5, 10), (7.5, 4), (12, 2), (19, 1), (90, 1)]
)
def test_the_governor_takes_the_most_steps_that_hold_the_rate(pass_ms, expected):
    governor, changes = governed(pass_ms / 1000, fps=15)
    assert governor.steps == expected
    assert len(changes) <= 2  # it does not waver


def test_the_governor_follows_the_load():
    governor, _ = governed(0.0035, fps=15)
    assert governor.steps == 10
    for _ in range(30):
        governor.note(steps=10, seconds=0.3)
    governor._clock = lambda: 100.0
    assert governor.choose(15, (10, 4, 2, 1)) < 10


def test_the_governor_waits_for_no_program():
    governor, _ = governed(0.019, fps=15)
    for _ in range(30):
        governor.note(steps=1, seconds=0.001)
    governor._clock = lambda: 100.0
    assert governor.choose(15, (4, 1)) == 4  # though 10 would do
    for _ in range(30):
        governor.note(steps=4, seconds=1.0)
    governor._clock = lambda: 200.0
    assert governor.choose(15, (10, 2)) == 2
    governor._clock = lambda: 300.0
    assert governor.choose(15, ()) == 2


CHOICES = (10, 4, 2, 1)


class Machine:
    """A device that needs so many seconds for a pass, played on through `play.Player`'s calls."""

    def __init__(self, pass_seconds, *, playable=None, fps=15, choices=CHOICES):
        self.now, self.pass_seconds, self.choices = 0.0, pass_seconds, choices
        self.governor = Governor(choices, lambda: self.now, playable=playable)
        self.rate = FrameRate(fps, lowers=playable is not None)

    def play(self, *, fps=15, pinned=0, frames=300):
        """The pairs (steps, frames a second) that were in use, each once a stretch."""
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
    ("pass_ms", "playable", "steps", "fps"),
    [
        (5, (1, 2, 4), 4, 15),  # 10 would hold the rate too, but is not on the card
        (12, (1, 2, 4), 2, 15),
        (19, (1, 2, 4), 1, 15),
        (19, (2, 4), 2, 11),  # 1 would hold the rate
        (40, (2, 4), 2, 5),
        (48, (2, 4), 1, 6),  # 2 steps hold 4.7 frames a second, which is below the floor
        (98, (2, 4), 1, 3),  # nothing holds the floor: as many frames as there can be
        (400, (2, 4), 1, 1),
        (40, (10,), 2, 5),  # of what is not on the card, the most that hold the floor
        (14, (10,), 10, 5),
        (200, (1,), 1, 1),
    ],
)
def test_the_rate_is_lowered_to_the_floor_before_the_card_is_left(pass_ms, playable, steps, fps):
    machine = Machine(pass_ms / 1000, playable=playable)
    used = machine.play()
    assert used[-1] == (steps, fps)
    outside = [n for n, _ in used if n not in playable]
    assert bool(outside) == (steps not in playable)
    if fps >= FLOOR:
        assert fps * pass_ms / 1000 * (steps + 2) <= 0.9


@pytest.mark.parametrize("pass_ms", [0.1, 7.5, 19, 90, 400])
def test_without_a_card_the_rate_stays_as_it_was_asked_for(pass_ms):
    machine = Machine(pass_ms / 1000)
    used = machine.play()
    assert {fps for _, fps in used} == {15}
    _, before = governed(pass_ms / 1000, fps=15)
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


def test_the_rate_does_not_waver_on_a_machine_that_does():
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


def test_a_rate_that_is_asked_for_is_the_most_there_is():
    machine = Machine(0.03, playable=(2,))
    assert machine.play()[-1] == (2, 7)
    assert machine.play(fps=3)[-1] == (2, 3)
    assert machine.play(fps=3)[0] == (2, 3)
    assert not machine.rate.lowered
    assert machine.play(fps=15)[-1] == (2, 7)
    assert machine.rate.lowered
    assert machine.play(fps=20)[0] == (2, 7)  # not 20 for a moment
    assert machine.play(fps=15, pinned=10, frames=60)[-1] == (10, 2)  # a player may choose any


def test_where_only_steps_off_the_card_are_compiled_these_are_used():
    machine = Machine(0.019, playable=(2, 4))
    machine.choices = (1,)
    assert machine.play()[-1][0] == 1


def test_which_steps_an_engine_draws_with_by_a_card(engine, params):
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
    drawer = Unsure()
    with Scheduler(drawer) as scheduler:
        assert order(scheduler, 1).result(timeout=5).unsure is None
        assert not drawer.asked
        assert not drawer.can
        wanted = lambda: scheduler.draw(0, lambda: 7, seed=3, number=0, steps=1, unsure=True)
        deadline = time.monotonic() + 5
        while (found := wanted().result(timeout=5).unsure) is None:
            assert time.monotonic() < deadline
        assert (found == 3).all()
        assert {seed for seed, _ in drawer.asked} == {3}
        assert drawer.can == {1}
