"""The counts that benchmarks rest on: arithmetic by hand, kernels of a small program, sizes."""

import importlib

import pytest

from benchmarks import hlo, sizes
from cwm_jax import flops, model

PROGRAM = """HloModule made_up

%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %n = f32[8,4]{1,0} negate(%p)
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %loop_fusion = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %loop_fusion)
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %w = bf16[4,4]{1,0} parameter(1)
  %g = (f32[8,4]{1,0}, s8[4096]{0}) custom-call(%a, %w), custom_call_target="__cublas$gemm"
  %c = (s32[], f32[8,4]{1,0}) tuple(%z, %a)
  %l = (s32[], f32[8,4]{1,0}) while(%c), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %copy.1 = f32[8,4]{1,0} copy(%a)
}
"""


def test_kernels_of_a_program():
    found = hlo.kernels(PROGRAM)
    assert found.count == {"matmul (cuBLAS)": 1, "fusion": 5, "copy or transpose": 1}
    assert found.bytes == {
        "matmul (cuBLAS)": 128 + 32 + 128,  # its workspace not counted
        "fusion": 5 * 256,
        "copy or transpose": 256,
    }


def test_arithmetic_of_a_step():
    """61 TFLOP for 128 clips of the small network, nearly all in the linears of its tokens."""
    found = flops.train_step(sizes.network("small", dtype="float32"), clips=128, frames=32)
    assert found.total == pytest.approx(60.9e12, rel=1e-3)
    assert found.linears == 3 * 24 * 512**2 * 12 * 64 * 128 * 32
    assert found.conditioning < 0.01 * found.total


@pytest.mark.parametrize("size", ["small", "large"])
def test_sizes_are_those_of_the_configs(size):
    wanted = importlib.import_module(f"configs.{size}").get_config().model.to_dict()
    assert model.DiTConfig(**wanted) == sizes.network(size)
