"""A Hugging Face Space that serves the page of `cwm play`."""

import os

from cwm_jax.programs import command


def words() -> list[str]:
    """The command line, from the Space's variables."""
    chosen = os.environ.get("CWM_CHECKPOINT")
    host = os.environ.get("SPACE_HOST")  # set by the Space: the page's name as visitors see it
    return [
        "play",
        *("--host", "0.0.0.0", "--port", "7860"),
        *("--players", os.environ.get("CWM_PLAYERS", "2")),
        *(("--checkpoint", chosen) if chosen else ()),
        *(("--address", f"https://{host}") if host else ()),
    ]


if __name__ == "__main__":
    command.main(words())
