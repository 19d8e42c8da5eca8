"""The CUDA kernels of the activations, ``csrc/activation.cu``: whether they fit, and launching them.

They compute what :mod:`ep_moe.experts.activation` computes eagerly, in one pass over the data each way.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor, nn

from ep_moe.comm.nvlink_wire import ELEMENTS
from ep_moe.native import find_entry_points, has_code_for, launch, pointer

ACTIVATIONS = {"swiglu": 0, "geglu": 1, "gelu": 2, "relu": 3, "squared_relu": 4}  # Activation of pointwise.cuh
_VECTOR_BYTES = 16


class ActivationArgs(ctypes.Structure):
    """``ActivationArgs`` of ``activation.cu``, which says what each field means."""

    _fields_ = (
        ("x", c_void_p),
        ("grad", c_void_p),
        ("row_weights", c_void_p),
        ("out", c_void_p),
        ("grad_x", c_void_p),
        ("grad_weights", c_void_p),
        ("num_rows", c_void_p),
        ("start", c_void_p),
        ("rows", c_int64),
        ("row_vectors", c_int32),
        ("element", c_int32),
        ("activation", c_int32),
        ("room", c_int32),
    )


def rows_fit(dtype: torch.dtype, width: int) -> bool:
    """Whether the kernels take output rows of ``width`` elements: whole vectors of 16 bytes."""
    return dtype in ELEMENTS and width > 0 and width * dtype.itemsize % _VECTOR_BYTES == 0


def usable(x: Tensor, width: int) -> bool:
    """Whether the kernels can compute output rows of ``width`` elements from ``x``.

    ``torch.compile`` cannot look into them and fuses the eager operations itself; tensor subclasses have no data
    that a kernel could read.
    """
    return (
        x.is_cuda
        and rows_fit(x.dtype, width)
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and _is_plain(x)
        and has_code_for(x.get_device())
        and find_library() is not None
    )


def forward(
    x: Tensor,
    activation: str,
    row_weights: Tensor | None,
    row_count: Tensor | None,
    width: int,
    *,
    row_start: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The activation of ``x``, for which :func:`usable` holds; see ``activate`` for the arguments.

    Returns:
        ``[..., width]`` in the dtype of ``x``; only rows from ``row_start`` to ``row_count`` are written.
    """
    if out is None:
        out = x.new_empty(*x.shape[:-1], width)
    arguments = _arguments(out, activation, row_count, row_start)
    weights = as_fp32(row_weights)
    arguments.x, arguments.out, arguments.row_weights = x.data_ptr(), out.data_ptr(), pointer(weights)
    _launch("activation_forward", arguments, x.device)
    return out


def forward_packed(x: Tensor, activation: str, counts: Tensor, width: int) -> Tensor:
    """The activation of the first ``counts[e]`` (int32, on the GPU) rows of each ``x[e]``, ``[experts, room, any]``.

    Returns:
        ``[experts, room, width]``; rows behind the counts have not been written.
    """
    out = x.new_empty(*x.shape[:-1], width)
    arguments = _arguments(out, activation, counts)
    arguments.x, arguments.out, arguments.room = x.data_ptr(), out.data_ptr(), x.shape[1]
    _launch("activation_forward", arguments, x.device)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    activation: str,
    row_weights: Tensor | None,
    row_count: Tensor | None,
    *,
    need_x: bool,
    need_weights: bool,
    row_start: Tensor | None = None,
    out: Tensor | None = None,
    activated: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of :func:`forward` from that of its result, ``[..., width]`` in the dtype of ``x``.

    Returns:
        The gradients of ``x`` and of ``row_weights``, in their shapes and dtypes, or ``None`` for those not needed;
        that of ``x`` is ``out``, if given. Only rows from ``row_start`` to ``row_count`` are written, to ``activated``
        too, which gets the result of :func:`forward` and may be ``grad``.
    """
    # an expanded scalar (from sum().backward()), or a view that starts between vectors
    if not _is_plain(grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
    grad_x = (torch.empty_like(x) if out is None else out) if need_x else None
    grad_weights = x.new_empty(x.shape[:-1], dtype=torch.float32) if need_weights else None
    arguments = _arguments(grad, activation, row_count, row_start)
    weights = as_fp32(row_weights)
    arguments.x, arguments.grad, arguments.row_weights = x.data_ptr(), grad.data_ptr(), pointer(weights)
    arguments.grad_x, arguments.grad_weights = pointer(grad_x), pointer(grad_weights)
    arguments.out = pointer(activated)
    if need_x or need_weights or activated is not None:
        _launch("activation_backward", arguments, x.device)
    if grad_weights is not None and row_weights is not None:
        grad_weights = grad_weights.to(row_weights.dtype)
    return grad_x, grad_weights


@functools.cache
def find_library() -> ctypes.CDLL | None:
    """The CUDA library with the signatures of its activations declared, or ``None`` where there is none."""
    entries = {"activation_forward": ActivationArgs, "activation_backward": ActivationArgs}
    return find_entry_points(entries, "activations run without their CUDA kernels")


def _arguments(
    out_like: Tensor, activation: str, row_count: Tensor | None, row_start: Tensor | None = None
) -> ActivationArgs:
    width = out_like.shape[-1]
    return ActivationArgs(
        num_rows=pointer(row_count),
        start=pointer(row_start),
        rows=out_like.numel() // width,
        row_vectors=width * out_like.itemsize // _VECTOR_BYTES,
        element=ELEMENTS[out_like.dtype],
        activation=ACTIVATIONS[activation],
    )


def _launch(entry: str, arguments: ActivationArgs, device: torch.device) -> None:
    library = find_library()
    assert library is not None  # usable() has seen to it
    launch(library, entry, arguments, device)


def _is_plain(x: Tensor) -> bool:
    """Dense, and from a vector's boundary on."""
    return x.is_contiguous() and x.data_ptr() % _VECTOR_BYTES == 0


def as_fp32(row_weights: Tensor | None) -> Tensor | None:
    """The weights as the kernels read them: one fp32 a row."""
    if row_weights is None or (row_weights.dtype == torch.float32 and row_weights.is_contiguous()):
        return row_weights
    return row_weights.to(torch.float32).contiguous()
