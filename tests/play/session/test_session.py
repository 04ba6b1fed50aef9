"""A session is its frames and actions: it can be rewound, branched, shared and replayed."""

import asyncio
import base64
import json
import zlib

import numpy as np
import pytest

from cwm_jax.coinrun import MEANINGFUL_ACTIONS
from cwm_jax.errors import UserError
from cwm_jax.play.inference.engine import Engine
from cwm_jax.play.inference.scheduler import Scheduler
from cwm_jax.play.session import saving, session, share_code
from cwm_jax.play.session.prompt_sources import ClipSource
from cwm_jax.play.session.session import Session
from cwm_jax.rendering import key_panel
from cwm_jax.rendering.contact_sheet import GAP, GUTTER
from cwm_jax.rendering.video import read_mp4


@pytest.fixture
def new(scheduler, clips):
    """new(seed=…): a session that starts from three frames of a clip."""
    opened = []

    def make(*, seed=5, clip=17, frames=3):
        prompt = clips.load(ClipSource(clip, frames))
        opened.append(Session(scheduler, prompt, clips.known, seed=seed))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def play(one, actions, steps=2):
    async def run():
        return [(await one.step(lambda a=a: a, steps=steps)).frame for a in actions]

    return asyncio.run(run())


def frames_of(one):
    return np.stack(list(one.history.frames(0, len(one.history))))


def replayed(scheduler, clips, code):
    async def run():
        again = Session.from_recipe(scheduler, clips, share_code.decode(code))
        while again.to_replay:
            await again.replay_step()
        return again

    return asyncio.run(run())


ACTIONS = [7, 7, 8, 4, 1, 2, 5, 7, 8, 8, 0, 3, 6, 14, 9, 4, 7, 5, 2]


def test_a_session_begins_with_its_prompt_and_grows_by_its_actions(new, clips):
    one = new()
    generated = play(one, ACTIONS)
    assert len(one.history) == 3 + len(ACTIONS)
    assert np.array_equal(frames_of(one)[:3], clips.load(ClipSource(17, 3)).frames_PHWC)
    assert np.array_equal(frames_of(one)[3:], generated)
    assert one.history.actions[3:] == ACTIONS
    assert one.history.actions[0] == -1
    assert len({frame.tobytes() for frame in generated}) == len(ACTIONS)


@pytest.mark.parametrize("to", [2, 3, 8, 9, 20])
def test_rewound_and_played_alike_it_has_the_same_frames(new, to):
    one = new()
    play(one, ACTIONS)
    before = frames_of(one)
    assert np.array_equal(one.rewind(to), before[to])
    assert np.array_equal(frames_of(one), before)  # rewinding removes no frames
    play(one, ACTIONS[to - 2 :])
    assert np.array_equal(frames_of(one), before)


def test_a_branch_removes_the_later_frames(new):
    one = new()
    play(one, ACTIONS)
    before = frames_of(one)
    one.rewind(9)
    play(one, [1])
    assert len(one.history) == 11
    assert np.array_equal(frames_of(one)[:10], before[:10])
    assert not np.array_equal(one.history.frame(10), before[10])


def test_rewinding_never_cuts_the_prompt(new):
    one = new()
    play(one, [7])
    one.rewind(0)
    assert one.at == 2
    play(one, [7])
    assert len(one.history) == 4


def test_a_missing_frame_is_refused(new):
    with pytest.raises(UserError, match="no frame 3: frames are 0…2"):
        new().rewind(3)


def test_prompts_longer_than_the_window_work(new, scheduler, clips):
    one = new(frames=32)
    play(one, [7, 8])
    assert np.array_equal(
        frames_of(replayed(scheduler, clips, one.recipe().encoded)), frames_of(one)
    )


def test_a_share_code_replays_the_same_frames(new, scheduler, clips):
    one = new(seed=2**32 - 1)
    play(one, ACTIONS[:9])
    play(one, ACTIONS[9:], steps=1)  # the governor may change the steps
    one.rewind(17)
    play(one, [4, 4], steps=2)
    again = replayed(scheduler, clips, one.recipe().encoded)
    assert np.array_equal(frames_of(again), frames_of(one))
    assert again.history.actions == one.history.actions
    assert again.history.programs == one.history.programs
    assert again.recipe().encoded == one.recipe().encoded


def test_frames_of_a_shared_batch_are_replayed_alone(new, scheduler, clips):
    scheduler.generator.compile(2, 2)
    ones = [new(seed=1), new(seed=2, clip=90)]

    async def together():
        for action in ACTIONS:
            await asyncio.gather(*(one.step(lambda a=action: a, steps=2) for one in ones))

    asyncio.run(together())
    lanes = {program.lanes for one in ones for program in one.history.programs[3:]}
    assert 2 in lanes
    for one in ones:
        again = replayed(scheduler, clips, one.recipe().encoded)
        assert np.array_equal(frames_of(again), frames_of(one))


def test_a_choice_as_long_as_the_rewind_before_it_replaces_the_cache(new, scheduler, clips):
    one = new()
    play(one, ACTIONS)
    one.rewind(one.at - 4)
    asyncio.run(one.what_if(4, steps=2))
    one.choose(5)
    play(one, [7])
    again = replayed(scheduler, clips, one.recipe().encoded)
    assert np.array_equal(frames_of(again), frames_of(one))


def test_what_if_shows_each_future_and_a_choice_continues_it(new, scheduler, clips):
    one = new()
    play(one, ACTIONS[:7])
    branches = asyncio.run(one.what_if(4, steps=2))
    assert [branch.action for branch in branches] == list(MEANINGFUL_ACTIONS)
    assert len({branch.frames[-1].tobytes() for branch in branches}) == len(branches)
    assert len(one.history) == 10  # the session is unchanged so far
    one.choose(2)
    assert one.history.actions[10:] == [MEANINGFUL_ACTIONS[2]] * 4
    assert np.array_equal(frames_of(one)[10:], branches[2].frames)
    play(one, [7])
    again = replayed(scheduler, clips, one.recipe().encoded)
    assert np.array_equal(frames_of(again), frames_of(one))
    with pytest.raises(UserError, match="no branch 2"):
        one.choose(2)


def test_a_code_for_something_else_is_refused(new, scheduler, clips):
    one = new()
    play(one, ACTIONS[:3])
    recipe = one.recipe()
    for change, message in (
        (dict(fingerprint=b"8 bytes."), "is for checkpoint"),
        (dict(prompt_checksum=1), "another clip 17"),
        (dict(programs=[(7, 1)] * 3), "needs 7 DDIM steps"),
        (dict(source=ClipSource(10**6, 3)), "no clip 1000000"),
        (dict(actions=[7, 15, 7]), "has action 15; coinrun has 0…14"),
        (dict(actions=[7, -1, 7]), "has action -1"),
    ):
        with pytest.raises(UserError, match=message):
            Session.from_recipe(scheduler, clips, recipe._replace(**change))
    with pytest.raises(UserError, match="frames are not identical"):
        replayed(scheduler, clips, recipe._replace(last_frame=1).encoded)


def test_another_network_has_another_fingerprint(engine, params):
    name = sorted(params)[0]
    other = Engine(engine.network, {**params, name: params[name] + 1e-6}, steps=(1,))
    assert other.fingerprint != engine.fingerprint


def test_a_session_has_an_end(new, monkeypatch):
    monkeypatch.setattr(session, "MAX_FRAMES", 4)
    one = new()
    play(one, [7] * 4)
    with pytest.raises(UserError, match="at most 4 frames"):
        play(one, [7])
    with pytest.raises(UserError, match="at most 4 frames"):
        asyncio.run(one.what_if(1, steps=2))
    one.rewind(4)
    play(one, [7])


def test_the_session_continues_after_a_device_error(new, scheduler, monkeypatch):
    one, twin = new(), new()
    play(one, ACTIONS[:5])
    good = scheduler.generator.generate

    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(scheduler.generator, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        play(one, [1])
    monkeypatch.setattr(scheduler.generator, "generate", good)
    play(one, ACTIONS[5:])
    play(twin, ACTIONS)
    assert np.array_equal(frames_of(one), frames_of(twin))


def test_orders_after_the_stop_fail_at_once(engine, clips):
    with Scheduler(engine) as stopped:
        pass
    one = Session(stopped, clips.load(ClipSource(0, 1)), clips.known)
    with pytest.raises(RuntimeError, match="scheduler has stopped"):
        play(one, [7])


def test_saved_files_hold_the_session(new, tmp_path):
    one = new()
    play(one, ACTIONS[:5])
    saving.write_numbers(one, tmp_path / "a.npz", start=1, stop=8)
    with np.load(tmp_path / "a.npz") as saved:
        assert np.array_equal(saved["frames"], frames_of(one)[1:8])
        assert saved["actions"].tolist() == one.history.actions[1:8]
        assert (saved["seed"], saved["n_prompt"], saved["first_frame"]) == (5, 2, 1)
    saving.write_video(one, tmp_path / "a.mp4", start=1, stop=8, fps=15)
    found = read_mp4(tmp_path / "a.mp4")
    assert len(found) == 7
    assert found.shape[1] > 64 * 6  # the picture enlarged, and the keys below


def test_history_has_a_private_file_and_truncates_it(new):
    one = new()
    play(one, ACTIONS[:4])
    one.history.cut(5)
    assert len(one.history) == len(one.history.programs) == 5
    with pytest.raises(IndexError):
        one.history.frame(5)
    one.history.cut(0)
    assert len(one.history) == one.history.given == 3


def test_codes_are_short_and_any_change_is_detected(new):
    one = new()
    play(one, [7] * 30 + [8] * 10)
    code = one.recipe().encoded
    assert len(code) < 100
    assert share_code.decode(f" {code[:20]}\n{code[20:]} ") == one.recipe()
    for at in range(5, len(code)):
        other = "A" if code[at] != "A" else "B"
        with pytest.raises(UserError, match="damaged"):
            share_code.decode(code[:at] + other + code[at + 1 :])
    for cut in (code[:-1], code[:30], "CWM2-", code + "AAAA", "CWM2-é", "CWM2-" + "A" * 5000):
        with pytest.raises(UserError, match="damaged"):
            share_code.decode(cut)
    for other in ("", "hello", code[1:]):
        with pytest.raises(UserError, match="not a share code"):
            share_code.decode(other)


def sealed(body):
    """A code with a valid checksum of any body, as an attacker would make."""
    packed = zlib.compress(body)
    text = base64.urlsafe_b64encode(share_code._checksum(packed) + packed)
    return "CWM2-" + text.decode().rstrip("=")


def test_a_forged_code_is_refused_and_cannot_exhaust_memory(new):
    one = new()
    play(one, [7, 8])
    body = share_code._body(one.recipe())
    assert share_code.decode(sealed(body)) == one.recipe()
    for forged in (
        b"",
        body[:-1],
        body + b"\0",
        body[:20],
        bytes(50_000_000),
        body[:12] + b"\xff" * 40,
    ):
        with pytest.raises(UserError, match="damaged"):
            share_code.decode(sealed(forged))
    long = one.recipe()._replace(actions=[7] * 20_000, programs=[(2, 1)] * 20_000)
    with pytest.raises(UserError, match="damaged"):
        share_code.decode(long.encoded)
    with pytest.raises(UserError, match="damaged"):
        share_code.decode(one.recipe()._replace(actions=[7, 256]).encoded)
    many = one.recipe()._replace(actions=[7] * 17, programs=[(n, 1) for n in range(1, 18)])
    with pytest.raises(UserError, match="holds at most 16"):
        _ = many.encoded


def test_a_code_holds_every_possible_action(new):
    one = new()
    play(one, [7])
    actions = [-1, *range(256)]
    recipe = one.recipe()._replace(actions=actions, programs=[(2, 1)] * len(actions))
    assert share_code.decode(recipe.encoded) == recipe
    with pytest.raises(UserError, match="earlier version of play"):
        share_code.decode("CWM1-" + recipe.encoded[5:])


def test_a_pad_is_played_shared_and_saved_with_its_own_keys(pad_scheduler, pad_clips, tmp_path):
    one = Session(pad_scheduler, pad_clips.load(ClipSource(0, 2)), pad_clips.known, seed=3)
    generated = play(one, [0, 5, 7, 2], steps=1)
    assert len({frame.tobytes() for frame in generated}) == 4
    again = replayed(pad_scheduler, pad_clips, one.recipe().encoded)
    assert np.array_equal(frames_of(again), frames_of(one))
    saving.write_numbers(one, tmp_path / "a.npz", start=0, stop=6)
    with np.load(tmp_path / "a.npz") as saved:
        assert saved["actions"][2:].tolist() == [0, 5, 7, 2]
        assert json.loads(str(saved["controls"])) == pad_clips.known.to_json()
    saving.write_video(one, tmp_path / "a.mp4", start=0, stop=6, fps=15)
    panel = key_panel.render(pad_clips.known, 5, width=384)
    found = read_mp4(tmp_path / "a.mp4")
    shown = found[3, GAP + 384 + GAP :][: len(panel), GUTTER : GUTTER + 384]
    assert np.abs(shown.astype(int) - panel).mean() < 4  # the video is compressed
    one.close()
    again.close()
