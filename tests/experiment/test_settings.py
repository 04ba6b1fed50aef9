"""Configs: each is complete, and mistakes are named."""

import importlib
import json
from pathlib import Path

import pytest
from changed_config import changed

from cwm_jax.checkpoints import migration
from cwm_jax.errors import UserError
from cwm_jax.experiment import resume_check
from cwm_jax.experiment.settings import Settings, reference

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))


def config_of(name):
    return importlib.import_module(f"configs.{name}").get_config().to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_whole(name):
    Settings.from_config(config_of(name))


def test_the_page_of_settings_lists_them_as_they_are():
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert page == reference(), "python -m cwm_jax.experiment.settings > docs/settings.md"


def test_small_keeps_the_originals_settings():
    config = dict(migration.flattened(config_of("small")))
    original = {
        "data.batch_size": 128,
        "data.clip_len": 32,
        "data.stride": 8,
        "schedule.epochs": 10,
        "optimizer.lr": 1e-4,
        "optimizer.weight_decay": 0.01,
        "optimizer.warmup_steps": 2000,
        "optimizer.grad_clip": 1.0,
        "optimizer.ema_decay": 0.0,
        "sampler.ddim_steps": 10,
        "checkpoints.every_steps": 10_000,
        "logging.every_steps": 50,
        "validation.every_steps": 5000,
        "validation.batches": 50,
        "rollouts.every_steps": 1000,
        "rollouts.n_prompt": 1,
        "rollouts.frames": 16,
        "rollouts.count": 4,
    }
    assert {name: config[name] for name in original} == original


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("learning_rate", 1e-3, "no setting config.learning_rate"),
        ("model.hiden_size", 3, "no setting config.model.hiden_size"),
        ("optimizer.lr", "fast", "config.optimizer.lr must be float, not 'fast'"),
        ("data.batch_size", 1.5, "config.data.batch_size must be int, not 1.5"),
        ("data.batch_size", 0, "config.data.batch_size=0: must be 1 or more"),
        ("schedule.epochs", True, "config.schedule.epochs must be int"),
        ("optimizer.lr", float("nan"), "config.optimizer.lr=nan: must be 0…1"),
        ("optimizer.grad_clip", 0.0, r"config\.optimizer\.grad_clip=0\.0"),
        ("logging.wandb.mode", "loud", "config.logging.wandb.mode must be one of auto"),
        ("compute.remat", "some", "config.compute.remat must be one of none"),
        ("data", 3, "config.data must hold settings, not 3"),
        ("data.clip_len", 33, "config.data.clip_len=33"),
        ("rollouts.n_prompt", 16, "config.rollouts.n_prompt=16"),
        ("model.history", 32, r"config\.model\.history=32 must be less than .*max_frames=32"),
        ("context.share", 0.5, r"config\.context\.share=0\.5 needs config\.model\.history"),
        (
            "optimizer.decay_steps",
            7,
            r"decay_steps=7 needs config\.schedule\.max_steps",
        ),
        ("context.lead", 3, r"config\.context\.lead=3 needs config\.context\.steps ≥ 1 and share"),
        ("schedule.stages", (0.5,), r"config\.schedule\.stages holds 0\.5; a stage is \(share"),
        ("schedule.stages", ((1.5, {}),), r"config\.schedule\.stages: a stage begins at 1\.5"),
        ("schedule.stages", ((0.5, {}), (0.4, {})), r"a stage begins at 0\.4"),
        ("schedule.stages", ((0.5, {"optimizer.lr": 1.0}),), r"stages sets 'optimizer\.lr'"),
        ("schedule.stages", ((0.5, {"context.x": 1}),), r"no setting config\.context\.x"),
        ("schedule.stages", ((0.5, {5: 1}),), "stages sets 5; a stage may only set"),
        ("schedule.stages", ((0.5, {"context.share": 2}),), r"config\.context\.share=2\.0: must"),
    ],
)
def test_mistakes_are_named(path, value, named):
    with pytest.raises(UserError, match=named):
        Settings.from_config(changed(config_of("small"), {path: value}))


def test_minutes_exclude_decay_steps():
    both = {"schedule.minutes": 9.0, "schedule.max_steps": 10, "optimizer.decay_steps": 5}
    with pytest.raises(UserError, match=r"decay_steps=5 and config\.schedule\.minutes=9"):
        Settings.from_config(changed(config_of("small"), both))


def test_a_stage_keeps_the_settings_of_earlier_stages():
    stages = ((0.2, {"context.rounds": 3}), (0.6, {"noise_levels.top_share": 0.1}))
    settings = {"context.rounds": 2, "schedule.stages": stages}
    settings = Settings.from_config(changed(config_of("pocket"), settings))
    shares, examples = zip(*settings.stages, strict=True)
    assert shares == (0, 0.2, 0.6)
    assert [each.context.rounds for each in examples] == [2, 3, 3]
    assert [each.noise_levels.top_share for each in examples] == [0.35, 0.35, 0.1]


def test_a_stage_cannot_change_the_lead():
    settings = {"schedule.stages": ((0.5, {"context.lead": 4}),), "context.lead": 3}
    with pytest.raises(UserError, match=r"stages: context\.lead must stay 3"):
        Settings.from_config(changed(config_of("pocket"), settings))
    settings["schedule.stages"] = ((0.5, {"context.steps": 0}),)
    with pytest.raises(UserError, match=r"stages sets context\.steps to 0, and .*lead=3"):
        Settings.from_config(changed(config_of("pocket"), settings))


def test_training_clips_have_the_frames_of_a_lead_more():
    settings = Settings.from_config(changed(config_of("pocket"), {"context.lead": 5}))
    assert (settings.training_data.clip_len, settings.data.clip_len) == (17, 12)


def test_a_missing_key_is_named():
    config = config_of("small")
    del config["model"]["depth"]
    with pytest.raises(UserError, match=r"lacks config\.model\.depth"):
        Settings.from_config(config)


def test_one_frame_has_no_residual():
    with pytest.raises(UserError, match=r"config\.data\.clip_len=1 must be 2 or more"):
        Settings.from_config(changed(config_of("pocket"), {"data.clip_len": 1}))


@pytest.mark.parametrize(
    "change", [{"num_actions": 8}, {"num_actions": 8, "action_encoding": "buttons"}]
)
def test_only_coinruns_actions_can_be_mirrored(change):
    config = config_of("pocket")
    config["model"] |= change
    with pytest.raises(
        UserError, match=r"config\.augment\.mirror_share=0\.45 needs CoinRun's actions"
    ):
        Settings.from_config(config)


# Of the commit before settings were put into groups.
OLD = json.loads((ROOT / "tests/experiment/config_0_1.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("network", "stage", "fault"),
    [
        ({"num_actions": 3}, {"augment.mirror_share": 1.0}, r"mirror_share=1\.0 needs CoinRun's"),
        ({}, {"context.share": 1.0}, r"context\.share=1\.0 needs config\.model\.history"),
    ],
)
def test_a_later_stage_must_fit_the_network_too(network, stage, fault):
    changes = {f"model.{name}": value for name, value in network.items()}
    changes["schedule.stages"] = ((0.5, stage),)
    with pytest.raises(UserError, match=fault):
        Settings.from_config(changed(config_of("small"), changes))


def test_a_config_of_an_earlier_version_is_read():
    settings = Settings.from_config(OLD)
    assert settings == Settings.from_config(changed(config_of("pocket"), OLD_CHANGES))
    assert resume_check.compare(OLD, settings.to_config()) == []


OLD_CHANGES = {
    "data.global_batch_size": 4,
    "schedule.stages": [[0.55, {"context.rounds": 4, "noise_levels.top_share": 0.1}]],
    "optimizer.lr": 3e-4,
    "model.still_threshold": 0.0,
}


def test_old_names_in_a_users_config_file_count():
    config = config_of("small") | {"lr": 3e-4, "noise": {"own_share": 0.0}}
    settings = Settings.from_config(config)
    assert settings.optimizer.lr == 3e-4
    with pytest.raises(UserError, match=r"no setting config\.noise"):
        Settings.from_config(config_of("small") | {"noise": {"own_shares": 0.0}})


def test_a_run_resumes_from_a_config_that_is_older_than_a_setting():
    now = config_of("small")
    before = dict(migration.flattened(now))
    before = migration.nested({k: v for k, v in before.items() if k not in migration.BEFORE})
    assert resume_check.compare(before, now) == []
    staged = changed(now, {"schedule.stages": ((0.5, {"context.rounds": 2}),)})
    assert resume_check.compare(json.loads(json.dumps(staged)), staged) == []
    assert resume_check.compare(before, staged) == [
        "config.schedule.stages=[[0.5, {'context.rounds': 2}]], was []"
    ]
    for name, value in {"model.displacement_down": 8, "model.history": 1}.items():
        with pytest.raises(UserError, match=rf"config\.{name}={value}, was 0"):
            resume_check.compare(before, changed(now, {name: value}))


def test_a_teacher_needs_enough_steps():
    config = changed(config_of("small"), {"distil_from": "runs/small", "sampler.ddim_steps": 501})
    with pytest.raises(UserError, match=r"config\.sampler\.ddim_steps=501 must be at most 500"):
        Settings.from_config(config)
