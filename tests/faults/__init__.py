"""Injects faults into real training runs and checks the results: `python -m tests.faults`."""
