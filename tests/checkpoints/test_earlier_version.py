"""What version 0.1 wrote is still read: a run, its exports, its metrics, its share codes.

`tests/earlier_version/version_0_1.tar.xz` was made by the last commit before settings were put into
groups: two updates of a small network with history and a warp (`run/`), its exports, frames that
it generated, and a share code.
"""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from cwm_jax.checkpoints import formats, run_checkpoint, weights
from cwm_jax.experiment import loop, metrics_file
from cwm_jax.experiment.settings import Settings
from cwm_jax.models.fingerprint import fingerprint
from cwm_jax.play.session import share_code

ARCHIVE = Path(__file__).parents[1] / "earlier_version" / "version_0_1.tar.xz"
EMBEDDED = Path(__file__).parents[2] / "assets" / "coinrun"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("form", ["run", "model.safetensors"])
def test_a_model_generates_the_same_frames(earlier, form):
    with np.load(earlier / "frames.npz") as kept:
        generator = formats.open_sampler(earlier / form).sampler
        state = generator.start(kept["prompt"], kept["led_in"])
        _, frames = generator.rollout(state, kept["actions"], jax.random.key(0))
        off = np.abs(np.asarray(frames).astype(int) - kept["frames"])
    assert off.max() <= 1
    assert generator.config.levels == (999, 499)  # its config has ddim_steps=2


def test_a_card_and_a_bundle_are_read(earlier):
    exported = formats.load(earlier / "model.safetensors")
    assert formats.playable_steps(exported) == (1, 2)
    bundle = formats.load(earlier / "bundle")
    assert bundle.network == exported.network
    for name, value in exported.params.items():
        np.testing.assert_array_equal(bundle.params[name], value)


def test_a_run_resumes_with_its_own_config(earlier):
    config = json.loads((earlier / "run" / "config.json").read_text())
    config |= {"max_steps": 3, "data": config["data"] | {"dir": str(EMBEDDED)}}
    state = loop.train(Settings.from_config(config), earlier / "run", config=config)
    assert int(state.step) == 3
    steps, losses = metrics_file.read_series(earlier / "run" / "metrics.jsonl")["train/loss"]
    assert steps.tolist() == [1, 2, 3]
    assert np.isfinite(losses).all()
    assert run_checkpoint.load(earlier / "run").step == 3


def test_a_share_code_names_the_same_model(earlier):
    kept = json.loads((earlier / "share_code.json").read_text())
    recipe = share_code.decode(kept["share_code"])
    params, _ = weights.read(earlier / "model.safetensors")
    network = formats.load(earlier / "model.safetensors").network
    assert recipe.fingerprint.hex() == kept["fingerprint"]
    assert fingerprint(network, params) == recipe.fingerprint
    assert (recipe.seed, recipe.actions) == (5, [7, 7, 1])
