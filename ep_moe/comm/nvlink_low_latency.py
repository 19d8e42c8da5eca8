"""Low-latency exchange between GPUs of one host, or of several, by our own CUDA kernels over symmetric memory.

``csrc/include/low_latency.cuh`` describes the protocol. What it asks of the host is done here, one grid for all
calls, and in ``nvlink_rounds.py``: at most two rounds under way, their kernels in order.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm import nvlink_low_latency_args as native
from ep_moe.comm.arena import Arena
from ep_moe.comm.fp8 import BLOCK
from ep_moe.comm.low_latency import (
    Hook,
    PackedRows,
    ScaleFormat,
    check_combine,
    check_dispatch,
    check_other_rank,
    check_sizes,
)
from ep_moe.comm.low_latency_buffer import LandingBuffer, allocate_landing
from ep_moe.comm.low_latency_reach import Reach, one_host
from ep_moe.comm.nvlink_args import MAX_RANKS
from ep_moe.comm.nvlink_faults import FaultMonitor
from ep_moe.comm.nvlink_rounds import Rounds
from ep_moe.native import current_stream, launch, pointer, stream_handle
from ep_moe.streams import tensors_in

_SCALE_FORMATS: dict[ScaleFormat, int] = {"none": 0, "fp32": 1, "ue8m0": 2}
_TABLE_BYTES = 96 * 1024  # of shared memory: two blocks share a multiprocessor
_MAX_THREADS, _CHANNELS_PER_THREAD = 448, 16


@dataclass(frozen=True)
class NvlinkLowLatencyHandle:
    """The routes of one dispatch; valid once it has been received.

    Attributes:
        source_token: int32 ``[local_experts, ranks * max_tokens]``, the token of each row at its rank.
        ranges: int64 ``[local_experts, ranks]``, begin << 32 | count of each rank's rows.
        slots: address of int32 ``[ranks * max_tokens, top_k]``, the row of each arrived entry, or -1; in the memory of
            the tensors above.
        weights: fp32 ``[ranks * max_tokens, top_k]``, of tokens that arrived, if they travelled with the rows.
        tokens: dispatched at this rank.
        top_k: experts per token.
    """

    source_token: Tensor
    ranges: Tensor
    slots: int
    weights: Tensor | None
    tokens: int
    top_k: int


class NvlinkLowLatencyCommunicator:
    """A :class:`~ep_moe.comm.low_latency.LowLatencyCommunicator` by our kernels.

    GPUs access each other's memory; those of other nodes put to it. All ranks make the same calls in the same order.
    Everything can be captured in a CUDA graph, once a call of the same kind has allocated the buffers; a graph that is
    captured with a send must contain its receive.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        max_tokens: int,
        hidden: int,
        num_experts: int,
        timeout_s: float = 30.0,
        reach: Reach | None = None,
    ) -> None:
        """Prepare; buffers are allocated by the first dispatch.

        Args:
            group: ranks, each with a GPU (several may share one); at most 8 on one host, 32 between nodes.
            device: this rank's GPU.
            max_tokens: most tokens a rank will bring.
            hidden: channels of a token, a multiple of 128.
            num_experts: experts over all ranks.
            timeout_s: longest wait for a peer.
            reach: how the kernels reach other ranks; ``None`` if all GPUs are of this host.

        Raises:
            NativeLibraryError: if the CUDA library is missing.
            ValueError: for a group of more ranks.
        """
        self._reach = one_host(group, device) if reach is None else reach
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.size > self._reach.max_ranks:
            raise ValueError(f"group: expected at most {self._reach.max_ranks} ranks, got {self.size}")
        check_sizes(max_tokens, hidden, num_experts, self.size)
        self.device = device
        self.max_tokens, self.hidden, self.num_experts = max_tokens, hidden, num_experts
        self._timeout_s = timeout_s
        self._workspace = torch.zeros(native.WORKSPACE_WORDS, dtype=torch.int32, device=device)
        # Where kernels write the number of a round that they also receive, so that nobody asks for it.
        self._unread = torch.zeros(1, dtype=torch.int32, device=device)
        self._faults = FaultMonitor(
            self.rank,
            timeout_s,
            self._workspace[native.REPORTED : native.REPORTED + 1],
            "mask_rank() lets the others go on without it",
        )
        self._landing: LandingBuffer | None = None
        self._common = native.LowLatency()
        self._captured = False
        self._masked = 0
        self._dispatches, self._combines = (Rounds(what, device.index) for what in ("dispatches", "combines"))
        self._lock = threading.Lock()  # hooks may be called by other threads

    @property
    def symmetric_bytes(self) -> int:
        """Size of this rank's symmetric buffer; 0 before the first dispatch."""
        return 0 if self._landing is None else self._landing.memory.local.numel()

    @property
    def masked(self) -> Tensor:
        """Bool ``[ranks]``, on the CPU: ranks that take no part any more."""
        masked = [bool(self._masked >> rank & 1) for rank in range(self.size)]
        return torch.tensor(masked, dtype=torch.bool, device="cpu")

    def mask_rank(self, rank: int, failed: bool = True) -> None:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.mask_rank`; waits for the device."""
        check_other_rank(self, rank)
        with self._lock:
            self._masked = self._masked | 1 << rank if failed else self._masked & ~(1 << rank)
            self._faults.forget()
            mask = ctypes.c_int32(self._masked).value
            self._workspace[0] = mask
            self._workspace[native.MASKED] = mask

    def check(self) -> None:
        """Raise what kernels have reported so far, without waiting for running ones; see :class:`FaultMonitor`."""
        self._faults.check()

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None = None,
        *,
        scale_format: ScaleFormat = "none",
        received: Tensor | None = None,
        wait_ns: Tensor | None = None,
    ) -> PackedRows:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.dispatch`."""
        return self._dispatch(x, topk_idx, topk_weights, scale_format, received, wait_ns, split=False)[0]

    def dispatch_send(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None = None,
        *,
        scale_format: ScaleFormat = "none",
        received: Tensor | None = None,
        wait_ns: Tensor | None = None,
    ) -> tuple[PackedRows, Hook]:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.dispatch_send`."""
        return self._dispatch(x, topk_idx, topk_weights, scale_format, received, wait_ns, split=True)

    def combine(
        self,
        rows: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        handle: NvlinkLowLatencyHandle,
        *,
        out: Tensor | None = None,
        wait_ns: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.combine`."""
        return self._combine(rows, topk_idx, topk_weights, handle, out, wait_ns, split=False)[0]

    def combine_send(
        self,
        rows: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        handle: NvlinkLowLatencyHandle,
        *,
        out: Tensor | None = None,
        wait_ns: Tensor | None = None,
    ) -> tuple[Tensor, Hook]:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.combine_send`."""
        return self._combine(rows, topk_idx, topk_weights, handle, out, wait_ns, split=True)

    def combine_buffer(self, handle: NvlinkLowLatencyHandle) -> Tensor:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.combine_buffer`.

        Combine reads rows where they are, so any tensor is as good.
        """
        shape = (*handle.source_token.shape, self.hidden)
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device)

    def _dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        scale_format: ScaleFormat,
        received: Tensor | None,
        wait_ns: Tensor | None,
        split: bool,
    ) -> tuple[PackedRows, Hook]:
        check_dispatch(self, x, topk_idx, topk_weights, scale_format, received, wait_ns)
        self._check_device(x)
        x, topk_idx = x.contiguous(), topk_idx.contiguous()
        topk_weights = None if topk_weights is None else topk_weights.contiguous()
        local_experts, places, blocks = self.num_experts // self.size, self.size * self.max_tokens, self.hidden // BLOCK
        top_k = topk_idx.shape[1]
        # Weights have room whether or not they travel: so the first of them does not make the buffer grow.
        row_bytes = (2 * self.hidden if scale_format == "none" else self.hidden + 4 * blocks) + 4 * top_k
        row_bytes = -(-row_bytes // 16) * 16

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        quantised = scale_format != "none"
        rows = empty(local_experts, places, self.hidden, dtype=torch.float8_e4m3fn if quantised else torch.bfloat16)
        scales = None
        if scale_format == "fp32":
            scales = empty(local_experts, places, blocks, dtype=torch.float32)
        elif scale_format == "ue8m0":
            scales = empty(local_experts, places, -(-blocks // 4))
        entries, ranges = local_experts * places, local_experts * self.size
        arena = Arena(
            self.device,
            counts=4 * local_experts,
            source_token=4 * entries,
            ranges=8 * ranges,
            slots=4 * places * top_k,
            round=4,
        )
        counts = arena.tensor("counts", local_experts)
        handle = NvlinkLowLatencyHandle(
            source_token=arena.tensor("source_token", local_experts, places),
            ranges=arena.tensor("ranges", local_experts, self.size, dtype=torch.int64),
            slots=arena.addresses["slots"],
            weights=None if topk_weights is None else empty(places, top_k, dtype=torch.float32),
            tokens=x.shape[0],
            top_k=top_k,
        )
        with self._lock:
            self._reserve(top_k, row_bytes)
            table_bytes = places * _routing_bytes(self._common.shape.max_top_k)
            arguments = native.LowLatencyDispatchArgs(
                ll=self._common,
                x=x.data_ptr(),
                topk_idx=topk_idx.data_ptr(),
                topk_weights=pointer(topk_weights),
                rows=rows.data_ptr(),
                scales=pointer(scales),
                **arena.addresses,
                weights=pointer(handle.weights),
                received=pointer(received),
                wait_ns=pointer(wait_ns),
                tokens=x.shape[0],
                top_k=top_k,
                scale_format=_SCALE_FORMATS[scale_format],
                table_bytes=table_bytes if table_bytes <= _TABLE_BYTES else 0,
            )
            results = (rows, arena.memory, handle.weights, scales, received, wait_ns)
            hook = self._start("dispatch", arguments, self._dispatches, split, results)
        return PackedRows(rows, scales, counts, handle), hook

    def _combine(
        self,
        rows: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        handle: NvlinkLowLatencyHandle,
        out: Tensor | None,
        wait_ns: Tensor | None,
        split: bool,
    ) -> tuple[Tensor, Hook]:
        check_combine(self, rows, topk_idx, topk_weights, handle, out, wait_ns)
        self._check_device(rows)
        rows, topk_idx = rows.contiguous(), topk_idx.contiguous()
        topk_weights = None if topk_weights is None else topk_weights.contiguous()
        tokens, top_k = topk_idx.shape
        if out is None:
            out = torch.empty(tokens, self.hidden, dtype=torch.bfloat16, device=self.device)
        number = torch.empty(1, dtype=torch.int32, device=self.device) if split else self._unread
        with self._lock:
            arguments = native.LowLatencyCombineArgs(
                ll=self._common,
                rows=rows.data_ptr(),
                slots=handle.slots,
                weights=pointer(handle.weights),
                topk_idx=topk_idx.data_ptr(),
                topk_weights=pointer(topk_weights),
                out=out.data_ptr(),
                round=number.data_ptr(),
                wait_ns=pointer(wait_ns),
                tokens=tokens,
                top_k=top_k,
            )
            hook = self._start("combine", arguments, self._combines, split, (out, number, topk_idx, wait_ns))
        return out, hook

    def _start(
        self,
        name: str,
        arguments: native.LowLatencyDispatchArgs | native.LowLatencyCombineArgs,
        rounds: Rounds,
        split: bool,
        used_by_receive: tuple[object, ...],
    ) -> Hook:
        """Launch the send, or with it the receive; returns what launches the receive, which then must be called."""
        self._faults.check()
        capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            self._captured = True
        work = (launch, self._reach.library, f"{self._reach.prefix}_{name}", arguments, self.device)
        if not split:
            arguments.ll.phases = native.SEND | native.RECEIVE
            rounds.exchange(capturing, *work)
            return _nothing
        arguments.ll.phases = native.SEND
        number = rounds.send(capturing, *work)
        home, called = stream_handle(self.device.index), False

        def hook() -> None:
            nonlocal called
            with self._lock:
                if called:
                    raise RuntimeError(f"the hook of a {name} was called twice")
                self._faults.check()
                arguments.ll.phases = native.RECEIVE
                rounds.receive(number, torch.cuda.is_current_stream_capturing(), *work)
                called = True  # only now: after mask_rank() a round whose hook told of a timeout can be received
                stream = current_stream(self.device.index)
                if stream.cuda_stream != home:
                    for tensor in tensors_in(used_by_receive):
                        tensor.record_stream(stream)

        return hook

    def _check_device(self, x: Tensor) -> None:
        if x.device != self.device:
            raise ValueError(f"x: expected device {self.device}, got {x.device}")

    def _reserve(self, top_k: int, row_bytes: int) -> None:
        """Allocate the buffer, or a larger one; collective then, since all ranks pass the same."""
        shape = self._common.shape
        if self._landing is not None and top_k <= shape.max_top_k and row_bytes <= shape.row_bytes:
            return
        if self._captured or torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the symmetric buffer cannot grow while CUDA graphs hold its address; run each kind of exchange once "
                "before capture"
            )
        shape = native.LowLatencyShape(
            ranks=self.size,
            max_tokens=self.max_tokens,
            max_top_k=max(top_k, shape.max_top_k),
            num_experts=self.num_experts,
            hidden=self.hidden,
            experts_per_rank=self.num_experts // self.size,
            row_bytes=max(row_bytes, shape.row_bytes),
        )
        try:
            landing = allocate_landing(self._reach, shape, self.rank, self.device)
        except Exception:
            self._landing = None  # between nodes the old one is gone: the next call asks again
            raise
        self._landing = landing
        self._workspace[native.ROUNDS :] = 0
        multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        threads = -(-self.hidden // (32 * _CHANNELS_PER_THREAD)) * 32
        self._common = native.LowLatency(
            buffers=(ctypes.c_void_p * MAX_RANKS)(*landing.pointers),
            nodes=pointer(landing.nodes),
            layout=landing.layout,
            shape=shape,
            workspace=self._workspace.data_ptr(),
            report=self._faults.address,
            timeout_ns=int(self._timeout_s * 1e9),
            rank=self.rank,
            blocks=min(2 * multiprocessors, self.size * self.max_tokens, native.MAX_BLOCKS),
            threads=min(max(threads, 128), _MAX_THREADS),
            own=landing.own,
            rank_factor=-(-(2**31) // (self.num_experts // self.size)),
        )


def _routing_bytes(max_top_k: int) -> int:
    """Bytes of a token in the routing table."""
    return -(-max_top_k // 8) * 16


def _nothing() -> None:
    """The hook of what has been received already."""
