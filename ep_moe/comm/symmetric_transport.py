"""The hop between nodes by our own kernel over symmetric memory: put-and-signal, chunk by chunk.

The kernel and its protocol are in ``csrc/include/node_exchange.cuh``. What a put is, the library decides: a store
between GPUs of one host (*loopback*, for which nodes are a fiction), or NVSHMEM's put over the network.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int32, c_int64, c_uint64, c_void_p
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm.nvlink_faults import FaultMonitor
from ep_moe.comm.symmetric import SymmetricBuffer, allocate_symmetric
from ep_moe.comm.transport import NodeRoutes
from ep_moe.native import launch, load_entry_points

MAX_NODES, _PARTS, _SLOTS, _CHUNK_ROWS = 32, 4, 2, 32
_MOST_CHANNELS, _MOST_BLOCKS = 8, 128


class NodePart(ctypes.Structure):
    """``NodePart`` of ``node_exchange.cuh``."""

    _fields_ = (("rows", c_void_p), ("received", c_void_p), ("width", c_int32), ("offset", c_int32))


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
        ("slot_bytes", c_int64),
        ("timeout_ns", c_uint64),
        ("node", c_int32),
        ("nodes", c_int32),
        ("num_parts", c_int32),
        ("channels", c_int32),
    )


ENTRY_POINTS: dict[str, type[ctypes.Structure]] = {"node_exchange": NodeExchangeArgs}


class SymmetricTransport:
    """A :class:`~ep_moe.comm.transport.NodeTransport` for CUDA tensors.

    Exchanges are ordered: each waits on its stream for the one before, and all ranks must issue them in the same order.
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
    def symmetric_bytes(self) -> int:
        """Size of this rank's symmetric memory; 0 before the first exchange."""
        return 0 if self._buffer is None else self._buffer.local.numel()

    def check(self) -> None:
        """Raise what kernels have reported so far, without waiting for running ones."""
        self._faults.check()

    def exchange(self, tensors: Sequence[Tensor], routes: NodeRoutes) -> list[Tensor]:
        """See :meth:`ep_moe.comm.transport.NodeTransport.exchange`; at most four tensors.

        Raises:
            PeerTimeoutError: if an earlier exchange waited in vain.
        """
        self.check()
        sent = [tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor for tensor in tensors]
        widths = [tensor.shape[1] * tensor.element_size() for tensor in tensors]
        received = sum(routes.recv_counts)
        out = [t.new_empty((received, t.shape[1])) for t in tensors]
        if self._nodes > 1:
            self._launch(sent, out, widths, routes)
        self._copy_own(sent, out, routes)
        return out

    def _copy_own(self, sent: Sequence[Tensor], out: Sequence[Tensor], routes: NodeRoutes) -> None:
        """Rows to this rank's own node do not travel."""
        count = routes.send_counts[self._node]
        if count == 0:
            return
        begin, to = sum(routes.send_counts[: self._node]), sum(routes.recv_counts[: self._node])
        for rows, received in zip(sent, out, strict=True):
            own = rows[begin : begin + count] if routes.tokens is None else rows[routes.tokens[begin : begin + count]]
            received.view(torch.uint8)[to : to + count] = own

    def _launch(self, sent: Sequence[Tensor], out: Sequence[Tensor], widths: Sequence[int], routes: NodeRoutes) -> None:
        offsets = list(accumulate((-(-_CHUNK_ROWS * width // 16) * 16 for width in widths), initial=0))
        self._reserve(offsets[-1])
        arguments = NodeExchangeArgs.from_buffer_copy(self._arguments)
        for p, (rows, received, width) in enumerate(zip(sent, out, widths, strict=True)):
            arguments.parts[p] = NodePart(rows.data_ptr(), received.data_ptr(), width, offsets[p])
        arguments.num_parts = len(widths)
        tokens = routes.tokens
        arguments.tokens = None if tokens is None else tokens.data_ptr()
        for name, counts in (("send", routes.send_counts), ("recv", routes.recv_counts)):
            first = list(accumulate(counts, initial=0))[:-1]
            setattr(arguments, f"{name}_first", (c_int32 * MAX_NODES)(*first))
            setattr(arguments, f"{name}_counts", (c_int32 * MAX_NODES)(*counts))
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._last)
        launch(self._library, "node_exchange", arguments, self._device)
        self._last.record(stream)

    def _reserve(self, slot_bytes: int) -> None:
        """Make slots at least so large; all ranks ask for the same."""
        if slot_bytes <= self._arguments.slot_bytes:
            return
        torch.cuda.synchronize(self._device)  # the old memory may be in use
        self._workspace.zero_()
        slots = 2 * self._nodes * self._channels * _SLOTS
        self._buffer = self._allocate(-(-slots * 8 // 16) * 16 + slots * slot_bytes)
        self._arguments.memory = (c_void_p * MAX_NODES)(*self._buffer.pointers)
        self._arguments.slot_bytes = slot_bytes


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
