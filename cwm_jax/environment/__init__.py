"""A trained model as a Gymnasium environment, one world or many.

    import gymnasium
    import cwm_jax.environment  # registers cwm/CoinRun-v0 with Gymnasium

    env = gymnasium.make("cwm/CoinRun-v0", checkpoint="checkpoints/pocket")
    envs = gymnasium.make_vec("cwm/CoinRun-v0", num_envs=8, vectorization_mode="vector_entry_point")

docs/gymnasium.md describes options, rewards and ends of episodes. It needs the extra `env`.
"""

import importlib.util

ID = "cwm/CoinRun-v0"
MAX_EPISODE_STEPS = 500

if importlib.util.find_spec("gymnasium"):  # the modules below report what is missing
    import gymnasium

    gymnasium.register(
        ID,
        entry_point="cwm_jax.environment.single:CoinRunEnv",
        vector_entry_point="cwm_jax.environment.vector:CoinRunVectorEnv",
        max_episode_steps=MAX_EPISODE_STEPS,
    )
