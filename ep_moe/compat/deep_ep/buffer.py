"""``Buffer``: the calls of DeepEP's first version over this library's communicators."""

from __future__ import annotations

import os
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm import Communicator, LowLatencyCommunicator, communicator_factory
from ep_moe.comm.low_latency import Hook
from ep_moe.compat.deep_ep import low_latency, normal
from ep_moe.compat.deep_ep.config import DEFAULT_NUM_SMS, Config, low_latency_size_hint
from ep_moe.compat.deep_ep.events import CommunicationStream, EventHandle, EventOverlap
from ep_moe.compat.deep_ep.low_latency import LowLatencyHandle
from ep_moe.compat.deep_ep.normal import Routes, Rows

COMM_VARIABLE, TIMEOUT_VARIABLE = "EP_MOE_COMM", "EP_MOE_COMM_TIMEOUT_S"

NormalHandle = tuple[Tensor, Routes]
Dispatched = tuple[Rows, Tensor | None, Tensor | None, list[int] | None, NormalHandle, EventOverlap]


class Buffer:
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

    num_sms: int = DEFAULT_NUM_SMS

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
        _refuse_capture("a Buffer is created")
        if comm is not None or group is None:
            raise NotImplementedError(f"comm: only process groups of torch.distributed, got group={group}, comm={comm}")
        choice = os.environ.get(COMM_VARIABLE, "auto")
        if choice not in ("auto", "portable", "nvlink"):
            raise ValueError(f"{COMM_VARIABLE}: expected one of auto, portable, nvlink, got {choice!r}")
        self._factory = communicator_factory(
            cast(Literal["auto", "portable", "nvlink"], choice),
            group,
            max_tokens=None,
            timeout_s=float(os.environ.get(TIMEOUT_VARIABLE, "30")),
        )
        self.group = group
        self.rank = dist.get_rank(group)
        self.group_size = dist.get_world_size(group)
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self._stream = CommunicationStream()
        self._communicators: dict[torch.device, Communicator] = {}
        self._room: dict[torch.device, int] = {}
        self._low_latency: dict[tuple[torch.device, int, int, int], LowLatencyCommunicator] = {}
        self._masked: set[int] = set()
        self._scratch: dict[bool, Tensor] = {}
        self._destroyed = False

    def destroy(self) -> None:
        """Let go of all memory; all ranks call it. The group may be gone already. Handles stay usable.

        Raises:
            RuntimeError: while a CUDA graph is captured.
        """
        _refuse_capture("a Buffer is destroyed")
        for device in self._communicators.keys() | {key[0] for key in self._low_latency}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        for kept in (self._communicators, self._room, self._low_latency, self._scratch):
            kept.clear()
        self._destroyed = True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """SMs that kernels may occupy from the next dispatch without ``config`` on; 20 leaves it to this library.

        Raises:
            ValueError: for less than one.
        """
        if new_num_sms < 1:
            raise ValueError(f"new_num_sms: expected at least 1, got {new_num_sms}")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The default hints for dispatch."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The default hints for combine."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes to ask a ``Buffer`` for; see :func:`low_latency_size_hint`."""
        return low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

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
        return self._stream.of(torch.device("cuda", torch.cuda.current_device()))

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """Scratch memory of ``num_nvl_bytes`` or ``num_rdma_bytes`` bytes, from byte ``offset`` on, as ``dtype``.

        It is the caller's alone: exchanges do not use it. It is on the current GPU if there is one.

        Raises:
            ValueError: if ``size`` elements do not fit.
        """
        self._check_alive()
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

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """How many tokens go where; not collective.

        Args:
            topk_idx: int64 ``[tokens, top_k]``, global expert or -1.
            num_experts: over all ranks.
            previous_event: waited for before, instead of everything on the current stream.
            async_finish: leave it to the caller to wait for the event.
            allocate_on_comm_stream: ignored; memory is safe on either stream.

        Returns:
            Tokens per rank int32 ``[ranks]``; ``None`` (tokens per node, on several); (token, expert) pairs per expert
            int32 ``[num_experts]``; bool ``[tokens, ranks]``, whether a token goes to a rank; the event.

        Raises:
            ValueError: if the arguments do not fit together.
        """
        self._check_alive()
        (per_rank, per_expert, in_rank), event = self._stream.run(
            topk_idx.device,
            lambda: normal.dispatch_layout(topk_idx, num_experts, self.group_size),
            [topk_idx],
            previous_event,
            async_finish,
        )
        return per_rank, None, per_expert, in_rank, event

    def dispatch(
        self,
        x: Rows,
        handle: NormalHandle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Dispatched:
        """Bring each token once to every rank that has an expert of it.

        Args:
            x: ``[tokens, hidden]``; or rows of one byte an element and their scales, of four bytes an element,
                ``[tokens, any]`` or ``[tokens]`` of any strides.
            handle: of an earlier dispatch: send along its routes, without anything else. The backward pass of combine.
            num_tokens_per_rank: not read: it follows from the rest.
            num_tokens_per_rdma_rank: not read.
            is_token_in_rank: bool ``[tokens, ranks]``; read only if there is no ``topk_idx``.
            num_tokens_per_expert: int32 ``[num_experts]`` of :meth:`get_dispatch_layout`; needed without ``handle``.
            topk_idx: int64 ``[tokens, top_k]``, global expert or -1.
            topk_weights: fp32 ``[tokens, top_k]``.
            expert_alignment: tokens per expert are rounded up to a multiple of it.
            num_worst_tokens: rows of the results, the same on all ranks, no rank bringing more than its share of them;
                the host then waits for nothing. 0 for the rows that arrive.
            config: how many SMs to use.
            previous_event: waited for before, instead of everything on the current stream.
            async_finish: leave it to the caller to wait for the event.
            allocate_on_comm_stream: ignored; memory is safe on either stream.

        Returns:
            The rows that arrive, by source rank, then token, or rows and scales; int64 ``[rows, top_k]`` local expert
            or -1; fp32 ``[rows, top_k]`` weights, 0 where -1; tokens of each local expert, empty with
            ``num_worst_tokens``; the handle, whose first entry is int32 ``[ranks, ranks]`` with rows from ranks 0 to
            ``i`` at ``[i][rank]``; the event. Indices, weights and tokens are ``None`` with ``handle``.

        Raises:
            ValueError: before anything is sent, naming the argument, what was given and what is allowed.
            CapacityError: if more than ``num_worst_tokens`` rows arrived; on GPUs by a later call.
        """
        data = x[0] if isinstance(x, tuple) else x
        communicator = self._communicator(data.device)
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise ValueError("topk_idx, topk_weights: must be None with handle, which has the routes")
            routes = _routes(handle)
            rows, event = self._stream.run(
                data.device, lambda: normal.dispatch_cached(x, routes), [x, routes], previous_event, async_finish
            )
            return rows, None, None, None, handle, event
        if num_tokens_per_expert is None:
            raise ValueError("num_tokens_per_expert: needed without handle; get_dispatch_layout returns it")
        named: dict[str, Any] = {
            "num_worst_tokens": num_worst_tokens,
            "num_sms": (config or Buffer.get_dispatch_config(self.group_size)).sm_budget,
        }

        def operation() -> normal.Received:
            num_experts = num_tokens_per_expert.shape[0]
            if num_worst_tokens:
                top_k = self.group_size if topk_idx is None else topk_idx.shape[1]
                self._make_room(communicator, data, num_worst_tokens, num_experts, top_k)
            if topk_idx is None:
                return normal.dispatch_by_rank(
                    communicator, x, is_token_in_rank, num_tokens_per_expert, alignment=expert_alignment, **named
                )
            return normal.dispatch(
                communicator, x, topk_idx, topk_weights, num_experts=num_experts, alignment=expert_alignment, **named
            )

        inputs = [x, topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert]
        arrived, event = self._stream.run(data.device, operation, inputs, previous_event, async_finish)
        handle = (arrived.rank_prefix_matrix, arrived.routes)
        return arrived.rows, arrived.topk_idx, arrived.topk_weights, arrived.tokens_per_expert, handle, event

    def combine(
        self,
        x: Tensor,
        handle: NormalHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sum the rows of each token, without weights, at its rank. The backward pass of dispatch.

        Args:
            x: ``[rows, hidden]``, as dispatched.
            handle: of the dispatch.
            topk_weights: fp32 ``[rows, top_k]``, to be summed too.
            bias: one or two ``[tokens, hidden]`` to be added to the sum.
            config: ignored; the dispatch of the handle fixed the SMs.
            previous_event: waited for before, instead of everything on the current stream.
            async_finish: leave it to the caller to wait for the event.
            allocate_on_comm_stream: ignored; memory is safe on either stream.

        Returns:
            ``[tokens, hidden]`` in the dtype of ``x``, zero for tokens routed nowhere; fp32 ``[tokens, top_k]`` or
            ``None``; the event.

        Raises:
            ValueError: if arguments do not fit the handle.
        """
        self._check_alive()
        routes = _routes(handle)
        biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        (out, weights), event = self._stream.run(
            x.device,
            lambda: normal.combine(x, routes, topk_weights, biases),
            [x, routes, topk_weights, biases],
            previous_event,
            async_finish,
        )
        return out, weights, event

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[low_latency.Rows, Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Bring each token to all its experts, in fixed shapes; can be captured in a CUDA graph once it has run.

        Args:
            x: bf16 ``[tokens, hidden]``, ``hidden`` a multiple of 128.
            topk_idx: int64 ``[tokens, top_k]``, global expert or -1.
            num_max_dispatch_tokens_per_rank: most tokens of a rank; the same on all.
            num_experts: over all ranks.
            cumulative_local_expert_recv_stats: int32 ``[local_experts]``; the counts are added.
            dispatch_wait_recv_cost_stats: int64 ``[ranks]``; the time waited for each rank is added, in nanoseconds.
            use_fp8: rows travel as e4m3 with a scale per 128 channels, the largest magnitude (at least 1e-4) / 448.
            round_scale: round scales up to powers of two.
            use_ue8m0: return these as UE8M0 exponents, four to an int32.
            async_finish: leave it to the caller to wait for the event.
            return_recv_hook: only send; what is returned holds garbage until the hook has been called.

        Returns:
            ``[local_experts, ranks * max_tokens, hidden]``, bf16, or e4m3 with scales, fp32 ``[..., hidden / 128]`` or
            int32 ``[..., hidden / 512 rounded up]``; int32 ``[local_experts]``, rows of each expert; the handle
            ``(src_info, layout_range, max_tokens, hidden, num_experts)``, with the token of each row at its rank and,
            int64 ``[local_experts, ranks]``, first row << 32 | rows of each rank; the event; the hook or ``None``.

        Raises:
            ValueError: before anything is sent, naming the argument, what was given and what is allowed.
            PeerTimeoutError: if a rank did not come; by this call or a later one.
        """
        _check_not_both(async_finish, return_recv_hook)
        sizes = (num_max_dispatch_tokens_per_rank, x.shape[-1], num_experts)
        communicator = self._low_latency_communicator(x.device, *sizes)
        inputs = [x, topk_idx, cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats]
        sent, event = self._stream.run(
            x.device,
            lambda: low_latency.dispatch(
                communicator,
                x,
                topk_idx,
                received=cumulative_local_expert_recv_stats,
                wait_ns=dispatch_wait_recv_cost_stats,
                use_fp8=use_fp8,
                round_scale=round_scale,
                use_ue8m0=use_ue8m0,
                split=return_recv_hook,
            ),
            inputs,
            None,
            async_finish,
        )
        return sent.rows, sent.counts, sent.handle, event, sent.hook

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Sum each token's rows, times their weights, at its rank; a handle may be combined several times.

        Args:
            x: bf16 ``[local_experts, ranks * max_tokens, hidden]``, as dispatched.
            topk_idx: as dispatched.
            topk_weights: fp32 ``[tokens, top_k]``.
            handle: of the dispatch.
            use_logfmt: not offered.
            zero_copy: the rows are in ``get_next_low_latency_combine_buffer(handle)``; ``x`` is not read.
            async_finish: leave it to the caller to wait for the event.
            return_recv_hook: only send; the result holds garbage until the hook has been called.
            out: bf16 ``[tokens, hidden]`` to write to.
            combine_wait_recv_cost_stats: int64 ``[ranks]``; the time waited for each rank is added, in nanoseconds.

        Returns:
            bf16 ``[tokens, hidden]``; the event; the hook or ``None``.

        Raises:
            NotImplementedError: for ``use_logfmt``.
            ValueError, PeerTimeoutError: as :meth:`low_latency_dispatch`.
        """
        self._check_alive()
        _check_not_both(async_finish, return_recv_hook)
        if use_logfmt:
            raise NotImplementedError("use_logfmt: LogFMT is not offered; combine sends bf16")
        routes = _low_latency_handle(handle).routes
        (combined, hook), event = self._stream.run(
            x.device,
            lambda: low_latency.combine(
                x,
                topk_idx,
                topk_weights,
                handle,
                zero_copy=zero_copy,
                out=out,
                wait_ns=combine_wait_recv_cost_stats,
                split=return_recv_hook,
            ),
            [x, topk_idx, topk_weights, routes, handle.combine_rows, out, combine_wait_recv_cost_stats],
            None,
            async_finish,
        )
        return combined, event, hook

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """Where experts may write for ``zero_copy``: bf16 ``[local_experts, ranks * max_tokens, hidden]``."""
        self._check_alive()
        return low_latency.combine_buffer(_low_latency_handle(handle))

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing to do: the modes do not share memory, and every exchange leaves its own clean."""
        self._check_alive()

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Write 1 for ranks that are left out, else 0, to int32 ``[ranks]``.

        Raises:
            ValueError: for another shape.
        """
        self._check_alive()
        if mask_status.shape != (self.group_size,):
            raise ValueError(f"mask_status: expected [{self.group_size}], got {list(mask_status.shape)}")
        masked = [int(rank in self._masked) for rank in range(self.group_size)]
        mask_status.copy_(torch.tensor(masked, dtype=mask_status.dtype, device="cpu"))

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave another rank out of low-latency exchanges, or let it take part again.

        Raises:
            ValueError: for this rank, or one that is not of the group.
        """
        self._check_alive()
        if not 0 <= rank_to_mask < self.group_size or rank_to_mask == self.rank:
            raise ValueError(f"rank_to_mask: expected another rank of {self.group_size}, got {rank_to_mask}")
        for communicator in self._low_latency.values():
            communicator.mask_rank(rank_to_mask, mask)
        (self._masked.add if mask else self._masked.discard)(rank_to_mask)

    def low_latency_clean_mask_buffer(self) -> None:
        """Let all ranks take part again."""
        for rank in sorted(self._masked):
            self.low_latency_update_mask_buffer(rank, False)

    def _check_alive(self) -> None:
        if self._destroyed:
            raise RuntimeError("this Buffer has been destroyed")

    def _communicator(self, device: torch.device) -> Communicator:
        self._check_alive()
        if device not in self._communicators:
            _refuse_capture("a Buffer is used for the first time")
            self._communicators[device] = self._factory.build(device)
        return self._communicators[device]

    def _low_latency_communicator(
        self, device: torch.device, max_tokens: int, hidden: int, num_experts: int
    ) -> LowLatencyCommunicator:
        self._check_alive()
        key = (device, max_tokens, hidden, num_experts)
        if key not in self._low_latency:
            _refuse_capture("a Buffer is used for the first time with these sizes")
            communicator = self._factory.build_low_latency(*key)
            for rank in self._masked:
                communicator.mask_rank(rank)
            self._low_latency[key] = communicator
        return self._low_latency[key]

    def _make_room(
        self, communicator: Communicator, x: Tensor, num_worst_tokens: int, experts: int, top_k: int
    ) -> None:
        """The share of each rank; collective when it has to grow, on all ranks then."""
        share = -(-num_worst_tokens // self.group_size)
        if share > self._room.get(x.device, 0):
            normal.make_room(communicator, x, share, experts, top_k)
            self._room[x.device] = share


def _routes(handle: NormalHandle) -> Routes:
    if not isinstance(handle, tuple) or len(handle) != 2 or not isinstance(handle[1], Routes):
        raise ValueError(f"handle: expected what dispatch returned, got {type(handle).__name__}")
    return handle[1]


def _low_latency_handle(handle: LowLatencyHandle) -> LowLatencyHandle:
    if not isinstance(handle, LowLatencyHandle):
        raise ValueError(f"handle: expected what low_latency_dispatch returned, got {type(handle).__name__}")
    return handle


def _check_not_both(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise ValueError("async_finish, return_recv_hook: at most one; a hook receives on the stream that calls it")


def _refuse_capture(what: str) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} while a CUDA graph is captured: do it before, where memory can be allocated")
