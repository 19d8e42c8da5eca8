"""Block-scaled FP8: rounding, scales, extreme values."""

from __future__ import annotations

import pytest
import torch

from ep_moe.comm.fp8 import dequantize_e4m3, quantize_e4m3, quantize_e4m3_ue8m0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_error_is_that_of_three_mantissa_bits(dtype: torch.dtype) -> None:
    x = (torch.randn(50, 384) * torch.logspace(-2, 3, 50)[:, None]).to(dtype)
    values, scales = quantize_e4m3(x)
    assert values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    assert values.shape == x.shape and scales.shape == (50, 3)
    amax = x.float().view(50, 3, 128).abs().amax(-1)
    torch.testing.assert_close(scales, amax / 448, rtol=0, atol=0)
    back = dequantize_e4m3(values, scales, torch.float64)
    exact = x.double()
    # Half a unit in the last of 3 mantissa bits, or half the least subnormal (2^-9) in units of the scale.
    bound = torch.maximum(exact.abs() * 2**-4, scales.double().repeat_interleave(128, 1) * 2**-10)
    assert ((back - exact).abs() <= bound * 1.001).all()


def test_the_largest_value_of_a_block_is_kept() -> None:
    x = torch.tensor([[-3.0] + [0.5] * 127])
    assert dequantize_e4m3(*quantize_e4m3(x), torch.float32)[0, 0] == -3.0


def test_zeros_and_tiny_values() -> None:
    x = torch.zeros(2, 128)
    x[1] = 1e-30
    values, scales = quantize_e4m3(x)
    assert (values.float() == 0).all() and torch.isfinite(scales).all() and (scales > 0).all()


def test_non_finite_blocks_do_not_touch_others() -> None:
    x = torch.ones(1, 384)
    x[0, 0], x[0, 130] = float("nan"), float("inf")
    back = dequantize_e4m3(*quantize_e4m3(x), torch.float32)
    assert back[0, 0].isnan() and not back[0, 130].isfinite()
    assert (back[0, 256:] == 1).all()


def test_no_rows() -> None:
    values, scales = quantize_e4m3(torch.zeros(0, 256))
    assert values.shape == (0, 256) and scales.shape == (0, 2)


def test_a_ragged_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="multiple of 128 for fp8, got 100"):
        quantize_e4m3(torch.zeros(1, 100))


@pytest.mark.gpu
def test_gpu_and_cpu_give_the_same_bits() -> None:
    x = torch.randn(200, 512)
    for cpu, gpu in zip(quantize_e4m3(x), quantize_e4m3(x.cuda()), strict=True):
        assert torch.equal(cpu.view(torch.uint8), gpu.cpu().view(torch.uint8))


def test_power_of_two_scales() -> None:
    x = torch.randn(6, 640, dtype=torch.float64).float() * torch.tensor([1e-6, 1e-3, 1.0, 300.0, 1e20, 1.0])[:, None]
    x[5, 0], x[5, 200], x[5, 300] = float("nan"), float("inf"), 448.0
    values, packed = quantize_e4m3_ue8m0(x)
    assert values.dtype == torch.float8_e4m3fn and packed.dtype == torch.int32 and packed.shape == (6, 2)
    exponents = packed.view(torch.uint8)
    assert (exponents[:, 5:] == 0).all()  # behind the last of 5 blocks
    assert exponents[5, :2].tolist() == [255, 255]  # NaN
    exact = quantize_e4m3(x)[1]
    scales = torch.pow(2.0, exponents[:, :5].double() - 127)
    finite = exact.isfinite()
    assert ((scales >= exact) & (scales < 2 * exact.double()))[finite].all()
    assert scales[5, 2] == 1.0  # 448 / 448 needs no rounding
    blocks = values.float().view(6, 5, 128).double() * scales[:, :, None]
    error = (blocks - x.view(6, 5, 128).double()).abs()
    assert (error <= x.view(6, 5, 128).abs().double() * 2**-4 + scales[:, :, None] * 2**-9)[finite].all()
