"""The activations that leave in FP8, ``csrc/activation_fp8.cu``: launching them."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from ep_moe.comm import ExpertSegments
from ep_moe.comm.fp8_quantize import RealRows
from ep_moe.experts import native_gemm
from ep_moe.experts.activation import is_gated
from ep_moe.experts.activation_kernels import ACTIVATIONS, as_fp32
from ep_moe.experts.fp8 import Fp8ActivationGradients, Fp8Rows, Segments, empty_scales
from ep_moe.experts.native_real_rows import real_rows
from ep_moe.native import launch, load_entry_points, pointer


class ActivationFp8Args(ctypes.Structure):
    """``ActivationFp8Args`` of ``activation_fp8.cu``, which says what each field means."""

    _fields_ = (
        ("x", c_void_p),
        ("grad", c_void_p),
        ("row_weights", c_void_p),
        ("values", c_void_p),
        ("scales", c_void_p),
        ("grad_x", c_void_p),
        ("activated", c_void_p),
        ("grad_weights", c_void_p),
        ("real", RealRows),
        ("scale_stride", c_int64),
        ("width", c_int32),
        ("activation", c_int32),
    )


def activate(x: Tensor, activation: str, row_weights: Tensor | None, segments: Segments) -> Fp8Rows:
    """See ``Fp8Gemm``; rows that are not real are not read."""
    width = _width(x, activation)
    values = x.new_empty(x.shape[0], width, dtype=torch.float8_e4m3fn)
    out = Fp8Rows(values, empty_scales(x.shape[0], width, x.device))
    x, weights = native_gemm.plain(x), as_fp32(row_weights)
    arguments = _arguments(x, activation, weights, segments, out)
    launch(load_kernels(), "activation_fp8_forward", arguments, x.device)
    return out


def activation_gradients(
    grad: Tensor,
    x: Tensor,
    activation: str,
    row_weights: Tensor | None,
    segments: ExpertSegments,
    *,
    need_weights: bool,
    need_activated: bool,
) -> Fp8ActivationGradients:
    """See ``Fp8Gemm``; rows behind the last segment are not read."""
    rows, width = x.shape[0], _width(x, activation)
    grad, x, weights = native_gemm.plain(grad), native_gemm.plain(x), as_fp32(row_weights)
    grad_x = torch.empty_like(x)
    quantized = Fp8Rows(torch.empty_like(x, dtype=torch.float8_e4m3fn), empty_scales(rows, x.shape[1], x.device))
    activated = x.new_empty(rows, width) if need_activated else None
    grad_weights = x.new_empty(rows, dtype=torch.float32) if need_weights else None
    arguments = _arguments(x, activation, weights, segments, quantized)
    arguments.grad, arguments.grad_x = grad.data_ptr(), grad_x.data_ptr()
    arguments.activated, arguments.grad_weights = pointer(activated), pointer(grad_weights)
    launch(load_kernels(), "activation_fp8_backward", arguments, x.device)
    if grad_weights is not None and row_weights is not None:
        grad_weights = grad_weights.to(row_weights.dtype)
    return Fp8ActivationGradients(grad_x, quantized, activated, grad_weights)


@functools.cache
def load_kernels() -> ctypes.CDLL:
    """The CUDA library with the signatures of these kernels declared.

    Raises:
        NativeLibraryError: if there is no library, or it is of another version.
    """
    return load_entry_points(
        {"activation_fp8_forward": ActivationFp8Args, "activation_fp8_backward": ActivationFp8Args}
    )


def _width(x: Tensor, activation: str) -> int:
    return x.shape[1] // 2 if is_gated(activation) else x.shape[1]


def _arguments(
    x: Tensor, activation: str, weights: Tensor | None, segments: Segments, out: Fp8Rows
) -> ActivationFp8Args:
    return ActivationFp8Args(
        x=x.data_ptr(),
        row_weights=pointer(weights),
        values=out.values.data_ptr(),
        scales=out.scales.data_ptr(),
        real=real_rows(segments, x.shape[0]),
        scale_stride=out.scales.stride(0),
        width=_width(x, activation),
        activation=ACTIVATIONS[activation],
    )
