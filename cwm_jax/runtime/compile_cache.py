"""Compiled programs cached on disk, so that later starts need not compile."""

import os
import tempfile
from pathlib import Path

import jax

from cwm_jax.errors import echo
from cwm_jax.runtime import user_cache

VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # JAX's own; it overrides the default
_QUICKEST = "jax_persistent_cache_min_compile_time_secs"


def default_folder() -> Path | None:
    """`cwm_jax/xla` in the user's cache folder; None where there is none."""
    caches = user_cache.folder()
    return caches and caches / "xla"


def enable(folder: str = "auto", *, everything: bool = False) -> None:
    """Keeps compiled programs in `folder`; "auto" is `default_folder`, "" keeps none.

    Where `JAX_COMPILATION_CACHE_DIR` is set, "auto" leaves JAX's choice as it is. A folder that
    cannot be written is logged, and nothing is kept.

    Args:
        everything: also programs that compile quickly, unless JAX's own variable is set.
    """
    if everything and _QUICKEST.upper() not in os.environ:
        jax.config.update(_QUICKEST, 0.0)
    if folder == "auto" and VARIABLE in os.environ:
        return
    chosen = default_folder() if folder == "auto" else folder
    jax.config.update("jax_compilation_cache_dir", _usable(chosen) if folder else None)


def folder() -> Path | None:
    """Where compiled programs are kept on this machine's disks; None where they are not."""
    chosen = jax.config.jax_compilation_cache_dir
    return Path(chosen) if chosen and "://" not in chosen else None


def _usable(folder: Path | str | None) -> str | None:
    if folder is None:
        reason = "there is no home folder"
    elif "://" in str(folder):
        return str(folder)
    else:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return str(folder)
        except OSError as error:
            reason = f"{folder} cannot be written ({error.strerror})"
    echo(
        f"warning: {reason}, so compiled programs are not kept and the next start compiles "
        f"again; {VARIABLE} names another folder"
    )
    return None
