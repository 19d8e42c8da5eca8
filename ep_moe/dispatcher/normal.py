"""Normal mode: autograd through dispatch and combine.

Dispatch copies a token into one row per routed expert; combine sums such rows. Each is the transpose of the
other, so the backward pass of dispatch is combine over the same handle and the other way round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_moe.comm import Communicator, Dispatched, ExpertSegments
from ep_moe.comm.fp8_rows import QuantizedRows, dequantize_rows
from ep_moe.dispatcher.dispatcher import DispatchedTokens, WeightGradients, refuse_gradients
from ep_moe.streams import communication_stream, start

T = TypeVar("T")


@dataclass(frozen=True)
class NormalHandle:
    """One exchange: the communicator's routes, and the segments they fill here."""

    routes: Any
    segments: ExpertSegments


class NormalDispatcher:
    """A :class:`~ep_moe.dispatcher.dispatcher.TokenDispatcher` for training and prefill."""

    def __init__(
        self,
        communicator: Communicator,
        num_experts: int,
        *,
        fp8: bool = False,
        takes_fp8_rows: Callable[[torch.dtype, torch.device], bool] = lambda dtype, device: False,
        alignment: int = 1,
        max_rows: int | None = None,
        num_sms: int | None = None,
        beside_others: bool = False,
    ) -> None:
        """Dispatch over ``communicator``.

        Args:
            communicator: moves the rows.
            num_experts: experts over all ranks.
            fp8: rows travel forward as e4m3 with a scale per 128 channels; gradients travel in the dtype of the
                tokens, as if no rounding had happened (straight-through).
            takes_fp8_rows: whether the experts take such rows for tokens of a dtype on a device. Others get them
                dequantised.
            alignment: rows per expert are padded to a multiple of this.
            max_rows: rows to make room for, so that the host waits for nothing (see
                :meth:`ep_moe.comm.Communicator.dispatch`); ``None`` for exactly those that arrive.
            num_sms: SMs that communication may occupy; ``None`` for the communicator's choice.
            beside_others: other work runs beside exchanges.
        """
        self.communicator = communicator
        self.num_experts = num_experts
        self.fp8 = fp8
        self.takes_fp8_rows = takes_fp8_rows
        self.alignment = alignment
        self.max_rows = max_rows
        self.num_sms = num_sms
        self.beside_others = beside_others

    def exchange(self, work: Callable[[], T], on: torch.device) -> T:
        """Run ``work``, which exchanges tensors on a device, for the current stream.

        If others compute beside it, on the communication stream: their blocks, which came first, would keep its own
        from the GPU until all of theirs have ended.
        """
        return start(work, communication_stream(on)).wait() if self.beside_others else work()

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: NormalHandle | None = None,
        *,
        behind: WeightGradients | None = None,
    ) -> DispatchedTokens:
        """See :meth:`ep_moe.dispatcher.dispatcher.TokenDispatcher.dispatch`."""
        weights_behind = () if behind is None else behind.weights
        if handle is None:
            rows, weights, arrived = _Dispatch.apply(x, topk_weights, topk_idx, self, behind, *weights_behind)
            handle = NormalHandle(arrived.handle, arrived.segments)
            if self.keeps_fp8(x):
                rows = QuantizedRows(arrived.rows, arrived.scales, rows)
        else:
            rows, weights = _CachedDispatch.apply(x, topk_weights, handle.routes, self, behind, *weights_behind)
        return DispatchedTokens(rows, weights, handle.segments, handle)

    def keeps_fp8(self, x: Tensor) -> bool:
        """Whether rows of tokens like ``x`` are handed to the experts in FP8."""
        return self.fp8 and self.takes_fp8_rows(x.dtype, x.device)

    def combine(self, rows: Tensor, handle: NormalHandle) -> Tensor:
        """See :meth:`ep_moe.dispatcher.dispatcher.TokenDispatcher.combine`."""
        return _Combine.apply(rows, handle.routes, self)

    def start_dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Callable[[], DispatchedTokens]:
        """See :meth:`ep_moe.dispatcher.dispatcher.TokenDispatcher.start_dispatch`; on a communication stream.

        Without ``max_rows`` the host still waits for the sizes, until ``topk_idx`` is there and has been exchanged.
        """
        refuse_gradients("forward_steps", "forward", x, topk_weights)
        return start(lambda: self.dispatch(x, topk_idx, topk_weights), communication_stream(x.device)).wait

    def start_combine(self, rows: Tensor, handle: NormalHandle) -> Callable[[], Tensor]:
        """See :meth:`ep_moe.dispatcher.dispatcher.TokenDispatcher.start_combine`; on a communication stream."""
        refuse_gradients("forward_steps", "forward", rows)
        return start(lambda: self.combine(rows, handle), communication_stream(rows.device)).wait


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_idx: Tensor,
        dispatcher: NormalDispatcher,
        behind: WeightGradients | None,
        *weights_behind: Tensor,
    ) -> tuple[Tensor, Tensor, Dispatched]:
        arrived = dispatcher.exchange(
            lambda: dispatcher.communicator.dispatch(
                x,
                topk_idx,
                topk_weights,
                num_experts=dispatcher.num_experts,
                fp8=dispatcher.fp8,
                alignment=dispatcher.alignment,
                max_rows=dispatcher.max_rows,
                num_sms=dispatcher.num_sms,
            ),
            x.device,
        )
        assert arrived.weights is not None
        ctx.dispatcher, ctx.routes, ctx.behind = dispatcher, arrived.handle, behind
        if arrived.scales is None:
            rows = arrived.rows
        elif dispatcher.keeps_fp8(x):
            rows = x.new_empty(()).expand(arrived.rows.shape)
        else:
            rows = dequantize_rows(arrived.rows, arrived.scales, x.dtype, arrived.segments.row_count)
        return rows, arrived.weights, arrived

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return _dispatch_backward(ctx, grad_rows, grad_weights)


class _CachedDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor,
        routes: Any,
        dispatcher: NormalDispatcher,
        behind: WeightGradients | None,
        *weights_behind: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.dispatcher, ctx.routes, ctx.behind = dispatcher, routes, behind
        communicator = dispatcher.communicator
        return dispatcher.exchange(
            lambda: (communicator.dispatch_cached(x, routes), communicator.dispatch_weights(topk_weights, routes)),
            x.device,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        return _dispatch_backward(ctx, grad_rows, grad_weights)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, routes: Any, dispatcher: NormalDispatcher) -> Tensor:
        ctx.dispatcher, ctx.routes = dispatcher, routes
        return dispatcher.exchange(lambda: dispatcher.communicator.combine(rows, routes), rows.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad, dispatcher = grad.contiguous(), ctx.dispatcher
        send = functools.partial(dispatcher.communicator.dispatch_cached, grad, ctx.routes)
        return dispatcher.exchange(send, grad.device), None, None


def _dispatch_backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of tokens and routing weights, behind which those of the experts' weights are computed."""
    communicator = ctx.dispatcher.communicator

    def send_back() -> tuple[Tensor | None, Tensor | None]:
        # Whether each is needed is the same on all ranks of a model.
        needs_x, needs_weights = ctx.needs_input_grad[:2]
        behind_gemms = ctx.behind is not None
        grad_x = (
            communicator.combine(grad_rows.contiguous(), ctx.routes, behind_gemms=behind_gemms) if needs_x else None
        )
        grad_topk = communicator.combine_weights(grad_weights.contiguous(), ctx.routes) if needs_weights else None
        return grad_x, grad_topk

    if ctx.behind is None:
        return *ctx.dispatcher.exchange(send_back, grad_rows.device), None, None, None
    travelling = start(send_back, communication_stream(grad_rows.device))
    gradients_behind = ctx.behind.compute()
    return *travelling.wait(), None, None, None, *gradients_behind
