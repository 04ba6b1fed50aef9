"""The four programs, one story each, and `cwm`, the command that starts every program."""
