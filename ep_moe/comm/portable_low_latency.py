"""Low-latency mode over ``torch.distributed`` alone: gloo on CPUs, NCCL on GPUs.

The plainest correct implementation of the :class:`~ep_moe.comm.low_latency.LowLatencyCommunicator` contract and the
oracle for the faster ones. Every rank sends all its tokens and their routing to every other rank, in packets of one
size; what a rank has no expert for it drops. So shapes are fixed and the host learns no sizes, at the price of bytes.

What a faster implementation may leave undefined is poison here (NaN, or -1): rows behind the counts, and results whose
hook has not been called.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm.communicator import check_expert_range
from ep_moe.comm.fp8 import BLOCK, quantize_e4m3, quantize_e4m3_ue8m0
from ep_moe.comm.low_latency import Hook, PackedRows, ScaleFormat, check_combine, check_dispatch, check_sizes

_IN_FLIGHT = 2
_E4M3_NAN = 0x7F


@dataclass(frozen=True)
class PortableLowLatencyHandle:
    """The routes of one dispatch; filled when it is received.

    Attributes:
        source_token: int32 ``[local_experts, ranks * max_tokens]``, the token of each row at its rank; -1 behind them.
        ranges: int64 ``[local_experts, ranks]``, begin << 32 | count of each rank's rows.
        slots: int64 ``[ranks * max_tokens, top_k]``, the row of each entry that came here, or -1.
        tokens: dispatched at this rank.
    """

    source_token: Tensor
    ranges: Tensor
    slots: Tensor
    tokens: int

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return self.slots.shape[1]


class PortableLowLatencyCommunicator:
    """A :class:`~ep_moe.comm.low_latency.LowLatencyCommunicator` over messages between the ranks of a process group.

    All ranks make the same calls in the same order. A combine's send waits for the peers' routing weights, so for their
    send. A rank that does not come makes the receive fail with the error of the process group, after its timeout.
    """

    def __init__(self, group: dist.ProcessGroup, *, max_tokens: int, hidden: int, num_experts: int) -> None:
        """Prepare; arguments as the attributes of the protocol.

        Raises:
            ValueError: for sizes that no communicator can have.
        """
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        check_sizes(max_tokens, hidden, num_experts, self.size)
        self.max_tokens, self.hidden, self.num_experts = max_tokens, hidden, num_experts
        self._local_experts = num_experts // self.size
        self._places = self.size * max_tokens
        self._masked = [False] * self.size
        self._messages = _Messages(group)
        self._dispatches, self._combines = _Rounds("dispatch"), _Rounds("combine")

    @property
    def masked(self) -> Tensor:
        """Bool ``[ranks]``, on the CPU: ranks that take no part any more."""
        return torch.tensor(self._masked)

    def mask_rank(self, rank: int, failed: bool = True) -> None:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.mask_rank`."""
        if not 0 <= rank < self.size or rank == self.rank:
            raise ValueError(f"rank: expected another rank of the group of {self.size}, got {rank}")
        self._masked[rank] = failed

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        *,
        scale_format: ScaleFormat = "none",
        received: Tensor | None = None,
        wait_ns: Tensor | None = None,
    ) -> PackedRows:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.dispatch`."""
        packed, hook = self.dispatch_send(x, topk_idx, scale_format=scale_format, received=received, wait_ns=wait_ns)
        hook()
        return packed

    def dispatch_send(
        self,
        x: Tensor,
        topk_idx: Tensor,
        *,
        scale_format: ScaleFormat = "none",
        received: Tensor | None = None,
        wait_ns: Tensor | None = None,
    ) -> tuple[PackedRows, Hook]:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.dispatch_send`."""
        check_dispatch(self, x, topk_idx, scale_format, received, wait_ns)
        if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):  # reading values waits for the device
            check_expert_range(topk_idx, self.num_experts)
        finish = self._dispatches.begin()
        tokens, top_k = topk_idx.shape
        routing = topk_idx.new_full((self.max_tokens, top_k), -1)
        routing[:tokens] = topk_idx
        values = x.new_zeros((self.max_tokens, self.hidden))
        values[:tokens] = x
        packet = torch.cat([_bytes_of(routing), _bytes_of(values)])
        # All bits set is a routing of -1: no token comes from a rank that is masked.
        arrive = self._messages.exchange(packet.expand(self.size, -1), 0xFF, self._masked, wait_ns)
        packed = self._poisoned(scale_format, tokens, top_k, x.device)

        def receive() -> None:
            arrived = arrive()
            split = routing.numel() * routing.itemsize
            everyone = arrived[:, :split].contiguous().view(torch.int64).view(self._places, top_k)
            rows = arrived[:, split:].contiguous().view(torch.bfloat16).view(self._places, self.hidden)
            self._place(everyone, rows, scale_format, packed)
            if received is not None:
                received.add_(packed.counts)

        return packed, finish(receive)

    def combine(
        self,
        rows: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: PortableLowLatencyHandle,
        *,
        out: Tensor | None = None,
        wait_ns: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.combine`."""
        out, hook = self.combine_send(rows, topk_idx, topk_weights, handle, out=out, wait_ns=wait_ns)
        hook()
        return out

    def combine_send(
        self,
        rows: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: PortableLowLatencyHandle,
        *,
        out: Tensor | None = None,
        wait_ns: Tensor | None = None,
    ) -> tuple[Tensor, Hook]:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.combine_send`."""
        check_combine(self, rows, topk_idx, topk_weights, handle, out, wait_ns)
        finish = self._combines.begin()
        tokens, top_k = topk_weights.shape
        weights = topk_weights.new_zeros((self.max_tokens, top_k))
        weights[:tokens] = topk_weights
        everyone = self._messages.exchange(_bytes_of(weights).expand(self.size, -1), 0, self._masked, None)()
        sums = self._weighted_sums(rows, everyone.view(torch.float32).view(self._places, top_k), handle.slots)
        arrive = self._messages.exchange(_bytes_of(sums).view(self.size, -1), 0, self._masked, wait_ns)
        result = rows.new_full((tokens, self.hidden), float("nan")) if out is None else out

        def receive() -> None:
            partial = arrive().view(torch.bfloat16).view(self.size, self.max_tokens, self.hidden)[:, :tokens]
            total = torch.zeros_like(result, dtype=torch.float32)
            for of_rank in partial.unbind(0):
                total += of_rank.to(torch.float32)
            result.copy_(total)

        return result, finish(receive)

    def combine_buffer(self, handle: PortableLowLatencyHandle) -> Tensor:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.combine_buffer`; an ordinary tensor."""
        shape = (*handle.source_token.shape, self.hidden)
        return torch.full(shape, float("nan"), dtype=torch.bfloat16, device=handle.source_token.device)

    def _poisoned(self, scale_format: ScaleFormat, tokens: int, top_k: int, device: torch.device) -> PackedRows:
        """The result of a dispatch before anything has arrived."""

        def full(*shape: int, value: float = -1, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        experts, places, blocks = self._local_experts, self._places, self.hidden // BLOCK
        scales = None
        if scale_format == "none":
            rows = full(experts, places, self.hidden, value=float("nan"), dtype=torch.bfloat16)
        else:
            rows = full(experts, places, self.hidden, value=_E4M3_NAN, dtype=torch.uint8).view(torch.float8_e4m3fn)
        if scale_format == "fp32":
            scales = full(experts, places, blocks, value=float("nan"), dtype=torch.float32)
        elif scale_format == "ue8m0":
            scales = full(experts, places, -(-blocks // 4))
        handle = PortableLowLatencyHandle(
            source_token=full(experts, places),
            ranges=full(experts, self.size, dtype=torch.int64),
            slots=full(places, top_k, dtype=torch.int64),
            tokens=tokens,
        )
        return PackedRows(rows, scales, full(experts), handle)

    def _place(self, topk_idx: Tensor, x: Tensor, scale_format: ScaleFormat, packed: PackedRows) -> None:
        """Fill ``packed`` from the tokens of all ranks (``[places, hidden]``) and their routing (``[places, top_k]``).

        Only operations of fixed shape: the host learns nothing of the routing.
        """
        experts, places = self._local_experts, self._places
        local = topk_idx - self.rank * experts
        here = (local >= 0) & (local < experts)
        local = torch.where(here, local, experts)
        wants = torch.zeros(places, experts + 1, dtype=torch.int64, device=x.device).scatter_(1, local, 1)
        # The row of a place within an expert is the number of places before it that want the expert too.
        before = wants.cumsum(0) - wants
        slots = torch.where(here, local * places + before.gather(1, local), -1)
        of_rank = wants[:, :experts].view(self.size, self.max_tokens, experts).sum(1)
        begin = of_rank.cumsum(0) - of_rank
        packed.counts.copy_(of_rank.sum(0))
        packed.handle.ranges.copy_((begin << 32 | of_rank).t())
        packed.handle.slots.copy_(slots)
        tokens = torch.arange(places, device=x.device, dtype=torch.int32) % self.max_tokens
        _scatter_rows(packed.handle.source_token, tokens[:, None], slots)
        if scale_format == "none":
            _scatter_rows(packed.rows, x, slots)
            return
        assert packed.scales is not None
        values, scales = (quantize_e4m3 if scale_format == "fp32" else quantize_e4m3_ue8m0)(x)
        _scatter_rows(packed.rows.view(torch.uint8), values.view(torch.uint8), slots)
        _scatter_rows(packed.scales, scales, slots)

    def _weighted_sums(self, rows: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
        """What this rank adds to each token of each rank, rounded once: bf16 ``[places, hidden]``."""
        sums = torch.zeros(self._places, self.hidden, dtype=torch.float32, device=rows.device)
        flat = rows.reshape(-1, self.hidden)
        for slot, weight in zip(slots.unbind(1), weights.unbind(1), strict=True):
            # `where`, not a product: rows that are not this token's may hold NaN.
            product = flat[slot.clamp(min=0)].to(torch.float32) * weight[:, None]
            sums = torch.where((slot >= 0)[:, None], sums + product, sums)
        return sums.to(torch.bfloat16)


class _Rounds:
    """Counts the rounds of one direction, and refuses a third one while the first has not been received."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._sent = 0
        self._waiting: set[int] = set()
        self._lock = threading.Lock()  # hooks may be called by other threads

    def begin(self) -> Callable[[Callable[[], None]], Hook]:
        """Begin a round; returns what turns its receive into its hook.

        Raises:
            RuntimeError: if the round before the last has not been received.
        """
        with self._lock:
            if any(number <= self._sent + 1 - _IN_FLIGHT for number in self._waiting):
                raise RuntimeError(
                    f"{self._what}: at most {_IN_FLIGHT} may be under way; call the hook of the one before last first"
                )
            self._sent += 1
            number = self._sent
            self._waiting.add(number)

        def hook_of(receive: Callable[[], None]) -> Hook:
            called = False

            def hook() -> None:
                nonlocal called
                with self._lock:
                    if called:
                        raise RuntimeError(f"the hook of a {self._what} was called twice")
                    called = True
                receive()
                with self._lock:
                    self._waiting.discard(number)

            return hook

        return hook_of


class _Messages:
    """One message from every rank to every other, begun at once and waited for later."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._gloo = dist.get_backend(group) == "gloo"
        self._begun = 0

    def exchange(
        self, packets: Tensor, absent: int, masked: list[bool], wait_ns: Tensor | None
    ) -> Callable[[], Tensor]:
        """Begin to send row ``r`` of ``packets`` (uint8 ``[ranks, bytes]``) to rank ``r``.

        Args:
            packets: of one length on all ranks.
            absent: every byte of the message of a rank that is masked.
            masked: ranks that nothing is sent to or expected from.
            wait_ns: int64 ``[ranks]``, to add the time waited for each rank to, or ``None``.

        Returns:
            What waits for the messages and returns them, uint8 ``[ranks, bytes]``.
        """
        staging = torch.device("cpu") if self._gloo else packets.device  # gloo sends from CPU memory only
        outgoing = packets.to(staging).contiguous()
        incoming = torch.full(outgoing.shape, absent, dtype=torch.uint8, device=staging)
        incoming[self._rank] = outgoing[self._rank]
        self._begun += 1  # the tag: equal on all ranks, which make the same calls
        peers = [rank for rank in range(self._size) if rank != self._rank and not masked[rank]]
        operations = [
            dist.P2POp(operation, tensor[peer], dist.get_global_rank(self._group, peer), self._group, self._begun)
            for operation, tensor in ((dist.irecv, incoming), (dist.isend, outgoing))
            for peer in peers
        ]
        works = dist.batch_isend_irecv(operations) if operations else []

        def arrive() -> Tensor:
            start = time.monotonic_ns()
            for i, work in enumerate(works):
                work.wait()
                # NCCL returns one piece of work for all, and has the stream wait for it, not the host.
                if wait_ns is not None and i < len(peers) and self._gloo:
                    wait_ns[peers[i]] += time.monotonic_ns() - start
            return incoming.to(packets.device)

        return arrive


def _scatter_rows(out: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write row ``p`` of ``values`` to the rows ``slots[p, :]`` of ``out`` (``[experts, places, ...]``), if any."""
    width = values.shape[1]
    flat = out.view(-1, width)
    # The row of each slot, the last one standing for none: slots of a token that repeats an expert are equal.
    source = torch.full((flat.shape[0] + 1,), -1, dtype=torch.int64, device=out.device)
    places = torch.arange(values.shape[0], device=out.device)[:, None].expand_as(slots)
    source.scatter_(0, torch.where(slots >= 0, slots, flat.shape[0]).flatten(), places.flatten())
    source = source[:-1, None]
    flat.copy_(torch.where(source >= 0, values[source.squeeze(1).clamp(min=0)], flat))


def _bytes_of(x: Tensor) -> Tensor:
    """The memory of a tensor, uint8 ``[bytes]``."""
    return x.contiguous().flatten().view(torch.uint8)
