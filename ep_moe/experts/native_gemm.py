"""The grouped GEMMs of the CUDA library, ``csrc/grouped_gemm_*.cu``: whether they fit, and launching them.

All three read the segment ends on the GPU, take any counts, wait for nothing and give the same bits on every run.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from ep_moe.comm import ExpertSegments
from ep_moe.experts.activation_kernels import as_fp32
from ep_moe.experts.gemm import GroupedGemm, store_result
from ep_moe.native import NativeLibraryError, capability, launch, load_entry_points, pointer

WIDTH_MULTIPLE = 64
MAX_EXPERTS = 1024
_CAPABILITY = (9, 0)  # exactly: the instructions exist on no other
_ALIGNMENT_BYTES = 16  # of the tensors' first elements
TURNS = 4  # of blocks on an SM, beside other kernels: each costs some microseconds to start


class GroupedGemmArgs(ctypes.Structure):
    """``GroupedGemmArgs`` of ``gemm_tokens.cuh``, which says what each field means."""

    _fields_ = (
        ("rows", c_void_p),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("ends", c_void_p),
        ("start", c_void_p),
        ("num_rows", c_int64),
        ("experts", c_int32),
        ("reduction", c_int32),
        ("columns", c_int32),
        ("blocks", c_int32),
        ("room", c_int32),
        ("reserved", c_int32),
    )


class SwigluGemmArgs(ctypes.Structure):
    """``SwigluGemmArgs`` of ``grouped_gemm_swiglu.cu``, which says what each field means."""

    _fields_ = (("gemm", GroupedGemmArgs), ("row_weights", c_void_p), ("pre_activation", c_void_p))


class GroupedWgradArgs(ctypes.Structure):
    """``GroupedWgradArgs`` of ``grouped_gemm_wgrad.cu``, which says what each field means."""

    _fields_ = (
        ("grad", c_void_p),
        ("rows", c_void_p),
        ("out", c_void_p),
        ("ends", c_void_p),
        ("num_rows", c_int64),
        ("experts", c_int32),
        ("out_features", c_int32),
        ("in_features", c_int32),
        ("blocks", c_int32),
        ("accumulate", c_int32),
    )


def find_obstacle(
    dtype: torch.dtype, device: torch.device, num_local_experts: int, widths: Mapping[str, int]
) -> str | None:
    """Why the kernels cannot multiply such matrices, or ``None``.

    Args:
        dtype: of rows and weights.
        device: of rows and weights.
        num_local_experts: segments of rows.
        widths: of the matrices, by the configuration keys that set them.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return f"moe.experts.backend = native: needs bf16 on a CUDA GPU, got {dtype} on {device.type}"
    if capability(device.index) != _CAPABILITY:
        major, minor = capability(device.index)
        return f"moe.experts.backend = native: needs compute capability 9.0 (Hopper), {device} has {major}.{minor}"
    if num_local_experts > MAX_EXPERTS:
        return f"moe.experts.backend = native: takes at most {MAX_EXPERTS} experts a rank, got {num_local_experts}"
    for path, width in widths.items():
        if width % WIDTH_MULTIPLE:
            return f"{path} = {width}: must be a multiple of {WIDTH_MULTIPLE} for moe.experts.backend native"
    return _library_obstacle()


def forward(
    rows: Tensor, weight: Tensor, segments: ExpertSegments, *, out: Tensor | None = None, turns: int = 1
) -> Tensor:
    """Tokens on the narrow side of the multiply, a tile as wide as the expert's count asks; see ``GroupedGemm``."""
    if out is None:
        out = rows.new_empty(rows.shape[0], weight.shape[1])
    _multiply_tokens("grouped_gemm_forward", rows, weight, out, segments, turns)
    return out


def forward_packed(rows: Tensor, weight: Tensor, counts: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As :func:`forward`, each expert's rows having a fixed place; see ``PackedForward``."""
    experts, room, width = rows.shape
    if out is None:
        out = rows.new_empty(experts, room, weight.shape[1])
    if not _is_plain(out):
        raise ValueError(
            f"out: expected a contiguous tensor from a multiple of 16 bytes on, got strides {out.stride()}"
        )
    flat = rows.reshape(experts * room, width)
    flat, weight = plain(flat), plain(weight)
    arguments = _token_arguments(flat, weight, out.view(experts * room, -1), counts, None)
    arguments.room = room
    launch(load_kernels(), "grouped_gemm_forward", arguments, rows.device)
    return out


def dgrad(
    grad: Tensor, weight: Tensor, segments: ExpertSegments, *, out: Tensor | None = None, turns: int = 1
) -> Tensor:
    """As :func:`forward`, with the weights transposed as they are read; see ``GroupedGemm``."""
    if out is None:
        out = grad.new_empty(grad.shape[0], weight.shape[2])
    _multiply_tokens("grouped_gemm_dgrad", grad, weight, out, segments, turns)
    return out


def wgrad(
    grad: Tensor,
    rows: Tensor,
    segments: ExpertSegments,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    turns: int = 1,
) -> Tensor:
    """See ``GroupedGemm``; :func:`into` says where the result goes."""
    shape = (segments.ends.shape[0], grad.shape[1], rows.shape[1])

    def multiply(target: Tensor | None) -> Tensor:
        target = rows.new_empty(shape) if target is None else target
        return _multiply_weights(grad, rows, segments, target, turns)

    return into(out, accumulate, multiply)


def into(out: Tensor | None, accumulate: bool, multiply: Callable[[Tensor | None], Tensor]) -> Tensor:
    """A gradient of weights, from a kernel that writes bf16 or adds to fp32; any other ``out`` takes a pass of its own.

    Args:
        out: as of ``WeightGradient``.
        accumulate: likewise.
        multiply: writes a dense bf16 tensor, adds to a dense fp32 one, or makes a new one for ``None``; returns it.
    """
    if out is not None and _is_plain(out):
        if out.dtype == torch.float32:
            return multiply(out if accumulate else out.zero_())
        if not accumulate:
            return multiply(out)
    return store_result(multiply(None), out, accumulate)


def swiglu(
    rows: Tensor,
    weight: Tensor,
    segments: ExpertSegments,
    row_weights: Tensor | None,
    *,
    keep: bool,
    out: Tensor | None = None,
    pre_activation: Tensor | None = None,
    turns: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Activates what a tile has multiplied before it is written; see ``SwigluForward``.

    The results have the bits of :func:`forward` and ``apply_activation``, one after the other.
    """
    rows, weight, row_weights = plain(rows), plain(weight), as_fp32(row_weights)
    num_rows, width = rows.shape[0], weight.shape[1]
    if out is None:
        out = rows.new_empty(num_rows, width // 2)
    if keep and pre_activation is None:
        pre_activation = rows.new_empty(num_rows, width)
    arguments = SwigluGemmArgs(
        gemm=_token_arguments(rows, weight, out, segments.ends, segments.start, turns),
        row_weights=pointer(row_weights),
        pre_activation=pointer(pre_activation),
    )
    launch(load_kernels(), "grouped_gemm_swiglu", arguments, rows.device)
    return out, pre_activation


_IN_TURNS = GroupedGemm(
    functools.partial(forward, turns=TURNS),
    functools.partial(dgrad, turns=TURNS),
    functools.partial(wgrad, turns=TURNS),
    swiglu=functools.partial(swiglu, turns=TURNS),
    reads_start=True,
)
NATIVE = GroupedGemm(forward, dgrad, wgrad, forward_packed, swiglu, reads_start=True, in_turns=_IN_TURNS)


def _multiply_tokens(
    entry: str, rows: Tensor, weight: Tensor, out: Tensor, segments: ExpertSegments, turns: int
) -> None:
    rows, weight = plain(rows), plain(weight)
    arguments = _token_arguments(rows, weight, out, segments.ends, segments.start, turns)
    launch(load_kernels(), entry, arguments, rows.device)


def _token_arguments(
    rows: Tensor, weight: Tensor, out: Tensor, ends: Tensor, start: Tensor | None, turns: int = 1
) -> GroupedGemmArgs:
    return GroupedGemmArgs(
        rows=rows.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        ends=ends.data_ptr(),
        start=pointer(start),
        num_rows=rows.shape[0],
        experts=weight.shape[0],
        reduction=rows.shape[1],
        columns=out.shape[1],
        blocks=turns * multiprocessors(rows.get_device()),
    )


def _multiply_weights(grad: Tensor, rows: Tensor, segments: ExpertSegments, out: Tensor, turns: int) -> Tensor:
    accumulate = out.dtype == torch.float32
    if rows.shape[0] == 0:
        return out if accumulate else out.zero_()
    grad, rows = plain(grad), plain(rows)
    arguments = GroupedWgradArgs(
        grad=grad.data_ptr(),
        rows=rows.data_ptr(),
        out=out.data_ptr(),
        ends=segments.ends.data_ptr(),
        num_rows=rows.shape[0],
        experts=out.shape[0],
        out_features=out.shape[1],
        in_features=out.shape[2],
        blocks=turns * multiprocessors(rows.get_device()),
        accumulate=accumulate,
    )
    launch(load_kernels(), "grouped_gemm_wgrad", arguments, rows.device)
    return out


@functools.cache
def load_kernels() -> ctypes.CDLL:
    """The CUDA library with the signatures of its grouped GEMMs declared.

    Raises:
        NativeLibraryError: if there is no library, or it is of another version.
    """
    return load_entry_points(
        {
            "grouped_gemm_forward": GroupedGemmArgs,
            "grouped_gemm_dgrad": GroupedGemmArgs,
            "grouped_gemm_wgrad": GroupedWgradArgs,
            "grouped_gemm_swiglu": SwigluGemmArgs,
        }
    )


@functools.cache
def _library_obstacle() -> str | None:
    try:
        load_kernels()
    except NativeLibraryError as error:
        return f"moe.experts.backend = native: {error}"
    return None


@functools.cache
def multiprocessors(device: int) -> int:
    """SMs of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _is_plain(x: Tensor) -> bool:
    """Dense from an aligned address on, as the copy engine wants it."""
    return x.is_contiguous() and x.data_ptr() % _ALIGNMENT_BYTES == 0


def plain(x: Tensor) -> Tensor:
    """``x``, or a copy of it that the copy engine takes."""
    return x if _is_plain(x) else x.clone(memory_format=torch.contiguous_format)
