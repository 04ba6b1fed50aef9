"""`evaluate.py settings`: which denoising steps and window a model should be used with."""

import argparse
import itertools
from pathlib import Path

from cwm_jax import shipped
from cwm_jax.checkpoints import formats, pretrained
from cwm_jax.errors import UserError
from cwm_jax.evaluation import full, generation_settings, lpips_weights
from cwm_jax.files import check_writable, path_flag
from cwm_jax.programs.evaluate import flags, measure, outputs
from cwm_jax.runtime import devices
from cwm_jax.sampling import sampler


def run(words: list[str]) -> None:
    args = parser().parse_args(words)
    plan = full.Plan(
        clips=args.clips,
        horizon=args.horizon,
        n_prompt=(args.n_prompt,),
        drift_frames=args.drift_frames,
        seed=args.seed,
        batch_size=args.batch_size,
        seeds=0,
    )
    numbers = flags.numbers(args.steps, "--steps", "1,2,4")
    for steps in numbers:
        sampler.ddim_levels(steps)  # raises for an invalid number
    outputs.check_folder(args.output)
    devices.check()
    args.checkpoint = pretrained.unless(args.checkpoint)
    file = generation_settings.writable(args.checkpoint) if args.write else None
    if file:
        check_writable(file)
    lpips = lpips_weights.available()
    if lpips is None:
        raise UserError(
            f"settings are ranked by LPIPS: `{lpips_weights.FETCH}` downloads its weights"
        )
    network = formats.load(args.checkpoint, step=args.step).network
    powers = args.sharpness and flags.numbers(args.sharpness, "--sharpness", "1,4", float)
    powers = generation_settings.sharpnesses(network, powers)
    found = []
    for window, steps, power in itertools.product(args.windows, numbers, powers):
        how = dict(window=window, ddim_steps=steps, sharpness=power)
        how = argparse.Namespace(**vars(args) | how)
        results = measure.measured(how, plan, lpips).results
        sharp = "" if power == 1 else f"_{power:g}"
        outputs.write_numbers(args.output / f"{steps}_{window}{sharp}.json", results)
        found.append(generation_settings.Setting(steps, window, results, power))
    judged = generation_settings.judge(found)
    print(generation_settings.table(judged))
    answer = generation_settings.answer(judged)
    print(answer or "no setting is playable")
    if file and answer:
        generation_settings.write(file, answer)
        print(f"→ {file}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=flags.called("settings"),
        description="Ranks numbers of denoising steps, windows and, for networks with softmax "
        "filters, their sharpness by LPIPS, readable keys and the length of stable rollouts, and "
        "prints the recommended ones.",
    )
    add = made.add_argument
    flags.add_model(add)
    add("--steps", default="1,2,4,10", help="denoising steps a frame (%(default)s)")
    add(
        "--sharpness",
        help="powers of the warp's softmax filters (1 and 4; without effect on other networks)",
    )
    add("--windows", nargs="+", default=["hop"], choices=sampler.WINDOWS, help="(hop)")
    add(
        "--data",
        type=path_flag,
        default=shipped.data(),
        help="folder with train/, val/, test/ (embedded)",
    )
    add("--clips", type=int, default=0, help="0: all that are long enough (0)")
    add("--horizon", type=int, default=20, help="frames that LPIPS is averaged over (%(default)s)")
    add("--n-prompt", type=int, default=4, help="real frames to start from (%(default)s)")
    add("--drift-frames", type=int, default=256, help="(%(default)s)")
    add("--batch-size", type=int, default=32, help="clips at once (%(default)s)")
    add("--seed", type=int, default=0, help="of noise and random actions (%(default)s)")
    add("--probes", type=path_flag, help="folder where trained probes are kept (~/.cache/cwm_jax)")
    add(
        "--output", type=path_flag, default=Path("settings"), help="folder of numbers (%(default)s)"
    )
    add("--write", action="store_true", help="write the result to the model's safetensors file")
    return made
