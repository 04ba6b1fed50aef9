"""Kernels for NVIDIA GPUs, each beside a plain-JAX function that computes the same."""
