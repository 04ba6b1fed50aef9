"""Which settings are good enough to play with, which is best, and where that is written."""

import dataclasses
import math

import numpy as np
import pytest
from tiny_network import TINY

from cwm_jax.checkpoints import weights
from cwm_jax.checkpoints.migration import migrated
from cwm_jax.errors import UserError
from cwm_jax.evaluation import full, generation_settings
from cwm_jax.evaluation.frame_scores import Scores
from cwm_jax.evaluation.generation_settings import Answer, Setting


def scores(lpips, seed, psnr=20.0):
    """Scores of 20 clips of 6 frames."""
    rng = np.random.default_rng(seed)
    level, noise = np.random.default_rng(0).random((20, 1)), rng.normal(scale=0.01, size=(20, 6))
    level = level + noise
    return Scores(psnr + 9 * level, 0.5 + noise, 15 + 9 * level, lpips + 0.1 * level)


def setting(steps, *, lpips=0.1, psnr=20.0, keys=0.9, lasts=100, window="hop", sharpness=1.0):
    floor = scores(0.3, 99)
    scored = {"model": scores(lpips, steps, psnr), "copy_last": floor, "blur": floor}
    return Setting(
        steps,
        window,
        {
            "rollout": {"prompt_4": full._quality(scored, (1, 6))},
            "probe": {"keys_of_real": {"jump": math.nan, "left": keys}},
            "drift": {"frames_to_collapse": dict(mean=lasts, low=lasts, high=lasts)},
        },
        sharpness,
    )


def judged(*settings):
    return generation_settings.judge(settings)


def faults(*settings):
    return {one.setting.steps: one.faults for one in judged(*settings)}


def test_settings_are_ranked_by_lpips_with_what_keeps_each_from_play():
    found = judged(setting(1, lpips=0.35), setting(2, lpips=0.2), setting(4, lpips=0.1))
    assert [one.setting.steps for one in found] == [4, 2, 1]
    assert [bool(one.faults) for one in found] == [False, False, True]
    assert "copying the last frame" in found[-1].faults[0]


def test_unreadable_keys_and_rollouts_that_do_not_last_are_faults():
    found = faults(setting(1, keys=0.3), setting(2, lasts=40), setting(4), setting(8, keys=0.6))
    assert found[1] == ("left is not readable",)
    assert found[2] == ("does not last",)
    assert found[4] == found[8] == ()
    uncertain = setting(2, lasts=40)
    uncertain.results["drift"]["frames_to_collapse"]["high"] = 60
    assert faults(uncertain, setting(4))[2] == ()


def test_the_cheaper_of_two_that_cannot_be_told_apart_is_the_answer():
    alike = judged(setting(4, lpips=0.1), setting(2, lpips=0.1), setting(1, lpips=0.2))
    assert generation_settings.answer(alike) == Answer("hop", 2, (1, 2, 4))
    better = judged(setting(4, lpips=0.1), setting(2, lpips=0.15))
    assert generation_settings.answer(better).ddim_steps == 4


def test_only_settings_of_the_best_window_that_can_be_played_are_listed():
    found = judged(
        setting(2, lpips=0.1),
        setting(4, lpips=0.2, window="exact"),
        setting(1, lpips=0.4),
        setting(8, lpips=0.25),
    )
    assert generation_settings.answer(found) == Answer("hop", 2, (2, 8))
    assert generation_settings.answer(judged(setting(1, lpips=0.4))) is None


def test_the_table_says_where_psnr_ranks_settings_differently():
    found = judged(setting(1, lpips=0.2, psnr=22), setting(2, lpips=0.1))
    first, second, third, *sentences = generation_settings.table(found).splitlines()
    assert "PSNR" in first
    assert second.startswith("S = 2, hop")
    assert second.endswith("playable")
    assert "left 0.90" in second
    assert third.startswith("S = 1, hop")
    assert any("LPIPS ranks S = 2, hop above S = 1, hop" in line for line in sentences)


def test_settings_without_lpips_cannot_be_ranked():
    blind = setting(1)
    del blind.results["rollout"]["prompt_4"]["model"]["lpips"]
    with pytest.raises(UserError, match="LPIPS, which was not measured"):
        judged(setting(2), blind)


def test_the_answer_changes_the_steps_of_a_file_and_nothing_else(tmp_path):
    file = tmp_path / weights.NAME
    meta = {"format": 1, "step": 7, "config": {"model": {"depth": 2}, "ddim_steps": 10, "lr": 1}}
    weights.write(file, {"a": np.arange(3, dtype=np.float16)}, meta)
    assert generation_settings.writable(tmp_path) == generation_settings.writable(file) == file
    generation_settings.write(file, Answer("hop", 2, (1, 2)))
    params, found = weights.read(file)
    np.testing.assert_array_equal(params["a"], np.arange(3, dtype=np.float16), strict=True)
    steps = {"ddim_steps": 2, "playable_steps": [1, 2]}
    assert found == meta | {"config": migrated(meta["config"]) | {"sampler": steps}}


def test_a_model_in_another_form_cannot_be_written_to(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(UserError, match=r"export\s+the model first"):
            generation_settings.writable(path)


def test_sharper_filters_are_ranked_and_written_beside_the_steps(tmp_path):
    found = judged(setting(2, lpips=0.3), setting(1, lpips=0.1, sharpness=4.0), setting(4))
    assert found[-1].setting.name == "S = 2, hop"
    answer = generation_settings.answer(found)
    assert answer == Answer("hop", 1, (1,), 4.0)
    assert "warp_sharpness = 4" in str(answer)
    file = tmp_path / "model.safetensors"
    config = {"ddim_steps": 10, "model": {"warp_reach": 4}}
    weights.write(file, {"a": np.ones(3, np.float32)}, {"step": 3, "config": config})
    generation_settings.write(file, answer)
    model = lambda: weights.read(file)[1]["config"]["model"]
    assert model() == migrated(config)["model"] | {"warp_sharpness": 4.0}
    generation_settings.write(file, answer._replace(sharpness=1.0))
    assert model() == migrated(config)["model"] | {"warp_sharpness": 1.0}


def test_a_network_without_softmax_filters_has_no_sharpness_to_rank(capsys):
    moving = dataclasses.replace(TINY, history=1, warp_reach=2)
    assert generation_settings.sharpnesses(moving, None) == (1.0, 4.0)
    assert generation_settings.sharpnesses(moving, [1, 2]) == (1, 2)
    with pytest.raises(UserError, match="warp_sharpness=0"):
        generation_settings.sharpnesses(moving, [0])
    assert not capsys.readouterr().err
    copying = dataclasses.replace(TINY, history=1, displacement_down=2, displacement_patch=4)
    for network, kind in ((TINY, "does not warp"), (copying, "copies whole pixels")):
        assert generation_settings.sharpnesses(network, [1, 4]) == (1.0,)
        assert kind in capsys.readouterr().err
        with pytest.raises(UserError, match=r"warp_sharpness=4.*does not have"):
            dataclasses.replace(network, warp_sharpness=4.0)
