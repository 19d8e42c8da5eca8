"""Grouped GEMM back ends: one linear layer per expert over the expert's segment of rows.

All of them accept ragged segments: none asks for segments padded to a multiple (see :data:`ALIGNMENT`).
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_moe.comm import ExpertSegments
from ep_moe.config import ConfigError

ALIGNMENT = 1
"""Rows of a segment must be a multiple of this. grouped_mm addresses rows, whose strides it wants aligned to 16
bytes, so any row may start a segment; TransformerEngine runs one bf16 GEMM per expert."""

_GROUPED_MM_ALIGNMENT_BYTES = 16
_GROUPED_MM_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GroupedLinear(Protocol):
    """The operation every back end provides, differentiable in ``rows`` and ``weight``."""

    def __call__(self, rows: Tensor, weight: Tensor, segments: ExpertSegments) -> Tensor:
        """Multiply each expert's rows by its transposed weight.

        Args:
            rows: ``[segments.num_rows, in_features]``, expert-major.
            weight: ``[local_experts, out_features, in_features]``, contiguous, same dtype and device as ``rows``.
            segments: which rows belong to which expert.

        Returns:
            ``[segments.num_rows, out_features]`` in the dtype of ``rows``.
        """
        ...


def loop_linear(rows: Tensor, weight: Tensor, segments: ExpertSegments) -> Tensor:
    """One ordinary linear layer per expert, any dtype and device (see :class:`GroupedLinear`)."""
    sizes = segments.host_sizes()
    chunks = rows[: sum(sizes)].split(sizes)
    out = torch.cat([F.linear(chunk, matrix) for chunk, matrix in zip(chunks, weight.unbind(0), strict=True)])
    return _to_capacity(out, rows.shape[0])


def grouped_mm_linear(rows: Tensor, weight: Tensor, segments: ExpertSegments) -> Tensor:
    """``torch.nn.functional.grouped_mm`` (see :class:`GroupedLinear`); reads segment ends on the device only."""
    if segments.num_rows == 0:
        return loop_linear(rows, weight, segments)  # grouped_mm takes the strides of some empty tensors for invalid
    result: Tensor = _GroupedMM.apply(rows, weight, segments.ends)
    return result


def te_linear(rows: Tensor, weight: Tensor, segments: ExpertSegments) -> Tensor:
    """``transformer_engine.pytorch.GroupedLinear`` run on our weights (see :class:`GroupedLinear`).

    Raises:
        ConfigError: if TransformerEngine is not installed.
    """
    te = import_transformer_engine()
    if segments.num_rows == 0:
        return loop_linear(rows, weight, segments)
    module = _te_module(weight.shape[0], weight.shape[2], weight.shape[1], weight.dtype, weight.device)
    # One unbind for all experts: its backward is a single stack, where indexing would add up one full-size
    # gradient per expert. The module's own parameters are meta placeholders that these replace for the call.
    weights = {f"weight{i}": matrix for i, matrix in enumerate(weight.unbind(0))}
    # The module is shared by layers of the same shape, so FP8 scaling state must never build up in it.
    autocast = getattr(te, "autocast", None) or te.fp8_autocast
    sizes = list(segments.host_sizes())
    with autocast(enabled=False):
        result: Tensor = torch.func.functional_call(module, weights, (rows[: sum(sizes)], sizes))
    return _to_capacity(result, rows.shape[0])


def import_transformer_engine() -> Any:
    """Import and return ``transformer_engine.pytorch``.

    Raises:
        ConfigError: if that fails, saying how to get it.
    """
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError) as error:
        raise ConfigError(
            "moe.experts.backend = te: needs TransformerEngine (pip install --no-build-isolation "
            f"'transformer-engine[pytorch]'), which cannot be imported here: {str(error).splitlines()[0]}"
        ) from error
    return te


def select_backend(
    name: str, *, dtype: torch.dtype, device: torch.device, hidden_size: int, ffn_hidden_size: int
) -> GroupedLinear:
    """The back end for a computation in ``dtype`` on ``device``.

    Args:
        name: loop, grouped_mm, te, or auto: grouped_mm where it runs, else loop.
        dtype: of rows and weights.
        device: of rows and weights.
        hidden_size: width of the rows.
        ffn_hidden_size: inner width of the experts.

    Raises:
        ConfigError: (a ``ValueError``) if the back end cannot run this, naming the key and what is allowed.
    """
    if name == "loop":
        return loop_linear
    if name == "te":
        if device.type != "cuda" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"moe.experts.backend = te: needs bf16, fp16 or fp32 on a CUDA GPU, got {dtype} on {device}"
            )
        import_transformer_engine()
        return te_linear
    obstacle = _grouped_mm_obstacle(dtype, device, hidden_size, ffn_hidden_size)
    if name == "auto":
        return grouped_mm_linear if obstacle is None else loop_linear
    if obstacle is not None:
        raise ConfigError(obstacle)
    return grouped_mm_linear


def _grouped_mm_obstacle(
    dtype: torch.dtype, device: torch.device, hidden_size: int, ffn_hidden_size: int
) -> str | None:
    """Why grouped_mm cannot run, or ``None``."""
    if device.type == "cuda":
        # Other dtypes work in some releases, but by a loop that waits for the segment ends on the host; ours
        # knows the sizes already.
        if dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 0):
            return f"moe.experts.backend = grouped_mm: needs bf16 on CUDA (compute capability 8.0 or more), got {dtype}"
    elif dtype not in _GROUPED_MM_CPU_DTYPES:
        return f"moe.experts.backend = grouped_mm: needs fp32, bf16 or fp16 on {device.type}, got {dtype}; use loop"
    multiple = _GROUPED_MM_ALIGNMENT_BYTES // dtype.itemsize
    widths = (("model.hidden_size", hidden_size), ("moe.experts.ffn_hidden_size", ffn_hidden_size))
    for path, width in widths:
        if width % multiple:
            return f"{path} = {width}: must be a multiple of {multiple} for moe.experts.backend grouped_mm in {dtype}"
    return None


class _GroupedMM(torch.autograd.Function):
    """Its own backward, because grouped_mm's rejects gradients with broadcast strides (``y.sum().backward()``)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        rows, weight = _row_major(rows), _row_major(weight)
        ctx.save_for_backward(rows, weight, ends)
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, ends = ctx.saved_tensors
        grad = _row_major(grad)
        grad_rows = F.grouped_mm(grad, weight, offs=ends) if ctx.needs_input_grad[0] else None
        grad_weight = F.grouped_mm(grad.t(), rows, offs=ends) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weight, None


def _to_capacity(rows: Tensor, num_rows: int) -> Tensor:
    """With zero rows behind, where the tensors have more rows than the segments."""
    return rows if rows.shape[0] == num_rows else F.pad(rows, (0, 0, 0, num_rows - rows.shape[0]))


def _row_major(x: Tensor) -> Tensor:
    """A copy unless the strides are the usual ones; ``contiguous()`` lets any stride pass in dimensions of one."""
    if x.is_contiguous() and x.stride()[-2:] == (x.shape[-1], 1):
        return x
    return x.new_empty(x.shape).copy_(x)


@functools.lru_cache(maxsize=64)
def _te_module(
    num_experts: int, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """A GroupedLinear without memory of its own; cached because TransformerEngine's constructor is slow."""
    te = import_transformer_engine()
    module: torch.nn.Module = te.GroupedLinear(
        num_experts, in_features, out_features, bias=False, params_dtype=dtype, device="meta"
    )
    for i in range(num_experts):
        # unused without bias, but handed to the kernels' autograd function: keep meta tensors out of there
        setattr(module, f"bias{i}", torch.empty(0, dtype=dtype, device=device))
    return module
