"""The counts of ``Buffer.get_dispatch_layout``, by the kernel in ``csrc/routing_counts.cu`` where there is one."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int32, c_void_p

import torch
from torch import Tensor

from ep_moe.comm.arena import Arena
from ep_moe.native import find_entry_points, has_code_for, launch


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


def count(topk_idx: Tensor, num_experts: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens per rank int32 ``[ranks]``, per expert int32 ``[num_experts]``, and bool ``[tokens, ranks]``.

    One function, for each that a call passes through costs as much as a tensor.

    Raises:
        ValueError: if the arguments do not fit together.
    """
    if topk_idx.dim() != 2 or topk_idx.dtype != torch.int64:
        raise ValueError(f"topk_idx: expected int64 [tokens, top_k], got {topk_idx.dtype} {list(topk_idx.shape)}")
    if num_experts < 1 or num_experts % ranks:
        raise ValueError(f"num_experts: expected a multiple of the {ranks} ranks of the group, got {num_experts}")
    library = _find_library() if topk_idx.is_cuda and has_code_for(topk_idx.get_device()) else None
    if library is None:
        return _count_by_operations(topk_idx, num_experts, ranks)
    topk_idx, device = topk_idx.contiguous(), topk_idx.device
    tokens, top_k = topk_idx.shape
    arena = Arena(device, counts=4 * (ranks + num_experts), in_rank=tokens * ranks)
    arguments = RoutingCountsArgs(
        topk_idx=topk_idx.data_ptr(),
        **arena.addresses,
        tokens=tokens,
        top_k=top_k,
        ranks=ranks,
        experts_per_rank=num_experts // ranks,
    )
    launch(library, "routing_counts", arguments, device)
    per_rank, per_expert = arena.tensor("counts", ranks + num_experts).split_with_sizes((ranks, num_experts))
    return per_rank, per_expert, arena.tensor("in_rank", tokens, ranks, dtype=torch.bool)


def _count_by_operations(topk_idx: Tensor, num_experts: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    device = topk_idx.device
    owners = topk_idx.div(num_experts // ranks, rounding_mode="floor")  # -1 stays -1
    in_rank = (owners.unsqueeze(2) == torch.arange(ranks, device=device)).any(1)
    # One place more on both sides, for what is no expert; dispatch reports those behind the last.
    places = topk_idx.flatten().clamp(-1, num_experts) + 1
    per_expert = torch.zeros(num_experts + 2, dtype=torch.int32, device=device)
    per_expert.scatter_add_(0, places, torch.ones(1, dtype=torch.int32, device=device).expand_as(places))
    return in_rank.sum(0, dtype=torch.int32), per_expert[1:-1], in_rank


@functools.cache
def _find_library() -> ctypes.CDLL | None:
    """The CUDA library with the signature of the kernel declared, or ``None`` where there is none."""
    return find_entry_points({"routing_counts": RoutingCountsArgs}, "layouts are counted without their CUDA kernel")
