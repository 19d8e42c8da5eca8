"""Experts in chunks: groups of local experts compute while rows of other groups travel, forward and backward.

Time runs to the right; a line is a stream, ``D1`` the dispatch of group 1, ``E1`` its experts, ``C1`` its combine::

    main   | D0 | E0 | E1 | E2 |       |
    comm        | D1 | D2 | C0 | C1 | C2 |

Dispatch, experts and combine are one autograd function, because their steps interleave. All tensors that both streams
use are allocated for the main one, which waits for the other before any of them can be freed. Weight gradients come
last, for all experts at once, while the gradients of rows are on their way back.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_moe.comm import ExpertSegments
from ep_moe.comm.fp8_rows import dequantize_rows
from ep_moe.dispatcher import NormalDispatcher
from ep_moe.experts import GroupedExperts
from ep_moe.experts.activation import activate
from ep_moe.experts.gemm import row_major, weight_gradient, weight_product
from ep_moe.experts.groups import (
    ExpertGroup,
    ExpertNetwork,
    ExpertRows,
    ExpertWeights,
    RowGradients,
    group_backward,
    group_forward,
    make_expert_rows,
    split_segments,
)
from ep_moe.streams import Pending, communication_stream, joined, start


def run_in_chunks(
    x: Tensor,
    topk_weights: Tensor,
    topk_idx: Tensor,
    dispatcher: NormalDispatcher,
    experts: GroupedExperts,
    chunks: int,
) -> Tensor:
    """Dispatch, experts and combine, differentiable once: the bits of the three one after the other.

    Args:
        x: ``[tokens, hidden]``.
        topk_weights: ``[tokens, top_k]`` routing weights.
        topk_idx: int64 ``[tokens, top_k]``, global expert or -1.
        dispatcher: says how rows travel.
        experts: of this rank.
        chunks: groups of local experts, the same number on all ranks.

    Returns:
        ``[tokens, hidden]``.

    Raises:
        ConfigError: (a ``ValueError``) if the experts' back end cannot compute this.
        ValueError: if an argument does not fit.
    """
    fc1, fc2 = experts.weights_for(x)
    network = experts.network(x)
    if network.gemm.in_turns is not None:
        network = replace(network, gemm=network.gemm.in_turns)
    exchange = _Exchange(topk_idx, dispatcher, chunks)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, topk_weights, fc1, fc2)):
        result: Tensor = _Chunked.apply(x, topk_weights, fc1, fc2, exchange, network)
        return result
    weights = ExpertWeights(row_major(fc1), row_major(fc2))
    return _forward(x, topk_weights, weights, exchange, network, keep=False)[0]


@dataclass(frozen=True)
class _Exchange:
    """What is to travel how: arguments of :func:`run_in_chunks`."""

    topk_idx: Tensor
    dispatcher: NormalDispatcher
    chunks: int


@dataclass(frozen=True)
class _Routes:
    """Where rows went: what backward needs to know besides tensors."""

    handle: Any
    segments: ExpertSegments
    groups: list[ExpertGroup]


def _forward(
    x: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    exchange: _Exchange,
    network: ExpertNetwork,
    *,
    keep: bool,
) -> tuple[Tensor, ExpertRows, _Routes]:
    dispatcher, chunks = exchange.dispatcher, exchange.chunks
    communicator, comm_stream = dispatcher.communicator, communication_stream(x.device)
    with joined(comm_stream):
        arrived, steps = communicator.dispatch_in_groups(
            x,
            exchange.topk_idx,
            topk_weights,
            groups=chunks,
            num_experts=dispatcher.num_experts,
            fp8=dispatcher.fp8,
            alignment=dispatcher.alignment,
            max_rows=dispatcher.max_rows,
            num_sms=dispatcher.num_sms,
        )
        # All of them before the first experts, behind which they would start otherwise.
        arriving = [start(functools.partial(next, steps), comm_stream) for _ in range(chunks - 1)]
        assert arrived.weights is not None
        groups = split_segments(arrived.segments, chunks, network.gemm)
        rows = arrived.rows if arrived.scales is None else torch.empty_like(arrived.rows, dtype=x.dtype)
        kept = make_expert_rows(network, weights, rows, arrived.weights, keep=keep)
        out, steps = communicator.combine_in_groups(kept.out, arrived.handle, chunks)
        for place, group in enumerate(groups):
            if place > 0:
                arriving[place - 1].wait()
            if arrived.scales is not None:
                travelled, scales = arrived.rows[group.rows], arrived.scales[group.rows]
                rows[group.rows] = dequantize_rows(travelled, scales, x.dtype)
            group_forward(network, weights, group, kept)
            start(functools.partial(next, steps), comm_stream)
    return out, kept, _Routes(arrived.handle, arrived.segments, groups)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        exchange: _Exchange,
        network: ExpertNetwork,
    ) -> Tensor:
        ctx.parameters = fc1, fc2  # besides the saved ones, which may come back as other tensors without main_grad
        weights = ExpertWeights(row_major(fc1), row_major(fc2))
        out, kept, ctx.routes = _forward(x, topk_weights, weights, exchange, network, keep=True)
        ctx.save_for_backward(weights.fc1, weights.fc2, kept.rows, kept.row_weights, kept.fc1_out, kept.inner)
        ctx.communicator, ctx.network = exchange.dispatcher.communicator, network
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        fc1, fc2, rows, row_weights, fc1_out, inner = ctx.saved_tensors
        # Whether tokens and routing weights need gradients is the same on all ranks of a model.
        need_x, need_topk, need_fc1, need_fc2, *_ = ctx.needs_input_grad
        communicator, network, routes = ctx.communicator, ctx.network, ctx.routes
        handle, segments, groups = routes.handle, routes.segments, routes.groups
        comm_stream = communication_stream(grad.device)
        grad_x = grad_topk = grad_fc1 = grad_fc2 = None
        with joined(comm_stream):
            grad_out, steps = communicator.dispatch_cached_in_groups(grad.contiguous(), handle, len(groups))
            arriving = [start(functools.partial(next, steps), comm_stream) for _ in groups[1:]]
            grads = RowGradients(
                out=grad_out,
                fc1_out=torch.empty_like(fc1_out) if need_x or need_fc1 else None,
                row_weights=torch.empty_like(row_weights) if need_topk else None,
                rows=torch.empty_like(rows) if need_x else None,
            )
            if grads.rows is not None:
                grad_x, steps = communicator.combine_in_groups(grads.rows, handle, len(groups))
            for place, group in enumerate(groups):
                if place > 0:
                    arriving[place - 1].wait()
                group_backward(network, ExpertWeights(fc1, fc2), group, fc1_out, row_weights, grads)
                if grads.rows is not None:
                    start(functools.partial(next, steps), comm_stream)
            returning: Pending[Tensor | None] = start(
                lambda: None if grads.row_weights is None else communicator.combine_weights(grads.row_weights, handle),
                comm_stream,
            )
            if need_fc2:
                if inner is None:
                    inner = activate(fc1_out, network.activation, row_weights, segments.row_count)
                product = weight_product(network.gemm, grad_out, inner, segments)
                grad_fc2 = weight_gradient(ctx.parameters[1], product)
            if need_fc1:
                assert grads.fc1_out is not None
                product = weight_product(network.gemm, grads.fc1_out, rows, segments)
                grad_fc1 = weight_gradient(ctx.parameters[0], product)
            grad_topk = returning.wait()
        return grad_x, grad_topk, grad_fc1, grad_fc2, None, None
