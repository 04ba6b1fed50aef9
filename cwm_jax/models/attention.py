"""Spatial, causal temporal and cached attention; softmax in float32 throughout.

Over clips, attention starts from the output of the qkv projection, q | k | v of N heads in one axis
of 3 · D: `along_space` and `along_time` rotate, attend and join the heads.
"""

import contextlib

import jax
import jax.numpy as jnp

from cwm_jax.errors import UserError
from cwm_jax.models import rope

KERNELS = ("auto", "xla", "cudnn", "fused")


def check(kernel: str, dtype: str, *, name: str = "attention") -> None:
    """Raises a UserError where `config.model.NAME` is unknown or does not fit the dtype."""
    if kernel not in KERNELS:
        raise UserError(f"config.model.{name} must be {', '.join(KERNELS)}, not {kernel!r}")
    if kernel in ("cudnn", "fused") and dtype == "float32":
        raise UserError(
            f"config.model.{name}={kernel} works in bfloat16 only, and config.model.dtype is "
            f"float32: choose {name}=xla or dtype=bfloat16"
        )


def check_device(over_space: str, over_time: str) -> None:
    """Raises a UserError where a kernel needs a GPU that is missing."""
    for name, kernel in (("attention", over_space), ("time_attention", over_time)):
        if kernel not in ("cudnn", "fused") or fuses():
            continue
        raise UserError(
            f"config.model.{name}={kernel} needs an NVIDIA GPU of compute capability 8 or "
            f"newer, not {jax.devices()[0].device_kind}: use auto or xla"
        )


def candidates(dtype: jnp.dtype, head_size: int, *, length: int) -> tuple[str, ...]:
    """The `KERNELS` that `auto` compares at these sizes on a GPU that `fuses`; XLA's is the first.

    cuDNN's is none of them: on an H100 its gradient is not a number where scores are extreme, and
    it takes three times as long as the fused one (`benchmarks/RESULTS.md`).

    Args:
        length: of the sequences that attend.
    """
    found = ["xla"]
    if dtype == jnp.bfloat16 and _kernels().fits(length, head_size):
        found.append("fused")
    return tuple(found)


def fuses() -> bool:
    """Whether the device is an NVIDIA GPU of compute capability 8 or newer."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))  # not a number on AMD
    return device.platform == "gpu" and capability[:1].isdigit() and float(capability) >= 8


def split(qkv_BTSC: jax.Array, num_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, not yet rotated, each [B, T, S, N, K]."""
    parts = qkv_BTSC.reshape(*qkv_BTSC.shape[:-1], 3, num_heads, -1)
    q, k, v = jnp.moveaxis(parts, 3, 0)
    return q, k, v


@jax.named_scope("attention")
def along_space(qkv_BTSC, angles_SJ, *, num_heads: int, implementation: str = "xla") -> jax.Array:
    """Full attention among the tokens of each frame → [B, T, S, D].

    Args:
        qkv_BTSC: the projection's output, [B, T, S, 3 · D].
        angles_SJ: of each token, float32 [S, K/2], known at compile time.
        num_heads: N.
        implementation: one of `KERNELS` except auto.
    """
    if _takes(implementation, qkv_BTSC.shape[2], qkv_BTSC, num_heads):
        frames = qkv_BTSC.reshape(-1, qkv_BTSC.shape[2], 1, qkv_BTSC.shape[-1])
        attended = _fused(frames, angles_SJ, num_heads, causal=False)
        return attended.reshape(*qkv_BTSC.shape[:-1], -1)
    q, k, v = split(qkv_BTSC, num_heads)
    turn = lambda x: rope.rotate(x, angles_SJ[:, None])
    return _joined(over_space(turn(q), turn(k), v, implementation=_without(implementation)))


@jax.named_scope("attention")
def along_time(qkv_BTSC, angles_TJ, *, num_heads: int, implementation: str = "xla") -> jax.Array:
    """Causal attention over the frames, separately at each token position → [B, T, S, D].

    The arguments are those of `along_space`, except the angles, which are of each frame.
    """
    if _takes(implementation, qkv_BTSC.shape[1], qkv_BTSC, num_heads):
        return _fused(qkv_BTSC, angles_TJ, num_heads, causal=True)
    q, k, v = split(qkv_BTSC, num_heads)
    turn = lambda x: rope.rotate(x, angles_TJ[:, None, None])
    return _joined(over_time(turn(q), turn(k), v, implementation=_without(implementation)))


def _takes(implementation: str, length: int, qkv_BTSC, num_heads: int) -> bool:
    if implementation != "fused":
        return False
    return _kernels().fits(length, qkv_BTSC.shape[-1] // (3 * num_heads))


def _fused(qkv_RLMC, angles_LJ, num_heads: int, *, causal: bool) -> jax.Array:
    head_size = qkv_RLMC.shape[-1] // (3 * num_heads)
    plan = _kernels().Plan(num_heads=num_heads, head_size=head_size, causal=causal)
    return _kernels().rotary_attention(qkv_RLMC, *rope.cos_sin(angles_LJ), plan)


def _kernels():
    """Imported on use: not every jaxlib has Pallas for GPUs."""
    from cwm_jax.models.kernels import rotary_attention

    return rotary_attention


def _without(implementation: str) -> str:
    """The implementation where the fused kernel does not fit."""
    return "xla" if implementation == "fused" else implementation


def _joined(x_BTSNK: jax.Array) -> jax.Array:
    return x_BTSNK.reshape(*x_BTSNK.shape[:3], -1)


def over_space(q_BTSNK, k_BTSNK, v_BTSNK, *, implementation: str = "xla") -> jax.Array:
    """Full attention among the tokens of each frame → [B, T, S, N, K]."""
    fold = lambda x: x.reshape(-1, *x.shape[2:])
    with _exact(q_BTSNK.dtype):
        out = jax.nn.dot_product_attention(
            fold(q_BTSNK), fold(k_BTSNK), fold(v_BTSNK), implementation=implementation
        )
    return out.reshape(q_BTSNK.shape)


def over_time(q_BTSNK, k_BTSNK, v_BTSNK, *, implementation: str = "xla") -> jax.Array:
    """Causal attention over the frames, separately at each token position → [B, T, S, N, K].

    Token positions are folded into the heads, so nothing is transposed.
    """
    fold = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])
    folded = fold(q_BTSNK), fold(k_BTSNK), fold(v_BTSNK)
    with _exact(q_BTSNK.dtype):
        out = jax.nn.dot_product_attention(*folded, is_causal=True, implementation=implementation)
    return out.reshape(q_BTSNK.shape)


def _exact(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """Full float32 precision: by default a GPU would multiply in TF32."""
    if dtype != jnp.float32:
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


@jax.named_scope("attention")
def over_past(q_BQSNK, k_BTSNK, v_BTSNK, past_k_BSNMK, past_v_BSNMK, visible_BTM) -> jax.Array:
    """New frames attend to the past that they see, to the new ones before them, and to themselves.

    The same sum as `over_time` for the last Q ≤ T of T new frames, in two parts, so that the past
    is read in place instead of copied next to the new frames → [B, Q, S, N, K].
    """
    new, others = k_BTSNK.shape[1], k_BTSNK.shape[1] - q_BQSNK.shape[1]
    # One by one these are sums that XLA fuses; together they would be tiny matrix products.
    attended = []
    for t in range(others, new):
        of_frame = q_BQSNK[:, t - others], k_BTSNK[:, : t + 1], v_BTSNK[:, : t + 1]
        attended.append(_newest_over_past(*of_frame, past_k_BSNMK, past_v_BSNMK, visible_BTM[:, t]))
    return jnp.stack(attended, axis=1)


def _newest_over_past(q_BSNK, k_BTSNK, v_BTSNK, past_k_BSNMK, past_v_BSNMK, visible_BM):
    """`over_past` for the last of T new frames alone, [B, S, N, K]."""
    slots, new = past_k_BSNMK.shape[3], range(k_BTSNK.shape[1])
    exact = dict(preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)
    past_BSNM = jnp.einsum("bsnk,bsnmk->bsnm", q_BSNK, past_k_BSNMK, **exact)
    past_BSNM = jnp.where(visible_BM[:, None, None], past_BSNM, -jnp.inf)
    own_BSN = [jnp.einsum("bsnk,bsnk->bsn", q_BSNK, k_BTSNK[:, t], **exact) for t in new]
    logits = jnp.concatenate([past_BSNM, jnp.stack(own_BSN, axis=-1)], axis=-1)
    weights = jax.nn.softmax(logits * q_BSNK.shape[-1] ** -0.5, axis=-1).astype(v_BTSNK.dtype)
    found = jnp.einsum("bsnm,bsnmk->bsnk", weights[..., :slots], past_v_BSNMK, **exact)
    for t in new:
        found += weights[..., slots + t, None] * v_BTSNK[:, t]
    return found.astype(v_BTSNK.dtype)
