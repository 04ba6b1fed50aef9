"""Diffusion: the noise schedule, residual samples, and the warp of the last frame."""
