"""Sampling: DDIM with a KV cache, and rollouts from a prompt."""
