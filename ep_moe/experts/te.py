"""TransformerEngine's grouped GEMM as a back end: one cuBLAS GEMM per expert, on several streams.

``general_grouped_gemm`` is what TransformerEngine's own ``GroupedLinear`` is made of. It adds to fp32 buffers in the
GEMM itself. Written against the signature of release 2.20.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ep_moe.comm import ExpertSegments
from ep_moe.config import ConfigError
from ep_moe.experts.gemm import GroupedGemm


def import_grouped_gemm() -> Callable[..., Any]:
    """TransformerEngine's ``general_grouped_gemm``.

    Raises:
        ConfigError: if it cannot be imported or has another signature, saying how to get it.
    """
    advice = "needs TransformerEngine 2.20 (pip install --no-build-isolation 'transformer-engine[pytorch]')"
    try:
        from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"moe.experts.backend = te: {advice}, which cannot be imported here: {str(error).splitlines()[0]}"
        ) from error
    if "quantization_params" not in inspect.signature(general_grouped_gemm).parameters:
        raise ConfigError(f"moe.experts.backend = te: {advice}; the one installed has another general_grouped_gemm")
    grouped_gemm: Callable[..., Any] = general_grouped_gemm
    return grouped_gemm


def te_forward(rows: Tensor, weight: Tensor, segments: ExpertSegments, *, out: Tensor | None = None) -> Tensor:
    """See :class:`~ep_moe.experts.gemm.GroupedGemm`."""
    return _times_weight(rows, weight, segments, "TN", weight.shape[1], out)


def te_dgrad(grad: Tensor, weight: Tensor, segments: ExpertSegments, *, out: Tensor | None = None) -> Tensor:
    """See :class:`~ep_moe.experts.gemm.GroupedGemm`."""
    return _times_weight(grad, weight, segments, "NN", weight.shape[2], out)


def te_wgrad(
    grad: Tensor, rows: Tensor, segments: ExpertSegments, *, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """See :class:`~ep_moe.experts.gemm.WeightGradient`."""
    sizes = segments.host_sizes()
    if out is None:
        out = rows.new_empty(len(sizes), grad.shape[1], rows.shape[1])
    if not sum(sizes):
        return out if accumulate else out.zero_()
    inputs, gradients = (list(x[: sum(sizes)].split(sizes)) for x in (rows, grad))
    _run(inputs, gradients, list(out.unbind(0)), "NT", sizes, accumulate=accumulate)
    return out


def _times_weight(
    x: Tensor, weight: Tensor, segments: ExpertSegments, layout: str, width: int, out: Tensor | None
) -> Tensor:
    sizes = segments.host_sizes()
    real = sum(sizes)
    if out is None:
        out = x.new_empty(x.shape[0], width)
    out[real:] = 0
    if real:
        _run(list(weight.unbind(0)), list(x[:real].split(sizes)), [out[:real]], layout, sizes, single_output=True)
    return out


def _run(
    a: list[Tensor], b: list[Tensor], out: list[Tensor], layout: str, sizes: tuple[int, ...], **options: bool
) -> None:
    """Layouts as in BLAS, in which matrices are column-major: TN is ``b @ a.T``, NN ``b @ a``, NT ``b.T @ a``."""
    with torch.no_grad():
        import_grouped_gemm()(
            a,
            b,
            out,
            quantization_params=[None] * len(sizes),
            out_dtype=out[0].dtype,
            layout=layout,
            m_splits=list(sizes),
            grad=layout != "TN",
            **options,
        )


TE = GroupedGemm(te_forward, te_dgrad, te_wgrad)
