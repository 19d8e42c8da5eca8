"""``Buffer``: the communication alone, for people who write the rest of the layer themselves.

The calls of :class:`ep_moe.compat.deep_ep.Buffer` with the arguments that matter, and with autograd in normal mode.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ep_moe.comm.low_latency import Hook
from ep_moe.compat import deep_ep
from ep_moe.compat.deep_ep import EventOverlap
from ep_moe.compat.deep_ep.low_latency import LowLatencyHandle, Rows
from ep_moe.compat.deep_ep.normal_handle import NormalHandle


class Buffer:
    """Brings token rows to the ranks of their experts and back; on CPUs and GPUs.

    All ranks of the group make the same calls in the same order. Memory is allocated by the first exchange of each
    kind and grows as needed. ``torch.compile`` cannot follow handles: wrap what makes these calls in
    ``torch.compiler.disable``, and compile around it.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
    ) -> None:
        """Prepare; sizes and mode are hints, any exchange works whatever they say.

        Raises:
            ConfigError: if ``torch.distributed`` has not been initialised.
            RuntimeError: while a CUDA graph is captured.
        """
        self._buffer = deep_ep.Buffer(group, num_nvl_bytes, num_rdma_bytes, low_latency_mode)

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor, NormalHandle, EventOverlap]:
        """Bring each token once to every rank that has an expert of it; differentiable.

        Args:
            x: ``[tokens, hidden]``, another number of tokens on each rank, also zero.
            topk_idx: int64 ``[tokens, top_k]``, global expert or -1. Rank ``r`` holds ``num_experts / ranks`` experts,
                from ``r * num_experts / ranks``.
            topk_weights: ``[tokens, top_k]``.
            num_experts: over all ranks.

        Returns:
            ``[rows, hidden]``, by source rank, then token; int64 ``[rows, top_k]``, local expert or -1; fp32 ``[rows,
            top_k]``, 0 where -1, which takes no gradient there; the handle for :meth:`combine`; an event, for which
            nobody has to wait.

        Raises:
            ValueError: before anything is sent, naming the argument, what was given and what is allowed.
        """
        if not isinstance(topk_weights, Tensor):
            raise ValueError(f"topk_weights: expected a tensor [tokens, top_k], got {type(topk_weights).__name__}")
        return _Dispatch.apply(x, topk_weights.float(), topk_idx, num_experts, self._buffer)

    def combine(self, y: Tensor, handle: NormalHandle) -> tuple[Tensor, EventOverlap]:
        """Sum each token's rows, without weights, at its rank; differentiable.

        Args:
            y: ``[rows, hidden]``, a row for each that was dispatched, weighted already.
            handle: of the dispatch; valid as long as it is kept.

        Returns:
            ``[tokens, hidden]``, zero for tokens that are routed nowhere; an event, for which nobody has to wait.

        Raises:
            ValueError: if ``y`` does not fit the handle.
        """
        return _Combine.apply(y, handle, self._buffer)

    def low_latency_dispatch(
        self,
        hidden_states: Tensor,
        topk_idx: Tensor,
        num_max_tokens: int,
        num_experts: int,
        *,
        use_fp8: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Rows, Tensor, LowLatencyHandle, EventOverlap, Hook]:
        """Bring each token to all its experts, in fixed shapes, for decoding; not differentiable.

        Args:
            hidden_states: bf16 ``[tokens, hidden]``, ``hidden`` a multiple of 128.
            topk_idx: int64 ``[tokens, top_k]``, global expert or -1.
            num_max_tokens: most tokens of a rank; the same on all.
            num_experts: over all ranks.
            use_fp8: rows travel, and arrive, as e4m3 with an fp32 scale per 128 channels.
            return_recv_hook: only send: the results are there once the hook has been called.

        Returns:
            bf16 ``[local_experts, ranks * num_max_tokens, hidden]``, or e4m3 and scales; int32 ``[local_experts]``, how
            many rows of each expert are filled; the handle; an event, for which nobody has to wait; the hook, which
            does nothing unless ``return_recv_hook``.

        Raises:
            ValueError: before anything is sent, naming the argument, what was given and what is allowed.
        """
        rows, counts, handle, event, hook = self._buffer.low_latency_dispatch(
            hidden_states, topk_idx, num_max_tokens, num_experts, use_fp8=use_fp8, return_recv_hook=return_recv_hook
        )
        return rows, counts, handle, event, hook or _nothing

    def low_latency_combine(
        self,
        y: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: LowLatencyHandle,
        *,
        return_recv_hook: bool = False,
    ) -> tuple[Tensor, EventOverlap, Hook]:
        """Sum each token's rows, times their weights, at its rank.

        Args:
            y: bf16 ``[local_experts, ranks * num_max_tokens, hidden]``.
            topk_idx: as dispatched.
            topk_weights: fp32 ``[tokens, top_k]``.
            handle: of the dispatch.
            return_recv_hook: only send: the result is there once the hook has been called.

        Returns:
            bf16 ``[tokens, hidden]``; an event, for which nobody has to wait; the hook.

        Raises:
            ValueError: if arguments do not fit the handle.
        """
        out, event, hook = self._buffer.low_latency_combine(
            y, topk_idx, topk_weights, handle, return_recv_hook=return_recv_hook
        )
        return out, event, hook or _nothing

    def destroy(self) -> None:
        """Let go of all memory; all ranks call it. The group may be gone already."""
        self._buffer.destroy()


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, topk_weights: Tensor, topk_idx: Tensor, num_experts: int, buffer: deep_ep.Buffer
    ) -> tuple[Any, ...]:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
        rows, recv_topk_idx, recv_topk_weights, _, handle, event = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        assert recv_topk_idx is not None
        ctx.buffer, ctx.handle = buffer, handle  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(recv_topk_idx)
        ctx.save_for_backward(recv_topk_idx)
        return rows, recv_topk_idx, recv_topk_weights, handle, event

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, _: Any, grad_weights: Tensor, *__: Any) -> tuple[Tensor | None, ...]:
        # The weight of an expert of another rank is a constant here; its gradient comes from there alone.
        (recv_topk_idx,) = ctx.saved_tensors
        grad_weights = torch.where(recv_topk_idx >= 0, grad_weights, 0)
        grad_x, grad_topk_weights, _event = ctx.buffer.combine(
            grad_rows.contiguous(), ctx.handle, topk_weights=grad_weights
        )
        return grad_x, grad_topk_weights, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, handle: NormalHandle, buffer: deep_ep.Buffer) -> tuple[Any, ...]:
        out, _, event = buffer.combine(y, handle)
        ctx.buffer, ctx.handle = buffer, handle  # type: ignore[attr-defined]
        return out, event

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_y, *_rest = ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)
        return grad_y, None, None


def _nothing() -> None:
    """The hook of what has been received already."""
