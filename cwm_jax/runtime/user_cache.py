"""Where what can be made again is kept for this user."""

import os
from pathlib import Path


def folder() -> Path | None:
    """The project's folder in the user's cache (`XDG_CACHE_HOME`, or `~/.cache`).

    None where there is no home folder: in a container, for a user id that no file knows.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "cwm_jax"
    try:
        return Path.home() / ".cache" / "cwm_jax"
    except RuntimeError:
        return None
