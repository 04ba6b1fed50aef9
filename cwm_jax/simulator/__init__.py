"""The real game: Procgen, run in an environment of its own, since its wheels need NumPy 1."""
