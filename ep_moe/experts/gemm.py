"""What a grouped GEMM back end offers: three plain functions, and one autograd function over them.

The functions are apart because schedules want them apart: the data gradient has to go out early, the weight gradient
may be computed late, and may be added to a buffer that is there already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_moe.comm import ExpertSegments
from ep_moe.experts.deferred import WeightGradientTask


class RowProduct(Protocol):
    """A product of rows with weights; see :class:`GroupedGemm`."""

    def __call__(
        self, rows: Tensor, weight: Tensor, segments: ExpertSegments, /, *, out: Tensor | None = None
    ) -> Tensor:
        """Each expert's rows times its matrix.

        Args:
            rows: ``[segments.num_rows, width]``.
            weight: ``[local_experts, out_features, in_features]``.
            segments: which rows belong to which expert.
            out: ``[segments.num_rows, other width]`` to write to, contiguous; a new tensor if ``None``.

        Returns:
            ``out``.
        """
        ...


class WeightGradient(Protocol):
    """The weight gradient of a grouped linear layer; see :class:`GroupedGemm`."""

    def __call__(
        self,
        grad: Tensor,
        rows: Tensor,
        segments: ExpertSegments,
        *,
        out: Tensor | None = None,
        accumulate: bool = False,
    ) -> Tensor:
        """Each expert's ``grad`` transposed times its rows.

        Args:
            grad: ``[segments.num_rows, out_features]``, gradient of the result.
            rows: ``[segments.num_rows, in_features]``, as in ``forward``.
            segments: which rows belong to which expert.
            out: ``[local_experts, out_features, in_features]`` to write to, in the dtype of ``rows`` or in fp32; a new
                tensor in the dtype of ``rows`` if ``None``.
            accumulate: add to ``out`` instead of overwriting it.

        Returns:
            ``out``. Experts without rows have a gradient of zero.
        """
        ...


class WeightProduct(Protocol):
    """The weight gradient of operands that it knows."""

    def __call__(self, *, out: Tensor | None = None, accumulate: bool = False, in_turns: bool = False) -> Tensor:
        """Compute it.

        Args:
            out: as of :class:`WeightGradient`.
            accumulate: likewise.
            in_turns: whether other kernels run beside it; see ``GroupedGemm.in_turns``.

        Returns:
            As :class:`WeightGradient`.
        """
        ...


class PackedForward(Protocol):
    """The product for rows that lie packed, with gaps between the experts; see :class:`GroupedGemm`."""

    def __call__(self, rows: Tensor, weight: Tensor, counts: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Each expert's rows times its transposed weight. An expert without rows costs nothing.

        Args:
            rows: ``[local_experts, room, in_features]``; those of an expert behind its count reach no result.
            weight: ``[local_experts, out_features, in_features]``.
            counts: int32 ``[local_experts]``, on the device.
            out: ``[local_experts, room, out_features]`` to write to, or ``None`` for a new tensor.

        Returns:
            ``out``; rows behind the counts have not been written.
        """
        ...


class SwigluForward(Protocol):
    """The forward of a linear layer with SwiGLU behind it; see :class:`GroupedGemm`."""

    def __call__(
        self,
        rows: Tensor,
        weight: Tensor,
        segments: ExpertSegments,
        row_weights: Tensor | None,
        *,
        keep: bool,
        out: Tensor | None = None,
        pre_activation: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Each expert's rows times its transposed weight, activated, times the rows' routing weights.

        Args:
            rows: ``[segments.num_rows, in_features]``.
            weight: ``[local_experts, 2 * ffn, in_features]``, gate before linear half.
            segments: which rows belong to which expert.
            row_weights: floating point ``[segments.num_rows]``, or ``None`` for weights of 1.
            keep: whether the pre-activations are wanted.
            out: ``[segments.num_rows, ffn]`` to write to; a new tensor if ``None``.
            pre_activation: ``[segments.num_rows, 2 * ffn]`` to write them to, if they are wanted; likewise.

        Returns:
            ``[segments.num_rows, ffn]``, and the pre-activations ``[segments.num_rows, 2 * ffn]`` or ``None``.
        """
        ...


@dataclass(frozen=True)
class GroupedGemm:
    """A back end: one linear layer per expert over the expert's segment of rows, and its two gradients.

    The functions know nothing of autograd. Every tensor they get is dense and row-major. Where the tensors have more
    rows than the segments (``ExpertSegments.capacity``), those behind the last segment are not to be read into any
    result, and are unspecified in results.

    Attributes:
        forward: see :class:`RowProduct`; each expert's rows times its transposed weight, ``[num_rows, in_features]`` to
            ``[num_rows, out_features]``.
        dgrad: likewise; each expert's gradients times its weight, ``[num_rows, out_features]`` to
            ``[num_rows, in_features]``.
        wgrad: see :class:`WeightGradient`.
        forward_packed: see :class:`PackedForward`; ``None`` if the back end has none.
        swiglu: see :class:`SwigluForward`; ``None`` if the back end does not fuse it.
        reads_start: whether all but ``wgrad`` take segments with a ``start``, and leave other rows of ``out`` as they
            are.
        in_turns: the same for work beside other kernels, without ``forward_packed``: several blocks an SM one after the
            other, so that a kernel that starts meanwhile finds SMs when a turn ends, and takes no more from this one
            than those. With a block an SM, one that waits for its SM makes all wait. ``None`` if there is no other.
    """

    forward: RowProduct
    dgrad: RowProduct
    wgrad: WeightGradient
    forward_packed: PackedForward | None = None
    swiglu: SwigluForward | None = None
    reads_start: bool = False
    in_turns: GroupedGemm | None = None


def grouped_linear(
    rows: Tensor,
    weight: Tensor,
    segments: ExpertSegments,
    gemm: GroupedGemm,
    defer: Callable[[WeightGradientTask], None] | None = None,
) -> Tensor:
    """``gemm.forward``, differentiable once in ``rows`` and ``weight``; strides may be any.

    With ``defer`` the backward pass hands it the computation of the weight's gradient instead of running it.
    """
    result: Tensor = _GroupedLinear.apply(rows, weight, segments, gemm, defer)
    return result


def store_result(result: Tensor, out: Tensor | None, accumulate: bool = False) -> Tensor:
    """What a product with ``out`` (and ``accumulate``) asks for, for back ends that can only make a new tensor."""
    if out is None:
        return result
    return out.add_(result) if accumulate else out.copy_(result)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        segments: ExpertSegments,
        gemm: GroupedGemm,
        defer: Callable[[WeightGradientTask], None] | None,
    ) -> Tensor:
        ctx.parameter = weight  # besides the saved one, which may come back as another tensor without main_grad
        rows, weight = row_major(rows), row_major(weight)
        ctx.save_for_backward(rows, weight)
        ctx.segments, ctx.gemm, ctx.defer = segments, gemm, defer
        return gemm.forward(rows, weight, segments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad = row_major(grad)  # sum().backward() hands over an expanded scalar
        need_rows, need_weight, *_ = ctx.needs_input_grad
        grad_rows = ctx.gemm.dgrad(grad, weight, ctx.segments) if need_rows else None
        grad_weight = None
        if need_weight:
            product = weight_product(ctx.gemm, grad, rows, ctx.segments)
            grad_weight = gradient_or_task(ctx.defer, ctx.parameter, product)
        return grad_rows, grad_weight, None, None, None


def weight_product(gemm: GroupedGemm, grad: Tensor, rows: Tensor, segments: ExpertSegments) -> WeightProduct:
    """``gemm.wgrad`` of these operands."""

    def multiply(*, out: Tensor | None = None, accumulate: bool = False, in_turns: bool = False) -> Tensor:
        chosen = gemm.in_turns or gemm if in_turns else gemm
        return chosen.wgrad(grad, rows, segments, out=out, accumulate=accumulate)

    return multiply


def gradient_or_task(
    defer: Callable[[WeightGradientTask], None] | None, weight: Tensor, product: WeightProduct
) -> Tensor | None:
    """:func:`weight_gradient` now, or left to ``defer``, to be computed while rows travel."""
    if defer is None:
        return weight_gradient(weight, product)
    defer(functools.partial(weight_gradient, weight, functools.partial(product, in_turns=True)))
    return None


def weight_gradient(weight: Tensor, product: WeightProduct) -> Tensor:
    """The gradient of ``weight``, or, if it was added to Megatron's ``main_grad``, a tensor without meaning.

    Megatron's ``DistributedDataParallel`` (checked with 0.16 and 0.19) gives its parameters ``main_grad``, a view of
    the buffer that it reduces, and the mark ``grad_added_to_main_grad``. Its hook asks for a gradient to be there, and
    adds it to ``main_grad`` only where the mark is false.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or not hasattr(weight, "grad_added_to_main_grad"):
        return product()
    product(out=main_grad, accumulate=True)
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


def row_major(x: Tensor) -> Tensor:
    """``x``, copied unless its strides are the usual ones; ``contiguous()`` passes any stride in dimensions of one."""
    if x.is_contiguous() and x.stride()[-2:] == (x.shape[-1], 1):
        return x
    return x.new_empty(x.shape).copy_(x)
