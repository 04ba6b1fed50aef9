"""Plays Procgen games; run by the simulator's own Python, so it imports nothing of this project.

Jobs are read from stdin, a line of JSON each, and results are written to stdout:

    record  chunks of episodes, each a line of JSON and then the raw bytes of its arrays; or, if no
            more follow, a line with the error
    replay  a line with a number of bytes, then an npz of that size: the frames of given levels
            under given actions
    play    given levels, one step for each line with a list of actions, until a line with null:
            the raw frames of all (before the first line too), rewards and whether they have ended

One process serves many jobs, since the game needs seconds to load its pictures.
"""

import io
import json
import os
import sys

import numpy as np
from procgen import ProcgenGym3Env

NUM_ACTIONS = 15
PATIENCE = 1000  # consecutive episodes too short to record before giving up
MEAN_HOLD = 8  # mean frames for which a sticky player repeats an action
#                 left:+down   -    +up  down noop  up  right:+down  -    +up   the letter keys
STICKY = np.array([0.01, 0.10, 0.05, 0.02, 0.08, 0.04, 0.02, 0.36, 0.32, 0, 0, 0, 0, 0, 0])


class Players:
    """One player for each environment: some choose at random, some repeat their action."""

    def __init__(self, policy, num, rng):
        self.rng, self.num = rng, num
        self.share = policy.get("sticky", 0) / sum(policy.values())
        self.sticky = np.zeros(num, bool)
        self.held = np.zeros(num, np.int32)
        self.fresh = np.ones(num, bool)
        self.restart(np.ones(num, bool))

    def restart(self, ended):
        """A new player, possibly of another policy, for each new episode."""
        self.sticky = np.where(ended, self.rng.random(self.num) < self.share, self.sticky)
        self.fresh = self.fresh | ended

    def act(self):
        rng = self.rng
        changes = ~self.sticky | self.fresh | (rng.random(self.num) < 1 / MEAN_HOLD)
        uniform = rng.integers(NUM_ACTIONS, size=self.num)
        biased = rng.choice(NUM_ACTIONS, p=STICKY, size=self.num)
        chosen = np.where(self.sticky, biased, uniform)
        self.held = np.where(changes, chosen, self.held).astype(np.int32)
        self.fresh[:] = False
        return self.held


def environment(job, num, seed):
    return ProcgenGym3Env(
        num=num,
        env_name=job["game"],
        start_level=job["first_level"],
        num_levels=job["num_levels"],
        rand_seed=seed,
        num_threads=0,  # in this thread: several workers use a machine better than threads
        distribution_mode=job["difficulty"],
    )


def level_seeds(env):
    return [int(info["level_seed"]) for info in env.get_info()]


def record(job, out):
    """Writes `records` chunks of at most `chunk` frames; shorter ones only if a level ends.

    Stops, and writes the reason, after `PATIENCE` episodes without a chunk of `min_chunk` frames.
    """
    num, length = job["num_envs"], job["chunk"]
    rng = np.random.default_rng(job["seed"])
    env = environment(job, num, int(rng.integers(2**31 - 1)))
    players = Players(job["policy"], num, rng)
    frames = np.empty((num, length, 64, 64, 3), np.uint8)
    actions = np.empty((num, length), np.int32)
    rewards = np.empty((num, length), np.float32)
    filled = np.zeros(num, int)  # frames in each unfinished chunk
    starts = np.zeros(num, int)  # number of each chunk's first frame in its level
    seeds, rows, written = level_seeds(env), np.arange(num), 0
    passed_over, longest = 0, 0  # ends of episodes since the last chunk; frames of the longest
    while written < job["records"] and passed_over < PATIENCE:
        _, seen, _ = env.observe()
        pressed = players.act()
        frames[rows, filled], actions[rows, filled] = seen["rgb"], pressed
        env.act(pressed)
        reward, _, ended = env.observe()
        rewards[rows, filled] = reward
        filled += 1
        for i in np.nonzero(ended | (filled == length))[0]:
            size = filled[i]
            if size >= job["min_chunk"] and written < job["records"]:
                head = {"frames": int(size), "level_seed": seeds[i], "start": int(starts[i])}
                head["ended"] = bool(ended[i])
                out.write(json.dumps(head).encode() + b"\n")
                for part in (frames, actions, rewards):
                    out.write(part[i, :size].tobytes())
                written += 1
                passed_over = 0
            elif ended[i]:
                passed_over, longest = passed_over + 1, max(longest, size)
            starts[i] = 0 if ended[i] else starts[i] + size
            filled[i] = 0
        if ended.any():
            players.restart(ended)
            seeds = level_seeds(env)
    env.close()
    if written < job["records"]:
        fault = (
            f"{PATIENCE} episodes of {job['game']} in a row had no {job['min_chunk']} frames to "
            f"record, but {longest} at most: lower --min-chunk"
        )
        out.write(json.dumps({"fault": fault}).encode() + b"\n")


def replay(job, out):
    """Plays each run's actions in its level until the level ends."""
    arrays = {}
    for number, run in enumerate(job["runs"]):
        level = {**job, "first_level": run["level_seed"], "num_levels": 1}
        env = environment(level, 1, 0)
        frames, rewards, over = [env.observe()[1]["rgb"][0].copy()], [], False
        for action in run["actions"]:
            env.act(np.array([action], np.int32))
            reward, seen, ended = env.observe()
            rewards.append(float(reward[0]))
            over = bool(ended[0])
            if over:  # the frame is of the next level
                break
            frames.append(seen["rgb"][0].copy())
        env.close()
        arrays[f"frames_{number}"] = np.array(frames)
        arrays[f"rewards_{number}"] = np.array(rewards, np.float32)
        arrays[f"ended_{number}"] = np.array(over)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    out.write(b"%d\n" % buffer.tell() + buffer.getvalue())


def play(job, out):
    """Plays levels by actions read step by step; a level that has ended keeps its last frame."""
    envs = [environment({**job, "first_level": s, "num_levels": 1}, 1, 0) for s in job["levels"]]
    num = len(envs)
    frames = np.stack([env.observe()[1]["rgb"][0] for env in envs])
    rewards, over = np.zeros(num, np.float32), np.zeros(num, bool)
    while True:
        for part in (frames, rewards, over):
            out.write(part.tobytes())
        out.flush()
        actions = json.loads(sys.stdin.buffer.readline())
        if actions is None:
            break
        rewards = np.zeros(num, np.float32)
        for i in np.nonzero(~over)[0]:
            envs[i].act(np.array([actions[i]], np.int32))
            reward, seen, ended = envs[i].observe()
            rewards[i], over[i] = reward[0], ended[0]
            if not over[i]:  # else the frame is of the next level
                frames[i] = seen["rgb"][0]
    for env in envs:
        env.close()


def main():
    out = os.fdopen(os.dup(1), "wb", buffering=1 << 20)
    os.dup2(2, 1)  # prints of libraries must not mix with the frames
    for line in sys.stdin.buffer:
        job = json.loads(line)
        {"record": record, "replay": replay, "play": play}[job["do"]](job, out)
        out.flush()


if __name__ == "__main__":
    main()
