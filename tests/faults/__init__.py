"""Faults done to real training runs, and what became of them: `python -m tests.faults`."""
