"""What a network is before it has any numbers: its sizes, and what it is shown and draws."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cwm_jax import controls
from cwm_jax.coinrun import NUM_ACTIONS
from cwm_jax.errors import UserError
from cwm_jax.models import attention

_MAY_BE_ZERO = ("history", "motion", "displacement_down", "displacement_across")


class Reach(NamedTuple):
    """How far a patch of `patch` × `patch` pixels may move, in pixels."""

    down: int
    across: int
    patch: int

    @property
    def count(self) -> int:
        """Number of displacements to choose from."""
        return (2 * self.down + 1) * (2 * self.across + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of the network; `config.model` of a config file."""

    hidden_size: int  # D
    depth: int  # blocks, each a spatial and a temporal half
    num_heads: int  # N
    patch_size: int  # pixels on a side
    image_size: int  # pixels on a side
    num_actions: int  # actions, or buttons; see `action_encoding`
    max_frames: int  # window of the temporal attention
    dtype: str  # of the matmuls: float32, bfloat16, or auto (bfloat16 on a GPU or TPU)
    # one_hot: an action is a number; buttons: its bit i is button i, and any may be held together.
    # The default is for checkpoints older than the setting.
    action_encoding: str = "one_hot"
    # Over clips: xla, cudnn, fused, or auto (see `kernel_choice`); older checkpoints lack it.
    attention: str = "auto"
    # Earlier frames shown beside each frame, of which then the change is drawn in units of
    # `change_scale`; see `cwm_jax.diffusion.residual`. 0: none, the original's network. Not in the
    # repr, from which share codes know a network: codes older than this must go on to work.
    history: int = dataclasses.field(default=0, repr=False)
    change_scale: float = dataclasses.field(default=0.2, repr=False)
    # What adds the output of a half block and takes the next norm, see `layers.add_and_norm`: xla,
    # triton (NVIDIA GPUs), or auto (see `kernel_choice`).
    norm: str = dataclasses.field(default="auto", repr=False)
    # Pixels by which the last frame's may move, see `cwm_jax.diffusion.warp`. 0: none are moved.
    motion: int = dataclasses.field(default=0, repr=False)
    # Largest displacement of a patch of `displacement_patch` pixels, down or up and across, see
    # `cwm_jax.diffusion.displacement`. 0: none.
    displacement_down: int = dataclasses.field(default=0, repr=False)
    displacement_across: int = dataclasses.field(default=0, repr=False)
    displacement_patch: int = dataclasses.field(default=4, repr=False)
    # The power of the weights of softmax filters (`motion`): above 1 they point more sharply at one
    # place. For generation with a trained model, found by `evaluate.py settings`; 1 in training.
    warp_sharpness: float = dataclasses.field(default=1.0, repr=False)
    qk_norm: bool = dataclasses.field(default=False, repr=False)  # queries and keys of RMS 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in _MAY_BE_ZERO else 1
            if field.type is int and (not isinstance(value, int) or value < least):
                raise UserError(
                    f"config.model.{field.name} must be a whole number ≥ {least}, not {value!r}"
                )
        if self.hidden_size % (4 * self.num_heads):
            raise UserError(
                f"config.model.hidden_size={self.hidden_size} must be a multiple of 4 · num_heads "
                f"= {4 * self.num_heads}: a head turns half of its planes by row, half by column"
            )
        if self.image_size % self.patch_size:
            raise UserError(
                f"config.model.image_size={self.image_size} must be a multiple of "
                f"patch_size={self.patch_size}"
            )
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(
                f"config.model.dtype must be auto, float32 or bfloat16, not {self.dtype!r}"
            )
        if self.action_encoding not in controls.ENCODINGS:
            raise UserError(
                f"config.model.action_encoding must be one of {', '.join(controls.ENCODINGS)}, "
                f"not {self.action_encoding!r}"
            )
        if self.action_encoding == "buttons" and self.num_actions > controls.MAX_BUTTONS:
            raise UserError(
                f"config.model.num_actions={self.num_actions}: there can be at most "
                f"{controls.MAX_BUTTONS} buttons"
            )
        attention.check(self.attention, self.dtype)
        if self.norm not in ("auto", "xla", "triton"):
            raise UserError(f"config.model.norm must be auto, xla or triton, not {self.norm!r}")
        if self.history >= self.max_frames:
            raise UserError(
                f"config.model.history={self.history} must be less than the window, "
                f"config.model.max_frames={self.max_frames}"
            )
        if not 1e-3 <= self.change_scale <= 2:
            raise UserError(f"config.model.change_scale={self.change_scale}: must be 0.001…2")
        if self.motion and not self.history:
            raise UserError(
                f"config.model.motion={self.motion} needs config.model.history ≥ 1: what moves are "
                f"the pixels of the last frame"
            )
        if self.motion > self.patch_size:
            raise UserError(
                f"config.model.motion={self.motion} must be at most "
                f"config.model.patch_size={self.patch_size}"
            )

        if not 0.1 <= self.warp_sharpness <= 100:
            raise UserError(f"config.model.warp_sharpness={self.warp_sharpness}: must be 0.1…100")
        if self.warp_sharpness != 1 and not self.motion:
            raise UserError(
                f"config.model.warp_sharpness={self.warp_sharpness} needs config.model.motion ≥ 1: "
                "it is the power of softmax filters, which this network does not have"
            )
        self._check_displacement()

    def _check_displacement(self) -> None:
        down, across, patch = (
            self.displacement_down,
            self.displacement_across,
            self.displacement_patch,
        )
        if self.reach is None:
            return
        for name, value in (("displacement_down", down), ("displacement_across", across)):
            if not value < self.image_size:
                raise UserError(
                    f"config.model.{name}={value} must be less than image_size={self.image_size}"
                )
        if not self.history or self.motion:
            raise UserError(
                f"config.model.displacement_down={down} and displacement_across={across} need "
                f"config.model.history ≥ 1, of which they displace the last frame, and motion=0"
            )
        if self.patch_size % patch:
            raise UserError(
                f"config.model.displacement_patch={patch} must divide patch_size={self.patch_size}"
            )

    @property
    def reach(self) -> Reach | None:
        """Of discrete displacements; None where there are none."""
        if not (self.displacement_down or self.displacement_across):
            return None
        return Reach(self.displacement_down, self.displacement_across, self.displacement_patch)

    @property
    def taps(self) -> int:
        """Numbers of one softmax filter, which looks `motion` pixels to either side."""
        return 2 * self.motion + 1

    @property
    def action_values(self) -> int:
        """Actions are 0 … action_values − 1, and NO_ACTION."""
        return self.num_actions if self.action_encoding == "one_hot" else 2**self.num_actions

    @property
    def has_coinrun_actions(self) -> bool:
        """Whether action 7 is RIGHT, and so on, as `cwm_jax.coinrun` has them."""
        return (self.num_actions, self.action_encoding) == (NUM_ACTIONS, "one_hot")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def compute_dtype(self) -> jnp.dtype:
        if self.dtype == "auto":
            return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
        return jnp.dtype(self.dtype)

    @property
    def attention_kernel(self) -> str:
        """`attention`; auto is xla where `kernel_choice.measured` did not replace it."""
        return "xla" if self.attention == "auto" else self.attention

    @property
    def norm_kernel(self) -> str:
        """`norm`; auto is xla where `kernel_choice.measured` did not replace it."""
        return "xla" if self.norm == "auto" else self.norm
