"""The routed experts of one rank, computed together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ep_moe.comm import ExpertSegments, PackedSegments
from ep_moe.comm.fp8 import BLOCK
from ep_moe.comm.fp8_rows import QuantizedRows
from ep_moe.config import ConfigError, ExpertsConfig
from ep_moe.experts.activated_linear import activated_linear
from ep_moe.experts.activation import (
    apply_activation,
    apply_packed_activation,
    check_row_weights,
    fc1_width,
)
from ep_moe.experts.backends import ALIGNMENT, select_backend, select_fp8_backend
from ep_moe.experts.deferred import DeferredGradients, WeightGradientTask
from ep_moe.experts.fp8 import Fp8Gemm, Fp8Rows, Fp8WeightPair, by_blocks
from ep_moe.experts.fp8_activated import fp8_activated_linear
from ep_moe.experts.fp8_linear import Fp8Products, QuantizedGradient, fp8_grouped_linear
from ep_moe.experts.gemm import GroupedGemm, grouped_linear, row_major
from ep_moe.experts.groups import ExpertNetwork
from ep_moe.experts.init import initialize_experts
from ep_moe.experts.quantized_weight import QuantizedWeight
from ep_moe.experts.swiglu import activated, swiglu_linear
from ep_moe.experts.te import import_grouped_gemm


class GroupedExperts(nn.Module):
    """Feed-forward networks of a rank's experts: ``fc2(act(fc1(rows)) * row_weights)``, each on its own rows.

    The activations are the GLU variants and plain ones of :func:`~ep_moe.experts.activation.apply_activation`
    (Shazeer 2020, arXiv 2002.05202), which applies the routing weights.

    Args:
        hidden_size: width of the rows.
        num_local_experts: experts of this rank.
        config: inner width, activation, grouped GEMM back end and its precision.
        first_expert: global index of the first local expert; its initial weights depend on it alone.
        init_method: fills one expert's first projection, ``[fc1 width, hidden]``, in place.
        output_init_method: fills one expert's second projection, ``[hidden, ffn]``, in place.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        fc1_weight: ``[local_experts, fc1 width, hidden]``; the width is ``2 * ffn`` for gated activations,
            gate first and then up, otherwise ``ffn``.
        fc2_weight: ``[local_experts, hidden, ffn]``.

    Raises:
        ConfigError: (a ``ValueError``) if the back end is not installed, or the precision does not take the widths.
        ValueError: if a size is not positive or the activation unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        num_local_experts: int,
        config: ExpertsConfig,
        *,
        first_expert: int = 0,
        init_method: Callable[[Tensor], Any],
        output_init_method: Callable[[Tensor], Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or num_local_experts < 1:
            raise ValueError(
                "hidden_size, num_local_experts: expected at least 1 each, "
                f"got hidden_size {hidden_size}, num_local_experts {num_local_experts}"
            )
        if config.backend == "te":
            import_grouped_gemm()
        if config.precision == "fp8" and hidden_size % BLOCK:
            raise ConfigError(
                f"moe.experts.precision = fp8: needs hidden_size ({hidden_size}) to be a multiple of {BLOCK}, the "
                "scale block"
            )
        self.hidden_size = hidden_size
        self.num_local_experts = num_local_experts
        self.first_expert = first_expert
        self.config = config
        ffn = config.ffn_hidden_size
        width = fc1_width(config.activation, ffn)
        self.fc1_weight = nn.Parameter(torch.empty(num_local_experts, width, hidden_size, device=device, dtype=dtype))
        self.fc2_weight = nn.Parameter(torch.empty(num_local_experts, hidden_size, ffn, device=device, dtype=dtype))
        self._quantized = (QuantizedWeight(), QuantizedWeight())
        self._marks: dict[str, Any] = {}
        initialize_experts(self.fc1_weight, init_method, first_expert)
        initialize_experts(self.fc2_weight, output_init_method, first_expert)

    @property
    def alignment(self) -> int:
        """Rows per segment must be a multiple of this; every back end takes ragged segments."""
        return ALIGNMENT

    def forget_quantized_weights(self) -> None:
        """With ``precision: fp8``, quantise at the next pass: for who writes weights through ``data`` on their own.

        See :mod:`ep_moe.experts.quantized_weight` for what is noticed.
        """
        for kept in self._quantized:
            kept.forget()

    def mark_parameters(self, **marks: Any) -> None:
        """Set attributes of both parameters, such as ``allreduce``, which others read.

        The marks stay where PyTorch puts new parameters, without such attributes, in the place of the old: in
        ``to_empty``, ``load_state_dict(assign=True)`` and ``copy.deepcopy``.
        """
        self._marks = marks
        self._set_marks()

    def takes_packed_rows(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether :meth:`forward` takes :class:`~ep_moe.comm.PackedSegments` of rows in ``dtype`` on ``device``."""
        if dtype != torch.bfloat16:
            return False
        return self.config.precision == "fp8" or self._backend(dtype, device).forward_packed is not None

    def takes_fp8_rows(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether :meth:`forward` takes :class:`~ep_moe.comm.fp8_rows.QuantizedRows` in place of rows in ``dtype``."""
        return self.config.precision == "fp8"

    def defer_gradients(self) -> DeferredGradients:
        """What :meth:`forward` needs so that its backward pass leaves the gradient of ``fc1_weight`` for later.

        That one alone takes longer than rows travel, and needs nothing that is not there at the end of the backward
        pass anyway.
        """
        return DeferredGradients(*autocast(self.fc1_weight))

    def network(self, rows: Tensor) -> ExpertNetwork:
        """How rows like ``rows``, of the dtype of the computation, are computed with.

        Raises:
            ConfigError: (a ``ValueError``) if the back end does not support the dtype, device or widths, or the
                experts compute in FP8.
        """
        if self.config.precision == "fp8":
            raise ConfigError("moe.experts.precision = fp8: experts in chunks compute in the dtype of the rows")
        gemm = self._backend(rows.dtype, rows.device)
        return ExpertNetwork(gemm, self.config.activation, self.config.recompute_activation)

    def weights_for(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of both projections in the dtype of the computation, which is that of ``rows``.

        Raises:
            ValueError: if ``rows`` are of another dtype or device, or not ``hidden`` wide.
        """
        fc1_weight, fc2_weight = autocast(self.fc1_weight, self.fc2_weight)
        self._check_rows(rows, rows.shape[0], fc1_weight)
        return fc1_weight, fc2_weight

    def forward(
        self,
        rows: Tensor | QuantizedRows,
        row_weights: Tensor | None,
        segments: ExpertSegments | PackedSegments,
        deferred: DeferredGradients | None = None,
    ) -> Tensor:
        """Compute each expert's network on its segment of rows.

        Padding rows must be zero with weight 0, and gradients that arrive at them finite; they then yield zero
        rows and add nothing to any gradient.

        Args:
            rows: ``[segments.num_rows, hidden]``, expert-major, in the dtype of the parameters. Under
                ``torch.autocast`` rows and weights are computed with in its dtype (except fp64 ones). With
                ``precision: fp8`` also in FP8.
            row_weights: floating point ``[segments.num_rows]``, or ``None`` for weights of 1.
            segments: which rows belong to which local expert. If packed, for inference: ``rows`` are
                ``[local_experts, room, hidden]``, and so is the result, which is ``segments.out``.
            deferred: of :meth:`defer_gradients`; takes the gradients of its weights, those of the first projection or
                of both, whose computation the caller then owes. Others are computed in the backward pass.

        Returns:
            ``[segments.num_rows, hidden]`` in the dtype of the computation, contiguous.

        Raises:
            ConfigError: (a ``ValueError``) if the back end does not support the dtype, device or widths.
            RuntimeError: if a gradient of packed rows would be needed.
            ValueError: if an argument's shape, dtype or device does not fit.
        """
        if isinstance(segments, PackedSegments):
            return self._forward_packed(rows, segments)
        later = () if deferred is None else deferred.weights
        fc1_weight, fc2_weight = (*later, *autocast(*(self.fc1_weight, self.fc2_weight)[len(later) :]))
        if isinstance(rows, QuantizedRows):
            rows = replace(rows, stand_in=autocast(rows.stand_in)[0])
        else:
            (rows,) = autocast(rows)
        self._check(rows, row_weights, segments, fc1_weight)
        defer_fc1, defer_fc2 = (
            functools.partial(deferred.add, i) if deferred is not None and i < len(later) else None for i in range(2)
        )
        activation = self.config.activation
        if self.config.precision == "fp8":
            return self._forward_fp8(rows, row_weights, segments, (fc1_weight, fc2_weight), (defer_fc1, defer_fc2))
        assert isinstance(rows, Tensor)  # which _check has seen to
        gemm = self._backend(rows.dtype, rows.device)
        inner: Tensor | None = None
        fc1_out: Tensor | None
        if gemm.swiglu is not None and activation == "swiglu":
            fc1_out, inner = swiglu_linear(rows, fc1_weight, row_weights, segments, gemm, defer_fc1)
        else:
            fc1_out = grouped_linear(rows, fc1_weight, segments, gemm, defer_fc1)
        # Only where the pre-activations are kept anyway, for their own gradient.
        if self.config.recompute_activation and fc1_out is not None and fc1_out.requires_grad:
            return activated_linear(fc1_out, row_weights, activation, fc2_weight, segments, gemm, defer_fc2, inner)
        if inner is None:
            assert fc1_out is not None
            inner = apply_activation(fc1_out, activation, row_weights, segments.row_count)
        elif fc1_out is not None:
            inner = activated(fc1_out, row_weights, segments, inner)
        return grouped_linear(inner, fc2_weight, segments, gemm, defer_fc2)

    def _set_marks(self) -> None:
        for parameter in (self.fc1_weight, self.fc2_weight):
            for name, value in self._marks.items():
                setattr(parameter, name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupedExperts:
        super()._apply(fn, recurse)
        self._set_marks()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._set_marks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_marks()

    def extra_repr(self) -> str:
        """Sizes, activation and back end."""
        first, last = self.first_expert, self.first_expert + self.num_local_experts - 1
        return (
            f"experts {first}..{last}, hidden={self.hidden_size}, ffn={self.config.ffn_hidden_size}, "
            f"activation={self.config.activation}, backend={self.config.backend}, precision={self.config.precision}"
        )

    @property
    def _no_fp8_rows(self) -> str:
        return f"moe.experts.precision = {self.config.precision} does not take it"

    @property
    def _sizes(self) -> dict[str, int]:
        """What a choice of back end depends on besides dtype and device."""
        return {
            "num_local_experts": self.num_local_experts,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.config.ffn_hidden_size,
        }

    def _backend(self, dtype: torch.dtype, device: torch.device) -> GroupedGemm:
        return select_backend(self.config.backend, dtype=dtype, device=device, **self._sizes)

    def _forward_fp8(
        self,
        rows: Tensor | QuantizedRows,
        row_weights: Tensor | None,
        segments: ExpertSegments,
        weights: tuple[Tensor, Tensor],
        defer: tuple[Callable[[WeightGradientTask], None] | None, ...],
    ) -> Tensor:
        """The network with its products in FP8; ``weights`` take the gradients."""
        kind = rows.stand_in if isinstance(rows, QuantizedRows) else rows
        fp8, fc1, fc2 = self._fp8_weights(kind)
        in_fp8 = self.config.wgrad_precision == "fp8"
        products = Fp8Products(fp8, None if in_fp8 else self._backend(kind.dtype, kind.device))
        activation, gradient = self.config.activation, QuantizedGradient()
        fc1_out = fp8_grouped_linear(rows, weights[0], fc1, segments, products, defer[0], gradient=gradient)
        differentiated = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (fc1_out, row_weights, weights[1])
        )
        # Activations that backward would read are there in FP8 alone only if it can make them again.
        if not differentiated or (self.config.recompute_activation and fc1_out.requires_grad):
            return fp8_activated_linear(
                fc1_out, row_weights, activation, weights[1], fc2, segments, products, defer[1], gradient
            )
        inner = apply_activation(fc1_out, activation, row_weights, segments.row_count)
        return fp8_grouped_linear(inner, weights[1], fc2, segments, products, defer[1])

    def _fp8_weights(self, rows: Tensor) -> tuple[Fp8Gemm, Fp8WeightPair, Fp8WeightPair]:
        """The back end of FP8 products for such rows, and both weights for it."""
        fp8 = select_fp8_backend(self.config.backend, dtype=rows.dtype, device=rows.device, **self._sizes)
        # Of the parameters, not of what autocast makes of them: that would be rounded twice.
        weights = (self.fc1_weight, self.fc2_weight)
        fc1, fc2 = (kept.get(weight, fp8) for kept, weight in zip(self._quantized, weights, strict=True))
        return fp8, fc1, fc2

    def _forward_packed(self, rows: Tensor | QuantizedRows, segments: PackedSegments) -> Tensor:
        """The network on the real rows of each expert, into the buffer from which they are combined."""
        fc1_weight, fc2_weight = autocast(self.fc1_weight, self.fc2_weight)
        arrived, rows = (rows, rows.stand_in) if isinstance(rows, QuantizedRows) else (None, rows)
        if torch.is_grad_enabled() and (rows.requires_grad or fc1_weight.requires_grad or fc2_weight.requires_grad):
            raise RuntimeError("packed rows have no gradients: wrap the call in torch.no_grad()")
        expected = [self.num_local_experts, segments.room, self.hidden_size]
        for name, x in (("rows", rows), ("segments.out", segments.out)):
            if list(x.shape) != expected or x.dtype != fc1_weight.dtype or x.device != fc1_weight.device:
                raise ValueError(
                    f"{name}: expected {fc1_weight.dtype} {expected} on {fc1_weight.device} as the weights, "
                    f"got {x.dtype} {list(x.shape)} on {x.device}"
                )
        if self.config.precision == "fp8":
            return self._forward_packed_fp8(rows, arrived, segments)
        if arrived is not None:
            raise ValueError(f"rows: expected {rows.dtype}, got FP8: {self._no_fp8_rows}")
        multiply = self._backend(rows.dtype, rows.device).forward_packed
        if multiply is None:
            raise ValueError(f"segments: moe.experts.backend = {self.config.backend} takes no packed rows here")
        inner = multiply(rows, fc1_weight, segments.counts)
        inner = apply_packed_activation(inner, self.config.activation, segments.counts)
        return multiply(inner, fc2_weight, segments.counts, out=segments.out)

    def _forward_packed_fp8(self, rows: Tensor, arrived: QuantizedRows | None, segments: PackedSegments) -> Tensor:
        """The same with products in FP8, of rows as they have arrived if they were in FP8 then."""
        fp8, fc1, fc2 = self._fp8_weights(rows)
        if arrived is None:
            fp8_rows = fp8.quantize_rows(row_major(rows).flatten(0, 1), segments)
        else:
            fp8_rows = Fp8Rows(arrived.values.flatten(0, 1), by_blocks(arrived.scales.flatten(0, 1)))
        fc1_out = fp8.multiply(fp8_rows, fc1.weight, segments, rows.dtype)
        inner = fp8.activate(fc1_out, self.config.activation, None, segments)
        fp8.multiply(inner, fc2.weight, segments, rows.dtype, out=segments.out.view(-1, self.hidden_size))
        return segments.out

    def _check(
        self, rows: Tensor | QuantizedRows, row_weights: Tensor | None, segments: ExpertSegments, weight: Tensor
    ) -> None:
        if isinstance(rows, QuantizedRows):
            if self.config.precision != "fp8":
                raise ValueError(f"rows: expected {weight.dtype}, got FP8: {self._no_fp8_rows}")
            rows = rows.stand_in
        if segments.ends.shape != (self.num_local_experts,):
            raise ValueError(
                f"segments: expected {self.num_local_experts} local experts, got ends of shape "
                f"{list(segments.ends.shape)}"
            )
        self._check_rows(rows, segments.num_rows, weight)
        if row_weights is not None:
            check_row_weights(row_weights, rows)

    def _check_rows(self, rows: Tensor, num_rows: int, weight: Tensor) -> None:
        if rows.shape != (num_rows, self.hidden_size):
            raise ValueError(
                f"rows: expected [{num_rows}, {self.hidden_size}] (rows of segments, model.hidden_size), "
                f"got {list(rows.shape)}"
            )
        if rows.dtype != weight.dtype or rows.device != weight.device:
            raise ValueError(
                f"rows: expected {weight.dtype} on {weight.device} as the weights, got {rows.dtype} on {rows.device}"
            )


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as ``torch.autocast`` would for a linear layer: custom autograd functions are outside its reach."""
    if not tensors or not torch.is_autocast_enabled(kind := tensors[0].device.type):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
