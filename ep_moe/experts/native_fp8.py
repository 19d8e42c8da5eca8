"""The FP8 kernels of the CUDA library, ``csrc/grouped_gemm_fp8.cu`` and ``csrc/quantize.cu``: launching them.

As the bf16 ones they read the segment ends on the GPU, wait for nothing and give the same bits on every run.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from ep_moe.comm import PackedSegments
from ep_moe.comm.fp8 import BLOCK
from ep_moe.comm.fp8_quantize import QuantizeRowsArgs
from ep_moe.comm.nvlink_wire import ELEMENTS
from ep_moe.experts import native_fp8_activation, native_fp8_wgrad, native_gemm
from ep_moe.experts.fp8 import Fp8Gemm, Fp8Rows, Fp8Weight, Fp8WeightPair, Segments, empty_scales
from ep_moe.experts.native_real_rows import real_rows
from ep_moe.native import launch, load_entry_points


class GroupedFp8Args(ctypes.Structure):
    """``GroupedFp8Args`` of ``grouped_gemm_fp8.cu``, which says what each field means."""

    _fields_ = (
        ("rows", c_void_p),
        ("row_scales", c_void_p),
        ("weight", c_void_p),
        ("weight_scales", c_void_p),
        ("out", c_void_p),
        ("ends", c_void_p),
        ("num_rows", c_int64),
        ("scale_stride", c_int64),
        ("experts", c_int32),
        ("reduction", c_int32),
        ("columns", c_int32),
        ("blocks", c_int32),
        ("room", c_int32),
        ("reserved", c_int32),
    )


class QuantizeWeightArgs(ctypes.Structure):
    """``QuantizeWeightArgs`` of ``quantize.cu``, which says what each field means."""

    _fields_ = (
        ("weight", c_void_p),
        ("values", c_void_p),
        ("scales", c_void_p),
        ("transposed", c_void_p),
        ("transposed_scales", c_void_p),
        ("experts", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("element", c_int32),
    )


def quantize_rows(rows: Tensor, segments: Segments) -> Fp8Rows:
    """See ``Fp8Gemm``; rows that are not real are not read."""
    rows = native_gemm.plain(rows)
    values = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    scales = empty_scales(rows.shape[0], rows.shape[1], rows.device)
    arguments = QuantizeRowsArgs(
        x=rows.data_ptr(),
        values=values.data_ptr(),
        scales=scales.data_ptr(),
        real=real_rows(segments, rows.shape[0]),
        row_stride=scales.stride(1),
        block_stride=scales.stride(0),
        width=rows.shape[1],
        element=ELEMENTS[rows.dtype],
    )
    launch(load_kernels(), "quantize_rows", arguments, rows.device)
    return Fp8Rows(values, scales)


def quantize_weight(weight: Tensor, transposed: bool) -> Fp8WeightPair:
    """See ``Fp8Gemm``; both copies in one pass."""
    weight = native_gemm.plain(weight)
    experts, rows, columns = weight.shape

    def new(rows: int, columns: int) -> Fp8Weight:
        values = weight.new_empty(experts, rows, columns, dtype=torch.float8_e4m3fn)
        return Fp8Weight(values, weight.new_empty(experts, rows // BLOCK, columns // BLOCK, dtype=torch.float32))

    pair = Fp8WeightPair(new(rows, columns), new(columns, rows) if transposed else None)
    other = pair.transposed
    arguments = QuantizeWeightArgs(
        weight=weight.data_ptr(),
        values=pair.weight.values.data_ptr(),
        scales=pair.weight.scales.data_ptr(),
        transposed=None if other is None else other.values.data_ptr(),
        transposed_scales=None if other is None else other.scales.data_ptr(),
        experts=experts,
        rows=rows,
        columns=columns,
        element=ELEMENTS[weight.dtype],
    )
    launch(load_kernels(), "quantize_weight", arguments, weight.device)
    return pair


def multiply(
    rows: Fp8Rows, weight: Fp8Weight, segments: Segments, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """See ``Fp8Gemm``; bf16 results alone."""
    values = native_gemm.plain(rows.values)
    if out is None:
        out = values.new_empty(values.shape[0], weight.values.shape[1], dtype=dtype)
    arguments = GroupedFp8Args(
        rows=values.data_ptr(),
        row_scales=rows.scales.data_ptr(),
        weight=weight.values.data_ptr(),
        weight_scales=weight.scales.data_ptr(),
        out=out.data_ptr(),
        ends=(segments.counts if isinstance(segments, PackedSegments) else segments.ends).data_ptr(),
        num_rows=values.shape[0],
        scale_stride=rows.scales.stride(0),
        experts=weight.values.shape[0],
        reduction=values.shape[1],
        columns=out.shape[1],
        blocks=native_gemm.multiprocessors(values.get_device()),
        room=segments.room if isinstance(segments, PackedSegments) else 0,
    )
    launch(load_kernels(), "grouped_gemm_fp8", arguments, values.device)
    return out


NATIVE = Fp8Gemm(
    quantize_rows,
    quantize_weight,
    multiply,
    native_fp8_activation.activate,
    native_fp8_activation.activation_gradients,
    native_fp8_wgrad.quantize_columns,
    native_fp8_wgrad.quantize_both,
    native_fp8_wgrad.wgrad,
)


@functools.cache
def load_kernels() -> ctypes.CDLL:
    """The CUDA library with the signatures of these kernels declared.

    Raises:
        NativeLibraryError: if there is no library, or it is of another version.
    """
    return load_entry_points(
        {
            "grouped_gemm_fp8": GroupedFp8Args,
            "quantize_rows": QuantizeRowsArgs,
            "quantize_weight": QuantizeWeightArgs,
        }
    )
