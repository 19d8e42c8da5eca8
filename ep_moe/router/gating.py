"""From tokens to router logits: the gating product in the router's precision, and random logits for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
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
            if x.dtype == torch.bfloat16 and _exact_on_tensor_cores(x, weight, ctx.dtype):
                return *_backward_by_halves(grad_logits, x, weight, ctx.needs_input_grad), None
            if ctx.needs_input_grad[0]:
                grad_x = (grad_logits @ weight.to(ctx.dtype)).to(x.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (grad_logits.t() @ x.to(ctx.dtype)).to(weight.dtype)
        return grad_x, grad_weight, None


def _exact_on_tensor_cores(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the operands need no cast: products of two half-precision numbers are exact in fp32, and summed in it."""
    halves = (torch.bfloat16, torch.float16)
    return x.is_cuda and x.dtype == weight.dtype and x.dtype in halves and dtype == torch.float32


def _backward_by_halves(
    grad_logits: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient products on tensor cores, with each fp32 gradient as the sum of two bf16 numbers.

    Together they hold 16 bits of it, more than TF32 would, and the products are exact and summed in fp32. (fp16 has not
    the range for it.)
    """
    tokens, experts = grad_logits.shape
    halves = x.new_empty(tokens, 2, experts)
    high, low = halves.unbind(1)
    high.copy_(grad_logits)
    torch.sub(grad_logits, high, out=low)
    halves = halves.view(tokens, 2 * experts)
    grad_x = grad_weight = None
    if needed[0]:
        grad_x = halves @ weight.repeat(2, 1)
    if needed[1]:
        sums = torch.mm(halves.t(), x, out_dtype=torch.float32).view(2, experts, -1)
        grad_weight = torch.add(sums[0], sums[1], out=torch.empty_like(weight))
    return grad_x, grad_weight


class _RandomLogits(torch.autograd.Function):
    """Straight-through, so that the benchmark still pays for the router's backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return torch.randn_like(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]
