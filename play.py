"""Plays a world model in the browser: `cwm play` in a checkout. See cwm_jax/programs/play.py."""

from cwm_jax.programs.play import main

if __name__ == "__main__":
    main()
