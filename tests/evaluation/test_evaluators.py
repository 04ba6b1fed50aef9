"""The evaluators on cases whose answers are known."""

import re

import jax
import numpy as np
import pytest
from lpips_case import weights

from cwm_jax.coinrun import NO_ACTION
from cwm_jax.data import splits
from cwm_jax.data.config import DataConfig
from cwm_jax.data.records import BadRecord, encode
from cwm_jax.data.shards import write_shard
from cwm_jax.errors import UserError
from cwm_jax.evaluation import (
    bootstrap,
    comparison,
    controllability,
    drift,
    full,
    generation,
    held_out,
    html_report,
    lpips,
    paired,
    probe,
    probe_accuracy,
    probe_features,
    protocol,
    quick,
    rollout_quality,
)
from cwm_jax.evaluation.frame_scores import score
from cwm_jax.evaluation.held_out import HeldOut
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.fingerprint import fingerprint
from cwm_jax.sampling.sampler import Sampler, SamplerConfig

CLIPS, LENGTH = 5, 24
EMBEDDED = DataConfig(num_workers=0, dir="assets/coinrun")
TINY = DiTConfig(
    hidden_size=8,
    depth=1,
    num_heads=2,
    patch_size=8,
    image_size=64,
    num_actions=15,
    max_frames=7,
    dtype="float32",
)


@pytest.fixture(scope="module")
def clips() -> HeldOut:
    return held_out.load(EMBEDDED, "test", frames=LENGTH, clips=CLIPS)


@pytest.fixture(scope="module")
def net() -> lpips.Lpips:
    return lpips.from_arrays(weights(), "random")


def replaying(clips: HeldOut) -> generation.Generate:
    """An oracle: returns the real frames for any actions."""

    def generate(prompt_BPHWC, actions_BT, key):
        given, length = prompt_BPHWC.shape[1], actions_BT.shape[1]
        rows = [np.argmax((clips.frames[:, 0] == p).all((1, 2, 3))) for p in prompt_BPHWC[:, 0]]
        return clips.frames[rows, given:length]

    return generate


def obeying(prompt_BPHWC, actions_BT, key):
    """A fake game: the picture moves to the right or left with the actions; no noise."""
    frame, frames = prompt_BPHWC[:, -1], []
    for action_B in actions_BT[:, prompt_BPHWC.shape[1] :].T:
        steps = np.select([action_B < 3, (action_B > 5) & (action_B < 9)], [-2, 2], 0)
        frame = np.stack([np.roll(f, s, axis=1) for f, s in zip(frame, steps, strict=True)])
        frames.append(frame)
    return np.stack(frames, axis=1)


def guessing(prompt_BPHWC, actions_BT, key):
    """A model that ignores actions: the prompt under its own noise."""
    frames = np.repeat(prompt_BPHWC[:, -1:], actions_BT.shape[1] - prompt_BPHWC.shape[1], axis=1)
    noise = 20 * np.asarray(jax.random.normal(key, frames.shape))
    return (frames + noise).clip(0, 255).astype(np.uint8)


# Quality


def test_identical_rollouts_have_infinite_psnr_and_an_ssim_of_one(clips):
    scores = score(clips.frames[:, 1:], clips.frames[:, 1:], clips.frames[:, 0])
    assert np.isinf(scores.psnr).all()
    np.testing.assert_allclose(scores.ssim, 1, atol=3e-5)  # 1e-6 as users compile it
    found = rollout_quality.summary(scores, (1, LENGTH - 1))
    assert found["identical"] == {"1": 1.0, str(LENGTH - 1): 1.0}
    assert found["psnr"]["mean"]["1"] == dict.fromkeys(
        ("mean", "low", "high"), rollout_quality.PSNR_CAP
    )


def test_copying_the_last_frame_of_a_still_clip_is_perfect_and_nothing_moves(clips):
    still = np.repeat(clips.frames[:, :1], LENGTH, axis=1)
    copied = rollout_quality.copy_last(still[:, :3], LENGTH - 3)
    scores = score(copied, still[:, 3:], still[:, 2])
    assert np.isinf(scores.psnr).all()
    assert np.isnan(scores.psnr_motion).all()
    assert np.isnan(rollout_quality.summary(scores, (4,))["psnr_motion"]["at"]["4"]["mean"])


def test_motion_counts_only_the_pixels_that_changed_since_the_prompt():
    given = np.full((1, 64, 64, 3), 100, np.uint8)
    real = np.repeat(given[:, None], 2, axis=1)
    real[:, 1, :8, :8] = 151  # 51 / 255 = 0.2 from the given colour
    generated = np.repeat(given[:, None], 2, axis=1)
    generated[:, :, 40:] += 100  # wrong where nothing moves
    (motion,) = score(generated, real, given).psnr_motion
    assert np.isnan(motion[0])
    assert motion[1] == pytest.approx(-20 * np.log10(0.2), abs=1e-4)


def test_scores_do_not_depend_on_the_number_of_clips_scored_at_once(clips):
    many = np.concatenate([clips.frames] * 5)  # 25: two calls, the second not full
    noisy = np.asarray(guessing(many[:, :1], np.zeros((len(many), 4), int), jax.random.key(0)))
    whole = score(noisy, many[:, 1:4], many[:, 0])
    for first, last in ((0, 7), (19, 25)):
        part = score(noisy[first:last], many[first:last, 1:4], many[first:last, 0])
        for name, values in part.measured().items():
            np.testing.assert_allclose(values, getattr(whole, name)[first:last], rtol=1e-5)


def test_lpips_is_a_score_if_its_weights_are_present(clips, net):
    frames = clips.frames[:2, 1:4], clips.frames[:2, 2:5], clips.frames[:2, 0]
    without, found = score(*frames), score(*frames, lpips=net)
    assert "lpips" not in rollout_quality.summary(without, (1,))
    np.testing.assert_array_equal(found.lpips, lpips.distances(net, *frames[:2]))
    summary = rollout_quality.summary(found, (1, 3))["lpips"]
    assert summary["mean"]["3"]["mean"] == pytest.approx(found.lpips.mean(), rel=1e-5)


def test_blur_spreads_a_point_within_its_frame_only():
    frames = np.zeros((2, 3, 64, 64, 3), np.uint8)
    frames[0, 1, 32, 32, 1] = 255
    found = rollout_quality.blurred(frames).astype(int)
    assert found[0, 1, 32, 32, 1] == pytest.approx(255 / (2 * np.pi), abs=2)
    assert found[0, 1, 31, 32, 1] == found[0, 1, 32, 33, 1] > 0
    found[0, 1, ..., 1] = 0
    assert not found.any()


def test_an_untrained_network_reconstructs_frames_at_the_lowest_level(clips):
    # Its last layer is zero, so v = 0 and x0 = ᾱ(0) · x: the frame itself but for rounding.
    frames = rollout_quality.reconstruction(TINY, dit.init(TINY, 0), clips.frames, clips.actions)
    assert frames.shape == clips.frames.shape
    assert np.abs(frames.astype(int) - clips.frames).max() <= 1


# Intervals


def test_an_interval_contains_the_mean_at_its_nominal_rate():
    rng = np.random.default_rng(5)
    samples = rng.normal(loc=3, size=(200, 40))
    held = [low <= 3 <= high for _, low, high in map(bootstrap.of_mean, samples)]
    assert 0.90 <= np.mean(held) <= 0.985


def test_an_interval_of_constants_is_a_point_and_of_no_values_is_nan():
    assert bootstrap.of_mean([2.0, 2.0, np.nan]) == (2.0, 2.0, 2.0)
    assert np.isnan(bootstrap.of_mean([np.nan, np.nan])).all()
    assert bootstrap.of_median([1.0, 5.0, 5.0, 5.0, 9.0]).mean == 5


# Control


def delta(generate, clips, frames=12):
    true = clips.actions[:, : 1 + frames]
    random = controllability.random_actions(clips.actions, n_prompt=1, frames=frames, seed=1)
    real = obeying(clips.frames[:, :1], true, None)
    generated = (
        generation.in_batches(generate, clips.frames[:, :1], actions, seed=0, batch_size=3)
        for actions in (true, random)
    )
    scores = (score(frames, real, clips.frames[:, 0]) for frames in generated)
    return controllability.delta_psnr(*scores, (1, frames))["delta_psnr"]["mean"][str(frames)]


def test_a_model_that_ignores_actions_has_no_delta_psnr(clips):
    found = delta(guessing, clips)
    assert found["low"] <= 0 <= found["high"]
    assert found["mean"] == 0  # the same noise for both


def test_a_model_that_obeys_has_a_delta_psnr_above_its_interval(clips):
    found = delta(obeying, clips)
    assert found["low"] > 5


def test_random_actions_keep_the_prompt_and_grow_at_the_end(clips):
    short, long = (
        controllability.random_actions(clips.actions, n_prompt=4, frames=n, seed=0) for n in (5, 9)
    )
    np.testing.assert_array_equal(short, long[:, :9])
    np.testing.assert_array_equal(short[:, :4], clips.actions[:, :4])
    assert short[:, 4:].min() >= 0


# The probe


@pytest.fixture(scope="module")
def obedient(clips):
    """A probe that has seen the fake game, and clips of it that it has not seen."""
    rng = np.random.default_rng(0)

    def clips_with(seed_frames, seed):
        actions = np.random.default_rng(seed).integers(15, size=(len(seed_frames), 40))
        actions[:, 0] = NO_ACTION
        prompt = seed_frames[:, None]
        frames = np.concatenate([prompt, obeying(prompt, actions, None)], axis=1)
        return frames, actions.astype(np.int32)

    pictures = clips.frames[rng.integers(CLIPS, size=40), rng.integers(LENGTH, size=40)]
    return probe.train(*clips_with(pictures, 1)), *clips_with(clips.frames[:, -1], 2)


def test_the_probe_learns_a_game_and_reads_it_from_other_clips(obedient):
    reader, frames, actions = obedient
    found = probe_accuracy.summary(reader, frames, frames, actions)
    confusion = np.array(found["real"]["confusion"])
    assert confusion.sum() == found["actions"] == 5 * 38
    left, right = confusion[[0, 1]].sum(0), confusion[[4, 5]].sum(0)
    assert left[[0, 1]].sum() > 0.9 * left.sum()  # jumping cannot be seen in the fake game
    assert right[[4, 5]].sum() > 0.9 * right.sum()
    assert found["shuffled"]["accuracy"]["high"] < 0.7


def test_an_oracle_that_replays_the_clip_is_read_as_real_frames_are(obedient):
    reader, frames, actions = obedient
    oracle = replaying(HeldOut(frames, actions, 5, 0, ""))
    generated = np.concatenate([frames[:, :1], oracle(frames[:, :1], actions, None)], axis=1)
    found = probe_accuracy.summary(reader, generated, frames, actions)
    assert found["drawn"] == found["real"]
    assert found["control"] == 1
    assert found["keys_of_real"]["left"] == found["keys_of_real"]["right"] == 1


def test_a_static_world_is_not_controllable(obedient):
    reader, frames, actions = obedient
    still = np.repeat(frames[:, :1], frames.shape[1], axis=1)
    found = probe_accuracy.summary(reader, still, frames, actions)
    assert found["drawn"]["balanced"] <= 1 / 6 + 1e-9
    assert abs(found["control"]) < 0.2
    assert abs(found["keys_of_real"]["left"]) < 0.2


def test_readings_are_counted_by_group_by_action_and_by_key():
    pressed = np.array([[0, 1, 2, 4], [9, 5, 7, 8]])  # two left, jump left; stand; …
    read = np.array([[0, 2, 0, 0], [2, 3, 4, 4]])
    found = probe_accuracy._accuracies(read, pressed)
    assert found["accuracy"]["mean"] == 4 / 8
    known = {"left": 1 / 2, "jump left": 0, "stand": 1 / 2, "jump": 1, "right": 1, "jump right": 0}
    assert found["by_group"] == known
    assert found["balanced"] == 3 / 6
    assert (found["by_action"]["LEFT+DOWN"], found["by_action"]["LEFT"]) == (1, 0)
    assert np.isnan(found["by_action"]["RIGHT+DOWN"])
    assert found["keys"]["left"] == {"read": 2 / 3, "false": 1 / 5}
    assert found["keys"]["right"] == {"read": 1, "false": 0}
    assert found["keys"]["jump"] == {"read": 1 / 3, "false": 0}
    assert np.array(found["confusion"])[1].tolist() == [1, 0, 0, 0, 0, 0]


def test_sight_finds_a_shift_and_a_mirror_turns_it_round(clips):
    moved = np.roll(clips.frames[0, 0], (-7, 1), axis=(0, 1))  # the level goes up and right
    seen = probe_features.look(np.stack([clips.frames[0, 0], moved])[None])
    shift = lambda motion: np.divmod(motion.argmin(-1), 2 * probe_features.ACROSS + 1)
    assert shift(seen.motion[0, 0]) == (probe_features.DOWN + 7, probe_features.ACROSS - 1)
    flipped = probe_features.look(np.stack([clips.frames[0, 0], moved])[None, :, :, ::-1])
    np.testing.assert_allclose(probe_features.mirrored(seen).motion, flipped.motion, atol=1e-4)
    np.testing.assert_array_equal(probe_features.mirrored(seen).middle, flipped.middle)


def test_probe_features_of_a_frame_are_of_the_frames_before_it():
    frames = np.arange(2 * 5).reshape(2, 5, 1, 1, 1)
    whole = probe_features.Sight(np.arange(2 * 4).reshape(2, 4, 1), frames)
    seen = probe_features.at(whole, np.array([0, 2, 3]))
    assert seen.motion[..., 0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert seen.middle.reshape(3, 2).tolist() == [[1, 2], [3, 4], [6, 7]]


def test_groups_are_actions_of_equal_effect():
    assert [probe.GROUP_NAMES[g] for g in probe.GROUPS[:9]] == [
        *("left", "left", "jump left", "stand", "stand", "jump"),
        *("right", "right", "jump right"),
    ]
    assert (probe.GROUPS[9:] == probe.GROUPS[4]).all()
    mirrored = [probe.GROUP_NAMES[g] for g in probe._MIRRORED]
    swap = lambda name: name.replace("left", "#").replace("right", "left").replace("#", "right")
    assert tuple(map(swap, mirrored)) == probe.GROUP_NAMES
    for key, groups in probe.KEYS.items():
        assert groups == tuple(i for i, name in enumerate(probe.GROUP_NAMES) if key in name)


def test_a_cached_probe_is_the_trained_one_and_other_data_has_another(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_EPOCHS", 1)
    fresh = probe.cached_on(clips, tmp_path)
    monkeypatch.setattr(probe, "train", lambda *_, **__: pytest.fail("trained again"))
    again = probe.cached_on(clips, tmp_path)
    np.testing.assert_array_equal(probe.read(fresh, clips.frames), probe.read(again, clips.frames))
    other = clips._replace(digest="other")
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        probe.cached_on(other, tmp_path)


def test_a_probe_that_cannot_be_stored_or_read_is_trained(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe, "_EPOCHS", 1)
    (tmp_path / "file").write_text("no folder")
    for folder in (None, tmp_path / "file"):
        fresh = probe.cached_on(clips, folder)
    assert "the probe is not stored" in capsys.readouterr().err
    path = tmp_path / f"probe_{probe.cached_on(clips, tmp_path).name}.npz"
    whole = path.read_bytes()
    with np.load(path) as arrays:
        other = {name: array[:1] for name, array in arrays.items()}
    np.savez(tmp_path / "other.npz", **other)
    monkeypatch.setattr(probe, "train", lambda *_, **__: fresh)
    for content in (b"no archive", whole[: len(whole) // 2], (tmp_path / "other.npz").read_bytes()):
        path.write_bytes(content)
        assert probe.cached_on(clips, tmp_path).params is fresh.params
        assert f"{path.name}" in capsys.readouterr().err
        assert path.read_bytes() != content  # put in its place


# Drift


def test_a_rollout_that_stays_the_real_clip_never_collapses():
    clips = held_out.load(EMBEDDED, "test", frames=120, clips=CLIPS)
    found = drift.summary(clips.frames[:, :60], clips.frames)
    assert found["survived"] == 1
    assert found["frames_to_collapse"]["mean"] == 60
    assert found["false_alarms"] <= 1 / CLIPS
    assert np.mean(found["by_window"]["sharpness"]["mean"]) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("ruin", ["blur", "noise"])
def test_a_degraded_rollout_collapses_where_it_is_degraded(ruin):
    clips = held_out.load(EMBEDDED, "test", frames=120, clips=CLIPS)
    frames = clips.frames[:, :80].copy()
    worse = frames[:, 40:].astype(np.float32)
    if ruin == "blur":
        blocks = worse.reshape(CLIPS, 40, 8, 8, 8, 8, 3).mean((3, 5), keepdims=True)
        worse = np.broadcast_to(blocks, (CLIPS, 40, 8, 8, 8, 8, 3)).reshape(worse.shape)
    else:
        worse = worse + np.random.default_rng(0).normal(scale=60, size=worse.shape)
    frames[:, 40:] = worse.clip(0, 255).astype(np.uint8)
    found = drift.summary(frames, clips.frames)
    assert 40 - drift.WINDOW <= found["frames_to_collapse"]["mean"] <= 40
    assert found["survived"] == 0
    late = found["by_window"]["sharpness"]["mean"][-1]
    assert late < 0.6 if ruin == "blur" else late > 1.5


def test_the_frechet_distance_of_two_gaussians_is_the_known_one():
    rng = np.random.default_rng(0)
    a, b = (x @ x.T for x in rng.normal(size=(2, 5, 5)))
    roots = np.linalg.eigvals(a @ b).real
    wanted = 5 * 4 + np.trace(a + b) - 2 * np.sqrt(roots).sum()
    found = drift.frechet(np.zeros((1, 5)), a[None], np.full((1, 5), 2.0), b[None])
    assert found[0] == pytest.approx(wanted, rel=1e-8)
    assert drift.frechet(np.ones(5), a, np.ones(5), a) == pytest.approx(0, abs=1e-8)


def test_one_bad_window_is_no_collapse():
    beyond = np.zeros((1, 20), bool)
    beyond[0, 3] = True
    assert drift.frames_to_collapse(beyond, 90) == [90]
    beyond[0, 10:] = True
    assert drift.frames_to_collapse(beyond, 90) == [40]


# Drawing


def test_batches_share_one_shape_and_noise_hangs_on_nothing_but_seed_and_place(clips):
    seen = []

    def generate(prompt, actions, key):
        seen.append((prompt.shape, actions.shape))
        return guessing(prompt, actions, key)

    args = clips.frames[:, :2], clips.actions[:, :6]
    a, b = (generation.in_batches(generate, *args, seed=4, batch_size=3) for _ in range(2))
    assert a.shape == (CLIPS, 4, 64, 64, 3)
    assert len(set(seen)) == 1
    np.testing.assert_array_equal(a, b)
    other = generation.in_batches(generate, *args, seed=5, batch_size=3)
    assert (a != other).any()


def test_a_sampler_that_generates_nan_is_reported(clips):
    params = dit.init(TINY, 0)
    params["patch_out.bias"] = params["patch_out.bias"].at[0].set(np.nan)
    generate = generation.by_sampler(Sampler(TINY, params, SamplerConfig(levels=(999, 499))))
    with pytest.raises(UserError, match="not finite"):
        generate(clips.frames[:2, :1], clips.actions[:2, :4], jax.random.key(0))


def test_a_network_of_another_frame_size_is_refused_with_both_sizes():
    with pytest.raises(UserError, match=r"32×32.*64×64"):
        generation.check_game(full.dataclasses.replace(TINY, image_size=32))


def test_a_network_of_another_game_is_refused_by_its_actions():
    with pytest.raises(UserError, match=r"num_actions 7.*15"):
        generation.check_game(full.dataclasses.replace(TINY, num_actions=7))


# Clips


def test_records_that_are_too_short_are_counted_and_left_out(make_data):
    folder = make_data(test=[[40, 12, 33], [160]])
    held = held_out.load(DataConfig(num_workers=0, dir=str(folder)), "test", frames=33)
    assert (len(held), held.records, held.too_short) == (3, 4, 1)
    assert held.frames[:, 0, 0, 0, 0].tolist() == [0, 2, 3]
    longer = held_out.load(DataConfig(num_workers=0, dir=str(folder)), "test", frames=13, up_to=50)
    assert longer.frames.shape[:2] == (3, 33)  # the shortest of those with 13 frames has 33
    shorter = held_out.load(DataConfig(num_workers=0, dir=str(folder)), "test", frames=5, up_to=8)
    assert shorter.frames.shape[:2] == (4, 8)
    with pytest.raises(UserError, match="3 of 4 records"):
        held_out.load(DataConfig(num_workers=0, dir=str(folder)), "test", frames=33, clips=4)
    with pytest.raises(UserError, match=r"longest has 160.*at least 1 frames fewer"):
        held_out.load(DataConfig(num_workers=0, dir=str(folder)), "test", frames=161)


def test_the_digest_differs_by_content(clips):
    assert clips.digest == held_out.digest(clips.frames, clips.actions)
    other = clips.actions.copy()
    other[2, 3] += 1
    assert clips.digest != held_out.digest(clips.frames, other)


# The whole


@pytest.fixture(scope="module")
def measured(tmp_path_factory, net):
    plan = full.Plan(
        split="test", clips=3, horizon=6, n_prompt=(1, 2), drift_frames=16, batch_size=2
    )
    params = dit.init(TINY, 0)
    sampler = Sampler(TINY, params, SamplerConfig(levels=(999, 499)))
    config = DataConfig(num_workers=0, dir="assets/coinrun", clip_len=7, stride=160)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "_EPOCHS", 1)
        patch.setattr(probe, "_CLIPS", 4)
        probes = tmp_path_factory.mktemp("probes")
        found = full.measure(TINY, params, sampler, config, plan, probes=probes, lpips=net)
    found.results.update(
        checkpoint=dict(path="runs/<tiny>", step=7, fingerprint=fingerprint(TINY, params).hex()),
        code=protocol.code_version(),
        device="none",
    )
    return found, plan


def test_the_whole_measurement_bears_its_protocol_and_compares(measured, tmp_path):
    results = measured[0].results
    assert results["protocol"]["clips"] == 3
    assert results["protocol"]["horizons"] == [1, 2, 3, 4, 5, 6]
    assert set(results["single_step"]) == {"epoch/val_loss", "epoch/psnr", "epoch/ssim"}
    path = tmp_path / "a.json"
    full.write_json(path, results)
    again = comparison.read(path)
    again["checkpoint"]["fingerprint"] = again["code"] = "another"
    table = comparison.table([("a", results), ("b", again)])
    row = next(line for line in table.splitlines() if line.startswith("ΔPSNR"))
    one, other = [cell.strip() for cell in row.split("  ") if cell.strip()][1:]
    assert one == other
    labels = [label for label, _ in comparison.rows(results)]
    assert len(labels) == len(set(labels))
    again["protocol"]["seed"] = 1
    again["protocol"]["window"] = "cached"
    with pytest.raises(UserError, match=r"seed: 0 and 1\s+window: exact and cached"):
        comparison.table([("a", results), ("b", again)])
    with pytest.raises(UserError, match=r"differ in\s+seed: 0 and 1$"):
        comparison.table([("a", results), ("b", again)], across=["window"])
    table = comparison.table([("a", results), ("b", again)], across=["window", "seed"])
    assert re.search(r"^window +exact +cached$", table, re.MULTILINE)
    with pytest.raises(UserError, match="--across records"):
        comparison.table([("a", results), ("b", again)], across=["records"])


def test_the_whole_measurement_has_lpips_beside_floors_and_by_clip(measured):
    results = measured[0].results
    for sides in results["rollout"].values():
        floors = {side: sides[side]["lpips"]["mean"]["6"]["mean"] for side in paired.FLOORS}
        mean = sides["model"]["lpips"]["mean"]["6"]["mean"]
        assert np.mean(sides["by_clip"]["lpips"]["6"]) == pytest.approx(mean)
        for floor, minus in sides["model_minus"].items():
            assert minus["lpips"]["6"]["mean"] == pytest.approx(mean - floors[floor])
    assert any("LPIPS minus" in label for label, _ in comparison.rows(results))


def test_the_full_measurement_correlates_uncertainty_with_errors(measured, tmp_path):
    found, plan = measured
    assert found.results["uncertainty"]["seeds"] == plan.seeds == 4
    assert found.unsure.instability.shape == (3, 6, 8, 8)
    labels = [label for label, _ in comparison.rows(found.results)]
    assert any(label.startswith("instability and error, rank correlation") for label in labels)
    path = tmp_path / "without.json"
    left_out = "uncertainty", "single_step"
    without = another({k: v for k, v in found.results.items() if k not in left_out}, path)
    labels = [label for label, _ in comparison.rows(without)]
    assert not any("rank correlation" in label or "single step" in label for label in labels)
    html_report.write(tmp_path, found._replace(unsure=None), plan)
    assert "Uncertainty" not in (tmp_path / html_report.FILE).read_text()


def another(results, path):
    full.write_json(path, results)
    return comparison.read(path)


def test_measurements_are_compared_clip_by_clip_and_rankings_that_differ_are_named(
    measured, tmp_path
):
    results = measured[0].results
    worse = another(results, tmp_path / "worse.json")
    for sides in worse["rollout"].values():
        clips = sides["by_clip"]
        clips["psnr"]["6"] = [x + 1 for x in clips["psnr"]["6"]]
        clips["lpips"]["6"] = [x + 0.5 for x in clips["lpips"]["6"]]
    table = comparison.table([("a", results), ("b", worse)])
    assert re.search(r"^LPIPS minus that of a, frames 1…6 from 1 +– +0\.500 \[", table, re.M)
    assert "LPIPS ranks a above b, PSNR in the opposite order (a minus b: LPIPS -0.500" in table
    assert "ranks a" not in comparison.table([("a", results), ("b", results)])


def test_a_measurement_without_lpips_or_of_an_earlier_version_still_compares(measured, tmp_path):
    results = measured[0].results
    earlier = another(results, tmp_path / "earlier.json")
    del earlier["uncertainty"], earlier["drift"]["nearest_real"], earlier["protocol"]["sharpness"]
    for sides in earlier["rollout"].values():
        for name in ("model_minus", "by_clip", "blur"):
            del sides[name]
        for side in sides.values():
            del side["lpips"]
    for pair in ([("a", results), ("b", earlier)], [("b", earlier), ("a", results)]):
        table = comparison.table(pair)
        assert re.search(r"^LPIPS .*–", table, re.MULTILINE)
        assert "minus that of a" not in table
    assert "LPIPS" not in comparison.table([("b", earlier)])


def test_other_files_than_measurements_are_refused(tmp_path):
    path = tmp_path / "x.json"
    for content in ("{", "[1]", '{"psnr": 3}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"x\.json"):
            comparison.read(path)
    with pytest.raises(UserError, match="cannot read"):
        comparison.read(tmp_path / "none.json")


def test_the_report_is_self_contained(measured, tmp_path):
    html_report.write(tmp_path, *measured)
    text = (tmp_path / html_report.FILE).read_text()
    assert "runs/&lt;tiny&gt;" in text
    assert text.count("data:video/mp4;base64,") == 3
    assert text.count("data:image/png;base64,") == 3 + 2 * 5 + 1
    for way_out in ("http:", "https:", 'src="/', "url("):
        assert way_out not in text
    for name in ("quality", "control_dark", "drift", "confusion", "uncertainty", "unsure", "best"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_the_report_lists_different_rankings_or_missing_lpips(measured):
    results = measured[0].results
    assert sum(name.startswith("LPIPS") for name, *_ in html_report.tiles(results)) == 1
    minus = {
        "psnr": {"6": dict(mean=1, low=0.5, high=2)},
        "lpips": {"6": dict(mean=1, low=-1, high=2)},
    }
    sides = results["rollout"]["prompt_1"] | {"model_minus": {"copy_last": minus}}
    shown = html_report._ranked({"rollout": {"prompt_1": sides}})
    assert "copying the last frame above the model, PSNR in the opposite order" in shown
    sides["model_minus"] = {"copy_last": minus | {"psnr": {"6": dict(mean=-1, low=-2, high=0)}}}
    assert "in the same order" in html_report._ranked({"rollout": {"prompt_1": sides}})
    del sides["model"]
    blind = sides | {"model": {"psnr": {"mean": {"6": minus["psnr"]["6"]}}}}
    assert "perceptual fetch" in html_report._ranked({"rollout": {"prompt_1": blind}})
    assert not list(html_report._perceptual_tile(blind, "6", "prompt_1"))


def test_a_fingerprint_changes_with_any_parameter():
    params = dit.init(TINY, 0)
    before = fingerprint(TINY, params)
    assert before == fingerprint(TINY, dit.init(TINY, 0))
    params["patch_in.bias"] = params["patch_in.bias"].at[0].add(1e-6)
    assert before != fingerprint(TINY, params)


def test_an_invalid_plan_is_refused():
    for wrong in (dict(horizon=1), dict(clips=-1), dict(drift_frames=100), dict(n_prompt=(0,))):
        with pytest.raises(UserError):
            full.Plan(**wrong)
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed={seed}: must be 0…4294967295"):
            full.Plan(seed=seed)


def test_too_many_clips_for_memory_are_refused_before_generation():
    # 1.5 · 1024 + 20 · 32 frames of 12,288 bytes, and 660 of 32,768: 48.4 MB a clip
    plan = full.Plan()
    full.check_memory(41, plan, memory=2e9)
    with pytest.raises(UserError, match=r"42 clips need 2\.0 GB.*has 2\.0.*--clips 41"):
        full.check_memory(42, plan, memory=2e9)


# The quick form


def test_the_quick_form_loads_the_few_clips_that_it_shows(make_data, monkeypatch):
    folder = make_data(val=[[40, 12, 40, 40, 40], [40, 40, 40]])
    loaded = []
    real = splits.load_clips
    monkeypatch.setattr(
        splits,
        "load_clips",
        lambda e, numbers, **kw: loaded.extend(numbers) or real(e, numbers, **kw),
    )
    few = quick.prepare(
        DataConfig(num_workers=0, dir=str(folder)),
        "val",
        clips=3,
        frames=29,
        num_actions=15,
        seed=0,
    )
    assert loaded == [0, 3, 5]  # every second of 0, 2, 3, 4, 5, 6, 7
    assert few.frames[:, 0, 0, 0, 0].tolist() == loaded


def test_the_quick_form_passes_over_bad_records(make_data, marked_episode, capsys):
    folder = make_data(val=[[40] * 6])
    wrong = [marked_episode(number, 40) for number in range(6)]
    for number in (0, 2, 3):
        wrong[number].actions[17] = 99
    shard = folder / "val" / "data_0000.array_record"
    write_shard(shard, map(encode, wrong))
    sizes = dict(clips=3, frames=29, num_actions=15, seed=0)
    with pytest.raises(BadRecord, match="record 0: its action at frame 17 is 99"):
        quick.prepare(DataConfig(num_workers=0, dir=str(folder)), "val", **sizes)
    skipping = DataConfig(num_workers=0, dir=str(folder), on_bad_record="skip")
    few = quick.prepare(skipping, "val", **sizes)  # of 0, 2, 4
    assert few.frames[:, 0, 0, 0, 0].tolist() == [1, 5, 4]
    printed = capsys.readouterr().err
    counts = [printed.count(f"{shard}, record {number}: ") for number in range(6)]
    assert counts == [1, 0, 1, 1, 0, 0]
    few = quick.prepare(skipping, "val", **sizes | {"clips": 6})
    assert few.frames[:, 0, 0, 0, 0].tolist() == [1, 4, 5]  # as many as are good
    with pytest.raises(UserError, match=r"bad record number 2 .*data\.max_bad_records=1"):
        quick.prepare(
            DataConfig(num_workers=0, dir=str(folder), on_bad_record="skip", max_bad_records=1),
            "val",
            **sizes,
        )


def test_the_quick_form_scores_an_oracle_above_copying_without_controllability(net):
    few = quick.prepare(EMBEDDED, "val", clips=3, frames=9, num_actions=15, seed=0, lpips=net)
    clips = HeldOut(few.frames, few.actions, 20, 0, "")
    found = dict(quick.run(replaying(clips), few))
    assert found["eval/psnr"] == rollout_quality.PSNR_CAP
    assert found["eval/copy_last_psnr"] < rollout_quality.PSNR_CAP
    assert found["eval/delta_psnr"] == 0
    assert found["eval/lpips"] == 0
    assert found["eval/copy_last_lpips"] > 0
    blind = few._replace(lpips=None, copy_last=few.copy_last._replace(lpips=None))
    without = dict(quick.run(replaying(clips), blind))
    assert set(found) - set(without) == {"eval/lpips", "eval/copy_last_lpips"}
    assert found["eval/copy_last_psnr_motion"] < found["eval/copy_last_psnr"]
