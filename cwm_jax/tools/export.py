"""Exports a trained model: only its parameters, or a bundle that runs without the model code.

    python -m cwm_jax.tools.export runs/small --format safetensors --output small.safetensors
    python -m cwm_jax.tools.export runs/small --format orbax --dtype bfloat16 --output exports/small
    python -m cwm_jax.tools.export runs/small --format bundle --output exports/small-bundle
    python -m cwm_jax.tools.export runs/small --format onnx --dtype float16 --output exports/onnx

The moving average is exported if the run has one. `sample.py --checkpoint` takes the first
three; docs/web.md describes an ONNX export.
The steps and the window of a bundle are fixed here. --playable-steps writes the model's card: the
numbers of denoising steps that are playable. --still-threshold keeps what stands still in generated
frames (docs/pocket.md). Exports are written atomically.
"""

import argparse
import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import orbax.checkpoint as ocp
from jax import ShapeDtypeStruct
from tqdm import tqdm

from cwm_jax import __version__, files, shipped
from cwm_jax.checkpoints import bundle, checksums, formats, run_checkpoint, weights
from cwm_jax.checkpoints.run_checkpoint import Saved, Trained
from cwm_jax.coinrun import to_model
from cwm_jax.data import splits
from cwm_jax.data.config import DataConfig
from cwm_jax.diffusion import schedule
from cwm_jax.diffusion.denoiser import bind
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.files import model_flag, path_flag
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig
from cwm_jax.models.dit import FrameKV, Modulations, Params
from cwm_jax.onnx import folder as onnx_folder
from cwm_jax.runtime import devices, random_numbers
from cwm_jax.sampling import kv_cache, sampler
from cwm_jax.sampling.kv_cache import World
from cwm_jax.sampling.sampler import SamplerConfig, Tables

FORMATS = ("orbax", "safetensors", "bundle", "onnx")
DTYPES = ("float32", "bfloat16", "float16")
_EXAMPLE_FRAMES = 4
_STILL = "another config.model.still_threshold, such as 1; 0: none (its own)"
_AVERAGE = "models of the same network: exports the mean of the parameters of all"


def write_orbax(trained: Trained, out: Path) -> None:
    """A folder that `run_checkpoint.load` reads: parameters and config, without the optimizer."""
    if out.exists():
        raise UserError(f"{out} exists already; choose a new folder")
    run_checkpoint.check_name(out)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        params = ocp.args.StandardSave(trained.params)
        saved = Saved(trained.step, data_position="", config=trained.config, pause_due=False)
        meta = ocp.args.JsonSave(run_checkpoint.meta_of(saved))
        args = ocp.args.Composite(params=params, meta=meta)
        writer.save(out.absolute(), args)
    checksums.write(out)


def averaged(trained: Trained, others: Sequence[Path]) -> Trained:
    """The model with the mean of its and the others' parameters, equally weighted.

    The average of models fine-tuned from the same parameters is often better than each of them
    (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482).

    Raises:
        UserError: one of the others is no model, or has another network.
    """
    params = [trained.params]
    for path in others:
        other = formats.load(path)
        if differs := formats.same_network(other.network, trained.network):
            raise UserError(f"--average {path} has another network: {differs}")
        params.append(other.params)
    mean = lambda *leaves: sum(leaves[1:], leaves[0]) / len(leaves)
    return trained._replace(params=jax.tree.map(mean, *params))


def _meta(trained: Trained) -> dict[str, Any]:
    return {"format": 1, "step": trained.step, "config": trained.config}


def write_safetensors(trained: Trained, out: Path) -> None:
    """One file with parameters and config, which `formats.open_sampler` reads."""
    if out.suffix != weights.SUFFIX:
        raise UserError(f"--output {out}: a safetensors file must end in {weights.SUFFIX}")
    weights.write(out, trained.params, _meta(trained))


def programs(network: DiTConfig, config: SamplerConfig) -> dict[str, Callable]:
    """The functions of a bundle, with dicts of arrays in place of the model code's types."""

    def tabulate(params):
        steps, context = sampler.tabulate(bind(network, params), config)
        return {"steps": steps._asdict(), "context": context._asdict()}

    def start(params, tables, frames_u8_BMHWC, actions_BM, count):
        bound, frames_BMHWC = bind(network, params), to_model(frames_u8_BMHWC)
        context = Modulations(**tables["context"])
        return _fields(kv_cache.start(bound, context, frames_BMHWC, actions_BM, count))

    def draw(params, tables, fields, action_B, key_data):
        bound, state = bind(network, params), _world(fields)
        key = jax.random.fold_in(random_numbers.wrap_key(key_data), state.count)
        noise, step_key = sampler.frame_noise(key, state.frames_BMHWC[:, 0].shape)
        both = Tables(**{name: Modulations(**table) for name, table in tables.items()})
        return sampler.generate_frame(bound, both, state, action_B, noise, step_key, config)

    def append(params, tables, fields, action_B, frame_BHWC):
        bound, context = bind(network, params), Modulations(**tables["context"])
        older = kv_cache.advance(
            bound, context, _world(fields), frame_BHWC, action_B, config.window
        )
        return _fields(older)

    return {"tabulate": tabulate, "start": start, "draw": draw, "append": append}


def _fields(state: World) -> dict[str, Any]:
    """A world as a `bundle.State`."""
    return {
        "frames_BMHWC": state.frames_BMHWC,
        "actions_BM": state.actions_BM,
        "keys": state.kv.keys,
        "values": state.kv.values,
        "first": state.first,
        "count": state.count,
    }


def _world(fields: dict[str, Any]) -> World:
    kv = FrameKV(tuple(fields["keys"]), tuple(fields["values"]))
    frames, actions = fields["frames_BMHWC"], fields["actions_BM"]
    return World(frames, actions, kv, first=fields["first"], count=fields["count"])


def lower(network: DiTConfig, config: SamplerConfig, params: Params) -> dict[str, bytes]:
    """The programs in StableHLO, for any number B of worlds and every platform of a bundle."""
    (batch,) = jax.export.symbolic_shape("B")
    made = programs(network, config)
    size, slots = network.image_size, network.max_frames - 1
    params = jax.tree.map(lambda x: ShapeDtypeStruct(x.shape, x.dtype), params)
    tables = jax.eval_shape(made["tabulate"], params)
    prompt = (
        ShapeDtypeStruct((batch, slots, size, size, 3), np.uint8),
        ShapeDtypeStruct((batch, slots), np.int32),
        ShapeDtypeStruct((), np.int32),
    )
    state = jax.eval_shape(made["start"], params, tables, *prompt)
    action = ShapeDtypeStruct((batch,), np.int32)
    frame = ShapeDtypeStruct((batch, size, size, 3), np.float32)
    key_data = jax.eval_shape(lambda: jax.random.key_data(random_numbers.key(0)))
    arguments = {
        "tabulate": (params,),
        "start": (params, tables, *prompt),
        "draw": (params, tables, state, action, key_data),
        "append": (params, tables, state, action, frame),
    }
    lowered = {}
    for name in tqdm(bundle.PROGRAMS, "exporting", unit=" programs"):
        export = jax.export.export(jax.jit(made[name]), platforms=bundle.PLATFORMS)
        lowered[name] = bytes(export(*arguments[name]).serialize())
    return lowered


def write_bundle(trained: Trained, out: Path, config: SamplerConfig, dtype: str, dir: str) -> None:
    """A folder for `bundle.Bundle`; `dir` is the data folder of the example."""
    # cuDNN's attention runs on one kind of device, a bundle on several.
    network = dataclasses.replace(trained.network, dtype=dtype, attention="xla")
    params = {name: jax.numpy.asarray(p, dtype) for name, p in trained.params.items()}
    example = _example(network, params, config, dir)
    with _folder_written_whole(out, bundle.is_bundle, "bundle") as folder:
        for name, program in lower(network, config, params).items():
            (folder / f"{name}.stablehlo").write_bytes(program)
        weights.write(folder / bundle.PARAMS, params, _meta(trained))
        np.savez_compressed(folder / bundle.EXAMPLE, **example)
        generation = {name: getattr(config, name) for name in bundle.Generation._fields}
        sizes = {f.name: getattr(network, f.name) for f in dataclasses.fields(bundle.Network)}
        manifest = {
            "format": bundle.FORMAT,
            "made_with": {"cwm_jax": __version__, "jax": jax.__version__},
            "platforms": bundle.PLATFORMS,
            "step": trained.step,
            "dtype": dtype,
            "parameters": dit.parameter_count(params),
            "network": sizes,
            "drawing": generation,
            "config": trained.config,
            "files": {p.name: files.sha256(p) for p in sorted(folder.iterdir())},
        }
        (folder / bundle.MANIFEST).write_text(
            json.dumps(manifest, indent=1) + "\n", encoding="utf-8"
        )


def _example(network: DiTConfig, params: Params, config: SamplerConfig, dir: str) -> dict:
    """A real frame, real actions, and the frames generated with the key of seed 0."""
    shape = DataConfig(dir=dir)
    episodes = splits.open_episodes(shape, "val", num_actions=network.action_values)
    (number,) = splits.pick_episodes(episodes, count=1, length=_EXAMPLE_FRAMES + 1)
    clip = splits.load_clips(episodes, [number], length=_EXAMPLE_FRAMES + 1)
    prompt, led_in = clip["frames"][:, :1], clip["actions"][:, :1]
    generator = sampler.Sampler(network, params, config)
    state = generator.start(prompt, led_in)
    _, generated = generator.rollout(state, clip["actions"][:, 1:], random_numbers.key(0))
    asked = {"prompt": prompt, "led_in": led_in, "actions": clip["actions"][:, 1:], "seed": 0}
    return asked | {"frames": np.asarray(generated)}


def write_onnx(trained: Trained, out: Path, steps: Sequence[int], dtype: str) -> None:
    """A folder of graphs that share one file of weights, see `cwm_jax.onnx.folder`."""
    if dtype == "bfloat16":
        raise UserError("--dtype bfloat16: an ONNX export stores float32 or float16")
    is_export = lambda path: (path / onnx_folder.DESCRIPTION).is_file()
    with _folder_written_whole(out, is_export, "ONNX export") as folder:
        onnx_folder.write(trained, folder, steps=steps, dtype=dtype)


@contextlib.contextmanager
def _folder_written_whole(
    out: Path, is_earlier: Callable[[Path], bool], kind: str
) -> Iterator[Path]:
    """A temporary folder that atomically replaces `out`, also an earlier one of the kind."""
    if out.exists() and not is_earlier(out):
        raise UserError(f"{out} exists and is no {kind}; choose another folder")
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    with shown_to_user():
        args = parser().parse_args(argv)
        if args.format is None:
            is_file = args.output.suffix == weights.SUFFIX
            args.format = "safetensors" if is_file else "bundle"
        _check_flags(args)
        devices.check()
        trained = _with_card(formats.load(args.checkpoint, step=args.step), args.playable_steps)
        trained = averaged(trained, args.average)
        if args.still_threshold is not None:
            trained = _with_threshold(trained, args.still_threshold)
        if args.format == "onnx":
            steps = onnx_folder.default_steps(trained)
            steps = steps if args.ddim_steps is None else _numbers("--ddim-steps", args.ddim_steps)
            write_onnx(trained, args.output, steps, args.dtype)
        elif args.format == "bundle":
            levels = sampler.ddim_levels(_bundle_steps(trained, args.ddim_steps))
            config = SamplerConfig(levels=levels, window=args.window or "exact")
            if args.dtype == "float16":
                raise UserError("--dtype float16: a bundle computes in float32 or bfloat16")
            write_bundle(trained, args.output, config, args.dtype, str(args.data))
        elif args.dtype == "float16":
            raise UserError(f"--dtype float16: {args.format} stores float32 or bfloat16")
        else:
            cast = jax.tree.map(lambda x: x.astype(args.dtype), trained.params)
            write = write_orbax if args.format == "orbax" else write_safetensors
            write(trained._replace(params=cast), args.output)
        print(f"step {trained.step} of {args.checkpoint} → {args.output}")


def _check_flags(args: argparse.Namespace) -> None:
    """Raises `UserError` for a flag that has no effect with the format."""
    for name, formats_with in (("ddim_steps", ("bundle", "onnx")), ("window", ("bundle",))):
        if getattr(args, name) is not None and args.format not in formats_with:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} has no effect with --format {args.format}: it is chosen when frames are "
                f"generated. {flag} belongs to --format {' or '.join(formats_with)}"
            )


def _with_card(trained: Trained, playable_steps: str | None) -> Trained:
    """The model with this card in its config; with its own card if none is given.

    Raises:
        UserError: the card of the flag, or else that of the model, has invalid numbers.
    """
    if playable_steps is not None:
        steps = _numbers("--playable-steps", playable_steps)
        sampling = trained.config.get("sampler", {}) | {"playable_steps": steps}
        trained = trained._replace(config=trained.config | {"sampler": sampling})
    formats.playable_steps(trained)
    return trained


def _with_threshold(trained: Trained, threshold: float) -> Trained:
    """The model with another `model.still_threshold`. Raises `UserError` where it cannot be."""
    network = dataclasses.replace(trained.network, still_threshold=threshold)
    model = trained.config["model"] | {"still_threshold": threshold}
    return trained._replace(network=network, config=trained.config | {"model": model})


def _bundle_steps(trained: Trained, asked: str | None) -> int:
    if asked is None:
        return formats.usual_steps(trained)
    steps = _numbers("--ddim-steps", asked)
    if len(steps) > 1:
        raise UserError(f"--ddim-steps {asked}: a bundle has one number of denoising steps")
    return steps[0]


def _numbers(flag: str, text: str) -> list[int]:
    try:
        return list(formats.check_playable_steps([int(word) for word in text.split(",")]))
    except (ValueError, UserError):
        raise UserError(
            f"{flag} {text}: give integers 1…{schedule.NUM_LEVELS} with commas "
            "between, such as 1,2,4"
        ) from None


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=model_flag, help="a run, one checkpoint of it, an export, or hf://…")
    add("--output", type=path_flag, required=True, help="folder, or file.safetensors, to make")
    add(
        "--format",
        choices=FORMATS,
        help="(safetensors for an output with that suffix, otherwise bundle)",
    )
    add("--average", nargs="+", type=model_flag, default=[], metavar="OTHER", help=_AVERAGE)
    add("--step", type=int, help="which checkpoint of the run (the newest)")
    add("--dtype", default="float32", choices=DTYPES, help="of the parameters (%(default)s)")
    add("--ddim-steps", metavar="S,S,…", help="bundle, onnx: denoising steps a frame (its own)")
    add("--playable-steps", metavar="S,S,…", help="the card: playable numbers of denoising steps")
    add("--still-threshold", type=float, metavar="COLOURS", help=_STILL)
    add("--window", choices=sampler.WINDOWS, help="bundle: past the window (exact)")
    add(
        "--data",
        type=path_flag,
        default=shipped.data(),
        help="bundle: data folder of its example",
    )
    return parser


if __name__ == "__main__":
    main()
