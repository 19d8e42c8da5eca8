"""FP8 operands of the experts' products, what a back end for them offers, and the one of PyTorch operations.

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

from ep_moe.comm import ExpertSegments
from ep_moe.comm.fp8 import BLOCK, E4M3_MAX, MIN_AMAX, quantize_e4m3
from ep_moe.experts.activation import activation_backward, apply_activation

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


class Fp8Activate(Protocol):
    """An activation whose result is quantised; see :class:`Fp8Gemm`."""

    def __call__(self, x: Tensor, activation: str, row_weights: Tensor | None, segments: ExpertSegments) -> Fp8Rows:
        """``apply_activation`` of ``x``, rounded to the dtype of ``x`` and then quantised.

        Rows behind the last segment are unspecified.
        """
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
        """From the gradient of the activations to that of the pre-activations ``x``.

        Rows behind the last segment are unspecified.
        """
        ...


@dataclass(frozen=True)
class Fp8Gemm:
    """A back end of FP8 products. The functions know nothing of autograd; every tensor they get is dense.

    Attributes:
        quantize_rows: ``(rows [num_rows, width], segments)``; rows behind the last segment are unspecified.
        quantize_weight: ``(weight [local_experts, out_features, in_features], whether the transposed one is needed)``.
        multiply: ``(rows [num_rows, in_features], weight, segments, dtype)`` to ``[num_rows, out_features]`` of
            ``dtype``: each expert's rows times its transposed weight. Rows behind the last segment are read into no
            result, and are unspecified in results.
        activate: see :class:`Fp8Activate`.
        activation_gradients: see :class:`Fp8BackwardOfActivation`.
    """

    quantize_rows: Callable[[Tensor, ExpertSegments], Fp8Rows]
    quantize_weight: Callable[[Tensor, bool], Fp8WeightPair]
    multiply: Callable[[Fp8Rows, Fp8Weight, ExpertSegments, torch.dtype], Tensor]
    activate: Fp8Activate
    activation_gradients: Fp8BackwardOfActivation


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


def emulated_quantize_rows(rows: Tensor, segments: ExpertSegments) -> Fp8Rows:
    """See :class:`Fp8Gemm`."""
    values, scales = quantize_e4m3(rows)
    return Fp8Rows(values, scales.t().contiguous())


def emulated_quantize_weight(weight: Tensor, transposed: bool) -> Fp8WeightPair:
    """See :class:`Fp8Gemm`."""
    experts, out_features, in_features = weight.shape
    blocks = weight.float().view(experts, out_features // BLOCK, BLOCK, in_features // BLOCK, BLOCK)
    amax = blocks.abs().amax(dim=(2, 4), keepdim=True).clamp(min=MIN_AMAX)
    largest = amax.new_full((1,), E4M3_MAX)  # a tensor, as in quantize_e4m3
    values = (blocks * (largest / amax)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(weight.shape)
    scales = (amax / largest).view(experts, out_features // BLOCK, in_features // BLOCK)
    other = Fp8Weight(_transpose(values), _transpose(scales)) if transposed else None
    return Fp8WeightPair(Fp8Weight(values, scales), other)


def emulated_multiply(rows: Fp8Rows, weight: Fp8Weight, segments: ExpertSegments, dtype: torch.dtype) -> Tensor:
    """See :class:`Fp8Gemm`; a loop over experts and blocks, which needs the segments' sizes on the host."""
    out = torch.zeros(len(rows.values), weight.values.shape[1], dtype=dtype, device=rows.values.device)
    start = 0
    for expert, size in enumerate(segments.host_sizes()):
        end = start + size
        total = torch.zeros(size, out.shape[1], device=out.device)
        blocks = zip(
            rows.values[start:end].float().split(BLOCK, dim=1),
            weight.values[expert].float().split(BLOCK, dim=1),
            rows.scales[:, start:end],
            weight.scales[expert].repeat_interleave(BLOCK, dim=0).unbind(1),
            strict=True,
        )
        for row_values, weight_values, row_scales, weight_scales in blocks:
            total += (row_values @ weight_values.t()) * (row_scales.unsqueeze(1) * weight_scales)
        out[start:end] = total.to(dtype)
        start = end
    return out


def emulated_activate(x: Tensor, activation: str, row_weights: Tensor | None, segments: ExpertSegments) -> Fp8Rows:
    """See :class:`Fp8Activate`."""
    with torch.no_grad():
        return emulated_quantize_rows(apply_activation(x, activation, row_weights, segments.row_count), segments)


def emulated_activation_gradients(
    grad: Tensor,
    x: Tensor,
    activation: str,
    row_weights: Tensor | None,
    segments: ExpertSegments,
    *,
    need_weights: bool,
    need_activated: bool,
) -> Fp8ActivationGradients:
    """See :class:`Fp8BackwardOfActivation`."""
    count = segments.row_count
    with torch.no_grad():
        activated = apply_activation(x, activation, row_weights, count) if need_activated else None
        grad_x, grad_weights = activation_backward(
            grad, x, activation, row_weights, count, need_x=True, need_weights=need_weights
        )
        assert grad_x is not None
        return Fp8ActivationGradients(grad_x, emulated_quantize_rows(grad_x, segments), activated, grad_weights)


EMULATED = Fp8Gemm(
    emulated_quantize_rows,
    emulated_quantize_weight,
    emulated_multiply,
    emulated_activate,
    emulated_activation_gradients,
)


def _transpose(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()
