"""The second projection of the experts with the activation before it, as one node of autograd.

Only the pre-activations are kept between forward and backward, which the gradient of the activation needs anyway.
Backward makes the activations again in the pass that computes their gradient, for the gradient of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_moe.comm import ExpertSegments
from ep_moe.experts.activation import activate, activation_backward
from ep_moe.experts.deferred import WeightGradientTask
from ep_moe.experts.gemm import GroupedGemm, gradient_or_task, row_major, weight_product


def activated_linear(
    pre_activation: Tensor,
    row_weights: Tensor | None,
    activation: str,
    weight: Tensor,
    segments: ExpertSegments,
    gemm: GroupedGemm,
    defer: Callable[[WeightGradientTask], None] | None,
    activated: Tensor | None,
) -> Tensor:
    """``grouped_linear`` of ``apply_activation`` of the pre-activations, with the same bits.

    Args:
        pre_activation: ``[segments.num_rows, fc1 width]``; takes a gradient.
        row_weights: floating point ``[segments.num_rows]``, or ``None`` for weights of 1.
        activation: as in ``apply_activation``.
        weight: ``[local_experts, hidden, ffn]``.
        segments: which rows belong to which expert.
        gemm: the back end.
        defer: takes the computation of the weight's gradient instead of running it.
        activated: what the activation makes of the first two, if somebody has computed it.

    Returns:
        ``[segments.num_rows, hidden]``.
    """
    result: Tensor = _ActivatedLinear.apply(
        pre_activation, row_weights, weight, activation, segments, gemm, defer, activated
    )
    return result


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre_activation: Tensor,
        row_weights: Tensor | None,
        weight: Tensor,
        activation: str,
        segments: ExpertSegments,
        gemm: GroupedGemm,
        defer: Callable[[WeightGradientTask], None] | None,
        activated: Tensor | None,
    ) -> Tensor:
        ctx.parameter = weight  # as in grouped_linear
        ctx.activation, ctx.segments, ctx.gemm, ctx.defer = activation, segments, gemm, defer
        weight = row_major(weight)
        ctx.save_for_backward(pre_activation, row_weights, weight)
        if activated is None:
            activated = activate(pre_activation, activation, row_weights, segments.row_count)
        return gemm.forward(activated, weight, segments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre_activation, row_weights, weight = ctx.saved_tensors
        grad, segments = row_major(grad), ctx.segments
        _, need_weights, need_weight, *_ = ctx.needs_input_grad
        grad_inner = ctx.gemm.dgrad(grad, weight, segments)
        grad_pre_activation, grad_row_weights = activation_backward(
            grad_inner,
            pre_activation,
            ctx.activation,
            row_weights,
            segments.row_count,
            need_x=True,
            need_weights=need_weights,
            activated=grad_inner if need_weight else None,  # whose values have been read by then
        )
        grad_weight = None
        if need_weight:
            product = weight_product(ctx.gemm, grad, grad_inner, segments)
            grad_weight = gradient_or_task(ctx.defer, ctx.parameter, product)
        return grad_pre_activation, grad_row_weights, grad_weight, None, None, None, None, None
