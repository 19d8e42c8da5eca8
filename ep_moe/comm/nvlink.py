"""Expert-parallel exchange between GPUs of one host by our own CUDA kernels over symmetric memory.

The kernels and the argument why they are safe are in ``csrc/``; this file allocates, fills in arguments, launches
on the current stream and turns what the kernels report into exceptions.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm import nvlink_args as native
from ep_moe.comm.communicator import Dispatched, ExpertSegments, check_dispatch_shapes
from ep_moe.comm.nvlink_wire import ELEMENTS, SHARED_BYTES, WireFormat, wire_format
from ep_moe.comm.symmetric import SymmetricBuffer, allocate_symmetric

_MAX_WARPS, _MAX_STAGES = 8, 3
_SPINS = 200  # looks at the flag between looks at everything else


class PeerTimeoutError(RuntimeError):
    """A rank did not do its part in time. The communicator cannot be used any more; the process can."""


@dataclass(frozen=True)
class NvlinkHandle:
    """The routes of one dispatch.

    Attributes:
        tokens: at this rank.
        top_k: experts per token.
        experts_per_rank: local experts of every rank.
        num_sms: SMs that kernels may occupy, or ``None``.
        topk_idx: int64 ``[tokens, top_k]``, as dispatched.
        slots: int32 ``[ranks, max_tokens, top_k]``, slot of each arrived entry or -1.
        owners: uint8 ``[tokens]``, bit ``r`` for every rank that has an expert of the token.
        segments: of the expert-major rows.
    """

    tokens: int
    top_k: int
    experts_per_rank: int
    num_sms: int | None
    topk_idx: Tensor
    slots: Tensor
    owners: Tensor
    segments: ExpertSegments


@dataclass(frozen=True)
class _Layout:
    """What the layout kernel fills; see :class:`NvlinkHandle` and ``LayoutArgs`` of ``csrc/layout.cu``."""

    topk_idx: Tensor
    slots: Tensor
    owners: Tensor
    counts: Tensor
    ends: Tensor
    row_weights: Tensor | None


class NvlinkCommunicator:
    """A :class:`~ep_moe.comm.communicator.Communicator` for CUDA tensors of GPUs that can access each other.

    Operations of one communicator are ordered: each waits on its stream for the one before, whatever stream that ran
    on, and all ranks must issue them in the same order, as with any collective. So layers may share a communicator.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        max_tokens: int | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """Prepare; buffers are allocated by the first dispatch.

        Args:
            group: ranks, at most 8, each with a GPU of this host (several may share one).
            device: this rank's GPU.
            max_tokens: most tokens a rank will bring; ``None`` takes the largest number of the first dispatch.
            timeout_s: longest wait for a peer.

        Raises:
            NativeLibraryError: if the CUDA library is missing.
            ValueError: for a group of more than 8 ranks.
        """
        self._library = native.load_entry_points()
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.size > native.MAX_RANKS:
            raise ValueError(f"group: expected at most {native.MAX_RANKS} ranks, got {self.size}")
        self.device = device
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._wanted_tokens = max_tokens
        self._timeout_s = timeout_s
        self._comm = native.CommunicatorArgs()
        self._buffer: SymmetricBuffer | None = None
        self._workspace = torch.zeros(native.WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # Pinned host memory, which kernels write: the fault report, then a flag and the counts of local experts.
        self._report_memory = torch.zeros(ctypes.sizeof(native.FaultReport), dtype=torch.uint8, pin_memory=True)
        self._report = native.FaultReport.from_address(self._report_memory.data_ptr())
        self._host_counts = torch.zeros(1 + native.MAX_EXPERTS, dtype=torch.int32, pin_memory=True)
        self._ready = ctypes.c_uint32.from_address(self._host_counts.data_ptr())
        self._last = torch.cuda.Event()
        self._last_stream: torch.cuda.Stream | None = None

    @property
    def symmetric_bytes(self) -> int:
        """Size of this rank's symmetric buffer; 0 before the first dispatch."""
        return 0 if self._buffer is None else self._buffer.local.numel()

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        *,
        num_experts: int,
        fp8: bool = False,
        alignment: int = 1,
        num_sms: int | None = None,
    ) -> Dispatched:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch`; routing weights travel as fp32.

        The range of ``topk_idx`` is checked on the GPU: its error comes with the sizes, before rows are sent.
        """
        check_dispatch_shapes(x, topk_idx, topk_weights, num_experts, self.size)
        wire = wire_format(x, fp8)
        self._check_limits(topk_idx, num_experts)
        self._reserve(topk_idx.shape[0], topk_idx.shape[1], wire.bytes)
        with _OnStream(self):
            layout = self._lay_out(topk_idx, topk_weights, num_experts, alignment, num_sms)
            # Staging needs no sizes: it runs while the host waits for them.
            self._stage(x, wire, num_sms)
            sizes = self._wait_for_sizes(num_experts // self.size, alignment)
            segments = ExpertSegments(layout.counts, layout.ends, sizes)
            handle = NvlinkHandle(
                topk_idx.shape[0],
                topk_idx.shape[1],
                num_experts // self.size,
                num_sms,
                layout.topk_idx,
                layout.slots,
                layout.owners,
                segments,
            )
            rows, scales = self._pull(x, wire, handle)
        weights = None
        if topk_weights is not None and layout.row_weights is not None:
            weights = layout.row_weights[: segments.num_rows].to(topk_weights.dtype)
        return Dispatched(rows, scales, weights, segments, handle)

    def dispatch_cached(self, x: Tensor, handle: NvlinkHandle) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch_cached`."""
        if x.dim() != 2 or x.shape[0] != handle.tokens:
            raise ValueError(f"x: expected [{handle.tokens}, hidden] as in the dispatch, got {list(x.shape)}")
        wire = wire_format(x, fp8=False)
        self._reserve(handle.tokens, handle.top_k, wire.bytes)
        with _OnStream(self):
            self._stage(x, wire, handle.num_sms)
            return self._pull(x, wire, handle)[0]

    def dispatch_weights(self, topk_weights: Tensor, handle: NvlinkHandle) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch_weights`."""
        if topk_weights.shape != (handle.tokens, handle.top_k):
            raise ValueError(f"topk_weights: expected {[handle.tokens, handle.top_k]}, got {list(topk_weights.shape)}")
        rows = torch.zeros(handle.segments.num_rows, dtype=torch.float32, device=self.device)
        self._exchange_weights(topk_weights.float().contiguous(), rows, handle, to_rows=True)
        return rows.to(topk_weights.dtype)

    def combine(self, rows: Tensor, handle: NvlinkHandle) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.combine`."""
        if rows.dim() != 2 or rows.shape[0] != handle.segments.num_rows:
            raise ValueError(
                f"rows: expected [{handle.segments.num_rows}, hidden] as dispatched, got {list(rows.shape)}"
            )
        wire = wire_format(rows, fp8=False)
        rows = rows.contiguous()
        self._reserve(handle.tokens, handle.top_k, wire.bytes)
        out = torch.empty(handle.tokens, rows.shape[1], dtype=rows.dtype, device=self.device)
        with _OnStream(self):
            arguments = native.CombineArgs(
                comm=self._launch_args(handle.num_sms or 128),
                slots=handle.slots.data_ptr(),
                owners=handle.owners.data_ptr(),
                rows=rows.data_ptr(),
                out=out.data_ptr(),
                row_bytes=wire.bytes,
                element=ELEMENTS[rows.dtype],
                tokens=handle.tokens,
                top_k=handle.top_k,
            )
            self._launch("combine", arguments)
        return out

    def combine_weights(self, row_weights: Tensor, handle: NvlinkHandle) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.combine_weights`."""
        if row_weights.shape != (handle.segments.num_rows,):
            raise ValueError(f"row_weights: expected [{handle.segments.num_rows}], got {list(row_weights.shape)}")
        out = torch.empty(handle.tokens, handle.top_k, dtype=torch.float32, device=self.device)
        self._exchange_weights(out, row_weights.float().contiguous(), handle, to_rows=False)
        return out.to(row_weights.dtype)

    def check(self) -> None:
        """Raise what a kernel has reported so far, without waiting for running ones.

        Raises:
            PeerTimeoutError: if a wait for a peer ended in vain.
            ValueError: for an expert out of range.
        """
        report = self._report
        if report.fault == native.FAULT_TIMEOUT:
            raise PeerTimeoutError(
                f"rank {self.rank} waited {self._timeout_s:g} s for rank {report.rank} of the expert-parallel group "
                f"(step: {native.STEPS[report.step]}, round {report.round}); this communicator cannot be used any more"
            )
        if report.fault == native.FAULT_EXPERT_RANGE:
            value, allowed = report.value, report.allowed
            self._forget_fault()
            raise ValueError(f"topk_idx: expected experts in [0, {allowed}) (moe.num_experts) or -1, got {value}")

    def _check_limits(self, topk_idx: Tensor, num_experts: int) -> None:
        if topk_idx.shape[1] > native.MAX_TOP_K:
            raise ValueError(f"topk_idx: expected top_k of at most {native.MAX_TOP_K}, got {topk_idx.shape[1]}")
        if num_experts > native.MAX_EXPERTS:
            raise ValueError(f"num_experts: expected at most {native.MAX_EXPERTS}, got {num_experts}")

    def _reserve(self, tokens: int, top_k: int, row_bytes: int) -> None:
        """Grow the buffer where a dimension that all ranks share asks for it; collective then."""
        shape = self._comm.shape
        if self._buffer is not None:
            if tokens > shape.max_tokens:
                raise ValueError(
                    f"x: {tokens} tokens, but buffers were made for {shape.max_tokens} a rank; "
                    "set phases.<phase>.max_tokens_per_rank to the most that any rank will bring"
                )
            if top_k <= shape.max_top_k and row_bytes <= shape.max_row_bytes:
                return
        most = max(self._wanted_tokens or 0, tokens, shape.max_tokens)
        if self.size > 1:
            # On the CPU where the group has no GPU back end.
            on = torch.device("cpu") if dist.get_backend(self.group) == "gloo" else self.device
            agreed = torch.tensor(most, device=on)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.group)
            most = int(agreed)
        most = max(-(-most // native.CHUNK_TOKENS) * native.CHUNK_TOKENS, native.CHUNK_TOKENS)
        shape = native.BufferShape(
            ranks=self.size,
            max_tokens=most,
            max_top_k=max(top_k, shape.max_top_k),
            max_row_bytes=max(row_bytes, shape.max_row_bytes),
        )
        layout = native.BufferLayout()
        self._library.ep_moe_buffer_layout(ctypes.byref(shape), ctypes.byref(layout))
        torch.cuda.synchronize(self.device)  # the old buffer may be in use
        self._workspace.zero_()
        self._buffer = allocate_symmetric(layout.total, self.group, self.device)
        self._comm = native.CommunicatorArgs(
            buffers=(ctypes.c_void_p * native.MAX_RANKS)(*self._buffer.pointers),
            layout=layout,
            shape=shape,
            workspace=self._workspace.data_ptr(),
            report=self._report_memory.data_ptr(),
            timeout_ns=int(self._timeout_s * 1e9),
            rank=self.rank,
        )

    def _lay_out(
        self,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        num_experts: int,
        alignment: int,
        num_sms: int | None,
    ) -> _Layout:
        """Launch the routing exchange: where every arriving row goes, and the weight of each row."""
        shape, local_experts = self._comm.shape, num_experts // self.size
        tokens, top_k = topk_idx.shape
        arguments = native.LayoutArgs(comm=self._launch_args(num_sms or 64))
        on = self.device
        most_rows = self.size * shape.max_tokens * top_k + local_experts * (alignment - 1)
        slots = torch.empty(self.size, shape.max_tokens, top_k, dtype=torch.int32, device=on)
        owners = torch.empty(tokens, dtype=torch.uint8, device=on)
        counts = torch.empty(local_experts, dtype=torch.int64, device=on)
        ends = torch.empty(local_experts, dtype=torch.int32, device=on)
        histogram = torch.empty(self.size * arguments.comm.blocks * local_experts, dtype=torch.int32, device=on)
        row_weights = None if topk_weights is None else torch.zeros(most_rows, dtype=torch.float32, device=on)
        topk_idx = topk_idx.contiguous()
        topk_weights = None if topk_weights is None else topk_weights.float().contiguous()
        self._ready.value = 0
        arguments.topk_idx = topk_idx.data_ptr()
        arguments.topk_weights = None if topk_weights is None else topk_weights.data_ptr()
        arguments.slots = slots.data_ptr()
        arguments.owners = owners.data_ptr()
        arguments.row_weights = None if row_weights is None else row_weights.data_ptr()
        arguments.counts = counts.data_ptr()
        arguments.ends = ends.data_ptr()
        arguments.histogram = histogram.data_ptr()
        arguments.host_ready = self._host_counts.data_ptr()
        arguments.host_counts = self._host_counts.data_ptr() + 4
        arguments.tokens, arguments.top_k = tokens, top_k
        arguments.num_experts, arguments.alignment, arguments.max_rows = num_experts, alignment, most_rows
        self._launch("layout", arguments)
        return _Layout(topk_idx, slots, owners, counts, ends, row_weights)

    def _wait_for_sizes(self, local_experts: int, alignment: int) -> tuple[int, ...]:
        """Lengths of the experts' segments: the one wait of the host, until the layout kernel has counted."""
        # A kernel's own waits end in time; the margin is for kernels of others before it on the stream.
        deadline = time.monotonic() + 10 * self._timeout_s
        while not self._ready.value:
            for _ in range(_SPINS):  # sleeping instead would cost more than the wait usually takes
                if self._ready.value:
                    break
            self.check()
            if time.monotonic() > deadline:
                torch.cuda.synchronize(self.device)  # raises what went wrong on the device, if anything did
                raise PeerTimeoutError(
                    f"rank {self.rank}: the layout kernel did not run within {10 * self._timeout_s:g} s"
                )
        self.check()
        counts = self._host_counts[1 : 1 + local_experts].tolist()
        return tuple(-(-count // alignment) * alignment for count in counts)

    def _stage(self, x: Tensor, wire: WireFormat, num_sms: int | None) -> None:
        """Put this rank's tokens where peers pull them in the next round."""
        x = x.contiguous()
        arguments = native.StageArgs(
            comm=self._launch_args(num_sms or 64),
            x=x.data_ptr(),
            wire_bytes=wire.bytes,
            tokens=x.shape[0],
            hidden=x.shape[1],
            element=ELEMENTS[x.dtype],
            fp8=int(wire.scales > 0),
        )
        self._launch("stage", arguments)

    def _pull(self, x: Tensor, wire: WireFormat, handle: NvlinkHandle) -> tuple[Tensor, Tensor | None]:
        """Bring the rows routed here to their slots."""
        segments = handle.segments
        rows_dtype = torch.float8_e4m3fn if wire.scales else x.dtype
        rows = torch.empty(segments.num_rows, x.shape[1], dtype=rows_dtype, device=self.device)
        scales = None
        if wire.scales:
            scales = torch.empty(segments.num_rows, wire.scales, dtype=torch.float32, device=self.device)
        stage_bytes = -(-wire.bytes // 128) * 128
        warps = max(min(SHARED_BYTES // (2 * stage_bytes), _MAX_WARPS), 1)
        pull = native.DispatchArgs(
            comm=self._launch_args(handle.num_sms or 64),
            slots=handle.slots.data_ptr(),
            counts=segments.counts.data_ptr(),
            ends=segments.ends.data_ptr(),
            rows=rows.data_ptr(),
            scales=None if scales is None else scales.data_ptr(),
            wire_bytes=wire.bytes,
            row_bytes=wire.row_bytes,
            row_scales=wire.scales,
            top_k=handle.top_k,
            local_experts=handle.experts_per_rank,
            num_rows=segments.num_rows,
            warps=warps,
            stages=min(SHARED_BYTES // (warps * stage_bytes), _MAX_STAGES),
            stage_bytes=stage_bytes,
        )
        self._launch("dispatch", pull)
        return rows, scales

    def _exchange_weights(self, by_token: Tensor, by_row: Tensor, handle: NvlinkHandle, *, to_rows: bool) -> None:
        with _OnStream(self):
            arguments = native.WeightsArgs(
                comm=self._launch_args(min(handle.num_sms or 16, 16)),
                slots=handle.slots.data_ptr(),
                topk_idx=handle.topk_idx.data_ptr(),
                by_token=by_token.data_ptr(),
                by_row=by_row.data_ptr(),
                tokens=handle.tokens,
                top_k=handle.top_k,
                experts_per_rank=handle.experts_per_rank,
                to_rows=int(to_rows),
            )
            self._launch("weights", arguments)

    def _launch_args(self, num_sms: int) -> native.CommunicatorArgs:
        comm = native.CommunicatorArgs.from_buffer_copy(self._comm)
        comm.blocks = min(num_sms, self._multiprocessors)
        return comm

    def _launch(self, name: str, arguments: ctypes.Structure) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        error = getattr(self._library, f"ep_moe_{name}")(ctypes.byref(arguments), stream)
        if error is not None:
            raise RuntimeError(error.decode())

    def _forget_fault(self) -> None:
        """Allow the next fault to be reported; after one that left the ranks in step."""
        torch.cuda.synchronize(self.device)
        ctypes.memset(self._report_memory.data_ptr(), 0, self._report_memory.numel())
        self._workspace[20:24].zero_()  # Workspace::reported


class _OnStream:
    """One operation: behind the one before on its stream, and an error if an earlier one has failed."""

    def __init__(self, communicator: NvlinkCommunicator) -> None:
        self.communicator = communicator

    def __enter__(self) -> None:
        communicator = self.communicator
        communicator.check()
        stream = torch.cuda.current_stream(communicator.device)
        if communicator._last_stream is not None and communicator._last_stream != stream:
            stream.wait_event(communicator._last)
        communicator._last_stream = stream

    def __exit__(self, *exception: Any) -> None:
        self.communicator._last.record(self.communicator._last_stream)
