"""The second projection of the experts in FP8 with the activation before it, as one node of autograd.

Between the projections activations are there in FP8 alone: forward quantises them as it computes them and keeps the
pre-activations. Backward computes them again, in the dtype of the rows, for the gradient of the weight, in the same
pass that makes the gradient of the pre-activations and its FP8 form, which the first projection reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_moe.comm import ExpertSegments
from ep_moe.experts.deferred import WeightGradientTask
from ep_moe.experts.fp8 import Fp8WeightPair
from ep_moe.experts.fp8_linear import Fp8Products, QuantizedGradient, quantize_gradient, weight_product_of
from ep_moe.experts.gemm import gradient_or_task, row_major


def fp8_activated_linear(
    pre_activation: Tensor,
    row_weights: Tensor | None,
    activation: str,
    weight: Tensor,
    quantized: Fp8WeightPair,
    segments: ExpertSegments,
    products: Fp8Products,
    defer: Callable[[WeightGradientTask], None] | None,
    gradient: QuantizedGradient,
) -> Tensor:
    """``fp8_grouped_linear`` of ``apply_activation`` of the pre-activations, with the same bits.

    Args:
        pre_activation: ``[segments.num_rows, fc1 width]``; where anything needs a gradient, they do.
        row_weights: floating point ``[segments.num_rows]``, or ``None`` for weights of 1.
        activation: as in ``apply_activation``.
        weight: takes the gradient; its values are not read.
        quantized: the copies of ``weight``.
        segments: which rows belong to which expert.
        products: the back ends.
        defer: takes the computation of the weight's gradient instead of running it.
        gradient: takes the gradient of the pre-activations in FP8.

    Returns:
        ``[segments.num_rows, hidden]`` in the dtype of the pre-activations.
    """
    result: Tensor = _Fp8ActivatedLinear.apply(
        pre_activation, row_weights, weight, activation, quantized, segments, products, defer, gradient
    )
    return result


class _Fp8ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre_activation: Tensor,
        row_weights: Tensor | None,
        weight: Tensor,
        activation: str,
        quantized: Fp8WeightPair,
        segments: ExpertSegments,
        products: Fp8Products,
        defer: Callable[[WeightGradientTask], None] | None,
        gradient: QuantizedGradient,
    ) -> Tensor:
        ctx.parameter = weight  # as in grouped_linear
        ctx.activation, ctx.segments, ctx.products, ctx.defer = activation, segments, products, defer
        ctx.transposed, ctx.gradient = quantized.transposed, gradient
        ctx.save_for_backward(pre_activation, row_weights)
        inner = products.fp8.activate(pre_activation, activation, row_weights, segments)
        return products.fp8.multiply(inner, quantized.weight, segments, pre_activation.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre_activation, row_weights = ctx.saved_tensors
        grad, fp8, segments = row_major(grad), ctx.products.fp8, ctx.segments
        _, need_weights, need_weight, *_ = ctx.needs_input_grad
        dtype = pre_activation.dtype
        quantized, operand = quantize_gradient(ctx.products, grad, segments, need_weight)
        grad_inner = fp8.multiply(quantized, ctx.transposed, segments, dtype)
        gradients = fp8.activation_gradients(
            grad_inner,
            pre_activation,
            ctx.activation,
            row_weights,
            segments,
            need_weights=need_weights,
            need_activated=need_weight,
        )
        del grad_inner  # room for what the task makes
        ctx.gradient.put(gradients.x, gradients.quantized)
        grad_weight = None
        if need_weight:
            assert gradients.activated is not None
            product = weight_product_of(ctx.products, operand, gradients.activated, segments, dtype)
            grad_weight = gradient_or_task(ctx.defer, ctx.parameter, product)
        return gradients.x, gradients.row_weights, grad_weight, None, None, None, None, None, None
