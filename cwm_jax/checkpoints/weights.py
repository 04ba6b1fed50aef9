"""Parameters in a safetensors file, with their metadata in its header.

Format: https://github.com/huggingface/safetensors.
"""

import json
from pathlib import Path
from typing import Any

import jax
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from cwm_jax.checkpoints import migration
from cwm_jax.errors import UserError
from cwm_jax.files import MODEL_FILE, SAFETENSORS, written_whole

SUFFIX, NAME = SAFETENSORS, MODEL_FILE
_KEY = "cwm_jax"


def write(path: Path, params: dict[str, jax.Array], meta: dict[str, Any]) -> None:
    """Writes parameters by name, atomically.

    `meta` is a JSON object that includes a run's `step` and `config`.

    Raises:
        UserError: `path` cannot be written, such as on a full disk.
    """
    with written_whole(path) as temporary:
        save_file(params, str(temporary), metadata={_KEY: json.dumps(meta)})


def read(path: Path) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The parameters, in the dtype they were written in, and their metadata.

    Raises:
        UserError: there is no such file, or it was not written by `write`.
    """
    try:
        with safe_open(str(path), framework="flax") as file:
            header = (file.metadata() or {}).get(_KEY)
            params = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    return params, _meta(path, header)


def describe(path: Path) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """The shapes of the parameters and their metadata, without starting JAX's devices.

    Raises:
        UserError: as of `read`.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = (file.metadata() or {}).get(_KEY)
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    return shapes, _meta(path, header)


def _meta(path: Path, header: str | None) -> dict[str, Any]:
    if header is None:
        raise UserError(
            f"{path} does not describe its network: it was not exported by this program"
        )
    try:
        meta = json.loads(header)
        meta["config"] = migration.migrated(meta["config"])
        whole = isinstance(meta["step"], int) and isinstance(meta["config"]["model"], dict)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} describes its network in an unknown way: {error!r}") from None
    if not whole:
        raise UserError(f"{path} has no step, or no sizes of its network")
    return meta
