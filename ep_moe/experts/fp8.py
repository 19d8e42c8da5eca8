"""FP8 operands of the experts' products, and what a back end for them offers.

Values are e4m3. Rows have an fp32 scale for each 128 elements, weights one for each 128 x 128; the products of 128
elements of the reduction are summed, scaled and added up in fp32, as the DeepSeek-V3 report describes (arXiv
2412.19437, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ep_moe.comm import ExpertSegments, PackedSegments
from ep_moe.comm.fp8 import BLOCK

Segments = ExpertSegments | PackedSegments

_SCALES_OF_VECTOR = 4  # in 16 bytes


@dataclass(frozen=True)
class Fp8Rows:
    """Quantised rows.

    Attributes:
        values: e4m3 ``[num_rows, width]``.
        scales: fp32 ``[width / 128, num_rows]``, so that neighbouring rows have neighbouring scales; as
            :func:`empty_scales` lays them out.
    """

    values: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Fp8Weight:
    """Quantised weights of a linear layer an expert.

    Attributes:
        values: e4m3 ``[local_experts, out_features, in_features]``.
        scales: fp32 ``[local_experts, out_features / 128, in_features / 128]``.
    """

    values: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Fp8WeightPair:
    """A weight for the forward product, and transposed for the gradient of rows; ``None`` where nobody asks for one."""

    weight: Fp8Weight
    transposed: Fp8Weight | None


@dataclass(frozen=True)
class Fp8ActivationGradients:
    """What backward needs of an activation that lies between two products.

    Attributes:
        x: the gradient of the pre-activations, in their dtype.
        quantized: the same, quantised after that rounding.
        activated: the activations, in the dtype of ``x``, or ``None`` if not asked for.
        row_weights: the gradient of the routing weights in their dtype, or ``None`` if not asked for.
    """

    x: Tensor
    quantized: Fp8Rows
    activated: Tensor | None
    row_weights: Tensor | None


@dataclass(frozen=True)
class Fp8Columns:
    """Rows quantised along their columns: operands of the gradient of weights.

    Tokens lie in blocks of 128, which belong to one expert each: every expert's start a block, and what its last block
    has room for beyond them is zero. Gradients have a scale for each block of a channel. Rows of a linear layer have
    one for all tokens of an expert in a channel, so that sums over its blocks are scaled when they are complete.

    Attributes:
        values: e4m3 ``[blocks, width, 128]``, a channel's tokens side by side.
        scales: fp32 ``[blocks, width]``, or ``[local_experts, width]``, unspecified for experts without tokens.
        by_expert: whether scales are the latter.
    """

    values: Tensor
    scales: Tensor
    by_expert: bool


class Fp8Multiply(Protocol):
    """A product; see :class:`Fp8Gemm`."""

    def __call__(
        self, rows: Fp8Rows, weight: Fp8Weight, segments: Segments, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Tensor:
        """Each expert's rows times its transposed weight.

        Args:
            rows: ``[num_rows, in_features]``.
            weight: of ``[local_experts, out_features, in_features]``.
            segments: which rows belong to which expert.
            dtype: of the result.
            out: dense ``[num_rows, out_features]`` to write to, or ``None`` for a new tensor.

        Returns:
            ``out``. With packed segments only real rows of it have been written.
        """
        ...


class Fp8Activate(Protocol):
    """An activation whose result is quantised; see :class:`Fp8Gemm`."""

    def __call__(self, x: Tensor, activation: str, row_weights: Tensor | None, segments: Segments) -> Fp8Rows:
        """``apply_activation`` of ``x``, rounded to the dtype of ``x`` and then quantised."""
        ...


class Fp8BackwardOfActivation(Protocol):
    """The gradients of an activation, quantised too; see :class:`Fp8Gemm`."""

    def __call__(
        self,
        grad: Tensor,
        x: Tensor,
        activation: str,
        row_weights: Tensor | None,
        segments: ExpertSegments,
        *,
        need_weights: bool,
        need_activated: bool,
    ) -> Fp8ActivationGradients:
        """From the gradient of the activations to that of the pre-activations ``x``."""
        ...


class Fp8WeightGradient(Protocol):
    """The gradient of weights; see :class:`Fp8Gemm`."""

    def __call__(
        self,
        grad: Fp8Columns,
        rows: Fp8Columns,
        segments: ExpertSegments,
        dtype: torch.dtype,
        *,
        out: Tensor | None = None,
        accumulate: bool = False,
        in_turns: bool = False,
    ) -> Tensor:
        """Each expert's ``grad`` transposed times its rows.

        Args:
            grad: of ``[segments.num_rows, out_features]``, gradient of the result, with scales by block.
            rows: of ``[segments.num_rows, in_features]``, as in ``multiply``, with scales by expert.
            segments: which rows belong to which expert.
            dtype: of the result, if ``out`` is ``None``.
            out: as of :class:`~ep_moe.experts.gemm.WeightGradient`, which says the same of ``accumulate`` and the
                result.
            accumulate: likewise.
            in_turns: whether other kernels run beside it; see ``GroupedGemm.in_turns``.
        """
        ...


@dataclass(frozen=True)
class Fp8Gemm:
    """A back end of FP8 products. The functions know nothing of autograd; every tensor they get is dense.

    Packed rows lie flat, ``[local_experts * room, width]``; all but those that backward alone calls take them. Rows
    that are not real, behind the last segment or a packed expert's count, are read into no result, and unspecified in
    results.

    Attributes:
        quantize_rows: ``(rows [num_rows, width], segments)``.
        quantize_weight: ``(weight [local_experts, out_features, in_features], whether the transposed one is needed)``.
        multiply: see :class:`Fp8Multiply`.
        activate: see :class:`Fp8Activate`.
        activation_gradients: see :class:`Fp8BackwardOfActivation`.
        quantize_columns: ``(rows [num_rows, width], segments, by_expert)``; of rows in FP8, whose scales may have any
            strides, the values that they stand for, in fp32. There may be more blocks than the segments have: those
            behind are unspecified.
        quantize_both: ``quantize_rows`` and ``quantize_columns`` of the same rows, with the arguments of the latter.
        wgrad: see :class:`Fp8WeightGradient`.
    """

    quantize_rows: Callable[[Tensor, Segments], Fp8Rows]
    quantize_weight: Callable[[Tensor, bool], Fp8WeightPair]
    multiply: Fp8Multiply
    activate: Fp8Activate
    activation_gradients: Fp8BackwardOfActivation
    quantize_columns: Callable[[Tensor | Fp8Rows, ExpertSegments, bool], Fp8Columns]
    quantize_both: Callable[[Tensor, ExpertSegments, bool], tuple[Fp8Rows, Fp8Columns]]
    wgrad: Fp8WeightGradient


def empty_scales(num_rows: int, width: int, device: torch.device) -> Tensor:
    """Room for the scales of rows: ``[width / 128, num_rows]``, each block's from a multiple of 16 bytes on.

    So that the copy engine can fetch those of any rows.
    """
    room = -(-num_rows // _SCALES_OF_VECTOR) * _SCALES_OF_VECTOR
    return torch.empty(width // BLOCK, room, dtype=torch.float32, device=device)[:, :num_rows]


def by_blocks(scales: Tensor) -> Tensor:
    """The scales of rows that lie by row, ``[num_rows, width / 128]``, as :class:`Fp8Rows` has them."""
    num_rows, blocks = scales.shape
    return empty_scales(num_rows, blocks * BLOCK, scales.device).copy_(scales.t())
