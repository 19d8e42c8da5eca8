"""What a rank's routing asks of two hops: by our kernel where there is one, otherwise by PyTorch, with equal bits.

That is which tokens go to which node, and a *tally*: all that other ranks need to know of it, in one row of integers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int32, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_moe.comm.communicator import check_signature
from ep_moe.comm.hops import Counts
from ep_moe.comm.nvlink_args import MAX_NODES
from ep_moe.comm.nvlink_faults import PeerTimeoutError
from ep_moe.comm.topology import Topology
from ep_moe.native import find_entry_points, has_code_for, launch

SIGNATURE_WORDS = 5
_HEADER_WORDS = 3 + SIGNATURE_WORDS  # present, lowest, highest
_MOST_BINS = 12 * 1024  # which fit the shared memory of any block
_INT32 = torch.iinfo(torch.int32)


class RoutingTallyArgs(ctypes.Structure):
    """``RoutingTallyArgs`` of ``routing_tally.cu``, which says what each field means."""

    _fields_ = (
        ("topk_idx", c_void_p),
        ("sent", c_void_p),
        ("places", c_void_p),
        ("tally", c_void_p),
        ("tokens", c_int32),
        ("top_k", c_int32),
        ("ranks", c_int32),
        ("nodes", c_int32),
        ("experts_per_rank", c_int32),
        ("signature", c_int32 * SIGNATURE_WORDS),
    )


@dataclass(frozen=True)
class TallyFormat:
    """Where what stands in a tally; ``RoutingTallyArgs`` of ``routing_tally.cu`` describes it.

    Attributes:
        topology: of all ranks.
        experts_per_rank: local experts of every rank.
    """

    topology: Topology
    experts_per_rank: int

    @property
    def num_experts(self) -> int:
        """Of all ranks."""
        return self.topology.ranks * self.experts_per_rank

    @property
    def bins(self) -> int:
        """The experts of each rank, and its rows."""
        return self.topology.ranks * (self.experts_per_rank + 1)

    @property
    def width(self) -> int:
        """Of a tally; its bytes are a multiple of 16, so that kernels copy it by as many."""
        return -(-(self.bins + self.topology.nodes + _HEADER_WORDS) // 4) * 4

    def read(self, everyone: Tensor, rank: int, signature: Sequence[int]) -> Counts:
        """What ``rank`` needs to know of the tallies of all ranks.

        Args:
            everyone: int32 ``[ranks, width]`` on the CPU.
            rank: this one.
            signature: its own.

        Raises:
            PeerTimeoutError: if a tally did not come.
            ValueError: if a rank passed another signature, or experts out of range.
        """
        first = self.bins + self.topology.nodes
        headers = everyone[:, first : first + _HEADER_WORDS].tolist()
        for source, (present, lowest, highest, *theirs) in enumerate(headers):
            if not present:
                raise PeerTimeoutError(f"rank {rank}: the counts of rank {source} did not come", source)
            check_signature(source, theirs, rank, signature)
            if lowest or highest:
                raise ValueError(
                    f"topk_idx: expected experts in [0, {self.num_experts}) (moe.num_experts) or -1, got "
                    f"{' and '.join(str(expert) for expert in (lowest, highest) if expert)} at rank {source} of the "
                    "group"
                )
        here = self.experts_per_rank + 1
        bins = everyone[:, rank * here : (rank + 1) * here].t().to(torch.int64).contiguous()
        return Counts(everyone[:, self.bins : first].to(torch.int64), bins)


@dataclass(frozen=True)
class RoutedTokens:
    """Where this rank's tokens go.

    Attributes:
        sent: int64, the tokens of each node in ascending order, one node behind the other; longer than that where the
            host has not learnt how many they are.
        places: int32 ``[nodes, tokens]``, where among a node's tokens one is, or -1.
        tally: int32 ``[width]``, for all ranks.
    """

    sent: Tensor
    places: Tensor
    tally: Tensor


def route_tokens(topk_idx: Tensor, form: TallyFormat, signature: Sequence[int]) -> RoutedTokens:
    """Find out where tokens go; waits for nothing where there is a kernel.

    Args:
        topk_idx: int64 ``[tokens, top_k]``; entries out of range go nowhere.
        form: of the tally.
        signature: five integers that must be the same on all ranks.
    """
    topk_idx = topk_idx.contiguous()
    if not _usable(topk_idx, form):
        return _by_pytorch(topk_idx, form, signature)
    library = _find_library()
    assert library is not None  # _usable() has seen to it
    topology, device = form.topology, topk_idx.device
    tokens, top_k = topk_idx.shape
    routed = RoutedTokens(
        sent=torch.empty(topology.nodes * tokens, dtype=torch.int64, device=device),
        places=torch.empty(topology.nodes, tokens, dtype=torch.int32, device=device),
        tally=torch.zeros(form.width, dtype=torch.int32, device=device),
    )
    arguments = RoutingTallyArgs(
        topk_idx=topk_idx.data_ptr(),
        sent=routed.sent.data_ptr(),
        places=routed.places.data_ptr(),
        tally=routed.tally.data_ptr(),
        tokens=tokens,
        top_k=top_k,
        ranks=topology.ranks,
        nodes=topology.nodes,
        experts_per_rank=form.experts_per_rank,
        signature=(c_int32 * SIGNATURE_WORDS)(*signature),
    )
    launch(library, "routing_tally", arguments, device)
    return routed


def _by_pytorch(topk_idx: Tensor, form: TallyFormat, signature: Sequence[int]) -> RoutedTokens:
    topology, num_experts, tokens = form.topology, form.num_experts, topk_idx.shape[0]
    known = (topk_idx >= 0) & (topk_idx < num_experts)
    rank = torch.where(known, topk_idx // form.experts_per_rank, topology.ranks)
    to_rank = torch.zeros(tokens, topology.ranks + 1, dtype=torch.bool, device=topk_idx.device)
    to_rank = to_rank.scatter_(1, rank, True)[:, : topology.ranks]
    to_node = to_rank.unflatten(1, (topology.nodes, topology.ranks_per_node)).any(2).t()
    entries = torch.where(known, topk_idx, num_experts).flatten().bincount(minlength=num_experts + 1)[:num_experts]
    bins = torch.cat([entries.view(topology.ranks, -1), to_rank.sum(0).unsqueeze(1)], dim=1)
    tally = torch.zeros(form.width, dtype=torch.int32, device=topk_idx.device)
    first = form.bins + topology.nodes
    tally[: form.bins] = bins.flatten()
    tally[form.bins : first] = to_node.sum(1)
    tally[first] = 1
    if topk_idx.numel():
        tally[first + 1] = torch.where(topk_idx < -1, topk_idx, 0).min().clamp(min=_INT32.min)
        tally[first + 2] = torch.where(topk_idx >= num_experts, topk_idx, 0).max().clamp(max=_INT32.max)
    tally[first + 3 : first + _HEADER_WORDS] = torch.tensor(list(signature), dtype=torch.int32)
    places = torch.where(to_node, to_node.cumsum(1) - 1, -1).to(torch.int32)
    return RoutedTokens(to_node.nonzero()[:, 1], places, tally)


def _usable(topk_idx: Tensor, form: TallyFormat) -> bool:
    return (
        topk_idx.is_cuda
        and form.topology.nodes <= MAX_NODES
        and form.bins <= _MOST_BINS
        and has_code_for(topk_idx.get_device())
        and _find_library() is not None
    )


@functools.cache
def _find_library() -> ctypes.CDLL | None:
    """The CUDA library with the signature of the kernel declared, or ``None`` where there is none."""
    return find_entry_points({"routing_tally": RoutingTallyArgs}, "routing is tallied without its CUDA kernel")
