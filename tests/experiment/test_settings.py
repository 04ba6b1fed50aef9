"""Configs: each is whole, and a mistake in one is named."""

import importlib
import json
from pathlib import Path

import pytest

from cwm_jax.errors import UserError
from cwm_jax.experiment import resume_check
from cwm_jax.experiment.settings import Settings

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))


def config_of(name):
    return importlib.import_module(f"configs.{name}").get_config().to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_whole(name):
    Settings.from_config(config_of(name))


def test_small_keeps_the_originals_settings():
    settings = Settings.from_config(config_of("small"))
    assert (settings.batch_size, settings.data.clip_len, settings.data.stride) == (128, 32, 8)
    assert (settings.lr, settings.weight_decay, settings.warmup_steps) == (1e-4, 0.01, 2000)
    assert (settings.grad_clip, settings.epochs, settings.ema_decay) == (1.0, 10, 0.0)
    assert (settings.ckpt_every_steps, settings.rollout_every_steps) == (10_000, 1000)
    assert (settings.val_every_steps, settings.val_batches, settings.log_every_steps) == (
        5000,
        50,
        50,
    )
    assert (settings.ddim_steps, settings.n_prompt) == (10, 1)
    assert (settings.rollout_frames, settings.n_rollout_samples) == (16, 4)
    assert settings.wandb.mode == "auto"


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("learning_rate", 1e-3, "no setting config.learning_rate"),
        ("model.hiden_size", 3, "no setting config.model.hiden_size"),
        ("data.clips", 3, "no setting config.data.clips"),
        ("lr", "fast", "config.lr must be float, not 'fast'"),
        ("batch_size", 1.5, "config.batch_size must be int, not 1.5"),
        ("batch_size", 0, "config.batch_size=0"),
        ("epochs", True, "config.epochs must be int"),
        ("model.depth", 0, "config.model.depth"),
        ("data.clip_len", 33, "config.data.clip_len=33"),
        ("n_prompt", 16, "config.n_prompt=16"),
        ("ddim_steps", 1001, "1001"),
        ("wandb.mode", "loud", "loud"),
        ("model.history", -1, r"config\.model\.history must be a whole number ≥ 0"),
        ("model.history", 32, r"config\.model\.history=32 must be less than .*max_frames=32"),
        ("model.change_scale", 0.0, r"config\.model\.change_scale=0\.0"),
        ("noise.top_share", 1.5, r"config\.noise\.top_share=1\.5: must be 0…1"),
        ("noise.own_passes", 0, r"config\.noise\.own_passes=0: must be 1…16"),
        ("noise.own_share", 0.5, r"config\.noise\.own_share=0\.5 needs config\.model\.history"),
        ("distil_from", 3, r"config\.distil_from must be str, not 3"),
        ("noise.mirror_share", -0.1, r"config\.noise\.mirror_share=-0\.1: must be 0…1"),
        ("noise.middle_weight", -1.0, r"config\.noise\.middle_weight=-1\.0: must be 0…1000"),
        ("decay_steps", 7, r"config\.decay_steps=7 needs config\.max_steps"),
        ("minutes", -1.0, r"config\.minutes=-1\.0: must be 0…"),
        ("decay_share", 1.5, r"config\.decay_share=1\.5: must be 0…1"),
        ("val_every_steps", -1, r"config\.val_every_steps=-1: must be 0 or more"),
        ("data.on_device", -1, r"data\.on_device is -1"),
        ("stages", (0.5,), r"config\.stages holds 0\.5; a stage is \(share of the run, settings\)"),
        ("stages", ((1.5, {}),), r"config\.stages: a stage begins at 1\.5"),
        ("stages", ((0.5, {}), (0.4, {})), r"config\.stages: a stage begins at 0\.4"),
        ("stages", ((0.5, {"lr": 1.0}),), r"config\.stages sets 'lr'"),
        ("stages", ((0.5, {"noise.x": 1}),), r"no setting config\.noise\.x"),
        ("stages", ((0.5, {"noise.top_share": 2}),), r"config\.noise\.top_share=2\.0: must be"),
    ],
)
def test_mistakes_are_named(path, value, told):
    config = config_of("small")
    *sections, key = path.split(".")
    place = config
    for section in sections:
        place = place[section]
    place[key] = value
    with pytest.raises(UserError, match=told):
        Settings.from_config(config)


def test_minutes_and_steps_do_not_both_bring_the_rate_down():
    config = config_of("small") | dict(minutes=9.0, max_steps=10, decay_steps=5)
    with pytest.raises(UserError, match=r"config\.decay_steps=5 and config\.minutes=9"):
        Settings.from_config(config)


def test_a_stage_keeps_what_the_ones_before_have_set():
    config = config_of("pocket")
    config["noise"]["own_passes"] = 2
    config["stages"] = ((0.2, {"noise.own_passes": 3}), (0.6, {"noise.top_share": 0.1}))
    settings = Settings.from_config(config)
    shares, noises = zip(*settings.noises, strict=True)
    assert shares == (0, 0.2, 0.6)
    assert [noise.own_passes for noise in noises] == [2, 3, 3]
    assert [noise.top_share for noise in noises] == [0.35, 0.35, 0.1]


def test_a_missing_key_is_named():
    config = config_of("small")
    del config["model"]["depth"]
    with pytest.raises(UserError, match=r"lacks config\.model\.depth"):
        Settings.from_config(config)


def test_one_frame_shows_no_change():
    config = config_of("pocket")
    config["data"]["clip_len"] = 1
    with pytest.raises(UserError, match=r"config\.data\.clip_len=1 must be 2 or more"):
        Settings.from_config(config)


@pytest.mark.parametrize(
    "change", [{"num_actions": 8}, {"num_actions": 8, "action_encoding": "buttons"}]
)
def test_only_coinruns_actions_can_be_mirrored(change):
    config = config_of("pocket")
    config["model"] |= change
    with pytest.raises(
        UserError, match=r"config\.noise\.mirror_share=0\.45 needs CoinRun's actions"
    ):
        Settings.from_config(config)


def test_a_run_goes_on_from_a_config_that_is_older_than_a_setting():
    now = config_of("small")
    before = {
        name: value
        for name, value in now.items()
        if name not in ("noise", "decay_steps", "init_from", "distil_from")
    }
    before["model"] = {
        k: v for k, v in now["model"].items() if k not in ("history", "change_scale")
    }
    for name in ("minutes", "decay_share", "stages", "ckpt_every_minutes"):
        del before[name]
    for name in [k for k in before["model"] if k.startswith("displacement") or k == "qk_norm"]:
        del before["model"][name]
    before["data"] = {k: v for k, v in before["data"].items() if k != "on_device"}
    assert resume_check.compare(before, now) == []
    now["stages"] = ((0.5, {"noise.own_passes": 2}),)
    assert resume_check.compare(json.loads(json.dumps(now)), now) == []
    assert resume_check.compare(before, now) == [
        f"config.stages={[[0.5, dict(now['stages'][0][1])]]}, was []"
    ]
    now["model"]["displacement_down"] = 8
    with pytest.raises(UserError, match=r"config\.model\.displacement_down=8, was 0"):
        resume_check.compare(before, now)
    now["model"]["displacement_down"] = 0
    now["model"]["history"] = 1
    with pytest.raises(UserError, match=r"config\.model\.history=1, was 0"):
        resume_check.compare(before, now)


def test_a_teacher_needs_steps_to_take():
    config = config_of("small") | dict(distil_from="runs/small", ddim_steps=501)
    with pytest.raises(UserError, match=r"config\.ddim_steps=501 must be at most 500"):
        Settings.from_config(config)
