"""The back end of FP8 products made of PyTorch operations: the oracle, and what runs on a CPU."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ep_moe.comm import ExpertSegments, PackedSegments
from ep_moe.comm.fp8 import BLOCK, E4M3_MAX, MIN_AMAX, dequantize_e4m3, quantize_e4m3
from ep_moe.experts.activation import activation_backward, apply_activation
from ep_moe.experts.fp8 import (
    Fp8ActivationGradients,
    Fp8Columns,
    Fp8Gemm,
    Fp8Rows,
    Fp8Weight,
    Fp8WeightPair,
    Segments,
)
from ep_moe.experts.gemm import store_result


def quantize_rows(rows: Tensor, segments: Segments) -> Fp8Rows:
    """See :class:`Fp8Gemm`."""
    values, scales = quantize_e4m3(rows)
    return Fp8Rows(values, scales.t().contiguous())


def quantize_weight(weight: Tensor, transposed: bool) -> Fp8WeightPair:
    """See :class:`Fp8Gemm`."""
    experts, out_features, in_features = weight.shape
    blocks = weight.float().view(experts, out_features // BLOCK, BLOCK, in_features // BLOCK, BLOCK)
    amax = blocks.abs().amax(dim=(2, 4), keepdim=True).clamp(min=MIN_AMAX)
    largest = amax.new_full((1,), E4M3_MAX)  # a tensor, as in quantize_e4m3
    values = (blocks * (largest / amax)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(weight.shape)
    scales = (amax / largest).view(experts, out_features // BLOCK, in_features // BLOCK)
    other = Fp8Weight(_transpose(values), _transpose(scales)) if transposed else None
    return Fp8WeightPair(Fp8Weight(values, scales), other)


def multiply(
    rows: Fp8Rows, weight: Fp8Weight, segments: Segments, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """See :class:`~ep_moe.experts.fp8.Fp8Multiply`.

    A loop over experts and blocks, which needs the segments' sizes on the host.
    """
    if out is None:
        out = torch.zeros(len(rows.values), weight.values.shape[1], dtype=dtype, device=rows.values.device)
    for expert, (start, end) in enumerate(_places(segments)):
        total = torch.zeros(end - start, out.shape[1], device=out.device)
        blocks = zip(
            rows.values[start:end].float().split(BLOCK, dim=1),
            weight.values[expert].float().split(BLOCK, dim=1),
            rows.scales[:, start:end],
            weight.scales[expert].repeat_interleave(BLOCK, dim=0).unbind(1),
            strict=True,
        )
        for row_values, weight_values, row_scales, weight_scales in blocks:
            total += (row_values @ weight_values.t()) * (row_scales.unsqueeze(1) * weight_scales)
        out[start:end] = total.to(dtype)
    return out


def activate(x: Tensor, activation: str, row_weights: Tensor | None, segments: Segments) -> Fp8Rows:
    """See :class:`~ep_moe.experts.fp8.Fp8Activate`."""
    with torch.no_grad():
        return quantize_rows(apply_activation(x, activation, row_weights), segments)


def activation_gradients(
    grad: Tensor,
    x: Tensor,
    activation: str,
    row_weights: Tensor | None,
    segments: ExpertSegments,
    *,
    need_weights: bool,
    need_activated: bool,
) -> Fp8ActivationGradients:
    """See :class:`~ep_moe.experts.fp8.Fp8BackwardOfActivation`."""
    count = segments.row_count
    with torch.no_grad():
        activated = apply_activation(x, activation, row_weights, count) if need_activated else None
        grad_x, grad_weights = activation_backward(
            grad, x, activation, row_weights, count, need_x=True, need_weights=need_weights
        )
        assert grad_x is not None
        return Fp8ActivationGradients(grad_x, quantize_rows(grad_x, segments), activated, grad_weights)


def quantize_columns(rows: Tensor | Fp8Rows, segments: ExpertSegments, by_expert: bool) -> Fp8Columns:
    """See :class:`Fp8Gemm`."""
    x = rows if isinstance(rows, Tensor) else dequantize_e4m3(rows.values, rows.scales.t(), torch.float32)
    width, full = x.shape[1], torch.full((1,), E4M3_MAX, device=x.device)  # a tensor, as in quantize_e4m3
    values, scales = [], []
    for start, end in _places(segments):
        # Rows of zeros up to the next block.
        slots = F.pad(x[start:end].float(), (0, 0, 0, (start - end) % BLOCK))
        blocks = slots.view(len(slots) // BLOCK, BLOCK, width)
        amax = blocks.abs().amax(dim=1)
        if by_expert:
            amax = amax.amax(dim=0, keepdim=True) if len(amax) else amax.new_zeros(1, width)
        amax = amax.clamp(min=MIN_AMAX)
        scaled = (blocks * (full / amax).unsqueeze(1)).clamp(-E4M3_MAX, E4M3_MAX)
        values.append(_transpose(scaled.to(torch.float8_e4m3fn)))
        scales.append(amax / full)
    return Fp8Columns(torch.cat(values), torch.cat(scales), by_expert)


def quantize_both(rows: Tensor, segments: ExpertSegments, by_expert: bool) -> tuple[Fp8Rows, Fp8Columns]:
    """See :class:`Fp8Gemm`."""
    return quantize_rows(rows, segments), quantize_columns(rows, segments, by_expert)


def wgrad(
    grad: Fp8Columns,
    rows: Fp8Columns,
    segments: ExpertSegments,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    in_turns: bool = False,
) -> Tensor:
    """See :class:`~ep_moe.experts.fp8.Fp8WeightGradient`.

    A loop over experts and blocks, which needs the segments' sizes on the host.
    """
    shape = (len(segments.ends), grad.values.shape[1], rows.values.shape[1])
    totals = torch.zeros(shape, device=grad.values.device)
    block = 0
    for total, row_scales, (start, end) in zip(totals, rows.scales, _places(segments), strict=True):
        for _ in range(start, end, BLOCK):
            product = grad.values[block].float() @ rows.values[block].float().t()
            total += product * grad.scales[block].unsqueeze(1)
            block += 1
        if end > start:
            total *= row_scales
    return store_result(totals.to(dtype if out is None else out.dtype), out, accumulate)


EMULATED = Fp8Gemm(
    quantize_rows,
    quantize_weight,
    multiply,
    activate,
    activation_gradients,
    quantize_columns,
    quantize_both,
    wgrad,
)


def _transpose(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def _places(segments: Segments) -> list[tuple[int, int]]:
    """The first row of each expert, and the one behind its last."""
    if isinstance(segments, PackedSegments):
        starts = [expert * segments.room for expert in range(len(segments.counts))]
        return [(start, start + count) for start, count in zip(starts, segments.counts.tolist(), strict=True)]
    ends = [0, *itertools.accumulate(segments.host_sizes())]
    return list(itertools.pairwise(ends))
