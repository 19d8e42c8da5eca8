"""Linear layers of the experts in FP8, with autograd.

Forward and the gradient of the rows multiply in FP8: rows, and gradients of results, are quantised along the reduction
of the product that reads them. The gradient of the weights is a product in the dtype of the rows, or in FP8 too, of
rows and gradients that are quantised along the tokens for it: together with their other form where both are made of the
same tensor, so that forward keeps the rows in FP8 alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_moe.comm import ExpertSegments
from ep_moe.comm.fp8_rows import QuantizedRows, dequantize_rows
from ep_moe.experts.deferred import WeightGradientTask
from ep_moe.experts.fp8 import Fp8Columns, Fp8Gemm, Fp8Rows, Fp8WeightPair, by_blocks
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
    keeps_columns = products.wgrad is None and weight.requires_grad and torch.is_grad_enabled()
    result: Tensor = _Fp8GroupedLinear.apply(
        x, arrived, weight, quantized, segments, products, defer, gradient, keeps_columns
    )
    return result


def weight_product_of(
    products: Fp8Products,
    grad: Tensor | Fp8Columns,
    rows: Tensor | Fp8Rows | Fp8Columns,
    segments: ExpertSegments,
    dtype: torch.dtype,
) -> WeightProduct:
    """The gradient of the weights.

    Operands that are not quantised along the tokens yet are when it is computed, not before.

    Args:
        products: the back ends; quantised along the tokens operands may be without ``wgrad`` alone.
        grad: ``[segments.num_rows, out_features]``, gradient of the result.
        rows: ``[segments.num_rows, in_features]``; the scales of FP8 ones may have any strides.
        segments: which rows belong to which expert.
        dtype: of the rows, and of the result.
    """
    if products.wgrad is not None:
        if isinstance(rows, Fp8Rows):
            rows = dequantize_rows(rows.values, rows.scales.t(), dtype, segments.row_count)
        assert isinstance(grad, Tensor) and isinstance(rows, Tensor)
        return weight_product(products.wgrad, grad, rows, segments)
    fp8 = products.fp8

    def multiply(*, out: Tensor | None = None, accumulate: bool = False, in_turns: bool = False) -> Tensor:
        grad_columns = grad if isinstance(grad, Fp8Columns) else fp8.quantize_columns(grad, segments, False)
        row_columns = rows if isinstance(rows, Fp8Columns) else fp8.quantize_columns(rows, segments, True)
        return fp8.wgrad(grad_columns, row_columns, segments, dtype, out=out, accumulate=accumulate, in_turns=in_turns)

    return multiply


def quantize_gradient(
    products: Fp8Products, grad: Tensor, segments: ExpertSegments, need_weight: bool
) -> tuple[Fp8Rows, Tensor | Fp8Columns]:
    """The gradient of the result as the gradient of the rows reads it, and as that of the weights does, if needed."""
    if need_weight and products.wgrad is None:
        return products.fp8.quantize_both(grad, segments, False)
    return products.fp8.quantize_rows(grad, segments), grad


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
        keeps_columns: bool,
    ) -> Tensor:
        ctx.parameter = weight  # as in grouped_linear
        ctx.segments, ctx.products, ctx.defer = segments, products, defer
        ctx.transposed, ctx.gradient = quantized.transposed, gradient
        ctx.dtype = rows.dtype
        if arrived is not None:
            fp8_rows = Fp8Rows(arrived.values, by_blocks(arrived.scales))
            ctx.save_for_backward(arrived.values, arrived.scales.t())
            ctx.make_rows = Fp8Rows
        elif keeps_columns:
            fp8_rows, columns = products.fp8.quantize_both(row_major(rows), segments, True)
            ctx.save_for_backward(columns.values, columns.scales)
            ctx.make_rows = functools.partial(Fp8Columns, by_expert=True)
        else:
            rows = row_major(rows)
            fp8_rows = products.fp8.quantize_rows(rows, segments)
            ctx.save_for_backward(rows)
            ctx.make_rows = _unchanged
        return products.fp8.multiply(fp8_rows, quantized.weight, segments, rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        quantized = None if ctx.gradient is None else ctx.gradient.take(grad)
        grad = row_major(grad)
        need_rows, _, need_weight, *_ = ctx.needs_input_grad
        products, segments = ctx.products, ctx.segments
        operand: Tensor | Fp8Columns = grad
        grad_rows = grad_weight = None
        if need_rows:
            if quantized is None:
                quantized, operand = quantize_gradient(products, grad, segments, need_weight)
            grad_rows = products.fp8.multiply(quantized, ctx.transposed, segments, ctx.dtype)
        if need_weight:
            product = weight_product_of(products, operand, ctx.make_rows(*ctx.saved_tensors), segments, ctx.dtype)
            grad_weight = gradient_or_task(ctx.defer, ctx.parameter, product)
        return grad_rows, None, grad_weight, None, None, None, None, None, None


def _unchanged(rows: Tensor) -> Tensor:
    return rows
