"""What is fast, measured against what: each module is a program, `python -m benchmarks.NAME`."""
