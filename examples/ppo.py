"""Trains a policy inside the model by PPO, and plays it in the real game.

    pip install stable-baselines3        # needs PyTorch: make install-torch
    python examples/ppo.py --steps 2048

The reward of a step is how far the picture scrolled to the left, in pixels (the player runs to the
right), and 10 more where the model's heads say that the coin was taken. The policy sees one frame.
Then the policy, and one of random actions, play levels of the real game (Procgen, in an environment
of its own that the first call makes) that no model was trained on. docs/gymnasium.md has measured
results.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecTransposeImage

from cwm_jax.coinrun import NUM_ACTIONS
from cwm_jax.environment.vector import CoinRunVectorEnv
from cwm_jax.evaluation import bootstrap
from cwm_jax.rendering import video
from cwm_jax.simulator import game, venv

REACH = 3  # pixels that the picture may scroll in a step
LEVELS = 2_000_000_000  # seed of the first real level


def scroll(before_BHWC: np.ndarray, after_BHWC: np.ndarray) -> np.ndarray:
    """Pixels by which pictures moved to the left, −3…3, by the best match of their middle rows."""
    before, after = (x[:, 16:48].astype(np.float32).mean(-1) for x in (before_BHWC, after_BHWC))
    inner = after[:, :, REACH:-REACH]
    width = inner.shape[2]
    shifts = sorted(range(-REACH, REACH + 1), key=abs)  # of equal matches the smallest counts
    costs = [
        np.abs(before[:, :, REACH + s : REACH + s + width] - inner).mean((1, 2)) for s in shifts
    ]
    return np.array(shifts)[np.argmin(costs, axis=0)].astype(np.float32)


class Worlds(VecEnv):
    """The vector environment as stable-baselines3 wants it, with the reward of this example."""

    def __init__(self, envs: CoinRunVectorEnv):
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self.envs = envs

    def reset(self):
        self._frames, _ = self.envs.reset(seed=0)
        return self._frames

    def step_async(self, actions):
        self._actions = actions

    def step_wait(self):
        frames, rewards, ends, cut, details = self.envs.step(self._actions)
        over = ends | cut
        last = frames.copy()
        for i in np.nonzero(over)[0]:
            last[i] = details["final_obs"][i]
        rewards = rewards + scroll(self._frames, last)
        self._frames = frames
        infos = [{"TimeLimit.truncated": bool(c and not e)} for c, e in zip(cut, ends, strict=True)]
        for i in np.nonzero(over)[0]:
            infos[i]["terminal_observation"] = last[i]
        return frames, rewards.astype(np.float32), over, infos

    def close(self):
        self.envs.close()

    def get_attr(self, name, indices=None):
        return [getattr(self.envs, name, None)] * self.num_envs

    def set_attr(self, name, value, indices=None):
        setattr(self.envs, name, value)

    def env_method(self, name, *args, indices=None, **kwargs):
        return [getattr(self.envs, name)(*args, **kwargs)] * self.num_envs

    def env_is_wrapped(self, wrapper, indices=None):
        return [False] * self.num_envs


def train(args: argparse.Namespace) -> PPO:
    envs = CoinRunVectorEnv(
        args.worlds,
        checkpoint=args.checkpoint,
        denoising_steps=args.denoising_steps,
        max_episode_steps=args.episode,
        autoreset_mode=AutoresetMode.SAME_STEP,
    )
    wrapped = VecTransposeImage(VecMonitor(Worlds(envs)))
    model = PPO(
        "CnnPolicy",
        wrapped,
        n_steps=16,
        batch_size=64,
        n_epochs=6,
        learning_rate=1e-3,
        gamma=0.9,
        ent_coef=0.01,
        seed=args.seed,
        device="cpu",
        verbose=1,
    )
    begun = time.perf_counter()
    model.learn(args.steps, log_interval=1)
    print(
        f"{model.num_timesteps} steps of {args.worlds} worlds, "
        f"{time.perf_counter() - begun:.0f} s with compilation"
    )
    return model


def play_real(simulator, levels, frames: int, act) -> dict[str, np.ndarray]:
    """Plays levels of the real game; coin taken, pixels to the right, steps, and the frames."""
    playing = simulator.play("coinrun", levels)
    seen = next(playing)
    coins, far, steps = (np.zeros(len(levels)) for _ in range(3))
    shown = [seen.frames]
    for _ in range(frames):
        running = ~seen.over
        following = playing.send(act(seen.frames.copy()).tolist())
        far += scroll(seen.frames, following.frames) * running
        steps += running
        coins += following.rewards > 0
        seen = following
        shown.append(seen.frames)
        if seen.over.all():
            break
    playing.close()
    return {"coins": coins, "pixels": far, "steps": steps, "frames": np.stack(shown, axis=1)}


def play_model(args, first_frames: np.ndarray, frames: int, act) -> np.ndarray:
    """The model's frames from the same first ones, uint8 [N, T, H, W, C]."""
    envs = CoinRunVectorEnv(
        len(first_frames),
        checkpoint=args.checkpoint,
        denoising_steps=args.denoising_steps,
        rewards=False,
        max_episode_steps=None,
    )
    seen, _ = envs.reset(seed=0, options={"frames": first_frames[:, None]})
    shown = [seen]
    for _ in range(frames):
        shown.append(envs.step(act(shown[-1]))[0])
    return np.stack(shown, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a model with heads (checkpoints/pocket)")
    add("--steps", type=int, default=2048, help="of all worlds together (%(default)s)")
    add("--worlds", type=int, default=8, help="generated at once (%(default)s)")
    add("--denoising-steps", type=int, default=1, help="of each frame (%(default)s)")
    add("--episode", type=int, default=64, help="longest episode in the model (%(default)s)")
    add("--levels", type=int, default=100, help="of the real game to play (%(default)s)")
    add("--frames", type=int, default=200, help="of each real level, at most (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--output", type=Path, default=Path("runs/ppo"), help="folder (%(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    model = train(args)
    model.save(args.output / "policy.zip")
    rng = np.random.default_rng(args.seed)
    policies = {
        "trained": lambda frames: model.predict(frames, deterministic=False)[0],
        "random": lambda frames: rng.integers(NUM_ACTIONS, size=len(frames)),
    }
    results, levels = {}, range(LEVELS, LEVELS + args.levels)
    with game.Simulator(venv.ensure()) as simulator:
        for name, act in policies.items():
            played = play_real(simulator, levels, args.frames, act)
            measures = {"coins": played["coins"], "pixels": played["pixels"]}
            results[name] = {k: bootstrap.of_mean(v)._asdict() for k, v in measures.items()}
            for key, found in results[name].items():
                print(
                    f"real game, {name} policy: {key} a level {found['mean']:.2f} "
                    f"[{found['low']:.2f}, {found['high']:.2f}]"
                )
            if name == "trained":
                beside = played["frames"][: args.worlds, :49]
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    made = play_model(args, beside[:, 0], beside.shape[1] - 1, policies["trained"])
    rows = np.concatenate([beside, made], axis=2)  # real above, generated below
    wide = np.concatenate(list(rows), axis=2).repeat(2, axis=1).repeat(2, axis=2)
    video.write_mp4(args.output / "real_and_model.mp4", iter(wide), fps=15)
    print(f"real above, the model below → {args.output / 'real_and_model.mp4'}")


if __name__ == "__main__":
    main()
