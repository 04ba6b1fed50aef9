"""Measures a world model: `cwm evaluate` in a checkout. See cwm_jax/programs/evaluate/."""

from cwm_jax.programs.evaluate import main

if __name__ == "__main__":
    main()
