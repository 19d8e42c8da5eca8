"""Rows that leave in FP8: one kernel gives what PyTorch gives."""

from __future__ import annotations

import pytest
import torch

from ep_moe.comm.fp8 import quantize_e4m3
from ep_moe.comm.fp8_quantize import quantize_rows


def _rows(count: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different sizes, blocks of zeros and tiny values, and some that are not finite."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, hidden, generator=generator) * torch.exp2(torch.arange(count) % 12).unsqueeze(1)
    x[::5, :128] = 0
    x[1::7, -128:] *= 1e-6
    x[2::9, 3], x[3::9, 5] = torch.nan, torch.inf
    return x.to(dtype)


def test_without_the_kernel_pytorch_quantises() -> None:
    x = _rows(40, 256, torch.bfloat16)
    (values, scales), (wanted, wanted_scales) = quantize_rows(x), quantize_e4m3(x)
    assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8)) and scales.is_contiguous()
    torch.testing.assert_close(scales, wanted_scales, rtol=0, atol=0, equal_nan=True)


def test_rows_that_do_not_divide_into_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 128 for fp8, got 100"):
        quantize_rows(torch.zeros(1, 100))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("count", "hidden"), [(0, 128), (1, 128), (77, 384), (1000, 7168)])
def test_kernel_equals_pytorch(count: int, hidden: int, dtype: torch.dtype) -> None:
    x = _rows(count, hidden, dtype).cuda()
    (values, scales), (wanted, wanted_scales) = quantize_rows(x), quantize_e4m3(x)
    assert scales.is_contiguous() and values.dtype == torch.float8_e4m3fn
    assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))
    torch.testing.assert_close(scales, wanted_scales, rtol=0, atol=0, equal_nan=True)
