"""Evaluation: rollout quality, controllability and drift with their floors, under a protocol."""
