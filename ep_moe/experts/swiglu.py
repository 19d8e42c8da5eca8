"""The first projection with SwiGLU behind it as one autograd function, for back ends that fuse them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_moe.comm import ExpertSegments
from ep_moe.experts.activation import activation_backward
from ep_moe.experts.deferred import WeightGradientTask
from ep_moe.experts.gemm import GroupedGemm, row_major, weight_gradient


def swiglu_linear(
    rows: Tensor,
    weight: Tensor,
    row_weights: Tensor | None,
    segments: ExpertSegments,
    gemm: GroupedGemm,
    defer: Callable[[WeightGradientTask], None] | None = None,
) -> Tensor:
    """``swiglu(rows @ weight.T) * row_weights`` by ``gemm.swiglu``, differentiable once; strides may be any.

    The same as :func:`~ep_moe.experts.gemm.grouped_linear` and ``apply_activation`` one after the other, and backward
    is theirs: the derivative of the activation inside a GEMM was slower than in a kernel of its own.

    Args:
        rows: ``[segments.num_rows, hidden]``.
        weight: ``[local_experts, 2 * ffn, hidden]``, gate before linear half.
        row_weights: floating point ``[segments.num_rows]``, or ``None`` for weights of 1.
        segments: which rows belong to which expert.
        gemm: a back end that has ``swiglu``.
        defer: takes the computation of the weight's gradient in the backward pass; ``None`` runs it there.

    Returns:
        ``[segments.num_rows, ffn]``. Behind the last segment it is unspecified, as are the gradients of rows and
        ``row_weights``.
    """
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (rows, weight, row_weights))
    result: Tensor = _SwigluLinear.apply(rows, weight, row_weights, segments, gemm, defer, keep)
    return result


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        row_weights: Tensor | None,
        segments: ExpertSegments,
        gemm: GroupedGemm,
        defer: Callable[[WeightGradientTask], None] | None,
        keep: bool,
    ) -> Tensor:
        assert gemm.swiglu is not None
        ctx.parameter = weight  # besides the saved one, which may come back as another tensor without main_grad
        rows, weight = row_major(rows), row_major(weight)
        out, pre_activation = gemm.swiglu(rows, weight, segments, row_weights, keep=keep)
        ctx.save_for_backward(rows, weight, row_weights, pre_activation)
        ctx.segments, ctx.gemm, ctx.defer = segments, gemm, defer
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, row_weights, pre_activation = ctx.saved_tensors
        need_rows, need_weight, need_row_weights, *_ = ctx.needs_input_grad
        grad_pre_activation, grad_row_weights = activation_backward(
            grad,
            pre_activation,
            "swiglu",
            row_weights,
            ctx.segments.row_count,
            need_x=need_rows or need_weight,
            need_weights=need_row_weights,
        )
        grad_rows = grad_weight = None
        if need_rows:
            grad_rows = ctx.gemm.dgrad(grad_pre_activation, weight, ctx.segments)
        if need_weight:
            assert grad_pre_activation is not None
            task = functools.partial(weight_gradient, ctx.parameter, grad_pre_activation, rows, ctx.segments, ctx.gemm)
            grad_weight = task() if ctx.defer is None else ctx.defer(task)
        return grad_rows, grad_weight, grad_row_weights, None, None, None, None
