"""Back ends for CPU tests that can do what only the CUDA kernels do."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from ep_moe.comm import ExpertSegments
from ep_moe.experts.activation import activate
from ep_moe.experts.backends import LOOP
from ep_moe.experts.gemm import GroupedGemm


def fused_swiglu(
    rows: Tensor,
    weight: Tensor,
    segments: ExpertSegments,
    row_weights: Tensor | None,
    *,
    keep: bool,
    out: Tensor | None = None,
    pre_activation: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See :class:`ep_moe.experts.gemm.SwigluForward`."""
    pre_activation = LOOP.forward(rows, weight, segments, out=pre_activation)
    return activate(pre_activation, "swiglu", row_weights, None, out=out), pre_activation if keep else None


def device_started() -> GroupedGemm:
    """The loop as the CUDA kernels work: on segments that start where the device says, without writing other rows."""
    return dataclasses.replace(
        LOOP,
        forward=functools.partial(_from_start, LOOP.forward, 1),
        dgrad=functools.partial(_from_start, LOOP.dgrad, 2),
        swiglu=_swiglu_from_start,
        reads_start=True,
    )


def _from_start(
    product: Any, width: int, rows: Tensor, weight: Tensor, segments: ExpertSegments, out: Tensor | None = None
) -> Tensor:
    out = _poisoned(rows, weight.shape[width]) if out is None else out
    own, exact = _own_rows(segments)
    product(rows[own], weight, exact, out=out[own])
    return out


def _swiglu_from_start(
    rows: Tensor,
    weight: Tensor,
    segments: ExpertSegments,
    row_weights: Tensor,
    *,
    keep: bool,
    out: Tensor | None = None,
    pre_activation: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    out = _poisoned(rows, weight.shape[1] // 2) if out is None else out
    pre_activation = _poisoned(rows, weight.shape[1]) if pre_activation is None else pre_activation
    own, exact = _own_rows(segments)
    fused_swiglu(
        rows[own], weight, exact, row_weights[own], keep=True, out=out[own], pre_activation=pre_activation[own]
    )
    return out, pre_activation if keep else None


def _own_rows(segments: ExpertSegments) -> tuple[slice, ExpertSegments]:
    start, sizes = int(segments.start or 0), segments.host_sizes()
    return slice(start, start + sum(sizes)), ExpertSegments(segments.counts, segments.ends - start, sizes)


def _poisoned(rows: Tensor, width: int) -> Tensor:
    return torch.full((rows.shape[0], width), float("nan"), dtype=rows.dtype)
