"""From tokens to router logits: the gating product in the router's precision, and random logits for benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gating_logits(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``x @ weight.T`` with operands and result in ``dtype``, regardless of autocast.

    Args:
        x: ``[tokens, hidden]``, any floating dtype.
        weight: ``[num_experts, hidden]``, any floating dtype.
        dtype: precision of the product and of the gradient products.

    Returns:
        ``[tokens, num_experts]`` in ``dtype``. Gradients come back in the dtypes of ``x`` and ``weight``.
    """
    return _GatingProduct.apply(x, weight, dtype)


def random_logits(logits: Tensor) -> Tensor:
    """Replace logits by standard normal noise of the same shape and dtype; the gradient passes straight through."""
    return _RandomLogits.apply(logits)


class _GatingProduct(torch.autograd.Function):
    """Keeps the operands for backward as they came: a low-precision ``x`` costs no copy in the router's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        with torch.autocast(x.device.type, enabled=False):
            if _exact_on_tensor_cores(x, weight, dtype):
                return torch.mm(x, weight.t(), out_dtype=dtype)
            return x.to(dtype) @ weight.to(dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_logits,) = grads
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = (grad_logits @ weight.to(ctx.dtype)).to(x.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (grad_logits.t() @ x.to(ctx.dtype)).to(weight.dtype)
        return grad_x, grad_weight, None


def _exact_on_tensor_cores(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the operands need no cast: products of two half-precision numbers are exact in fp32, and summed in it."""
    halves = (torch.bfloat16, torch.float16)
    return x.is_cuda and x.dtype == weight.dtype and x.dtype in halves and dtype == torch.float32


class _RandomLogits(torch.autograd.Function):
    """Straight-through, so that the benchmark still pays for the router's backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return torch.randn_like(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]
