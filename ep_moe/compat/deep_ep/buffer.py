"""``Buffer``: the calls of DeepEP's first version over this library's communicators."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.compat.deep_ep.events import EventHandle, EventOverlap
from ep_moe.compat.deep_ep.exchanges import Exchanges, refuse_capture
from ep_moe.compat.deep_ep.low_latency_calls import LowLatencyCalls
from ep_moe.compat.deep_ep.normal_calls import NormalCalls


class Buffer(NormalCalls, LowLatencyCalls):
    """Moves token rows between the ranks of a group, in normal and in low-latency mode.

    All ranks make the same calls in the same order. Tensors may be on a GPU or, for tests, on the CPU. The memory of
    exchanges is allocated by the first of each kind and grows, whatever sizes were asked for; buffers of one group
    share it.

    The environment variable ``EP_MOE_COMM`` chooses what moves the rows, as the key ``moe.comm`` does, and
    ``EP_MOE_COMM_TIMEOUT_S`` how many seconds to wait for a rank, as ``moe.comm_timeout_s``.

    Attributes:
        group: the ranks, over NCCL or gloo.
        rank: this one.
        group_size: how many.
        num_nvl_bytes: as given.
        num_rdma_bytes: as given.
        low_latency_mode: as given; both modes work either way.
        explicitly_destroy: as given; :meth:`destroy` works either way.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        use_fabric: bool = False,
        comm: Any = None,
    ) -> None:
        """Prepare; nothing is allocated or exchanged yet.

        ``num_qps_per_rank``, ``allow_nvlink_for_low_latency_mode``, ``allow_mnnvl``, ``enable_shrink`` (ranks can
        always be masked) and ``use_fabric`` are ignored.

        Raises:
            NotImplementedError: for a communicator of MPI instead of a group.
            RuntimeError: while a CUDA graph is captured.
            ConfigError: if ``torch.distributed`` has not been initialised.
        """
        refuse_capture("a Buffer is created")
        if comm is not None or group is None:
            raise NotImplementedError(f"comm: only process groups of torch.distributed, got group={group}, comm={comm}")
        self._exchanges = Exchanges(group)
        self.group = group
        self.rank, self.group_size = self._exchanges.rank, self._exchanges.size
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self._scratch: dict[bool, Tensor] = {}

    def destroy(self) -> None:
        """Let go of all memory; all ranks call it. The group may be gone already. Handles stay usable.

        Raises:
            RuntimeError: while a CUDA graph is captured.
        """
        refuse_capture("a Buffer is destroyed")
        self._exchanges.destroy()
        self._scratch.clear()

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether FP8 rows and low-latency mode are there: always."""
        return True

    @staticmethod
    def capture() -> EventOverlap:
        """An event at the current point of the current stream."""
        return EventOverlap(EventHandle())

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream of operations that the caller's stream does not wait for, on the current GPU."""
        return self._exchanges.stream.of(torch.device("cuda", torch.cuda.current_device()))

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """Scratch memory of ``num_nvl_bytes`` or ``num_rdma_bytes`` bytes, from byte ``offset`` on, as ``dtype``.

        It is the caller's alone: exchanges do not use it. It is on the current GPU if there is one.

        Raises:
            ValueError: if ``size`` elements do not fit.
        """
        self._exchanges.check_alive()
        if use_rdma_buffer not in self._scratch:
            on = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
            num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
            self._scratch[use_rdma_buffer] = torch.zeros(num_bytes, dtype=torch.uint8, device=on)
        rest = self._scratch[use_rdma_buffer][offset:]
        elements = rest.numel() // dtype.itemsize
        whole = rest[: elements * dtype.itemsize].view(dtype)
        if size is None:
            return whole
        if size.numel() > elements:
            raise ValueError(f"size: {list(size)} of {dtype} do not fit into {rest.numel()} bytes")
        return whole[: size.numel()].view(size)
