"""`python -m cwm_jax.programs.evaluate`."""

from cwm_jax.programs.evaluate import main

main()
