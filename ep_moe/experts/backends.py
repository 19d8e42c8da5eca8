"""Grouped GEMM back ends, and which of them runs.

All of them accept ragged segments: none asks for segments padded to a multiple (see :data:`ALIGNMENT`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ep_moe.comm import ExpertSegments
from ep_moe.config import ConfigError
from ep_moe.experts import native_fp8, native_gemm
from ep_moe.experts.fp8 import Fp8Gemm
from ep_moe.experts.fp8_emulated import EMULATED
from ep_moe.experts.gemm import GroupedGemm, store_result
from ep_moe.experts.te import TE, import_grouped_gemm

ALIGNMENT = 1
"""Rows of a segment must be a multiple of this. grouped_mm addresses rows, whose strides it wants aligned to 16
bytes, so any row may start a segment; TransformerEngine runs one bf16 GEMM per expert."""

_GROUPED_MM_ALIGNMENT_BYTES = 16
_GROUPED_MM_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def loop_forward(rows: Tensor, weight: Tensor, segments: ExpertSegments, *, out: Tensor | None = None) -> Tensor:
    """One ordinary GEMM per expert, any dtype and device; see :class:`~ep_moe.experts.gemm.GroupedGemm`."""
    return _times_each(rows, weight.transpose(1, 2), segments, out)


def loop_dgrad(grad: Tensor, weight: Tensor, segments: ExpertSegments, *, out: Tensor | None = None) -> Tensor:
    """One ordinary GEMM per expert; see :class:`~ep_moe.experts.gemm.GroupedGemm`."""
    return _times_each(grad, weight, segments, out)


def loop_wgrad(
    grad: Tensor, rows: Tensor, segments: ExpertSegments, *, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """One ordinary GEMM per expert; see :class:`~ep_moe.experts.gemm.WeightGradient`."""
    sizes = segments.host_sizes()
    if out is None:
        out = rows.new_empty(len(sizes), grad.shape[1], rows.shape[1])
    chunks = zip(out.unbind(0), *(x[: sum(sizes)].split(sizes) for x in (grad, rows)), strict=True)
    for expert_out, expert_grad, expert_rows in chunks:
        store_result(expert_grad.t() @ expert_rows, expert_out, accumulate)
    return out


def grouped_mm_forward(rows: Tensor, weight: Tensor, segments: ExpertSegments, *, out: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.grouped_mm``, which reads segment ends on the device only and writes new tensors only."""
    if segments.num_rows == 0:  # grouped_mm takes the strides of some empty tensors for invalid
        return loop_forward(rows, weight, segments, out=out)
    return store_result(F.grouped_mm(rows, weight.transpose(1, 2), offs=segments.ends), out)


def grouped_mm_dgrad(grad: Tensor, weight: Tensor, segments: ExpertSegments, *, out: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.grouped_mm``; see :class:`~ep_moe.experts.gemm.GroupedGemm`."""
    if segments.num_rows == 0:
        return loop_dgrad(grad, weight, segments, out=out)
    return store_result(F.grouped_mm(grad, weight, offs=segments.ends), out)


def grouped_mm_wgrad(
    grad: Tensor, rows: Tensor, segments: ExpertSegments, *, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """``torch.nn.functional.grouped_mm``; with ``out`` in a pass of its own, for it writes new tensors only."""
    if segments.num_rows == 0:
        return loop_wgrad(grad, rows, segments, out=out, accumulate=accumulate)
    return store_result(F.grouped_mm(grad.t(), rows, offs=segments.ends), out, accumulate)


LOOP = GroupedGemm(loop_forward, loop_dgrad, loop_wgrad)
GROUPED_MM = GroupedGemm(grouped_mm_forward, grouped_mm_dgrad, grouped_mm_wgrad)


@functools.cache  # a pass asks for it several times
def select_backend(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_local_experts: int,
    hidden_size: int,
    ffn_hidden_size: int,
) -> GroupedGemm:
    """The back end for a computation in ``dtype`` on ``device``.

    Args:
        name: loop, grouped_mm, te, native, or auto: native where it runs, else grouped_mm where it runs, else loop.
            That order is the measured one for all shapes of the table in ``docs/performance.md``.
        dtype: of rows and weights.
        device: of rows and weights.
        num_local_experts: segments of rows.
        hidden_size: width of the rows.
        ffn_hidden_size: inner width of the experts.

    Raises:
        ConfigError: (a ``ValueError``) if the back end cannot run this, naming the key and what is allowed.
    """
    if name == "loop":
        return LOOP
    if name == "te":
        if device.type != "cuda" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"moe.experts.backend = te: needs bf16, fp16 or fp32 on a CUDA GPU, got {dtype} on {device}"
            )
        import_grouped_gemm()
        return TE
    widths = {"model.hidden_size": hidden_size, "moe.experts.ffn_hidden_size": ffn_hidden_size}
    if name in ("native", "auto"):
        obstacle = native_gemm.find_obstacle(dtype, device, num_local_experts, widths)
        if obstacle is None:
            return native_gemm.NATIVE
        if name == "native":
            raise ConfigError(obstacle)
    obstacle = _grouped_mm_obstacle(dtype, device, widths)
    if obstacle is None:
        return GROUPED_MM
    if name == "auto":
        return LOOP
    raise ConfigError(obstacle)


@functools.cache
def select_fp8_backend(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_local_experts: int,
    hidden_size: int,
    ffn_hidden_size: int,
) -> Fp8Gemm:
    """The back end of FP8 products for rows in ``dtype`` on ``device``; arguments as of :func:`select_backend`.

    Raises:
        ConfigError: (a ``ValueError``) if none can run this, naming the key and what is allowed.
    """
    if name == "loop" or (name == "auto" and device.type != "cuda"):
        return EMULATED
    widths = {"model.hidden_size": hidden_size, "moe.experts.ffn_hidden_size": ffn_hidden_size}
    obstacle = native_gemm.find_obstacle(dtype, device, num_local_experts, widths)
    if obstacle is not None:
        raise ConfigError(f"moe.experts.precision = fp8: {obstacle}")
    return native_fp8.NATIVE


def _grouped_mm_obstacle(dtype: torch.dtype, device: torch.device, widths: Mapping[str, int]) -> str | None:
    """Why grouped_mm cannot run, or ``None``."""
    if device.type == "cuda":
        # Other dtypes work in some releases, but by a loop that waits for the segment ends on the host; ours
        # knows the sizes already.
        if dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 0):
            return f"moe.experts.backend = grouped_mm: needs bf16 on CUDA (compute capability 8.0 or more), got {dtype}"
    elif dtype not in _GROUPED_MM_CPU_DTYPES:
        return f"moe.experts.backend = grouped_mm: needs fp32, bf16 or fp16 on {device.type}, got {dtype}; use loop"
    multiple = _GROUPED_MM_ALIGNMENT_BYTES // dtype.itemsize
    for path, width in widths.items():
        if width % multiple:
            return f"{path} = {width}: must be a multiple of {multiple} for moe.experts.backend grouped_mm in {dtype}"
    return None


def _times_each(x: Tensor, matrices: Tensor, segments: ExpertSegments, out: Tensor | None) -> Tensor:
    """Each expert's rows of ``x`` times its matrix; zero behind the last segment."""
    sizes = segments.host_sizes()
    if out is None:
        out = x.new_empty(x.shape[0], matrices.shape[2])
    out[sum(sizes) :] = 0
    for expert_out, rows, matrix in zip(
        out[: sum(sizes)].split(sizes), x[: sum(sizes)].split(sizes), matrices, strict=True
    ):
        torch.mm(rows, matrix, out=expert_out)
    return out
