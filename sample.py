"""Generates rollouts as a video: `cwm sample` in a checkout. See cwm_jax/programs/sample.py."""

from cwm_jax.programs.sample import main

if __name__ == "__main__":
    main()
