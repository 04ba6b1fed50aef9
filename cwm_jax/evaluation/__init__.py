"""Evaluation: rollout quality, controllability and drift beside their floors, under a protocol."""
