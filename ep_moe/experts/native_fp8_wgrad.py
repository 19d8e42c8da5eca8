"""The gradient of weights in FP8, ``csrc/quantize_columns.cu`` and ``csrc/grouped_gemm_wgrad_fp8.cu``: launching them.

Both find out on the GPU where an expert's blocks of tokens lie; the host knows how many there can be.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from ep_moe.comm import ExpertSegments
from ep_moe.comm.fp8 import BLOCK
from ep_moe.experts import native_gemm
from ep_moe.experts.fp8 import Fp8Columns, Fp8Rows, empty_scales
from ep_moe.native import launch, load_entry_points


class QuantizeColumnsArgs(ctypes.Structure):
    """``QuantizeColumnsArgs`` of ``quantize_columns.cu``, which says what each field means."""

    _fields_ = (
        ("rows", c_void_p),
        ("row_scales", c_void_p),
        ("values", c_void_p),
        ("scales", c_void_p),
        ("largest", c_void_p),
        ("ends", c_void_p),
        ("row_values", c_void_p),
        ("row_value_scales", c_void_p),
        ("row_stride", c_int64),
        ("block_stride", c_int64),
        ("scale_stride", c_int64),
        ("token_blocks", c_int32),
        ("experts", c_int32),
        ("width", c_int32),
        ("reserved", c_int32),
    )


class GroupedWgradFp8Args(ctypes.Structure):
    """``GroupedWgradFp8Args`` of ``grouped_gemm_wgrad_fp8.cu``, which says what each field means."""

    _fields_ = (
        ("grad", c_void_p),
        ("grad_scales", c_void_p),
        ("rows", c_void_p),
        ("row_scales", c_void_p),
        ("out", c_void_p),
        ("ends", c_void_p),
        ("token_blocks", c_int32),
        ("experts", c_int32),
        ("out_features", c_int32),
        ("in_features", c_int32),
        ("blocks", c_int32),
        ("accumulate", c_int32),
    )


def quantize_columns(rows: Tensor | Fp8Rows, segments: ExpertSegments, by_expert: bool) -> Fp8Columns:
    """See ``Fp8Gemm``; of bf16 or FP8 rows, of which those that are not real are not read."""
    if isinstance(rows, Fp8Rows):
        values = native_gemm.plain(rows.values)
        out, arguments = _columns(values, segments, by_expert)
        arguments.row_scales = rows.scales.data_ptr()
        arguments.block_stride, arguments.row_stride = rows.scales.stride()
    else:
        values = native_gemm.plain(rows)
        out, arguments = _columns(values, segments, by_expert)
    launch(load_kernels(), "quantize_columns", arguments, values.device)
    return out


def quantize_both(rows: Tensor, segments: ExpertSegments, by_expert: bool) -> tuple[Fp8Rows, Fp8Columns]:
    """See ``Fp8Gemm``; in one kernel, of bf16 rows, of which those that are not real are not read."""
    rows = native_gemm.plain(rows)
    out, arguments = _columns(rows, segments, by_expert)
    values = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    by_row = Fp8Rows(values, empty_scales(rows.shape[0], rows.shape[1], rows.device))
    arguments.row_values, arguments.row_value_scales = by_row.values.data_ptr(), by_row.scales.data_ptr()
    arguments.scale_stride = by_row.scales.stride(0)
    launch(load_kernels(), "quantize_columns", arguments, rows.device)
    return by_row, out


def wgrad(
    grad: Fp8Columns,
    rows: Fp8Columns,
    segments: ExpertSegments,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    in_turns: bool = False,
) -> Tensor:
    """See ``Fp8WeightGradient``; ``native_gemm.into`` says where the result goes."""
    shape = (segments.ends.shape[0], grad.values.shape[1], rows.values.shape[1])
    turns = native_gemm.TURNS if in_turns else 1

    def multiply(target: Tensor | None) -> Tensor:
        target = grad.values.new_empty(shape, dtype=dtype) if target is None else target
        return _multiply(grad, rows, segments, target, turns)

    return native_gemm.into(out, accumulate, multiply)


def most_blocks(num_rows: int, experts: int) -> int:
    """Blocks of 128 tokens that ``num_rows`` rows of so many experts can need at most, each having its own."""
    return (num_rows + min(experts, num_rows) * (BLOCK - 1)) // BLOCK


@functools.cache
def load_kernels() -> ctypes.CDLL:
    """The CUDA library with the signatures of these kernels declared.

    Raises:
        NativeLibraryError: if there is no library, or it is of another version.
    """
    return load_entry_points({"quantize_columns": QuantizeColumnsArgs, "grouped_gemm_wgrad_fp8": GroupedWgradFp8Args})


def _columns(rows: Tensor, segments: ExpertSegments, by_expert: bool) -> tuple[Fp8Columns, QuantizeColumnsArgs]:
    """Room for columns of rows, and the arguments that quantise them, of bf16."""
    (num_rows, width), experts = rows.shape, segments.ends.shape[0]
    token_blocks = most_blocks(num_rows, experts)
    values = rows.new_empty(token_blocks, width, BLOCK, dtype=torch.float8_e4m3fn)
    # With scales by expert, room for what the kernel works them out from is in one piece with them.
    shape = (2, experts, width) if by_expert else (1, token_blocks, width)
    scales, *largest = rows.new_empty(shape, dtype=torch.float32)
    arguments = QuantizeColumnsArgs(
        rows=rows.data_ptr(),
        values=values.data_ptr(),
        scales=scales.data_ptr(),
        largest=largest[0].data_ptr() if by_expert else None,
        ends=segments.ends.data_ptr(),
        token_blocks=token_blocks,
        experts=experts,
        width=width,
    )
    return Fp8Columns(values, scales, by_expert), arguments


def _multiply(grad: Fp8Columns, rows: Fp8Columns, segments: ExpertSegments, out: Tensor, turns: int) -> Tensor:
    assert rows.by_expert and not grad.by_expert
    accumulate, token_blocks = out.dtype == torch.float32, len(rows.values)
    if token_blocks == 0:
        return out if accumulate else out.zero_()
    arguments = GroupedWgradFp8Args(
        grad=grad.values.data_ptr(),
        grad_scales=grad.scales.data_ptr(),
        rows=rows.values.data_ptr(),
        row_scales=rows.scales.data_ptr(),
        out=out.data_ptr(),
        ends=segments.ends.data_ptr(),
        token_blocks=token_blocks,
        experts=out.shape[0],
        out_features=out.shape[1],
        in_features=out.shape[2],
        blocks=turns * native_gemm.multiprocessors(out.get_device()),
        accumulate=accumulate,
    )
    launch(load_kernels(), "grouped_gemm_wgrad_fp8", arguments, out.device)
    return out
