"""Further programs for the world model; each runs as `python -m cwm_jax.tools.NAME --help`."""
