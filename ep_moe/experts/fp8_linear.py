"""Linear layers of the experts in FP8, with autograd.

Forward and the gradient of the rows multiply in FP8: rows, and gradients of results, are quantised along the reduction
of the product that reads them. The gradient of the weights is a product in the dtype of the rows, or in FP8 too, of
rows and gradients that are quantised along the tokens for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_moe.comm import ExpertSegments
from ep_moe.comm.fp8_rows import QuantizedRows, dequantize_rows
from ep_moe.experts.deferred import WeightGradientTask
from ep_moe.experts.fp8 import Fp8Gemm, Fp8Rows, Fp8WeightPair, by_blocks
from ep_moe.experts.gemm import GroupedGemm, WeightProduct, gradient_or_task, row_major, weight_product


class QuantizedGradient:
    """A gradient in FP8 on its way to the node behind, beside the tensor that autograd hands on.

    It is held until it is taken, with that tensor, whose memory can so not become another's.
    """

    def __init__(self) -> None:
        self._held: tuple[Tensor, int, Fp8Rows] | None = None

    def put(self, gradient: Tensor, quantized: Fp8Rows) -> None:
        """Leave the FP8 form of ``gradient``."""
        self._held = gradient, gradient._version, quantized

    def take(self, gradient: Tensor) -> Fp8Rows | None:
        """The FP8 form of ``gradient``, if that is the tensor that was left and nothing was added to it since."""
        held, self._held = self._held, None
        if held is None or held[0].data_ptr() != gradient.data_ptr() or held[1] != gradient._version:
            return None
        return held[2]


@dataclass(frozen=True)
class Fp8Products:
    """The back ends of the three products of a linear layer: ``fp8`` of the first two, ``wgrad`` of the third.

    Without ``wgrad``, ``fp8`` of all three.
    """

    fp8: Fp8Gemm
    wgrad: GroupedGemm | None


def fp8_grouped_linear(
    rows: Tensor | QuantizedRows,
    weight: Tensor,
    quantized: Fp8WeightPair,
    segments: ExpertSegments,
    products: Fp8Products,
    defer: Callable[[WeightGradientTask], None] | None = None,
    *,
    gradient: QuantizedGradient | None = None,
) -> Tensor:
    """As :func:`~ep_moe.experts.gemm.grouped_linear`, with both factors rounded to FP8.

    Gradients pass the rounding as if it were not there (straight-through).

    Args:
        rows: ``[segments.num_rows, in_features]``; or in FP8, of which backward makes those that it needs.
        weight: takes the gradient; its values are not read.
        quantized: the copies of ``weight``; the transposed one serves the gradient of ``rows``.
        segments: which rows belong to which expert.
        products: the back ends.
        defer: takes the computation of the weight's gradient instead of running it.
        gradient: where that of the result may be found in FP8.

    Returns:
        ``[segments.num_rows, out_features]`` in the dtype of ``rows``.
    """
    arrived, x = (rows, rows.stand_in) if isinstance(rows, QuantizedRows) else (None, rows)
    result: Tensor = _Fp8GroupedLinear.apply(x, arrived, weight, quantized, segments, products, defer, gradient)
    return result


def weight_product_of(
    products: Fp8Products, grad: Tensor, rows: Tensor | Fp8Rows, segments: ExpertSegments
) -> WeightProduct:
    """The gradient of the weights, in the dtype of ``grad``.

    In FP8 operands are quantised when it is computed: what is left for later waits in the dtype in which it came.

    Args:
        products: the back ends.
        grad: ``[segments.num_rows, out_features]``, gradient of the result.
        rows: ``[segments.num_rows, in_features]``; the scales of FP8 ones may have any strides.
        segments: which rows belong to which expert.
    """
    fp8 = products.fp8
    if products.wgrad is not None:
        if isinstance(rows, Fp8Rows):
            rows = dequantize_rows(rows.values, rows.scales.t(), grad.dtype, segments.row_count)
        return weight_product(products.wgrad, grad, rows, segments)

    def multiply(*, out: Tensor | None = None, accumulate: bool = False, in_turns: bool = False) -> Tensor:
        columns = fp8.quantize_columns(grad, segments), fp8.quantize_columns(rows, segments)
        return fp8.wgrad(*columns, segments, grad.dtype, out=out, accumulate=accumulate, in_turns=in_turns)

    return multiply


class _Fp8GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        arrived: QuantizedRows | None,
        weight: Tensor,
        quantized: Fp8WeightPair,
        segments: ExpertSegments,
        products: Fp8Products,
        defer: Callable[[WeightGradientTask], None] | None,
        gradient: QuantizedGradient | None,
    ) -> Tensor:
        ctx.parameter = weight  # as in grouped_linear
        ctx.segments, ctx.products, ctx.defer = segments, products, defer
        ctx.transposed, ctx.gradient = quantized.transposed, gradient
        ctx.dtype = rows.dtype
        if arrived is None:
            rows = row_major(rows)
            fp8_rows = products.fp8.quantize_rows(rows, segments)
            ctx.save_for_backward(rows)
        else:
            fp8_rows = Fp8Rows(arrived.values, by_blocks(arrived.scales))
            ctx.save_for_backward(arrived.values, arrived.scales)
        return products.fp8.multiply(fp8_rows, quantized.weight, segments, rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        quantized = None if ctx.gradient is None else ctx.gradient.take(grad)
        grad = row_major(grad)
        need_rows, _, need_weight, *_ = ctx.needs_input_grad
        fp8, segments = ctx.products.fp8, ctx.segments
        grad_rows = grad_weight = None
        if need_rows:
            quantized = quantized or fp8.quantize_rows(grad, segments)
            grad_rows = fp8.multiply(quantized, ctx.transposed, segments, ctx.dtype)
        if need_weight:
            rows, *scales = ctx.saved_tensors
            product = weight_product_of(ctx.products, grad, Fp8Rows(rows, scales[0].t()) if scales else rows, segments)
            grad_weight = gradient_or_task(ctx.defer, ctx.parameter, product)
        return grad_rows, None, grad_weight, None, None, None, None, None
