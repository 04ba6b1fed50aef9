"""Compiled programs kept on disk, so that the second start of a run need not compile."""

import os
from pathlib import Path

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # JAX's own; it wins over the default


def default_folder() -> Path:
    """`cwm_jax/xla` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`)."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "cwm_jax" / "xla"


def enable(folder: str = "auto") -> None:
    """Keeps compiled programs in `folder`; "auto" is `default_folder`, "" keeps none.

    Where `JAX_COMPILATION_CACHE_DIR` is set, "auto" leaves JAX's choice as it is.
    """
    if folder == "auto" and VARIABLE in os.environ:
        return
    chosen = str(default_folder()) if folder == "auto" else folder
    jax.config.update("jax_compilation_cache_dir", chosen or None)


def folder() -> Path | None:
    """Where compiled programs are kept on this machine's disks; None where they are not."""
    chosen = jax.config.jax_compilation_cache_dir
    return Path(chosen) if chosen and "://" not in chosen else None
