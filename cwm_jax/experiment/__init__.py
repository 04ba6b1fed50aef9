"""A training run: the loop, its settings, its directory, and what it reports."""
