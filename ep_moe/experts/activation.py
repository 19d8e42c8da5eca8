"""Activations of the feed-forward networks, with the routing weight applied inside.

Scaling the inner activation by the routing weight instead of the expert's output is the same function, because
the second projection is linear, and it spares a pass over the wider output as well as its copy for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_moe.experts import activation_kernels


@dataclass(frozen=True)
class _Nonlinearity:
    """A pointwise function, and the product of an incoming gradient with its derivative: ``(grad, x)``."""

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


_SILU = _Nonlinearity(F.silu, torch.ops.aten.silu_backward)
_GELU = _Nonlinearity(F.gelu, torch.ops.aten.gelu_backward)
_RELU = _Nonlinearity(F.relu, lambda grad, x: grad * (x > 0))
_SQUARED_RELU = _Nonlinearity(lambda x: F.relu(x).square(), lambda grad, x: grad * (2 * F.relu(x)))

_GATED = {"swiglu": _SILU, "geglu": _GELU}
_PLAIN = {"gelu": _GELU, "relu": _RELU, "squared_relu": _SQUARED_RELU}


def is_gated(activation: str) -> bool:
    """Whether ``activation`` multiplies an activated half of the first projection by a linear half.

    Raises:
        ValueError: if ``activation`` is unknown.
    """
    if activation not in _GATED and activation not in _PLAIN:
        raise ValueError(f"activation: expected one of {', '.join([*_GATED, *_PLAIN])}, got {activation!r}")
    return activation in _GATED


def fc1_width(activation: str, ffn_hidden_size: int) -> int:
    """Outputs of the first projection: twice ``ffn_hidden_size`` for gated activations.

    Raises:
        ValueError: if ``activation`` is unknown.
    """
    return 2 * ffn_hidden_size if is_gated(activation) else ffn_hidden_size


def apply_activation(
    x: Tensor, activation: str, row_weights: Tensor | None = None, row_count: Tensor | None = None
) -> Tensor:
    """Apply an activation and, if given, scale each row by its routing weight.

    Gated activations split ``x`` into halves, gate first, and compute ``act(gate) * up`` (GLU variants, Shazeer
    2020, arXiv 2002.05202): swiglu with SiLU, geglu with the exact (erf) GELU. The others are gelu (exact),
    relu and squared_relu (So et al. 2021, arXiv 2109.08668). The arithmetic runs in fp32 (fp64 for fp64
    inputs) and the result is rounded once. Backward recomputes it: only ``x`` and the weights are kept.

    On Hopper or newer GPUs, dense bf16, fp16 and fp32 rows whose results are multiples of 16 bytes take one CUDA
    kernel forward and one backward, whose results are the same from run to run. Other rows, and all rows where the
    CUDA library was not built, take PyTorch operations.

    Args:
        x: floating point ``[..., 2 * ffn]`` for gated activations, else ``[..., ffn]``.
        activation: swiglu, geglu, gelu, relu or squared_relu.
        row_weights: floating point ``[...]``, one weight per row, or ``None``.
        row_count: int32, one element, on the device of ``x``: how many of the rows are real, if not all. Rows after
            them cost nothing in the kernels. It must not change before backward.

    Returns:
        ``[..., ffn]`` in the dtype of ``x``. First derivatives only. Rows from ``row_count`` on are unspecified, in
        the result and in both gradients: they may hold anything, NaN too.

    Raises:
        ValueError: if the activation is unknown or the shapes or dtypes do not fit.
    """
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(f"x: expected floating point [..., width], got {x.dtype} {list(x.shape)}")
    if is_gated(activation) and x.shape[-1] % 2:
        raise ValueError(f"x: expected an even width for {activation} (gate, up), got {list(x.shape)}")
    if row_weights is not None:
        check_row_weights(row_weights, x)
    if row_count is not None and (
        row_count.dtype != torch.int32 or row_count.numel() != 1 or row_count.device != x.device
    ):
        raise ValueError(
            f"row_count: expected one int32 element on {x.device} as x, "
            f"got {row_count.dtype} {list(row_count.shape)} on {row_count.device}"
        )
    result: Tensor = _Activation.apply(x, row_weights, activation, row_count)
    return result


def apply_packed_activation(x: Tensor, activation: str, counts: Tensor) -> Tensor:
    """As :func:`apply_activation`, for packed rows: of ``x[e]`` the first ``counts[e]`` are real. No gradients.

    Args:
        x: floating point ``[experts, room, width]``.
        activation: as in :func:`apply_activation`.
        counts: int32 ``[experts]``, on the device of ``x``.

    Returns:
        ``[experts, room, ffn]``; rows behind the counts are unspecified, and cost nothing in the kernel.
    """
    width = _out_width(x, activation)
    if activation_kernels.usable(x, width):
        return activation_kernels.forward_packed(x, activation, counts, width)
    return apply_activation(x, activation)


def activate(
    x: Tensor,
    activation: str,
    row_weights: Tensor | None,
    row_count: Tensor | None,
    *,
    row_start: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`apply_activation` without gradients; arguments as there.

    Args:
        x: as the next three, see there.
        activation: likewise.
        row_weights: likewise.
        row_count: likewise.
        row_start: int32, one element, on the device of ``x``: the first real row, if not 0.
        out: to write real rows to, contiguous; a new tensor if ``None``.
    """
    width = _out_width(x, activation)
    if activation_kernels.usable(x, width):
        return activation_kernels.forward(x, activation, row_weights, row_count, width, row_start=row_start, out=out)
    wide = x.to(_compute_dtype(x))
    if activation in _GATED:
        gate, up = wide.chunk(2, dim=-1)
        result = _GATED[activation].value(gate).mul_(up)
    else:
        result = _PLAIN[activation].value(wide)
    if row_weights is not None:
        result.mul_(row_weights.to(wide.dtype).unsqueeze(-1))
    return result.to(x.dtype) if out is None else _store(result, out, row_start, row_count)


def activation_backward(
    grad: Tensor,
    x: Tensor,
    activation: str,
    row_weights: Tensor | None,
    row_count: Tensor | None,
    *,
    need_x: bool,
    need_weights: bool,
    row_start: Tensor | None = None,
    out: Tensor | None = None,
    activated: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of :func:`activate` in ``x`` and ``row_weights`` from that of its result.

    Arguments as there, and which of the two gradients are wanted; the others are ``None``. That of ``x`` is written to
    ``out``, if given. If ``activated`` is, what the activation makes of ``x`` is written there, bit for bit; it may be
    ``grad``.
    """
    if activation_kernels.usable(x, _out_width(x, activation)):
        return activation_kernels.backward(
            grad,
            x,
            activation,
            row_weights,
            row_count,
            need_x=need_x,
            need_weights=need_weights,
            row_start=row_start,
            out=out,
            activated=activated,
        )
    wide = x.to(_compute_dtype(x))
    # dense: the aten backward kernels below are tuned for it, and sum().backward() hands over an expanded scalar
    grad = grad.to(wide.dtype).contiguous()
    scaled = grad if row_weights is None else grad * row_weights.to(wide.dtype).unsqueeze(-1)
    grad_x = grad_weights = None
    if activation in _GATED:
        nonlinearity = _GATED[activation]
        gate, up = wide.chunk(2, dim=-1)
        value = nonlinearity.value(gate)
        if need_weights:
            grad_weights = (grad * value).mul_(up).sum(-1)
        if need_x:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            grad_gate, grad_up = grad_x.chunk(2, dim=-1)
            grad_gate.copy_(nonlinearity.backward(scaled * up, gate))
            grad_up.copy_(value.mul_(scaled))
    else:
        nonlinearity = _PLAIN[activation]
        if need_weights:
            grad_weights = (grad * nonlinearity.value(wide)).sum(-1)
        if need_x:
            grad_x = nonlinearity.backward(scaled, wide).to(x.dtype)
    if grad_x is not None and out is not None:
        grad_x = _store(grad_x, out, row_start, row_count)
    if grad_weights is not None and row_weights is not None:
        grad_weights = grad_weights.to(row_weights.dtype)
    if activated is not None:
        activate(x, activation, row_weights, row_count, row_start=row_start, out=activated)
    return grad_x, grad_weights


def check_row_weights(row_weights: Tensor, x: Tensor) -> None:
    """Raise ``ValueError`` unless there is a floating point weight for each row of ``x``, on its device."""
    if not row_weights.is_floating_point() or row_weights.shape != x.shape[:-1]:
        raise ValueError(
            f"row_weights: expected floating point {list(x.shape[:-1])}, one per row of x, "
            f"got {row_weights.dtype} {list(row_weights.shape)}"
        )
    if row_weights.device != x.device:
        raise ValueError(f"row_weights: expected device {x.device} as x, got {row_weights.device}")


class _Activation(torch.autograd.Function):
    """Recomputes in backward, so that no fp32 copy of the widest tensor of the layer stays alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row_weights: Tensor | None, activation: str, row_count: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, row_weights, row_count)
        ctx.activation = activation
        return activate(x, activation, row_weights, row_count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, row_weights, row_count = ctx.saved_tensors
        need_x, need_weights, *_ = ctx.needs_input_grad
        grads = activation_backward(
            grad, x, ctx.activation, row_weights, row_count, need_x=need_x, need_weights=need_weights
        )
        return *grads, None, None


def _store(result: Tensor, out: Tensor, row_start: Tensor | None, row_count: Tensor | None) -> Tensor:
    """Write the real rows of ``result`` to ``out``."""
    if row_count is not None:
        row = torch.arange(result.shape[0], device=result.device)
        real = row < row_count if row_start is None else (row >= row_start) & (row < row_count)
        result = torch.where(real.unsqueeze(-1), result, out)
    return out.copy_(result)


def _out_width(x: Tensor, activation: str) -> int:
    return x.shape[-1] // 2 if activation in _GATED else x.shape[-1]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
