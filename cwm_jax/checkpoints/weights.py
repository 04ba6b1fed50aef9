"""Parameters in a safetensors file, with all that is known of them in its header.

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
from cwm_jax.files import written_whole

SUFFIX = ".safetensors"
NAME = f"model{SUFFIX}"  # in a folder that holds a model and what is said of it
_KEY = "cwm_jax"


def write(path: Path, params: dict[str, jax.Array], meta: dict[str, Any]) -> None:
    """Writes parameters by name, whole or not at all.

    `meta` is anything that JSON can hold, with a run's `step` and its `config` among it.
    """
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
        meta = json.loads(said)
        meta["config"] = migration.migrated(meta["config"])
        whole = isinstance(meta["step"], int) and isinstance(meta["config"]["model"], dict)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} tells of its network in a way unknown here: {error!r}") from None
    if not whole:
        raise UserError(f"{path} tells of its network without a step and the model's sizes")
    return params, meta
