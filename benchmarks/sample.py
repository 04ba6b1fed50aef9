"""How fast frames are drawn, against the plain way and against what the machine could do.

    python -m benchmarks.sample --size small --batch 1 --steps 10 --json sample.json

The plain way is the original's: each of the S passes goes over the whole window, nothing is
remembered. It is timed in the same run on the same weights, so the speed-up is a ratio that anyone
can repeat. Operations are those of `cwm_jax.flops`, without the conditioning that the tables save.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, sizes
from cwm_jax import diffusion, flops, model, sampler, speed
from cwm_jax.model import DiTConfig

KEY = jax.random.key(0)


def frame_flops(config: DiTConfig, in_view: int) -> float:
    """Operations of a pass over one frame whose conditioning comes from a table."""
    return flops.frame(config, in_view=in_view)._replace(conditioning=0).total


def drawn_frame_flops(config: DiTConfig, steps: int, window: str, context: int) -> float:
    """Operations of one drawn frame: its passes, and keeping the memory up to date after it."""
    in_view = min(context + 1, config.max_frames)
    one = frame_flops(config, in_view)
    clip = lambda frames: sum(frame_flops(config, i + 1) for i in range(frames))
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
    """One network, drawn from in every way."""

    def __init__(self, config: DiTConfig):
        self.config = config
        self.params = model.init(config, 0)
        self.speed = speed.matmul_flops(config.compute_dtype)

    def row(self, window: str, batch: int, steps: int, context: int) -> dict:
        """Milliseconds and frames/s after so many context frames; a full window of them slides."""
        ours = self._plain if window == "plain" else self._remembering
        per_frame, compiled = ours(window, batch, steps, context)
        operations = drawn_frame_flops(self.config, steps, window, context)
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
            "peak GB": machine.peak_bytes() / 1e9,
        }

    def _prompt(self, batch: int, context: int):
        rng = np.random.default_rng(0)
        shape = batch, context, self.config.image_size, self.config.image_size, 3
        actions = rng.integers(0, self.config.num_actions, (batch, context))
        return rng.integers(0, 256, shape, np.uint8), actions

    def _remembering(self, window: str, batch: int, steps: int, context: int):
        # On a GPU as play does it: one player's frame is one graph of kernels, without a loop.
        unroll = batch == 1 and jax.default_backend() == "gpu"
        config = sampler.SamplerConfig(
            levels=sampler.ddim_levels(steps), window=window, unroll=unroll
        )
        drawer = sampler.Sampler(self.config, self.params, config)
        action = np.full(batch, 7)
        state, taken = drawer.start(*self._prompt(batch, context)), []
        # With a full window a hop comes every half window: its mean is over a whole period.
        slides = context >= self.config.max_frames
        frames = self.config.max_frames // 2 if window == "hop" and slides else 3
        for _ in range(1 + frames):
            began = time.perf_counter()
            state, frame = drawer.step(state, action, KEY)
            jax.block_until_ready((state, frame))
            taken.append(time.perf_counter() - began)
        mean = np.mean if window == "hop" and slides else np.median
        return float(mean(taken[1:])), taken[0]

    def _plain(self, window: str, batch: int, steps: int, context: int):
        levels = sampler.ddim_levels(steps)
        alpha_bars = diffusion.alpha_bars()[np.array(levels)]
        after = np.append(alpha_bars[1:], np.float32(1))

        @jax.jit
        def draw(params, frames_BTHWC, actions_BT, x):
            net = model.bind(self.config, params)

            def one(x, step):
                level, now, then = step
                seen = jnp.concatenate([frames_BTHWC, x[:, None]], axis=1)
                t_BT = jnp.full(seen.shape[:2], 14).at[:, -1].set(level)
                velocity = net(seen, t_BT, actions_BT)[:, -1]
                x0 = diffusion.clean(x, velocity, now)
                noise = diffusion.epsilon(x, x0, now)
                return jnp.sqrt(then) * x0 + jnp.sqrt(1 - then) * noise, None

            return jax.lax.scan(one, x, (jnp.array(levels), alpha_bars, after))[0]

        in_view = min(context + 1, self.config.max_frames)
        frames, actions = self._prompt(batch, in_view)
        frames = jnp.asarray(frames[:, :-1], jnp.float32) / 127.5 - 1
        x = jax.random.normal(KEY, (batch, *frames.shape[2:]))
        cast = jax.tree.map(lambda p: p.astype(self.config.compute_dtype), self.params)
        began = time.perf_counter()
        jax.block_until_ready(draw(cast, frames, actions, x))
        compiled = time.perf_counter() - began
        once = speed.best_time(draw, cast, frames, actions, x, rounds=1, calls=1)
        return once, compiled


def cached_compile_seconds(config: DiTConfig, params) -> tuple[float, float]:
    """Seconds to the first frame without and with a filled persistent compilation cache."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        for _ in range(2):
            jax.clear_caches()
            began = time.perf_counter()
            drawer = sampler.Sampler(config, params, sampler.SamplerConfig(window="cached"))
            frames = np.zeros((1, 1, config.image_size, config.image_size, 3), np.uint8)
            state = drawer.start(frames, np.full((1, 1), -1))
            jax.block_until_ready(drawer.step(state, [7], KEY)[1])
            taken.append(time.perf_counter() - began)
        jax.config.update("jax_compilation_cache_dir", None)
    return taken[0], taken[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(word) for word in text.split(",")]
    add = parser.add_argument
    add("--size", default="small", choices=sizes.SIZES)
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--batch", type=numbers, default=[1, 4, 16, 64], help="players or clips at once")
    add("--steps", type=numbers, default=[1, 4, 10], help="DDIM steps a frame")
    add("--context", type=numbers, default=[1, 16, 32], help="frames before the drawn one")
    add("--window", default="plain,exact,cached,hop", help="which ways, by comma")
    add("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args()
    network = sizes.network(args.size, dtype=args.dtype)
    bench = Bench(network)
    about = machine.description() | {"size": args.size, "dtype": str(network.compute_dtype)}
    print(about | {"matmul TFLOP/s": round(bench.speed / 1e12, 3)})
    rows = []
    for batch in args.batch:
        for steps in args.steps:
            for context in (n for n in args.context if n <= network.max_frames):
                for window in args.window.split(","):
                    rows.append(bench.row(window, batch, steps, context))
                    print(machine.table(rows[-1:]).splitlines()[-1], flush=True)
    first, again = cached_compile_seconds(network, bench.params)
    print("\n" + machine.table(rows))
    print(f"\nfirst frame after {first:.1f} s; {again:.1f} s with a filled compilation cache")
    if args.json:
        result = {"about": about, "matmul_flops_per_second": bench.speed, "rows": rows}
        result |= {"first_frame_s": first, "first_frame_cached_s": again}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
