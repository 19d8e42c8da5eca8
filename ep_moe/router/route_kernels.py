"""The CUDA kernels of routing, ``csrc/route.cu``: whether they fit, and launching them.

They compute what :func:`ep_moe.router.scoring.route` computes by PyTorch operations, in one kernel each way.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int32, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_moe.config import RouterConfig
from ep_moe.native import find_entry_points, has_code_for, launch

_MAX_EXPERTS, _MAX_TOP_K, _MAX_GROUPS = 1024, 32, 32
_SOFTMAX, _PRE_SOFTMAX, _SIGMOID = range(3)  # Scoring of route.cu


class RouteArgs(ctypes.Structure):
    """``RouteArgs`` of ``route.cu``, which says what each field means."""

    _fields_ = (
        ("logits", c_void_p),
        ("bias", c_void_p),
        ("topk_idx", c_void_p),
        ("weights", c_void_p),
        ("grad_weights", c_void_p),
        ("grad_logits", c_void_p),
        ("tokens", c_int32),
        ("experts", c_int32),
        ("top_k", c_int32),
        ("groups", c_int32),
        ("group_topk", c_int32),
        ("scoring", c_int32),
        ("scale", c_float),
        ("reserved", c_int32),
    )


def usable(logits: Tensor, top_k: int, router: RouterConfig) -> bool:
    """Whether the kernels can route by these logits: fp32 on Hopper or newer, within their limits.

    ``torch.compile`` cannot look into them and fuses the PyTorch operations itself.
    """
    return (
        logits.is_cuda
        and logits.dtype == torch.float32
        and logits.shape[1] <= _MAX_EXPERTS
        and top_k <= _MAX_TOP_K
        and (router.num_groups or 0) <= _MAX_GROUPS
        and not torch.compiler.is_compiling()
        and type(logits) is Tensor
        and has_code_for(logits.get_device())
        and _find_library() is not None
    )


def route(logits: Tensor, top_k: int, router: RouterConfig, expert_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`ep_moe.router.scoring.route`, for logits of which :func:`usable` holds.

    Of equal scores the expert of the lower number is chosen first. Differentiable once in the logits.
    """
    topk_idx, weights = _Route.apply(logits, expert_bias, top_k, router)
    return topk_idx, weights


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, expert_bias: Tensor | None, top_k: int, router: RouterConfig
    ) -> tuple[Tensor, Tensor]:
        logits = logits.contiguous()
        topk_idx = torch.empty(logits.shape[0], top_k, dtype=torch.int64, device=logits.device)
        weights = torch.empty(logits.shape[0], top_k, dtype=torch.float32, device=logits.device)
        arguments = _arguments(logits, topk_idx, router)
        arguments.weights = weights.data_ptr()
        if expert_bias is not None:
            expert_bias = expert_bias.contiguous()
            arguments.bias = expert_bias.data_ptr()
        _launch("route_forward", arguments, logits.device)
        ctx.mark_non_differentiable(topk_idx)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, topk_idx)
        ctx.router = router
        return topk_idx, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, grad_weights: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grad_weights is None:
            return None, None, None, None
        logits, topk_idx = ctx.saved_tensors
        grad_weights = grad_weights.contiguous()
        grad_logits = torch.empty_like(logits)
        arguments = _arguments(logits, topk_idx, ctx.router)
        arguments.grad_weights, arguments.grad_logits = grad_weights.data_ptr(), grad_logits.data_ptr()
        _launch("route_backward", arguments, logits.device)
        return grad_logits, None, None, None


def _arguments(logits: Tensor, topk_idx: Tensor, router: RouterConfig) -> RouteArgs:
    limited = router.num_groups is not None and router.group_topk is not None
    scoring = _SIGMOID if router.score_function == "sigmoid" else _PRE_SOFTMAX if router.pre_softmax else _SOFTMAX
    return RouteArgs(
        logits=logits.data_ptr(),
        topk_idx=topk_idx.data_ptr(),
        tokens=logits.shape[0],
        experts=logits.shape[1],
        top_k=topk_idx.shape[1],
        groups=router.num_groups if limited else 0,
        group_topk=router.group_topk if limited else 0,
        scoring=scoring,
        scale=router.routed_scaling_factor,
    )


def _launch(entry: str, arguments: RouteArgs, device: torch.device) -> None:
    library = _find_library()
    assert library is not None  # usable() has seen to it
    launch(library, entry, arguments, device)


@functools.cache
def _find_library() -> ctypes.CDLL | None:
    """The CUDA library with the signatures of its routing declared, or ``None`` where there is none."""
    entries = {"route_forward": RouteArgs, "route_backward": RouteArgs}
    return find_entry_points(entries, "routing runs without its CUDA kernels")
