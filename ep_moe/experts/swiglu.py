"""The first projection with SwiGLU behind it, for back ends that compute both at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_moe.comm import ExpertSegments
from ep_moe.experts.activation import activation_backward
from ep_moe.experts.deferred import WeightGradientTask
from ep_moe.experts.gemm import GroupedGemm, grouped_linear, row_major


def swiglu_linear(
    rows: Tensor,
    weight: Tensor,
    row_weights: Tensor | None,
    segments: ExpertSegments,
    gemm: GroupedGemm,
    defer: Callable[[WeightGradientTask], None] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """``grouped_linear``, and ``swiglu(...) * row_weights`` of its result, by ``gemm.swiglu``; strides may be any.

    Backward is that of the two: the derivative of the activation inside a GEMM was slower than in a kernel of its own.

    Args:
        rows: ``[segments.num_rows, hidden]``.
        weight: ``[local_experts, 2 * ffn, hidden]``, gate before linear half.
        row_weights: floating point ``[segments.num_rows]``, or ``None`` for weights of 1.
        segments: which rows belong to which expert.
        gemm: a back end that has ``swiglu``.
        defer: takes the computation of the weight's gradient in the backward pass; ``None`` runs it there.

    Returns:
        The pre-activations ``[segments.num_rows, 2 * ffn]``, differentiable once in ``rows`` and ``weight``, or
        ``None`` where nothing needs a gradient; and the activations, ``[segments.num_rows, ffn]``, without a history:
        :func:`activated` gives them one. Behind the last segment both are unspecified, as are the gradients of rows.
    """
    fused = gemm.swiglu
    assert fused is not None
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in (rows, weight, row_weights)):
        inner, _ = fused(row_major(rows), row_major(weight), segments, row_weights, keep=False)
        return None, inner
    made: list[Tensor] = []

    def forward(rows: Tensor, weight: Tensor, segments: ExpertSegments, /, *, out: Tensor | None = None) -> Tensor:
        inner, pre_activation = fused(rows, weight, segments, row_weights, keep=True, pre_activation=out)
        assert pre_activation is not None
        made.append(inner)
        return pre_activation

    # Of the first projection alone, so that backward is done with the pre-activation before it makes the gradients of
    # rows and weight.
    first = GroupedGemm(forward, gemm.dgrad, gemm.wgrad, in_turns=gemm.in_turns)
    return grouped_linear(rows, weight, segments, first, defer), made.pop()


def activated(
    pre_activation: Tensor, row_weights: Tensor | None, segments: ExpertSegments, activations: Tensor
) -> Tensor:
    """The activations of :func:`swiglu_linear`, differentiable once in the pre-activations and ``row_weights``."""
    result: Tensor = _Activated.apply(pre_activation, row_weights, segments, activations)
    return result


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pre_activation: Tensor, row_weights: Tensor | None, segments: ExpertSegments, activations: Tensor
    ) -> Tensor:
        ctx.save_for_backward(pre_activation, row_weights)
        ctx.segments = segments
        return activations.view_as(activations)  # another tensor, which may have a history

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre_activation, row_weights = ctx.saved_tensors
        need_x, need_weights, *_ = ctx.needs_input_grad
        row_count = ctx.segments.row_count
        grads = activation_backward(
            grad, pre_activation, "swiglu", row_weights, row_count, need_x=need_x, need_weights=need_weights
        )
        return *grads, None, None
