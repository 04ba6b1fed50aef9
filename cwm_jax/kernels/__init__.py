"""Kernels for NVIDIA GPUs, each with the same formula in plain JAX beside it."""
