"""Diffusion: noise schedule, residual samples, and warps of the last frame."""
