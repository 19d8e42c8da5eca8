"""The hop between nodes by our own kernel over symmetric memory: put-and-signal, chunk by chunk.

The kernel and its protocol are in ``csrc/include/node_exchange.cuh``. What a put is, the library decides: a store
between GPUs of one host (*loopback*, for which nodes are a fiction), or NVSHMEM's put over the network. The kernel runs
alone, or beside those of a node's communicator.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm.nvlink_args import CHUNK_TOKENS, MAX_NODES, CommunicatorArgs
from ep_moe.comm.nvlink_faults import FaultMonitor
from ep_moe.comm.nvlink_sums import Summed
from ep_moe.comm.symmetric import SymmetricBuffer, allocate_symmetric
from ep_moe.comm.transport import NodeRoutes
from ep_moe.native import launch, load_entry_points, pointer

_PARTS, _SLOTS = 4, 2
_MOST_CHANNELS, _MOST_BLOCKS = 8, 64  # which leaves SMs to the kernels beside
_OWN_BLOCKS = 16


class NodePart(ctypes.Structure):
    """``NodePart`` of ``node_exchange.cuh``."""

    _fields_ = (
        ("rows", c_void_p),
        ("received", c_void_p),
        ("width", c_int32),
        ("column", c_int32),
        ("offset", c_int32),
        ("reserved", c_int32),
    )


class NodeExchangeArgs(ctypes.Structure):
    """``NodeExchangeArgs`` of ``node_exchange.cuh``."""

    _fields_ = (
        ("parts", NodePart * _PARTS),
        ("memory", c_void_p * MAX_NODES),
        ("ranks", c_int32 * MAX_NODES),
        ("send_first", c_int32 * MAX_NODES),
        ("send_counts", c_int32 * MAX_NODES),
        ("recv_first", c_int32 * MAX_NODES),
        ("recv_counts", c_int32 * MAX_NODES),
        ("tokens", c_void_p),
        ("workspace", c_void_p),
        ("report", c_void_p),
        ("summed", c_void_p),
        ("comm", CommunicatorArgs),
        ("staged_bytes", c_int64),
        ("slot_bytes", c_int64),
        ("timeout_ns", c_uint64),
        ("epoch", c_uint32),
        ("node", c_int32),
        ("nodes", c_int32),
        ("num_parts", c_int32),
        ("channels", c_int32),
        ("own_blocks", c_int32),
        ("beside", c_int32),
        ("reserved", c_int32),
    )


ENTRY_POINTS: dict[str, type[ctypes.Structure]] = {"node_exchange": NodeExchangeArgs}


@dataclass(frozen=True)
class Spans:
    """Rows of a tensor by node: ``counts[n]`` rows from ``first[n]`` on."""

    first: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def packed(cls, counts: Sequence[int]) -> Spans:
        """One behind the other."""
        return cls(tuple(accumulate(counts, initial=0))[:-1], tuple(counts))

    @property
    def end(self) -> int:
        """Behind the last row."""
        return self.first[-1] + self.counts[-1]

    def of(self, tensor: Tensor, node: int) -> Tensor:
        """The rows of a node."""
        return tensor[self.first[node] : self.first[node] + self.counts[node]]


class SymmetricTransport:
    """A :class:`~ep_moe.comm.transport.NodeTransport` for CUDA tensors.

    Operations are ordered: each waits on its stream for the one before, and all ranks must issue them in the same
    order. :meth:`exchange` is one; others are what is launched within ``with transport:``, together with kernels of a
    node's communicator.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        allocate: Callable[[int], SymmetricBuffer],
        ranks: Sequence[int],
        node: int,
        device: torch.device,
        *,
        timeout_s: float,
    ) -> None:
        """Prepare; memory is allocated by the first exchange.

        Args:
            library: with the entry point ``node_exchange``.
            allocate: zeroed symmetric memory of so many bytes, which it frees when asked again; collective.
            ranks: the rank in this one's place on every node, in the group.
            node: of this rank.
            device: this rank's GPU.
            timeout_s: longest wait for a peer.

        Raises:
            ValueError: for more than 32 nodes.
        """
        if len(ranks) > MAX_NODES:
            raise ValueError(f"ranks: expected at most {MAX_NODES} nodes, got {len(ranks)}")
        self.timeout_s = timeout_s
        self._library, self._allocate = library, allocate
        self._device, self._node, self._nodes = device, node, len(ranks)
        self._channels = max(min(_MOST_CHANNELS, _MOST_BLOCKS // (2 * max(self._nodes - 1, 1))), 1)
        words = 1 + 2 * self._nodes * self._channels
        self._workspace = torch.zeros(words, dtype=torch.int64, device=device)
        self._faults = FaultMonitor(
            ranks[node],
            timeout_s,
            self._workspace.view(torch.int32)[1:2],
            "this communicator cannot be used any more",
        )
        self._buffer: SymmetricBuffer | None = None
        self._last = torch.cuda.Event()
        self._arguments = NodeExchangeArgs(
            ranks=(c_int32 * MAX_NODES)(*ranks),
            workspace=self._workspace.data_ptr(),
            report=self._faults.address,
            timeout_ns=int(timeout_s * 1e9),
            node=node,
            nodes=self._nodes,
            channels=self._channels,
        )

    @property
    def blocks(self) -> int:
        """Of the kernel's grid, without those that copy rows to this rank's own node."""
        return 2 * (self._nodes - 1) * self._channels

    @property
    def symmetric_bytes(self) -> int:
        """Size of this rank's symmetric memory; 0 before the first exchange."""
        return 0 if self._buffer is None else self._buffer.local.numel()

    def check(self) -> None:
        """Raise what kernels have reported so far, without waiting for running ones."""
        self._faults.check()

    def __enter__(self) -> None:
        """Begin an operation: behind the one before, or with the error of an earlier one."""
        self.check()
        torch.cuda.current_stream(self._device).wait_event(self._last)

    def __exit__(self, *exception: object) -> None:
        """End it."""
        self._last.record(torch.cuda.current_stream(self._device))

    def exchange(self, tensors: Sequence[Tensor], routes: NodeRoutes) -> list[Tensor]:
        """See :meth:`ep_moe.comm.transport.NodeTransport.exchange`; at most four tensors.

        Raises:
            PeerTimeoutError: if an earlier exchange waited in vain.
        """
        send, recv = Spans.packed(routes.send_counts), Spans.packed(routes.recv_counts)
        sent = [tensor.contiguous() for tensor in tensors]
        with self:
            self.reserve(sent)
            out = [tensor.new_empty((recv.end, tensor.shape[1])) for tensor in sent]
            self.move(sent, out, routes.tokens, send, recv)
        return out

    def move(
        self, tensors: Sequence[Tensor], out: Sequence[Tensor], tokens: Tensor | None, send: Spans, recv: Spans
    ) -> None:
        """Launch the exchange of whole tensors, those of this rank's own node included; within an operation.

        Args:
            tensors: ``[rows, width]`` each, contiguous, for which there is room (:meth:`reserve`).
            out: where rows arrive, likewise.
            tokens: int64, the row of a tensor for every row to send; ``None`` for the rows in their order.
            send: of the rows to send.
            recv: of the rows that arrive.
        """
        arguments = self._exchange_arguments(tensors, tokens, send, recv)
        arguments.own_blocks = _OWN_BLOCKS
        for p, received in enumerate(out):
            arguments.parts[p].received = received.data_ptr()
        self._launch(arguments)

    def stage(
        self,
        tensors: Sequence[Tensor],
        columns: Sequence[int],
        tokens: Tensor | None,
        send: Spans,
        recv: Spans,
        *,
        comm: CommunicatorArgs,
        row_bytes: int,
        early: bool,
    ) -> None:
        """Launch the exchange that takes the place of the push for the next dispatch of a node's communicator.

        Args:
            tensors: as of :meth:`move`, as for the others.
            columns: where each tensor's part of a staged row begins, in bytes.
            tokens: likewise.
            send: likewise.
            recv: likewise; rows of a node arrive from a multiple of 32 on.
            comm: of the communicator.
            row_bytes: from row to row where they are staged.
            early: beside the kernel ahead, which must be the last work of the stream.
        """
        arguments = self._exchange_arguments(tensors, tokens, send, recv)
        arguments.own_blocks = _OWN_BLOCKS
        for p, column in enumerate(columns):
            arguments.parts[p].column = column
        arguments.comm, arguments.staged_bytes, arguments.beside = comm, row_bytes, int(early)
        self._launch(arguments)

    def send_summed(self, summed: Summed, out: Tensor, send: Spans, recv: Spans) -> None:
        """Launch the exchange of sums beside the combine that makes them, the last work of the stream.

        Rows to this rank's own node stay where they are.

        Args:
            summed: the sums.
            out: where rows arrive; there is room for such (:meth:`reserve`).
            send: of the rows to send; those to a node start at a multiple of 32.
            recv: of the rows that arrive.
        """
        arguments = self._exchange_arguments([summed.out], None, send, recv)
        arguments.parts[0].received = out.data_ptr()
        arguments.summed, arguments.epoch, arguments.beside = summed.flags.data_ptr(), summed.epoch, 1
        self._launch(arguments)

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        """Make room for rows of these widths to travel together, before anything of an operation is launched.

        Collective where there has not been so much before; all ranks ask for the same.
        """
        slot_bytes = _offsets(tensors)[-1]
        if slot_bytes <= self._arguments.slot_bytes:
            return
        torch.cuda.synchronize(self._device)  # the old memory may be in use
        self._arguments.slot_bytes = 0  # if there is no room, the next operation asks again: the old may be gone
        self._workspace.zero_()
        slots = 2 * self._nodes * self._channels * _SLOTS
        self._buffer = self._allocate(-(-slots * 8 // 16) * 16 + slots * slot_bytes)
        self._arguments.memory = (c_void_p * MAX_NODES)(*self._buffer.pointers)
        self._arguments.slot_bytes = slot_bytes

    def _exchange_arguments(
        self, tensors: Sequence[Tensor], tokens: Tensor | None, send: Spans, recv: Spans
    ) -> NodeExchangeArgs:
        arguments = NodeExchangeArgs.from_buffer_copy(self._arguments)
        for p, (tensor, offset) in enumerate(zip(tensors, _offsets(tensors), strict=False)):
            arguments.parts[p] = NodePart(rows=tensor.data_ptr(), width=_width(tensor), offset=offset)
        arguments.num_parts = len(tensors)
        arguments.tokens = pointer(tokens)
        for name, spans in (("send", send), ("recv", recv)):
            setattr(arguments, f"{name}_first", (c_int32 * MAX_NODES)(*spans.first))
            setattr(arguments, f"{name}_counts", (c_int32 * MAX_NODES)(*spans.counts))
        return arguments

    def _launch(self, arguments: NodeExchangeArgs) -> None:
        launch(self._library, "node_exchange", arguments, self._device)


def _width(tensor: Tensor) -> int:
    """Bytes of a row."""
    return tensor.shape[1] * tensor.element_size()


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Where the rows of each tensor begin in a slot, and the end."""
    return list(accumulate((-(-CHUNK_TOKENS * _width(tensor) // 16) * 16 for tensor in tensors), initial=0))


def loopback_transport(
    counterparts: dist.ProcessGroup, ranks: Sequence[int], device: torch.device, *, timeout_s: float
) -> SymmetricTransport:
    """The transport between GPUs of one host that pose as GPUs of several nodes.

    Args:
        counterparts: the ranks in one place of every node.
        ranks: these ranks in the whole group.
        device: this rank's GPU.
        timeout_s: longest wait for a peer.

    Raises:
        NativeLibraryError: if the CUDA library is missing.
    """
    return SymmetricTransport(
        load_entry_points(ENTRY_POINTS),
        lambda num_bytes: allocate_symmetric(num_bytes, counterparts, device),
        ranks,
        dist.get_rank(counterparts),
        device,
        timeout_s=timeout_s,
    )
