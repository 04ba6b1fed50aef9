"""Trains a world model: `cwm train` in a checkout. See cwm_jax/programs/train.py."""

from cwm_jax.programs.train import main

if __name__ == "__main__":
    main()
