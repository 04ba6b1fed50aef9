"""Small programs around the world model; each runs as `python -m cwm_jax.tools.NAME --help`."""
