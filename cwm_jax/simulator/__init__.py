"""The real game: Procgen, run in a separate Python environment, since its wheels need NumPy 1."""
