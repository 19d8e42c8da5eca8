"""What every operation of the CUDA communicators needs: the buffer, and launches in order."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ep_moe.comm import nvlink_args as native
from ep_moe.comm.nvlink_faults import FaultMonitor
from ep_moe.comm.symmetric import SymmetricBuffer, allocate_symmetric
from ep_moe.native import current_stream, launch, stream_handle


class NvlinkCore:
    """A rank's symmetric buffer and the rounds over it.

    Operations are ordered: each waits on its stream for the one before, whatever stream that ran on. While a CUDA graph
    is captured nothing is added to order it against operations outside: the stream that replays it does that.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, *, max_tokens: int | None, timeout_s: float
    ) -> None:
        """Prepare; the buffer is allocated by the first :meth:`reserve`.

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
        self.timeout_s = timeout_s
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._wanted_tokens = max_tokens
        self._comm = native.CommunicatorArgs()
        self._buffer: SymmetricBuffer | None = None
        self._captured = False
        self._workspace = torch.zeros(native.WORKSPACE_WORDS, dtype=torch.int32, device=device)
        self._faults = FaultMonitor(
            self.rank,
            timeout_s,
            self._workspace[native.REPORTED : native.REPORTED + 1],
            "this communicator cannot be used any more",
        )
        self._last = torch.cuda.Event()
        self._last_stream: torch.cuda.Stream | None = None

    @property
    def max_tokens(self) -> int:
        """Most tokens of a rank; 0 before there is a buffer."""
        return self._comm.shape.max_tokens

    @property
    def symmetric_bytes(self) -> int:
        """Size of this rank's symmetric buffer; 0 before there is one."""
        return 0 if self._buffer is None else self._buffer.local.numel()

    def reserve(self, tokens: int, top_k: int, row_bytes: int, row_places: int = 0) -> None:
        """Grow the buffer where a dimension that all ranks share asks for it; collective then.

        ``row_places`` is that of ``buffer.cuh``, for those who send rows.

        The number of tokens may differ between ranks, so more than before does not make it grow here: ranks would not
        agree that it does. The first buffer takes the largest number of all ranks.
        """
        shape = self._comm.shape
        wanted = (max(top_k, shape.max_top_k), max(row_bytes, shape.max_row_bytes), max(row_places, shape.row_places))
        if self._buffer is not None and wanted == (shape.max_top_k, shape.max_row_bytes, shape.row_places):
            return
        most = max(self._wanted_tokens or 0, tokens, shape.max_tokens)
        if self.size > 1:
            # On the CPU where the group has no GPU back end.
            on = torch.device("cpu") if dist.get_backend(self.group) == "gloo" else self.device
            agreed = torch.tensor(most, device=on)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.group)
            most = int(agreed)
        self._allocate(most, *wanted)

    def grow(self, tokens: int) -> None:
        """Make room for ``tokens`` a rank; collective, with the same number on all ranks."""
        shape = self._comm.shape
        self._allocate(tokens, shape.max_top_k, shape.max_row_bytes, shape.row_places)

    def arguments(self, num_sms: int) -> native.CommunicatorArgs:
        """The arguments common to all kernels."""
        comm = native.CommunicatorArgs.from_buffer_copy(self._comm)
        comm.blocks = min(num_sms, self.multiprocessors)
        return comm

    def launch(self, name: str, arguments: ctypes.Structure) -> None:
        """Call an entry point on the current stream."""
        launch(self._library, name, arguments, self.device)

    def steps(
        self,
        name: str,
        arguments: native.DispatchArgs | native.CombineArgs,
        ranges: list[native.ExpertRange],
        in_use: tuple[object, ...],
    ) -> Iterator[None]:
        """A launch a step; what kernels read and write (``in_use``) lives until the steps are dropped."""
        for experts in ranges:
            arguments.range = experts
            with self:
                self.launch(name, arguments)
            yield

    def skip_dispatch(self) -> None:
        """Count a dispatch that will not run though its rows are sent: the next must not take them for its own."""
        self._workspace[native.DISPATCHES] += 1

    def check(self) -> None:
        """Raise what a kernel has reported so far; see :meth:`FaultMonitor.check`."""
        self._faults.check()

    def _allocate(self, tokens: int, top_k: int, row_bytes: int, row_places: int) -> None:
        if self._captured or torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the symmetric buffer cannot grow while CUDA graphs hold its address; run the largest shapes once "
                "before capture, or set phases.<phase>.max_tokens_per_rank"
            )
        chunks = max(-(-tokens // native.CHUNK_TOKENS), 1)
        shape = native.BufferShape(
            ranks=self.size,
            max_tokens=chunks * native.CHUNK_TOKENS,
            max_top_k=top_k,
            row_places=row_places,
            max_row_bytes=row_bytes,
        )
        layout = native.BufferLayout()
        self._library.ep_moe_buffer_layout(ctypes.byref(shape), ctypes.byref(layout))
        torch.cuda.synchronize(self.device)  # the old buffer may be in use
        self._buffer = allocate_symmetric(layout.total, self.group, self.device)
        # Only now: where there was no room for the new buffer, the old one and the rounds counted for it stay in use.
        self._workspace.zero_()
        torch.cuda.synchronize(self.device)
        self._comm = native.CommunicatorArgs(
            buffers=(ctypes.c_void_p * native.MAX_RANKS)(*self._buffer.pointers),
            layout=layout,
            shape=shape,
            workspace=self._workspace.data_ptr(),
            report=self._faults.address,
            timeout_ns=int(self.timeout_s * 1e9),
            rank=self.rank,
        )

    def __enter__(self) -> None:
        """Begin an operation: behind the one before on its stream, or with the error of an earlier one."""
        self.check()
        if torch.cuda.is_current_stream_capturing():
            self._captured = True
            return
        if self._last_stream is not None and self._last_stream.cuda_stream == stream_handle(self.device.index):
            return
        stream = current_stream(self.device.index)
        if self._last_stream is not None:
            stream.wait_event(self._last)
        self._last_stream = stream

    def __exit__(self, *exception: Any) -> None:
        """End it."""
        if not torch.cuda.is_current_stream_capturing():
            self._last.record(self._last_stream)
