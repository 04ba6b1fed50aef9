"""Sizes, inputs and outputs of the network."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cwm_jax import controls
from cwm_jax.coinrun import NUM_ACTIONS
from cwm_jax.config_group import ConfigGroup, setting
from cwm_jax.errors import UserError
from cwm_jax.models import attention


class Reach(NamedTuple):
    """How far a patch of `patch` × `patch` pixels may be displaced, in pixels."""

    down: int
    across: int
    patch: int

    @property
    def count(self) -> int:
        """Number of displacements to choose from."""
        return (2 * self.down + 1) * (2 * self.across + 1)


STILL_PATCH = 4  # pixels on a side, see `cwm_jax.diffusion.stillness`

_ATTENTION = attention.KERNELS  # a field of the class below has the module's name


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig(ConfigGroup):
    """The network; `config.model` of a config file.

    Fields with `repr=False` are not in the text that share codes identify a network by: codes from
    before these settings existed must stay readable.
    """

    PATH = "config.model"

    hidden_size: int = setting(512, "D, a multiple of 4 · `num_heads`", least=1)
    depth: int = setting(6, "blocks, each a spatial and a temporal half", least=1)
    num_heads: int = setting(8, "attention heads, N", least=1)
    patch_size: int = setting(8, "pixels on a side; 64 tokens a frame", least=1)
    image_size: int = setting(64, "pixels on a side", least=1)
    num_actions: int = setting(15, "actions, or buttons (see `action_encoding`)", least=1)
    max_frames: int = setting(32, "frames in the window of the temporal attention", least=1)
    dtype: str = setting(
        "auto",
        "of the matrix products; `auto`: bfloat16 on a GPU or TPU, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    action_encoding: str = setting(
        "one_hot",
        "`one_hot`: an action is a number; `buttons`: its bit i is button i, any held together",
        choices=controls.ENCODINGS,
    )
    attention: str = setting(
        "auto",
        "kernel of the attention over clips; `fused`, `cudnn`: bfloat16 on NVIDIA; "
        "`auto`: the fastest right one, measured",
        choices=_ATTENTION,
    )
    time_attention: str = setting(
        "same",
        "kernel of the attention over time, if it is not that over space (`attention`)",
        choices=("same", *_ATTENTION),
        repr=False,
    )
    history: int = setting(
        0,
        "context frames shown beside each frame, whose residual is then generated; 0: none",
        least=0,
        repr=False,
    )
    residual_scale: float = setting(
        0.2,
        "with `history`: the unit of residuals (their standard deviation in CoinRun)",
        least=1e-3,
        most=2,
        repr=False,
    )
    prediction: str = setting(
        "velocity",
        "what the network predicts: `velocity`, or the `clean` sample (not with warps or "
        "displacements, which weigh both by a log-variance)",
        choices=("velocity", "clean"),
        repr=False,
    )
    norm: str = setting(
        "auto",
        "kernel of residual addition and norm; `triton`: NVIDIA; `auto`: measured",
        choices=("auto", "xla", "triton"),
        repr=False,
    )
    mlp: str = setting(
        "auto",
        "kernel of the gradient of GELU and of the product after it; `triton`: bfloat16 on "
        "NVIDIA; `auto`: measured",
        choices=("auto", "xla", "triton"),
        repr=False,
    )
    warp_reach: int = setting(
        0,
        "with `history`: pixels by which softmax filters may warp the last frame, at most "
        "`patch_size`; 0: no warp",
        least=0,
        repr=False,
    )
    displacement_down: int = setting(
        0, "with `history`: largest displacement of a patch in rows …", least=0, repr=False
    )
    displacement_across: int = setting(
        0, "… and in columns; both 0: no displacements", least=0, repr=False
    )
    displacement_patch: int = setting(
        4, "pixels on a side that are displaced as one; divides `patch_size`", least=1, repr=False
    )
    warp_sharpness: float = setting(
        1.0,
        "with `warp_reach`: power of the filters' weights in generation, found by `evaluate.py "
        "settings`; 1 in training",
        least=0.1,
        most=100,
        repr=False,
    )
    still_threshold: float = setting(
        0.0,
        "with `history`, in generation: while most of a frame hardly changes, patches that change "
        "by less (root mean square, colours of 0…255) stay as they were; 0: all change",
        least=0,
        most=255,
        repr=False,
    )
    qk_norm: bool = setting(False, "whether queries and keys are scaled to RMS 1", repr=False)
    heads: bool = setting(
        False, "whether reward and end of the episode are predicted too", repr=False
    )

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % (4 * self.num_heads):
            raise UserError(
                f"config.model.hidden_size={self.hidden_size} must be a multiple of 4 · num_heads "
                f"= {4 * self.num_heads}: a head rotates half of its planes by row, half by column"
            )
        if self.image_size % self.patch_size:
            raise UserError(
                f"config.model.image_size={self.image_size} must be a multiple of "
                f"patch_size={self.patch_size}"
            )
        if self.action_encoding == "buttons" and self.num_actions > controls.MAX_BUTTONS:
            raise UserError(
                f"config.model.num_actions={self.num_actions}: there can be at most "
                f"{controls.MAX_BUTTONS} buttons"
            )
        attention.check(self.attention, self.dtype)
        if self.time_attention != "same":
            attention.check(self.time_attention, self.dtype, name="time_attention")
        if self.history >= self.max_frames:
            raise UserError(
                f"config.model.history={self.history} must be less than the window, "
                f"config.model.max_frames={self.max_frames}"
            )
        if self.warp_reach and not self.history:
            raise UserError(
                f"config.model.warp_reach={self.warp_reach} needs config.model.history ≥ 1: it "
                f"warps the last frame"
            )
        if self.warp_reach > self.patch_size:
            raise UserError(
                f"config.model.warp_reach={self.warp_reach} must be at most "
                f"config.model.patch_size={self.patch_size}"
            )
        if self.warp_sharpness != 1 and not self.warp_reach:
            raise UserError(
                f"config.model.warp_sharpness={self.warp_sharpness} needs config.model.warp_reach "
                "≥ 1: it is the power of softmax filters, which this network does not have"
            )
        self._check_still()
        if self.prediction == "clean" and (self.warp_reach or self.reach):
            raise UserError(
                "config.model.prediction='clean' needs warp_reach=0, displacement_down=0 and "
                "displacement_across=0: a network with a warp predicts a residual from it, "
                "scaled by its log-variance; use 'velocity'"
            )
        self._check_displacement()

    def _check_still(self) -> None:
        given = f"config.model.still_threshold={self.still_threshold}"
        if self.still_threshold and not self.history:
            raise UserError(
                f"{given} needs config.model.history ≥ 1: it compares a generated frame with the "
                "last one"
            )
        if self.still_threshold and self.image_size % STILL_PATCH:
            raise UserError(
                f"{given} needs an image_size that is a multiple of {STILL_PATCH}, not "
                f"{self.image_size}"
            )

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
        if not self.history or self.warp_reach:
            raise UserError(
                f"config.model.displacement_down={down} and displacement_across={across} need "
                f"config.model.history ≥ 1, of which they displace the last frame, and warp_reach=0"
            )
        if self.patch_size % patch:
            raise UserError(
                f"config.model.displacement_patch={patch} must divide patch_size={self.patch_size}"
            )

    @property
    def reach(self) -> Reach | None:
        """The reach of discrete displacements; None where there are none."""
        if not (self.displacement_down or self.displacement_across):
            return None
        return Reach(self.displacement_down, self.displacement_across, self.displacement_patch)

    @property
    def taps(self) -> int:
        """Weights of one softmax filter, which reaches `warp_reach` pixels to either side."""
        return 2 * self.warp_reach + 1

    @property
    def action_values(self) -> int:
        """Actions are 0 … action_values − 1, and NO_ACTION."""
        return self.num_actions if self.action_encoding == "one_hot" else 2**self.num_actions

    @property
    def has_coinrun_actions(self) -> bool:
        """Whether the actions are those of `cwm_jax.coinrun`."""
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
    def attentions(self) -> tuple[str, str]:
        """The settings of attention over space, and over time."""
        over_time = self.attention if self.time_attention == "same" else self.time_attention
        return self.attention, over_time

    @property
    def attention_kernels(self) -> tuple[str, str]:
        """`attentions`; auto is xla where `kernel_choice.measured` did not replace it."""
        over_space, over_time = ("xla" if name == "auto" else name for name in self.attentions)
        return over_space, over_time

    @property
    def norm_kernel(self) -> str:
        """`norm`; auto is xla where `kernel_choice.measured` did not replace it."""
        return "xla" if self.norm == "auto" else self.norm

    @property
    def mlp_kernel(self) -> str:
        """`mlp`; auto is xla where `kernel_choice.measured` did not replace it."""
        return "xla" if self.mlp == "auto" else self.mlp
