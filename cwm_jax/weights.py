"""Parameters in a safetensors file, with all that is known of them in its header.

Format: https://github.com/huggingface/safetensors.
"""

import json
from pathlib import Path
from typing import Any

import jax
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from cwm_jax.errors import UserError
from cwm_jax.files import written_whole

SUFFIX = ".safetensors"
_KEY = "cwm_jax"


def write(path: Path, params: dict[str, jax.Array], meta: dict[str, Any]) -> None:
    """Writes parameters by name, whole or not at all; `meta` is anything that JSON can hold."""
    with written_whole(path) as temporary:
        save_file(params, str(temporary), metadata={_KEY: json.dumps(meta)})


def read(path: Path) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The parameters, in the dtype they were written in, and what was said of them.

    Raises:
        UserError: there is no such file, or it was not written by `write`.
    """
    try:
        with safe_open(str(path), framework="flax") as file:
            said = (file.metadata() or {}).get(_KEY)
            params = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    if said is None:
        raise UserError(f"{path} does not tell of which network it is: it was not exported here")
    try:
        return params, json.loads(said)
    except ValueError as error:
        raise UserError(f"{path} tells of its network in no JSON: {error}") from None
