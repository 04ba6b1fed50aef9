"""Whether JAX has the requested device."""

import os

import jax

from cwm_jax.errors import UserError


def check() -> None:
    """Starts JAX's devices; after `hosts.join` where there are several processes.

    Raises:
        UserError: there are none, such as where `JAX_PLATFORMS` names a GPU and JAX has no build
            for it.
    """
    if fault := missing():
        raise UserError(
            f"{fault}: unset JAX_PLATFORMS or set it to cpu to compute on the CPU, or install the "
            f"JAX build for the device. `python -m cwm_jax.tools.doctor` checks the machine"
        )


def missing() -> str:
    """Why JAX has no devices; empty where it has some."""
    try:
        jax.devices()
    except Exception as error:  # a RuntimeError, or an AssertionError without a message
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        requested = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms
        what = f"JAX has no device for JAX_PLATFORMS={requested}" if requested else "no devices"
        return f"{what} ({reason})"
    return ""
