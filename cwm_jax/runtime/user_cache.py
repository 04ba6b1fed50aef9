"""The cache folder of this user, for files that can be computed again."""

import os
from pathlib import Path


def folder() -> Path | None:
    """The project's folder in the user's cache (`XDG_CACHE_HOME`, or `~/.cache`).

    None without a home folder: in a container, for a user id without an account.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "cwm_jax"
    try:
        return Path.home() / ".cache" / "cwm_jax"
    except RuntimeError:
        return None
