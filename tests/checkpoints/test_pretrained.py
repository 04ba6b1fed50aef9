"""The repository's own model: complete, documented, used by default, and useful."""

import dataclasses
import json
import re
import sys

import jax
import numpy as np
import pytest

from configs import pocket as config
from cwm_jax.checkpoints import formats, pretrained, weights
from cwm_jax.data import splits
from cwm_jax.data.config import DataConfig
from cwm_jax.errors import UserError
from cwm_jax.evaluation import image_metrics
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.programs import sample
from cwm_jax.sampling.sampler import ddim_levels


@pytest.fixture(scope="module")
def trained():
    return formats.load(pretrained.FOLDER)


def test_it_is_small_and_matches_its_config(trained):
    held = sum(file.stat().st_size for file in pretrained.FOLDER.iterdir())
    assert held <= 24 * 2**20
    how = dict(dtype="auto", attention="auto", norm="auto")  # without influence on the parameters
    how["heads"] = True  # fitted afterwards
    wanted = DiTConfig(**config.get_config().model)
    assert dataclasses.replace(trained.network, **how) == dataclasses.replace(wanted, **how)
    assert trained.path == pretrained.FOLDER / weights.NAME


def test_it_names_no_machine(trained):
    """Paths in its config and card are those of any checkout."""
    for text in (json.dumps(trained.config), (pretrained.FOLDER / "README.md").read_text()):
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|mnt|data|Users)\b", text)


def test_its_card_describes_this_model(trained):
    card = (pretrained.FOLDER / "README.md").read_text()
    assert f"{dit.parameter_count(trained.params):,} parameters" in card
    assert f"{trained.step:,} steps" in card


def test_it_does_better_than_the_last_frame(trained):
    """On embedded clips of levels that it was not trained on, four frames after four given."""
    embedded = DataConfig(num_workers=0, dir="assets/coinrun")
    episodes = splits.open_episodes(embedded, "test", num_actions=15)
    picked = splits.pick_episodes(episodes, count=6, length=24)
    clips = splits.load_clips(episodes, picked, length=24)
    given, shown = 20, dict(levels=ddim_levels(2), window="hop")
    generator = formats.open_sampler(pretrained.FOLDER, **shown).sampler
    seen = slice(given - 4, given)
    state = generator.start(clips["frames"][:, seen], clips["actions"][:, seen])
    _, generated = generator.rollout(state, clips["actions"][:, given:], jax.random.key(0))
    real = clips["frames"][:, given:] / np.float32(255)
    error = image_metrics.mse(np.asarray(generated) / np.float32(255), real).mean()
    still = image_metrics.mse(clips["frames"][:, given - 1 : given] / np.float32(255), real).mean()
    assert error < 0.9 * still


def test_it_is_used_where_no_other_is_named(tmp_path, monkeypatch, capsys):
    output = tmp_path / "video.gif"
    words = f"sample.py --frames 4 --n-samples 1 --ddim-steps 1 --output {output}".split()
    monkeypatch.setattr(sys, "argv", words)
    sample.main()
    text = capsys.readouterr().out
    assert "Using checkpoints/pocket, the model that comes with the project" in text
    assert output.stat().st_size > 1000


def test_a_named_checkpoint_takes_precedence(tmp_path, capsys):
    assert pretrained.unless(tmp_path) == tmp_path
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match=r"no checkpoint at .*nowhere"):
        pretrained.unless(tmp_path / "nowhere")


def test_the_error_for_a_missing_model_explains_how_to_train_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)  # there, but empty
    with pytest.raises(UserError, match=r"(?s)no --checkpoint is named.*cwm train --config debug"):
        pretrained.unless(None)


def test_a_step_that_it_does_not_hold_is_named(trained):
    assert formats.load(pretrained.FOLDER, step=trained.step).step == trained.step
    with pytest.raises(UserError, match=rf"holds step {trained.step} of a run, not step 7"):
        formats.load(pretrained.FOLDER, step=7)
