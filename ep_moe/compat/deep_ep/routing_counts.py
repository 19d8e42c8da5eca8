"""The kernel of ``Buffer.get_dispatch_layout``, ``csrc/routing_counts.cu``: whether it fits, and launching it."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int32, c_void_p

import torch
from torch import Tensor

from ep_moe.native import find_entry_points, launch


class RoutingCountsArgs(ctypes.Structure):
    """``RoutingCountsArgs`` of ``routing_counts.cu``, which says what each field means."""

    _fields_ = (
        ("topk_idx", c_void_p),
        ("counts", c_void_p),
        ("in_rank", c_void_p),
        ("tokens", c_int32),
        ("top_k", c_int32),
        ("ranks", c_int32),
        ("experts_per_rank", c_int32),
    )


def count(library: ctypes.CDLL, topk_idx: Tensor, num_experts: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`ep_moe.compat.deep_ep.normal.dispatch_layout`, for entries on a GPU."""
    topk_idx, device = topk_idx.contiguous(), topk_idx.device
    tokens, top_k = topk_idx.shape
    counts = torch.empty(ranks + num_experts, dtype=torch.int32, device=device)
    in_rank = torch.empty(tokens, ranks, dtype=torch.bool, device=device)
    arguments = RoutingCountsArgs(
        topk_idx=topk_idx.data_ptr(),
        counts=counts.data_ptr(),
        in_rank=in_rank.data_ptr(),
        tokens=tokens,
        top_k=top_k,
        ranks=ranks,
        experts_per_rank=num_experts // ranks,
    )
    launch(library, "routing_counts", arguments, device)
    return counts[:ranks], counts[ranks:], in_rank


@functools.cache
def find_library() -> ctypes.CDLL | None:
    """The CUDA library with the signature of the kernel declared, or ``None`` where there is none."""
    return find_entry_points({"routing_counts": RoutingCountsArgs}, "layouts are counted without their CUDA kernel")
