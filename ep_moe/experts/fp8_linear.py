"""Linear layers of the experts in FP8, with autograd.

Forward and the gradient of the rows multiply in FP8: rows, and gradients of results, are quantised along the reduction
of the product that reads them. The gradient of the weights is a product in the dtype of the rows.
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
from ep_moe.experts.deferred import WeightGradientTask
from ep_moe.experts.fp8 import Fp8Gemm, Fp8Rows, Fp8WeightPair
from ep_moe.experts.gemm import GroupedGemm, row_major, weight_gradient
from ep_moe.experts.recompute import Recipe, kept


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
    """The back ends of the three products of a linear layer: ``fp8`` of the first two, ``wgrad`` of the third."""

    fp8: Fp8Gemm
    wgrad: GroupedGemm


def fp8_grouped_linear(
    rows: Tensor,
    weight: Tensor,
    quantized: Fp8WeightPair,
    segments: ExpertSegments,
    products: Fp8Products,
    defer: Callable[[WeightGradientTask], None] | None = None,
    recipe: Recipe | None = None,
    gradient: QuantizedGradient | None = None,
) -> Tensor:
    """As :func:`~ep_moe.experts.gemm.grouped_linear`, with both factors rounded to FP8.

    Gradients pass the rounding as if it were not there (straight-through).

    Args:
        rows: ``[segments.num_rows, in_features]``.
        weight: takes the gradient; its values are not read.
        quantized: the copies of ``weight``; the transposed one serves the gradient of ``rows``.
        segments: which rows belong to which expert.
        products: the back ends.
        defer: takes the computation of the weight's gradient instead of running it.
        recipe: to make ``rows`` again in backward instead of keeping them.
        gradient: where that of the result may be found in FP8.

    Returns:
        ``[segments.num_rows, out_features]`` in the dtype of ``rows``.
    """
    result: Tensor = _Fp8GroupedLinear.apply(rows, weight, quantized, segments, products, defer, recipe, gradient)
    return result


class _Fp8GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        quantized: Fp8WeightPair,
        segments: ExpertSegments,
        products: Fp8Products,
        defer: Callable[[WeightGradientTask], None] | None,
        recipe: Recipe | None,
        gradient: QuantizedGradient | None,
    ) -> Tensor:
        ctx.parameter = weight  # as in grouped_linear
        ctx.segments, ctx.products, ctx.defer = segments, products, defer
        ctx.transposed, ctx.gradient = quantized.transposed, gradient
        rows = row_major(rows)
        recipe = recipe or kept(rows)
        ctx.save_for_backward(*recipe.tensors)
        ctx.make_rows, ctx.dtype = recipe.make, rows.dtype
        return products.fp8.multiply(products.fp8.quantize_rows(rows, segments), quantized.weight, segments, rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        quantized = None if ctx.gradient is None else ctx.gradient.take(grad)
        grad = row_major(grad)
        need_rows, need_weight, *_ = ctx.needs_input_grad
        fp8, segments = ctx.products.fp8, ctx.segments
        grad_rows = grad_weight = None
        if need_rows:
            quantized = quantized or fp8.quantize_rows(grad, segments)
            grad_rows = fp8.multiply(quantized, ctx.transposed, segments, ctx.dtype)
        if need_weight:
            rows = ctx.make_rows(*ctx.saved_tensors)
            task = functools.partial(weight_gradient, ctx.parameter, grad, rows, segments, ctx.products.wgrad)
            grad_weight = task() if ctx.defer is None else ctx.defer(task)
        return grad_rows, grad_weight, None, None, None, None, None, None
