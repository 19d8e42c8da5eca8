"""Low-latency mode: the calls of ``Buffer`` for decode."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ep_moe.comm.low_latency import Hook, ScaleFormat
from ep_moe.compat.deep_ep.config import low_latency_size_hint
from ep_moe.compat.deep_ep.events import EventOverlap, NothingToWaitFor
from ep_moe.compat.deep_ep.exchanges import Exchanges
from ep_moe.compat.deep_ep.low_latency import LowLatencyHandle, Rows, combine_buffer, unpack_scales
from ep_moe.native import stream_handle


class LowLatencyCalls:
    """The part of ``Buffer`` that exchanges rows in fixed shapes, and leaves out ranks that failed."""

    _exchanges: Exchanges

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes to ask a ``Buffer`` for; see :func:`low_latency_size_hint`."""
        return low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

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
    ) -> tuple[Rows, Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
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
        if async_finish and return_recv_hook:
            raise _both()
        exchanges, most = self._exchanges, num_max_dispatch_tokens_per_rank
        communicator = exchanges.low_latency.get((x.device, most, x.shape[-1], num_experts))
        if communicator is None:
            communicator = exchanges.low_latency_communicator(x.device, most, x.shape[-1], num_experts)
        received, wait_ns = cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats
        if async_finish:
            given = (x, topk_idx, most, num_experts, received, wait_ns, use_fp8, round_scale, use_ue8m0)
            operation = partial(LowLatencyCalls.low_latency_dispatch, self, *given)
            (rows, counts, handle, _, _), event = exchanges.stream.run(x.device, operation, given, None, True)
            return rows, counts, handle, event, None
        if use_ue8m0 and use_fp8 and not round_scale:
            raise ValueError("use_ue8m0: needs round_scale=True, UE8M0 scales being powers of two")
        scale_format: ScaleFormat = "none" if not use_fp8 else "ue8m0" if round_scale else "fp32"
        hook: Hook | None = None
        if return_recv_hook:
            packed, hook = communicator.dispatch_send(
                x, topk_idx, scale_format=scale_format, received=received, wait_ns=wait_ns
            )
        else:
            packed = communicator.dispatch(x, topk_idx, scale_format=scale_format, received=received, wait_ns=wait_ns)
        routes, scales = packed.handle, packed.scales
        handle = LowLatencyHandle(
            (routes.source_token, routes.ranges, communicator.max_tokens, communicator.hidden, communicator.num_experts)
        )
        handle.communicator, handle.routes = communicator, routes
        if x.is_cuda:
            handle.home = stream_handle(x.device.index)
        if scales is None:
            return packed.rows, packed.counts, handle, NothingToWaitFor(), hook
        if round_scale and not use_ue8m0:
            scales, hook = unpack_scales(scales, communicator.hidden, hook)
        return (packed.rows, scales), packed.counts, handle, NothingToWaitFor(), hook

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
        if async_finish and return_recv_hook:
            raise _both()
        if use_logfmt:
            raise NotImplementedError("use_logfmt: LogFMT is not offered; combine sends bf16")
        exchanges, wait_ns = self._exchanges, combine_wait_recv_cost_stats
        if exchanges.destroyed:
            exchanges.check_alive()
        if not isinstance(handle, LowLatencyHandle):
            raise _no_handle(handle)
        if zero_copy:
            if handle.combine_rows is None:
                raise ValueError("zero_copy: call get_next_low_latency_combine_buffer(handle) first, and write there")
            x = handle.combine_rows
        if async_finish:
            operation = partial(
                LowLatencyCalls.low_latency_combine,
                *(self, x, topk_idx, topk_weights, handle),
                out=out,
                combine_wait_recv_cost_stats=wait_ns,
            )
            inputs = (x, topk_idx, topk_weights, out, wait_ns)
            (combined, _, _), event = exchanges.stream.run(x.device, operation, inputs, None, True)
            return combined, event, None
        if handle.home is not None and handle.home != stream_handle(x.device.index):
            handle.use(x.device)
        communicator = handle.communicator
        if return_recv_hook:
            combined, hook = communicator.combine_send(
                x, topk_idx, topk_weights, handle.routes, out=out, wait_ns=wait_ns
            )
            return combined, NothingToWaitFor(), hook
        combined = communicator.combine(x, topk_idx, topk_weights, handle.routes, out=out, wait_ns=wait_ns)
        return combined, NothingToWaitFor(), None

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """Where experts may write for ``zero_copy``: bf16 ``[local_experts, ranks * max_tokens, hidden]``."""
        self._exchanges.check_alive()
        if not isinstance(handle, LowLatencyHandle):
            raise _no_handle(handle)
        return combine_buffer(handle)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing to do: the modes do not share memory, and every exchange leaves its own clean."""
        self._exchanges.check_alive()

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Write 1 for ranks that are left out, else 0, to int32 ``[ranks]``.

        Raises:
            ValueError: for another shape.
        """
        self._exchanges.check_alive()
        if mask_status.shape != (self._exchanges.size,):
            raise ValueError(f"mask_status: expected [{self._exchanges.size}], got {list(mask_status.shape)}")
        masked = [int(rank in self._exchanges.masked) for rank in range(self._exchanges.size)]
        mask_status.copy_(torch.tensor(masked, dtype=mask_status.dtype, device="cpu"))

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave another rank out of low-latency exchanges, or let it take part again.

        Raises:
            ValueError: for this rank, or one that is not of the group.
        """
        self._exchanges.check_alive()
        if not 0 <= rank_to_mask < self._exchanges.size or rank_to_mask == self._exchanges.rank:
            raise ValueError(f"rank_to_mask: expected another rank of {self._exchanges.size}, got {rank_to_mask}")
        self._exchanges.mask(rank_to_mask, mask)

    def low_latency_clean_mask_buffer(self) -> None:
        """Let all ranks take part again."""
        for rank in sorted(self._exchanges.masked):
            self.low_latency_update_mask_buffer(rank, False)


def _no_handle(handle: object) -> ValueError:
    return ValueError(f"handle: expected what low_latency_dispatch returned, got {type(handle).__name__}")


def _both() -> ValueError:
    return ValueError("async_finish, return_recv_hook: at most one; a hook receives on the stream that calls it")
