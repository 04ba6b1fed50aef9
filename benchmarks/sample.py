"""Speed of generating frames, compared with the plain way and with the machine's limits.

    python -m benchmarks.sample --size small --json sample.json           everything; for a GPU
    python -m benchmarks.sample --size small --quick --json sample.json   minutes on two CPU cores
    python -m benchmarks.sample --size debug --long 1000                  does it slow down or grow?

The plain way is the original's: each of the S denoising steps covers the whole window, without
a cache. It is timed in the same run on the same weights, so the speed-up is a reproducible
ratio. Operations are those of `cwm_jax.models.flops`, without the conditioning, which is
tabulated.

A row has the number of frames before the generated one. Up to the window's length less two, nothing
slides; with the window's length, `exact` encodes it again and `hop` is the mean over its period.
"""

import argparse
import json
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import machine, sizes
from cwm_jax.diffusion import denoiser, schedule
from cwm_jax.errors import shown_to_user
from cwm_jax.files import path_flag
from cwm_jax.models import dit, flops
from cwm_jax.models.config import DiTConfig
from cwm_jax.runtime import device_speed, process_memory
from cwm_jax.sampling import sampler

KEY = jax.random.key(0)


def forward_flops(config: DiTConfig, in_view: int) -> float:
    """Operations of a denoising step of one frame with tabulated conditioning."""
    return flops.frame(config, in_view=in_view)._replace(conditioning=0).total


def frame_flops(config: DiTConfig, steps: int, window: str, context: int) -> float:
    """Operations of one generated frame: its denoising steps, and the update of the cache."""
    in_view = min(context + 1, config.max_frames)
    one = forward_flops(config, in_view)
    clip = lambda frames: sum(forward_flops(config, i + 1) for i in range(frames))
    slides = context >= config.max_frames
    if window == "plain":
        return steps * clip(in_view)
    if window == "exact" and slides:
        return steps * one + clip(config.max_frames - 1)
    if window == "hop" and slides:
        half = config.max_frames // 2
        return (steps + 1) * one + (clip(half) - one) / half
    return (steps + 1) * one


class Bench:
    """One network, sampled with every window."""

    def __init__(self, config: DiTConfig):
        self.config = config
        self.params = dit.init(config, 0)
        self.speed = device_speed.matmul_flops(config.compute_dtype)

    def row(self, window: str, batch: int, steps: int, context: int) -> dict:
        """Milliseconds and frames/s after so many context frames; a full window slides."""
        ours = self._plain if window == "plain" else self._remembering
        per_frame, compiled = ours(window, batch, steps, context)
        operations = frame_flops(self.config, steps, window, context)
        return {
            "window": window,
            "B": batch,
            "S": steps,
            "context": context,
            "ms/frame": 1e3 * per_frame,
            "frames/s": batch / per_frame,
            "GFLOP/frame": operations / 1e9,
            "of matmul speed": batch * operations / per_frame / self.speed,
            "compile s": compiled,
            "peak GB so far": machine.peak_bytes() / 1e9,
        }

    def _prompt(self, batch: int, context: int):
        rng = np.random.default_rng(0)
        shape = batch, context, self.config.image_size, self.config.image_size, 3
        actions = rng.integers(0, self.config.num_actions, (batch, context))
        return rng.integers(0, 256, shape, np.uint8), actions

    def _remembering(self, window: str, batch: int, steps: int, context: int):
        config = sampler.SamplerConfig(levels=sampler.ddim_levels(steps), window=window)
        generator = sampler.Sampler(self.config, self.params, config)
        action, prompt = np.full(batch, 7), self._prompt(batch, context)
        # With a full window a hop comes every half window: its mean is over a whole period, and
        # the other windows are timed repeatedly after the same frames.
        hops = window == "hop" and context >= self.config.max_frames
        state, taken = generator.start(*prompt), []
        for _ in range(1 + (self.config.max_frames // 2 if hops else 3)):
            jax.block_until_ready(state)
            began = time.perf_counter()
            state, frame = generator.step(state, action, KEY)
            jax.block_until_ready((state, frame))
            taken.append(time.perf_counter() - began)
            state = state if hops else generator.start(*prompt)
        per_frame = float((np.mean if hops else np.median)(taken[1:]))
        return per_frame, taken[0] - per_frame

    def _plain(self, window: str, batch: int, steps: int, context: int):
        levels = sampler.ddim_levels(steps)
        alpha_bars = schedule.alpha_bars()[np.array(levels)]
        after = np.append(alpha_bars[1:], np.float32(1))

        @jax.jit
        def generate(params, frames_BTHWC, actions_BT, x):
            net = denoiser.bind(self.config, params)
            with_new = jnp.concatenate([frames_BTHWC, frames_BTHWC[:, -1:]], axis=1)
            earlier = net.earlier(with_new)
            known = net.to_sample(frames_BTHWC, None if earlier is None else earlier[:, :-1])

            def one(x, step):
                level, now, then = step
                seen = jnp.concatenate([known, x[:, None]], axis=1)
                t_BT = jnp.full(seen.shape[:2], 14).at[:, -1].set(level)
                velocity = net(seen, t_BT, actions_BT, earlier)[:, -1]
                x0 = schedule.clean(x, velocity, now)
                noise = schedule.epsilon(x, x0, now)
                return jnp.sqrt(then) * x0 + jnp.sqrt(1 - then) * noise, None

            return jax.lax.scan(one, x, (jnp.array(levels), alpha_bars, after))[0]

        in_view = min(context + 1, self.config.max_frames)
        frames, actions = self._prompt(batch, in_view)
        frames = jnp.asarray(frames[:, :-1], jnp.float32) / 127.5 - 1
        x = jax.random.normal(KEY, (batch, *frames.shape[2:]))
        cast = jax.tree.map(lambda p: p.astype(self.config.compute_dtype), self.params)
        began = time.perf_counter()
        jax.block_until_ready(generate(cast, frames, actions, x))
        compiled = time.perf_counter() - began
        once = device_speed.best_time(generate, cast, frames, actions, x, rounds=1, calls=1)
        return once, compiled - once


def endurance(config: DiTConfig, params, window: str, frames: int, steps: int) -> list[dict]:
    """A long rollout of one world: time per frame and memory of the process, tenth by tenth."""
    levels = sampler.ddim_levels(steps)
    generator = sampler.Sampler(config, params, sampler.SamplerConfig(levels=levels, window=window))
    blank = np.zeros((1, 1, config.image_size, config.image_size, 3), np.uint8)
    state, rows = generator.start(blank, np.full((1, 1), -1)), []
    state, _ = generator.step(state, [7], KEY)  # compiles
    for part in range(10):
        began = time.perf_counter()
        for _ in range(frames // 10):
            state, frame = generator.step(state, [7], KEY)
        jax.block_until_ready((state, frame))
        per_frame = (time.perf_counter() - began) / (frames // 10)
        rows.append(
            {
                "window": window,
                "after frames": (part + 1) * (frames // 10),
                "ms/frame": 1e3 * per_frame,
                "resident MB": machine.resident_bytes() / 1e6,
            }
        )
    return rows


def cached_compile_seconds(config: DiTConfig, params) -> tuple[float, float]:
    """Seconds to the first frame without and with a filled persistent compilation cache."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        for _ in range(2):
            jax.clear_caches()
            began = time.perf_counter()
            generator = sampler.Sampler(config, params, sampler.SamplerConfig(window="cached"))
            frames = np.zeros((1, 1, config.image_size, config.image_size, 3), np.uint8)
            state = generator.start(frames, np.full((1, 1), -1))
            jax.block_until_ready(generator.step(state, [7], KEY)[1])
            taken.append(time.perf_counter() - began)
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()  # else it continues to write into the removed folder
    return taken[0], taken[1]


def main() -> None:
    args = _flags().parse_args()
    process_memory.claim_gpu()
    if args.quick:
        args.batch, args.steps = [1], [1, 4, 10]
    network = sizes.network(args.size, dtype=args.dtype)
    bench = Bench(network)
    about = machine.description() | {"size": args.size, "dtype": str(network.compute_dtype)}
    print(about | {"matmul TFLOP/s": round(bench.speed / 1e12, 3)})
    result = {"about": about, "matmul_flops_per_second": bench.speed, "rows": []}

    def keep(rows: list[dict], name: str = "rows") -> None:
        """Prints and writes the results so far, so that a stopped run loses nothing."""
        result.setdefault(name, []).extend(rows)
        if rows:
            print(machine.table(rows).split("\n", 2)[2], flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    if args.long:
        for window in (w for w in args.window.split(",") if w in sampler.WINDOWS):
            keep(endurance(network, bench.params, window, args.long, args.steps[-1]), "long")
        print("\n" + machine.table(result["long"]))
        return
    for batch in args.batch:
        for steps in args.steps:
            for context in args.context or contexts(network, quick=args.quick):
                for window in args.window.split(","):
                    keep([bench.row(window, batch, steps, context)])
    print("\n" + machine.table(result["rows"]))
    if args.rows_only:
        return
    first, again = cached_compile_seconds(network, bench.params)
    print(f"\nfirst frame after {first:.1f} s; {again:.1f} s with a filled compilation cache")
    result |= {"first_frame_s": first, "first_frame_cached_s": again}
    keep([])


def contexts(network: DiTConfig, *, quick: bool = False) -> list[int]:
    """Numbers of earlier frames: the first, half a window, the last that fit, a slid window."""
    full = network.max_frames
    return [full - 2, full] if quick else sorted({1, full // 2, full - 2, full})


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(word) for word in text.split(",")]
    add = parser.add_argument
    add("--size", default="small", choices=sizes.SIZES)
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--batch", type=numbers, default=[1, 4, 16, 64], help="players or clips in a batch")
    add("--steps", type=numbers, default=[1, 4, 10], help="DDIM steps a frame")
    add("--context", type=numbers, help="frames before the generated one (see above)")
    add("--window", default="plain,exact,cached,hop", help="windows, separated by commas")
    add("--quick", action="store_true", help="only one player, and a full and a slid window")
    add("--rows-only", action="store_true", help="omit the time to the first frame")
    add("--long", type=int, default=0, help="instead: so many frames in a row with each window")
    add("--json", type=path_flag, help="also write everything to this file, row by row")
    return parser


if __name__ == "__main__":
    with shown_to_user():
        main()
