"""Block-scaled FP8: e4m3 with one fp32 scale per 128 channels, as in the DeepSeek-V3 report (arXiv 2412.19437)."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
# A block of tiny values keeps a finite scale; below this the values round to zero anyway.
MIN_AMAX = 1e-4


def check_blocks(hidden: int) -> None:
    """Raise ``ValueError`` unless rows of ``hidden`` channels divide into blocks."""
    if hidden % BLOCK:
        raise ValueError(f"x: expected a hidden size that is a multiple of {BLOCK} for fp8, got {hidden}")


def quantize_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows to e4m3.

    Args:
        x: floating point ``[rows, hidden]``, ``hidden`` a multiple of 128.

    Returns:
        ``float8_e4m3fn [rows, hidden]`` and fp32 scales ``[rows, hidden / 128]`` such that
        ``values * scale`` approximates ``x``. A block that holds NaN or infinity becomes NaN as a whole.

    Raises:
        ValueError: if ``hidden`` is not a multiple of 128.
    """
    rows, hidden = x.shape
    check_blocks(hidden)
    blocks = x.to(torch.float32).view(rows, hidden // BLOCK, BLOCK)
    amax = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=MIN_AMAX)
    # Division by a Python number is a multiplication by its reciprocal on some devices, which rounds differently;
    # between tensors it is correctly rounded everywhere, so that all devices give the same bits.
    largest = amax.new_full((1,), E4M3_MAX)
    # Clamped because PyTorch versions differ on casts beyond the largest value (NaN or saturation).
    values = (blocks * (largest / amax)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values.view(rows, hidden), (amax / largest).view(rows, hidden // BLOCK)


def quantize_e4m3_ue8m0(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows to e4m3 with power-of-two scales: those of :func:`quantize_e4m3`, rounded up.

    Returns:
        ``float8_e4m3fn [rows, hidden]`` and int32 ``[rows, hidden / 512 rounded up]``, each the UE8M0 exponents of four
        blocks, lowest byte first (OCP microscaling formats 1.0); bytes behind the last block are 0.
    """
    rows, hidden = x.shape
    scales = quantize_e4m3(x)[1]
    # The exponent of the next power of two; infinity and NaN give 255, which is NaN in UE8M0.
    exponents = ((scales.abs().view(torch.int32).to(torch.int64) + 0x7FFFFF) >> 23).clamp(max=255)
    powers = (exponents << 23).to(torch.int32).view(torch.float32)
    blocks = x.to(torch.float32).view(rows, hidden // BLOCK, BLOCK)
    factors = powers.new_ones(()) / powers.unsqueeze(-1)
    values = (blocks * factors).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(rows, hidden)
    packed = exponents.new_zeros((rows, -(-hidden // (4 * BLOCK)) * 4), dtype=torch.uint8)
    packed[:, : exponents.shape[1]] = exponents.to(torch.uint8)
    return values, packed.view(torch.int32)


def dequantize_e4m3(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo :func:`quantize_e4m3`: ``[rows, hidden]`` of ``dtype`` from e4m3 values and their scales."""
    rows, hidden = values.shape
    blocks = values.to(torch.float32).view(rows, hidden // BLOCK, BLOCK)
    return (blocks * scales.unsqueeze(-1)).view(rows, hidden).to(dtype)
