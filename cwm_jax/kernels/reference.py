"""What the kernels compute, in plain JAX."""
