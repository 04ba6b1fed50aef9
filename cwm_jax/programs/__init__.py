"""The four main programs, and `cwm`, the command that starts every program."""
