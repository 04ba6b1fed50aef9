"""Kernels for NVIDIA GPUs, and plain JAX functions that compute the same."""
