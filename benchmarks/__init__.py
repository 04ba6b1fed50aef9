"""What is fast, measured against what; each program prints a table and can write JSON."""
