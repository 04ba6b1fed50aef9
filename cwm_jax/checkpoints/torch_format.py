"""Converts parameters of the PyTorch original to ours and back (NumPy only, no torch).

Besides names, three things differ. Linear weights are stored [out, in] there and [in, out] here.
The patch embedding is a convolution [D, C, row, column] there and a linear over (row, column,
channel) here. And the query and key columns of each head are reordered from interleaved to
half-split planes (see `cwm_jax.models.rope`).
"""

from collections.abc import Mapping

import numpy as np

from cwm_jax.errors import UserError
from cwm_jax.models import rope
from cwm_jax.models.config import DiTConfig

_BEFORE_BLOCKS = {
    "x_embedder.proj": "patch_in",
    "t_embedder.mlp.0": "time_in",
    "t_embedder.mlp.2": "time_out",
    "external_cond": "action",
}
_IN_BLOCK = {
    "attn.to_qkv": "qkv",
    "attn.to_out": "out",
    "mlp.fc1": "mlp_in",
    "mlp.fc2": "mlp_out",
    "adaLN_modulation.1": "modulation",
}
_AFTER_BLOCKS = {
    "final_layer.linear": "patch_out",
    "final_layer.adaLN_modulation.1": "final_modulation",
}
_ROPE = ("spatial", "temporal")


def names(depth: int) -> dict[str, str]:
    """The original's parameter names, in the order of its `parameters()`, and ours."""
    modules = dict(_BEFORE_BLOCKS)
    for block in range(depth):
        for short, half in (("s", "spatial"), ("t", "temporal")):
            for theirs, ours in _IN_BLOCK.items():
                modules[f"blocks.{block}.{short}_{theirs}"] = f"blocks.{block}.{half}.{ours}"
    table = {}
    for theirs, ours in (modules | _AFTER_BLOCKS).items():
        table[f"{theirs}.weight"] = f"{ours}.kernel"
        if not ours.endswith("qkv"):
            table[f"{theirs}.bias"] = f"{ours}.bias"
    return table


def parameters(config: DiTConfig) -> list[str]:
    """The original's `parameters()` by name: its optimizer numbers them in this order.

    The RoPE frequencies are among them, though never trained; blocks share them.
    """
    listed = list(names(config.depth))
    after = listed.index("t_embedder.mlp.2.bias") + 1
    return listed[:after] + [f"{kind}_rotary_emb.freqs" for kind in _ROPE] + listed[after:]


def frequencies(config: DiTConfig) -> dict[str, np.ndarray]:
    """The original's RoPE frequencies, float32, under every name that its state dict has them."""
    values = {
        "spatial": rope.spatial_frequencies(config.head_size),
        "temporal": rope.temporal_frequencies(config.head_size),
    }
    table = {f"{kind}_rotary_emb.freqs": values[kind] for kind in _ROPE}
    for block in range(config.depth):
        for kind in _ROPE:
            table[f"blocks.{block}.{kind[0]}_attn.rotary_emb.freqs"] = values[kind]
    return table


def _to_half_split(kernel: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders query and key columns of a qkv kernel [D, 3 · D]; values stay."""
    return _swapped(kernel, (len(kernel), 3, num_heads, -1, 2))


def _to_interleaved(kernel: np.ndarray, num_heads: int) -> np.ndarray:
    """The inverse of `_to_half_split`."""
    return _swapped(kernel, (len(kernel), 3, num_heads, 2, -1))


def _swapped(kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The kernel, its columns taken as (q, k, v; head; two axes), with the last two exchanged."""
    columns = kernel.reshape(shape)
    queries_and_keys = columns[:, :2].swapaxes(-1, -2).reshape(len(kernel), -1)
    return np.concatenate([queries_and_keys, columns[:, 2].reshape(len(kernel), -1)], axis=-1)


def _weight_in(name: str, value: np.ndarray, num_heads: int) -> np.ndarray:
    if name.endswith("bias"):
        return value
    if name == "patch_in.kernel":
        return value.transpose(2, 3, 1, 0).reshape(-1, len(value))
    kernel = value.T
    return _to_half_split(kernel, num_heads) if name.endswith("qkv.kernel") else kernel


def _weight_out(name: str, value: np.ndarray, config: DiTConfig) -> np.ndarray:
    if name.endswith("bias"):
        return value
    if name == "patch_in.kernel":
        size = config.patch_size
        return value.reshape(size, size, 3, -1).transpose(3, 2, 0, 1)
    kernel = _to_interleaved(value, config.num_heads) if name.endswith("qkv.kernel") else value
    return kernel.T


def infer_config(weights: Mapping[str, np.ndarray], **rest) -> DiTConfig:
    """Reads the sizes off the original's weights; `rest` gives all others.

    Raises:
        UserError: where the weights are not those of the original's network.
    """
    try:
        hidden, _, patch, _ = weights["x_embedder.proj.weight"].shape
        num_actions = weights["external_cond.weight"].shape[1]
        if "spatial_rotary_emb.freqs" in weights:
            rest["num_heads"] = hidden // (4 * weights["spatial_rotary_emb.freqs"].size)
    except (KeyError, ValueError) as error:
        raise UserError(f"these are not weights of the original's DiT: no {error}") from None
    depth = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("blocks."))
    sizes = dict(hidden_size=hidden, depth=depth, patch_size=patch, num_actions=num_actions)
    return DiTConfig(**sizes, **rest)


def from_original(weights: Mapping[str, np.ndarray], config: DiTConfig) -> dict[str, np.ndarray]:
    """The original's parameters as ours; its fixed RoPE frequencies are left out.

    Raises:
        UserError: a parameter is missing or unknown.
    """
    table = names(config.depth)
    given = {name for name in weights if not name.endswith("rotary_emb.freqs")}
    if given != set(table):
        missing, extra = sorted(set(table) - given), sorted(given - set(table))
        raise UserError(
            f"these weights do not fit a DiT of depth {config.depth}: "
            f"missing {missing[:3] or 'none'}, unknown {extra[:3] or 'none'}"
        )
    return {
        ours: _weight_in(ours, np.asarray(weights[theirs]), config.num_heads)
        for theirs, ours in table.items()
    }


def to_original(params: Mapping[str, np.ndarray], config: DiTConfig) -> dict[str, np.ndarray]:
    """Our parameters under the original's names and shapes, in its order; without heads.

    Raises:
        UserError: the original does not have such a network.
    """
    if config.history:
        raise UserError(
            f"config.model.history={config.history}: the original's network takes no context "
            f"frames beside the noisy one, so it cannot hold this model"
        )
    return {
        theirs: np.ascontiguousarray(_weight_out(ours, np.asarray(params[ours]), config))
        for theirs, ours in names(config.depth).items()
    }
