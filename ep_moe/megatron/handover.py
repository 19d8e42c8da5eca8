"""Tensors that pass from one step of the layer to the next by way of Megatron's overlapped schedule.

Megatron's combined 1F1B schedule (``overlap_moe_expert_parallel_comm``) frees the storage of what a step was given as
soon as the step has run, because its own steps copy what they need later. Ours do not: the tokens to dispatch are the
very tensor that the router has seen, and the experts keep their rows for the weight gradients. So the schedule is
handed a stand-in without data, and the next step exchanges it for the tensor itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Handover:
    """Tensors on their way from one step to the next."""

    def __init__(self, *, stand_ins: bool) -> None:
        """``stand_ins``: whether the schedule frees storage; otherwise the tensors themselves are handed over."""
        self._stand_ins = stand_ins
        self._held: tuple[Tensor, ...] = ()

    def leave(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Keep ``tensors`` for :meth:`take`; returns a stand-in of the same shape, dtype and gradient for each."""
        if not self._stand_ins:
            return tensors
        self._held = tuple(tensor.detach() for tensor in tensors)
        return tuple(_StandIn.apply(tensor) for tensor in tensors)

    def take(self, *stand_ins: Tensor) -> tuple[Tensor, ...]:
        """The tensors left, in exchange for their stand-ins, which receive their gradients."""
        if not self._stand_ins:
            return stand_ins
        held, self._held = self._held, ()
        return tuple(_Original.apply(stand_in, tensor) for stand_in, tensor in zip(stand_ins, held, strict=True))


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.new_empty(()).expand(tensor.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Original(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
