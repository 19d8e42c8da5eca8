"""Where rows go: the results of the layout kernel (``csrc/layout.cu``), and how the host learns their sizes."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_moe.comm import nvlink_args as native
from ep_moe.comm.arena import Arena
from ep_moe.comm.communicator import ReceivedRouting, RowLayout
from ep_moe.comm.node_chunks import NodeChunks
from ep_moe.comm.nvlink_core import NvlinkCore
from ep_moe.comm.nvlink_faults import PeerTimeoutError
from ep_moe.comm.nvlink_handle import Places
from ep_moe.native import pointer

_SPINS = 200  # looks at the flag between looks at everything else
_ROUTING_SMS = 64  # whatever the budget: some 20 us, in which they wait more than they move; 16 and 128 take longer


@dataclass(frozen=True)
class RowPlaces:
    """What the layout kernel fills; ``LayoutArgs`` of ``csrc/layout.cu`` describes it.

    Attributes:
        tokens: places of each token.
        arena: in which those lie, and the tensors below but for weights and received routing.
        counts: int64 ``[local_experts]``.
        ends: int32 ``[local_experts]``.
        max_slots: slots there is room for.
        slot_weights: fp32 ``[max_slots]``, if weights were sent.
        received_topk_idx: int64 ``[max_received, top_k]``, in the layout ``rows``.
        received_topk_weights: fp32, likewise, if weights were sent.
        rows_per_rank: int64 ``[ranks]``, in the layout ``rows``.
        max_received: rows there is room for.
    """

    tokens: Places
    arena: Arena
    counts: Tensor
    ends: Tensor
    max_slots: int
    slot_weights: Tensor | None
    received_topk_idx: Tensor | None
    received_topk_weights: Tensor | None
    rows_per_rank: Tensor | None
    max_received: int

    def row_of_slot(self, slots: int) -> Tensor:
        """int32 ``[slots]``."""
        return self.arena.tensor("row_of_slot", slots)

    def weights(self, slots: int, dtype: torch.dtype | None) -> Tensor | None:
        """``[slots]``, of ``dtype``; ``None`` if no weights were sent."""
        return _beginning(self.slot_weights, slots, dtype)

    def routing(self, received: int, dtype: torch.dtype | None) -> ReceivedRouting | None:
        """The routing of ``received`` rows, with weights of ``dtype`` if any were sent; ``None`` if not asked for."""
        if self.received_topk_idx is None or self.rows_per_rank is None:
            return None
        weights = _beginning(self.received_topk_weights, received, dtype)
        return ReceivedRouting(self.received_topk_idx.narrow(0, 0, received), weights, self.rows_per_rank)


def _beginning(weights: Tensor | None, count: int, dtype: torch.dtype | None) -> Tensor | None:
    if weights is None:
        return None
    weights = weights.narrow(0, 0, count)
    return weights if dtype == weights.dtype else weights.to(dtype)


@dataclass(frozen=True)
class KnownSizes:
    """What arrives at this rank, where the host knows before the layout.

    Attributes:
        slots: of each local expert, without padding.
        received: rows.
    """

    slots: tuple[int, ...]
    received: int

    def padded(self, alignment: int) -> tuple[int, ...]:
        """Length of each expert's segment."""
        if alignment == 1:
            return self.slots
        return tuple(-(-slots // alignment) * alignment for slots in self.slots)


class HostCounts:
    """Pinned host memory in which a layout kernel tells sizes: ``LayoutArgs::host_counts``."""

    def __init__(self, core: NvlinkCore) -> None:
        self._core = core
        self._memory = torch.zeros(3 + native.MAX_EXPERTS, dtype=torch.int32, device="cpu", pin_memory=True)
        # Read without PyTorch, whose slice and list take as long as a launch.
        self._values = (ctypes.c_int32 * self._memory.numel()).from_address(self._memory.data_ptr())
        self._ready = ctypes.c_int32.from_address(self._memory.data_ptr())

    def expect(self) -> int:
        """Forget earlier sizes; the address for the kernel."""
        self._ready.value = 0
        return self._memory.data_ptr()

    def wait(self, local_experts: int) -> tuple[int, KnownSizes]:
        """Wait until the layout kernel has counted: the one wait of the host.

        Returns:
            The most tokens of any rank, and what arrives here.

        Raises:
            PeerTimeoutError: if the kernel does not run.
            ValueError: what the kernel found wrong with its arguments.
            CapacityError: of an earlier dispatch.
        """
        core, ready = self._core, self._ready
        # A kernel's own waits end in time; the margin is for kernels of others before it on the stream.
        limit = 10 * core.timeout_s
        deadline = time.monotonic() + limit
        while not ready.value:
            for _ in range(_SPINS):  # sleeping instead would cost more than the wait usually takes
                if ready.value:
                    break
            core.check()
            if time.monotonic() > deadline:
                torch.cuda.synchronize(core.device)  # raises what went wrong on the device, if anything did
                raise PeerTimeoutError(f"rank {core.rank}: the layout kernel did not run within {limit:g} s", core.rank)
        core.check()
        _, most_tokens, *slots, received = self._values[: 3 + local_experts]
        return most_tokens, KnownSizes(tuple(slots), received)


def lay_out(
    core: NvlinkCore,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    *,
    num_experts: int,
    layout: RowLayout,
    alignment: int,
    max_rows: int | None,
    host_counts: HostCounts,
    nodes: NodeChunks | None = None,
    sizes: KnownSizes | None = None,
) -> RowPlaces:
    """Launch the exchange of routing: where every arriving row goes, and the weight of each slot.

    Without ``max_rows`` the kernel tells ``host_counts`` how many rows there are, and places have room for as many as
    can arrive, or exactly as many as there are where the host has learnt their ``sizes`` before: then it is told
    nothing. Tokens that came from ``nodes`` get places by the ranks they came from.
    """
    local_experts, max_tokens = num_experts // core.size, core.max_tokens
    tokens, top_k = topk_idx.shape
    # As many as can arrive, where the host will learn how many do, and slots that have no tensor in this layout.
    most_received = core.size * max_tokens
    most_rows = most_received * top_k + local_experts * (alignment - 1)
    if max_rows is not None and layout == "rows":
        most_received = max_rows
    elif max_rows is None and sizes is not None:
        most_rows, most_received = sum(sizes.padded(alignment)), sizes.received
    elif max_rows is not None:
        most_rows, most_received = max_rows, min(max_rows, most_received)
    comm = core.arguments(_ROUTING_SMS)
    entries, histogram = core.size * max_tokens, core.size * comm.blocks * (local_experts + 1)
    arena = Arena(
        core.device,
        slots=4 * entries * top_k,
        rows=4 * entries,
        owners=tokens,
        counts=8 * local_experts,
        ends=4 * local_experts,
        rows_per_rank=8 * core.size,
        row_of_slot=4 * most_rows,
        histogram=4 * histogram,
    )
    by_row, weighted = layout == "rows", topk_weights is not None
    at = arena.addresses

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=core.device)

    places = RowPlaces(
        tokens=Places(
            memory=arena.memory,
            slots=at["slots"],
            rows=at["rows"],
            owners=at["owners"],
            counts=at["counts"],
            ends=at["ends"],
            slot_tokens=max_tokens,
            top_k=top_k,
            experts=local_experts,
        ),
        arena=arena,
        counts=arena.tensor("counts", local_experts, dtype=torch.int64),
        ends=arena.tensor("ends", local_experts),
        max_slots=most_rows,
        slot_weights=empty(most_rows, dtype=torch.float32) if weighted else None,
        received_topk_idx=empty(most_received, top_k, dtype=torch.int64) if by_row else None,
        received_topk_weights=empty(most_received, top_k, dtype=torch.float32) if by_row and weighted else None,
        rows_per_rank=arena.tensor("rows_per_rank", core.size, dtype=torch.int64) if by_row else None,
        max_received=most_received,
    )
    sent_weights = None if topk_weights is None else topk_weights.float().contiguous()
    arguments = native.LayoutArgs(
        comm=comm,
        topk_idx=topk_idx.data_ptr(),
        topk_weights=pointer(sent_weights),
        slot_weights=pointer(places.slot_weights),
        received_topk_idx=pointer(places.received_topk_idx),
        received_topk_weights=pointer(places.received_topk_weights),
        host_counts=host_counts.expect() if max_rows is None and sizes is None else None,
        tokens=tokens,
        top_k=top_k,
        num_experts=num_experts,
        alignment=alignment,
        max_rows=most_rows,
        max_received=most_received,
        **at,
    )
    if not by_row:
        arguments.rows_per_rank = None
    if nodes is not None:
        arguments.nodes, arguments.shifts = nodes.arguments(), nodes.shifts
    core.launch("layout", arguments)
    return places
