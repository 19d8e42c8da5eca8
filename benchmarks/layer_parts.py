"""An MoE layer's exchanges without its experts, its computation without its exchanges, and what hides between them.

With the milliseconds of these parts the share of the exchanges that the layer hides is

    1 - (whole layer - computation alone) / exchanges alone,

no less than 0 and no more than 1: 0 if the layer takes as long as both after each other (or longer), 1 if it takes no
longer than its computation. It is a difference of times of three runs: where exchanges are a tenth of the layer, 1% of
the layer more or less is a tenth of the share. What exchanges and computation lose by running beside each other counts
as not hidden. So does what belongs to neither: sums of the gradients of the tokens, launches where the host is late,
and what strategies add (experts in chunks, halves of a batch), because both parts are measured in one piece, one
operation after the other. Shared experts that run beside routed ones count as hiding what that saves.
``timeline.py`` has another share: of the time in which kernels of exchanges ran beside others, whatever it cost those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ep_moe import EPMoELayer
from ep_moe.comm import ExpertSegments
from ep_moe.comm.fp8_rows import QuantizedRows
from ep_moe.dispatcher import DispatchedTokens, TokenDispatcher


@dataclass(frozen=True)
class Part:
    """What to measure.

    Attributes:
        forward: for use with or without ``torch.no_grad``; returns the results.
        both: forward and backward; leaves no gradients behind.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    both: Callable[[], None]


def exchanges_alone(layer: EPMoELayer, x: Tensor) -> Part:
    """The layer's dispatch of ``x``, routed beforehand, and a combine of as many rows as experts would return.

    Backward sends the gradients of those rows to them and brings those of the tokens and routing weights back. Includes
    what exchanges include in the layer: the host's wait for sizes, copies to and from buffers of communication, FP8
    rows made for the way. Collective.

    Args:
        layer: in training mode, in normal mode of communication.
        x: ``[tokens, hidden]``.
    """
    dispatcher, topk_idx, topk_weights, arrived = _exchange(layer, x)
    assert isinstance(arrived.segments, ExpertSegments)  # those of normal mode
    x, topk_weights = (t.detach().requires_grad_() for t in (x, topk_weights))
    rows = x.new_empty(arrived.segments.num_rows, x.shape[1]).normal_().requires_grad_()
    grad_rows, grad_out = torch.randn_like(rows), torch.randn_like(x)
    assert arrived.weights is not None
    grad_weights = torch.randn_like(arrived.weights)

    def forward() -> tuple[Tensor, ...]:
        came = dispatcher.dispatch(x, topk_idx, topk_weights)
        assert came.weights is not None
        out = dispatcher.combine(rows, came.handle)
        return out, _differentiable(came.rows), came.weights

    def both() -> None:
        torch.autograd.backward(forward(), (grad_out, grad_rows, grad_weights))
        forget_gradients(x, topk_weights, rows)

    return Part(forward, both)


def computation_alone(layer: EPMoELayer, x: Tensor) -> Part:
    """The layer's router and shared experts on ``x``, and its experts on the rows that one dispatch brought beforehand.

    So a rank computes on what it computes on in the layer. Backward starts from random gradients. Making this is
    collective, calling it is not.

    Args:
        layer: as in :func:`exchanges_alone`.
        x: ``[tokens, hidden]``.
    """
    _, _, _, arrived = _exchange(layer, x)
    assert arrived.weights is not None
    x, weights = (t.detach().requires_grad_() for t in (x, arrived.weights))
    leaf = _differentiable(arrived.rows).detach().requires_grad_()
    rows = replace(arrived.rows, stand_in=leaf) if isinstance(arrived.rows, QuantizedRows) else leaf

    def forward() -> tuple[Tensor, ...]:
        routing = layer.router(x)
        out = layer.experts(rows, weights, arrived.segments)
        shared = () if layer.shared_experts is None else (layer.shared_experts(x),)
        return routing.topk_weights, out, *shared

    with torch.no_grad():
        grads = [torch.randn_like(result) for result in forward()]

    def both() -> None:
        torch.autograd.backward(forward(), grads)
        forget_gradients(*layer.parameters(), x, weights, leaf)

    return Part(forward, both)


def hidden_part(whole: float, computation: float, exchanges: float) -> float:
    """The share of the exchanges that the layer hides, see above; NaN where a time is."""
    if math.isnan(whole + computation + exchanges):
        return math.nan
    return min(max(1 - (whole - computation) / exchanges, 0.0), 1.0)


def _exchange(layer: EPMoELayer, x: Tensor) -> tuple[TokenDispatcher, Tensor, Tensor, DispatchedTokens]:
    """The layer's own dispatcher, its router's choice for ``x``, and what a dispatch by it brings here."""
    with torch.no_grad():
        tokens, dispatcher, _ = layer._enter(x)  # the dispatcher is no part of what a layer offers
        routing = layer.router(x)
        arrived = dispatcher.dispatch(tokens, routing.topk_idx, routing.topk_weights)
    return dispatcher, routing.topk_idx, routing.topk_weights, arrived


def _differentiable(rows: Tensor | QuantizedRows) -> Tensor:
    """What takes the gradient of rows."""
    return rows.stand_in if isinstance(rows, QuantizedRows) else rows


def forget_gradients(*leaves: Tensor) -> None:
    """So that the next ones are written and not added."""
    for leaf in leaves:
        leaf.grad = None
