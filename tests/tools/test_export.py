"""Every form of export generates the same frames, a bundle without model code."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwm_jax import files
from cwm_jax.checkpoints import bundle, formats, run_checkpoint, weights
from cwm_jax.errors import UserError
from cwm_jax.models import attention, dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.sampling.sampler import Sampler, SamplerConfig, ddim_levels
from cwm_jax.tools import export
from cwm_jax.training import train_step

ROOT = Path(__file__).parents[2]
NETWORK = DiTConfig(
    **dict(hidden_size=16, depth=1, num_heads=2, patch_size=16, image_size=64),
    **dict(num_actions=15, max_frames=4, dtype="float32"),
)
GENERATION = dict(levels=ddim_levels(2), window="cached")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's workdir; its parameters are noise, so that every input matters."""
    workdir = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(2)
    params = {
        name: jax.numpy.asarray(0.2 * rng.normal(size=leaf.shape), np.float32)
        for name, leaf in dit.shapes(NETWORK).items()
    }
    config = {"model": {k: getattr(NETWORK, k) for k in DiTConfig.__dataclass_fields__}}
    step, loss = jax.numpy.int32(7), jax.numpy.zeros(2)
    state = train_step.TrainState(
        step, params, opt_state=(), ema=None, epoch_loss=loss, skipped=step
    )
    with run_checkpoint.Checkpoints(workdir, retention=run_checkpoint.Retention(1)) as saved:
        saved.save(state, data_position="", config=config)
    return workdir


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    flags = "--format bundle --ddim-steps 2 --window cached"
    export.main([str(run), "--output", str(out), *flags.split()])
    return out


def generate(sampler, worlds=2):
    """Frames generated from a prompt, past the window, with given actions."""
    rng = np.random.default_rng(4)
    prompt = rng.integers(256, size=(worlds, 2, 64, 64, 3), dtype=np.uint8)
    led_in = np.array([[-1, 7]] * worlds)
    actions = rng.integers(15, size=(worlds, 5))
    state = sampler.start(prompt, led_in)
    frames = []
    for action in actions[:, :-1].T:
        state, frame = sampler.step(state, action, jax.random.key(3))
        frames.append(np.asarray(frame)[:, None])
    _, last = sampler.rollout(state, actions[:, -1:], jax.random.key(3))
    return np.concatenate([*frames, np.asarray(last)], axis=1)


@pytest.fixture(scope="module")
def wanted(run):
    trained = run_checkpoint.load(run)
    return generate(Sampler(trained.network, trained.params, SamplerConfig(**GENERATION)))


def test_a_bundle_generates_the_models_frames(made, wanted):
    opened = formats.open_sampler(made)
    assert isinstance(opened.sampler, bundle.Bundle)
    assert opened.step == 7
    generated = generate(opened.sampler)
    assert generated.shape == (2, 5, 64, 64, 3)
    assert np.abs(generated.astype(int) - wanted).max() <= 1
    assert wanted.std() > 10


def test_a_bundle_runs_where_there_is_no_model_code(made):
    script = f"""
import sys
for module in (
    "models.dit",
    "sampling.sampler",
    "sampling.kv_cache",
    "diffusion.schedule",
    "models.attention",
    "checkpoints.run_checkpoint",
    "training.train_step",
):
    sys.modules["cwm_jax." + module] = None  # importing it fails from here on
import jax, numpy as np
from cwm_jax.checkpoints.bundle import Bundle
bundle, example = Bundle({str(made)!r}), np.load({str(made / bundle.EXAMPLE)!r})
state = bundle.start(example["prompt"], example["led_in"])
state, frames = bundle.rollout(state, example["actions"], jax.random.key(int(example["seed"])))
assert np.abs(np.asarray(frames).astype(int) - example["frames"]).max() <= 1
try:
    import cwm_jax.models.dit
except ImportError:
    print("generated without the model code")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "generated without the model code\n", done.stderr


def test_what_was_trained_with_kernels_for_gpus_opens_and_exports_anywhere(
    run, tmp_path, monkeypatch
):
    trained = run_checkpoint.load(run)
    network = dataclasses.replace(
        trained.network, dtype="bfloat16", attention="cudnn", norm="triton"
    )
    path = tmp_path / "run.safetensors"
    meta = {"config": {"model": dataclasses.asdict(network)}, "step": 7}
    weights.write(path, trained.params, meta)
    anywhere = dataclasses.replace(network, attention="auto", norm="auto")
    assert formats.load(path).network == anywhere
    monkeypatch.setattr(attention, "fuses", lambda: True)  # as on a GPU
    flags = "--format bundle --dtype bfloat16 --ddim-steps 2"
    export.main([str(path), "--output", str(tmp_path / "bundle"), *flags.split()])
    assert formats.open_sampler(tmp_path / "bundle").step == 7


def test_a_damaged_or_unfit_bundle_is_refused(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    with pytest.raises(UserError, match="levels="):
        formats.open_sampler(copy, levels=ddim_levels(10))
    state = bundle.Bundle(copy).start(np.zeros((1, 1, 64, 64, 3), np.uint8), [[-1]])
    with pytest.raises(UserError, match=r"action 15: actions are 0…14"):
        bundle.Bundle(copy).step(state, [15], jax.random.key(0))
    program = copy / "draw.stablehlo"
    program.write_bytes(program.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"draw.stablehlo is damaged"):
        bundle.Bundle(copy)
    program.unlink()
    with pytest.raises(UserError, match="missing"):
        bundle.Bundle(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        bundle.Bundle(copy)


@pytest.mark.parametrize(
    ("format", "name", "dtype"),
    [
        *(("orbax", "out", dtype) for dtype in ("float32", "bfloat16")),
        *(("safetensors", "o.safetensors", dtype) for dtype in ("float32", "bfloat16")),
    ],
)
def test_parameters_alone_keep_every_bit_that_fits(run, tmp_path, format, name, dtype):
    out = tmp_path / name
    export.main([str(run), "--output", str(out), "--format", format, "--dtype", dtype])
    read = (
        run_checkpoint.load(out).params
        if format == "orbax"
        else {k: v.astype("float32") for k, v in weights.read(out)[0].items()}
    )
    for key, value in run_checkpoint.load(run).params.items():
        np.testing.assert_array_equal(read[key], value.astype(dtype).astype("float32"))
    if format == "safetensors":
        whole = weights.read(out)[0]
        assert {str(v.dtype) for v in whole.values()} == {dtype}


def test_a_safetensors_file_is_opened_to_generate(run, tmp_path, wanted):
    out = tmp_path / "m.safetensors"
    export.main([str(run), "--output", str(out)])  # the format of the suffix
    np.testing.assert_array_equal(generate(formats.open_sampler(out, **GENERATION).sampler), wanted)


def test_the_default_steps_of_each_form(run, made, tmp_path):
    """A bundle as it was made to, others with the steps of their config, or 10."""
    levels = lambda path: formats.open_sampler(path).sampler.config.levels
    assert levels(made) == ddim_levels(2)
    assert levels(run) == ddim_levels(10)
    trained = run_checkpoint.load(run)
    kept = tmp_path / "m.safetensors"
    config = trained.config | {"sampler": {"ddim_steps": 3}}
    weights.write(kept, trained.params, {"step": 7, "config": config})
    assert levels(kept) == ddim_levels(3)
    odd = {"step": 7, "config": config | {"sampler": {"ddim_steps": "many"}}}
    weights.write(kept, trained.params, odd)
    with pytest.raises(UserError, match=r"m\.safetensors: its config\.sampler\..*not 'many'"):
        levels(kept)


def test_every_form_keeps_the_card_and_an_export_of_an_export_too(run, tmp_path):
    read = lambda path: formats.playable_steps(formats.load(path))
    assert read(run) is None
    one, other = tmp_path / "m.safetensors", tmp_path / "orbax"
    card = ["--format", "safetensors", "--playable-steps", "4,1, 2"]
    export.main([str(run), "--output", str(one), *card])
    assert weights.read(one)[1]["config"]["sampler"]["playable_steps"] == [1, 2, 4]
    export.main([str(one), "--output", str(other), "--format", "orbax"])
    folder = tmp_path / "bundle"
    flags = ["--ddim-steps", "2", "--playable-steps", "2"]
    export.main([str(other), "--output", str(folder), *flags])
    assert [read(path) for path in (one, other, folder)] == [(1, 2, 4), (1, 2, 4), (2,)]


BAD_CARDS = ["2", 2, [], [0], [1001], [1.0], [True], ["1"], None, {"1": 2}]


@pytest.mark.parametrize("card", BAD_CARDS, ids=repr)
def test_a_card_that_cannot_be_is_reported_with_file_field_and_value(run, tmp_path, card, capsys):
    trained, path = run_checkpoint.load(run), tmp_path / "m.safetensors"
    weights.write(path, trained.params, _metadata(trained, sampler={"playable_steps": card}))
    with pytest.raises(UserError) as caught:
        formats.playable_steps(formats.load(path))
    for part in (str(path), "config.sampler.playable_steps", repr(card), "whole numbers 1…1000"):
        assert part in str(caught.value)
    with pytest.raises(SystemExit):  # and it is not passed on
        export.main([str(path), "--output", str(tmp_path / "o"), "--format", "orbax"])
    assert "config.sampler.playable_steps" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def _metadata(trained, **fields):
    return {"step": 7, "config": trained.config | fields}


@pytest.mark.parametrize("text", ["", "0", "1,1001", "1,two", "1;2", "1.5", "1,"])
def test_a_flag_that_is_no_card_is_reported(run, tmp_path, text, capsys):
    out = tmp_path / "o"
    with pytest.raises(SystemExit):
        export.main([str(run), "--output", str(out), "--format", "orbax", "--playable-steps", text])
    assert f"--playable-steps {text}: give integers 1…1000" in capsys.readouterr().err
    assert not out.exists()


def test_every_form_holds_the_network_and_its_parameters(run, made, tmp_path):
    """The parts of each form that play and evaluation use."""
    out = tmp_path / "m.safetensors"
    export.main([str(run), "--output", str(out), "--format", "safetensors"])
    trained = run_checkpoint.load(run)
    for form in (run, out, made):
        for found in (formats.load(form), formats.open_sampler(form, **GENERATION)):
            assert (found.network, found.step) == (trained.network, trained.step)
            for name, value in trained.params.items():
                np.testing.assert_array_equal(found.params[name], value)


def test_faults_are_reported(run, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    for argv, fault in (
        (["--format", "safetensors", "--output", str(tmp_path / "x.bin")], "must end in"),
        (["--format", "orbax", "--output", str(tmp_path / "other")], "exists already"),
        (["--format", "orbax", "--window", "hop", "--output", "x"], "--window has no effect"),
        (["--ddim-steps", "2", "--output", "x.safetensors"], "--ddim-steps has no effect"),
        (["--output", str(tmp_path / "other")], "is no bundle"),
        (["--output", str(tmp_path / "new"), "--data", str(tmp_path)], "no *.array_record"),
    ):
        with pytest.raises(SystemExit):
            export.main([str(run), *argv])
        assert fault in capsys.readouterr().err
    with pytest.raises(UserError, match="not a readable safetensors"):
        formats.open_sampler(tmp_path / "bad.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.safetensors", "other"]


def test_a_bundle_from_a_stranger_calls_nothing_and_reads_nothing_else(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    manifest = json.loads((copy / "manifest.json").read_text())

    square = jax.ShapeDtypeStruct((2, 2), "float32")
    foreign = jax.export.export(jax.jit(jnp.linalg.cholesky), platforms=("cpu",))(square)
    program = copy / "tabulate.stablehlo"
    program.write_bytes(foreign.serialize())
    manifest["files"][program.name] = files.sha256(program)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"tabulate.stablehlo calls lapack_spotrf_ffi, which"):
        bundle.Bundle(copy)
    for name, message in (("../x", r"names '\.\./x'"), ("/etc/passwd", "names '/etc")):
        listed = {name: ""} | manifest["files"]
        (copy / "manifest.json").write_text(json.dumps(manifest | {"files": listed}))
        with pytest.raises(UserError, match=message):
            bundle.Bundle(copy)
    (copy / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="format None"):
        bundle.Bundle(copy)


def test_a_manifest_or_header_with_missing_parts_is_reported(made, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    generation = {"levels": 3} | {k: v for k, v in manifest["drawing"].items() if k != "levels"}
    wrong = [manifest | {name: None} for name in ("files", "platforms", "network", "step")]
    wrong += [
        manifest | {"files": {}},
        manifest | {"drawing": generation},
        manifest | {"network": {}},
    ]
    for content in wrong:
        (copy / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"manifest\.json (has no|does not)"):
            formats.open_sampler(copy)
    meta = {"step": 1, "config": {"model": {"hidden_size": 16}}}
    for content in ([], {"step": 1}, meta | {"step": "1"}, meta):
        weights.write(tmp_path / "x.safetensors", {"a": jnp.zeros(1)}, content)
        with pytest.raises(
            UserError, match=r"x\.safetensors (describes|has no step|is of an unknown)"
        ):
            formats.open_sampler(tmp_path / "x.safetensors")


def test_an_average_is_of_all_models(run, tmp_path):
    trained = formats.load(run)
    for number, factor in enumerate((2.0, 6.0)):
        params = {name: factor * leaf for name, leaf in trained.params.items()}
        export.write_safetensors(
            trained._replace(params=params), tmp_path / f"{number}.safetensors"
        )
    others = [str(tmp_path / f"{number}.safetensors") for number in (0, 1)]
    mean = tmp_path / "mean.safetensors"
    words = ["--format", "safetensors", "--output", str(mean), "--average", *others]
    export.main([str(run), *words])
    for name, leaf in formats.load(mean).params.items():
        np.testing.assert_allclose(leaf, 3 * trained.params[name], rtol=1e-6)
    network = dataclasses.replace(NETWORK, depth=2)
    other = {name: np.zeros(leaf.shape, np.float32) for name, leaf in dit.shapes(network).items()}
    config = {"model": dataclasses.asdict(network)}
    odd = trained._replace(params=other, network=network, config=config)
    export.write_safetensors(odd, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"odd\.safetensors has another network: depth=2, not"):
        export.averaged(trained, [tmp_path / "odd.safetensors"])


def test_a_threshold_is_stored_with_the_model(run, tmp_path, capsys):
    network = dataclasses.replace(NETWORK, history=1)
    params = {name: np.zeros(leaf.shape, np.float32) for name, leaf in dit.shapes(network).items()}
    config = {"model": dataclasses.asdict(network)}
    meta = {"format": 1, "step": 7, "config": config}
    weights.write(tmp_path / "first.safetensors", params, meta)
    for given, out in (("first", "second"), ("second", "third")):
        flags = ["--still-threshold", "2.5"] if given == "first" else []
        paths = [str(tmp_path / f"{name}.safetensors") for name in (given, out)]
        export.main([paths[0], "--format", "safetensors", "--output", paths[1], *flags])
        assert formats.load(paths[1]).network.still_threshold == 2.5
    flags = ["--format", "safetensors", "--still-threshold", "2.5"]
    with pytest.raises(SystemExit):
        export.main([str(run), "--output", str(tmp_path / "no.safetensors"), *flags])
    assert "still_threshold=2.5 needs config.model.history" in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()
