"""The router's auxiliary losses: formulas, and how they join the graph of the main loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.router.scoring import score_dtype


@dataclass(frozen=True, eq=False)
class AuxLoss:
    """A loss of one router and micro-batch, ready to be attached.

    Attributes:
        name: ``load_balancing_loss``, ``seq_load_balancing_loss``, ``global_load_balancing_loss`` or ``z_loss``.
        value: this rank's part of the loss times ``coefficient``; 0-d, fp32 or fp64.
        coefficient: what ``value`` was multiplied by; ``value / coefficient`` is the figure to log.
        group: ranks whose ``value`` adds up to the whole loss; None where this rank's value is whole.
        valid_tokens: this rank's tokens without padding, for trainers that scale losses by token.
    """

    name: str
    value: Tensor
    coefficient: float
    group: dist.ProcessGroup | None
    valid_tokens: int | Tensor


LossAttacher = Callable[[Tensor, AuxLoss], Tensor]
"""``(activation, loss) -> activation``: the same values, such that backward through them also reaches the loss."""


class _LossScale:
    """The gradient that attached losses receive; one per process, like the main loss scale it follows."""

    value: float | Tensor = 1.0


def set_loss_scale(scale: float | Tensor) -> None:
    """Set the gradient that losses attached by :func:`attach_loss` receive in backward passes from now on.

    Args:
        scale: the factor on the main loss, for instance of mixed-precision loss scaling or 1 / micro-batches.
            A tensor (0-d) is read in the backward pass, on the device.
    """
    _LossScale.value = scale


def attach_loss(activation: Tensor, loss: AuxLoss) -> Tensor:
    """Make backward passes through ``activation`` also run through ``loss``, with the gradient of ``set_loss_scale``.

    The loss need not be returned and summed by every layer above (as Megatron-Core does it).

    Args:
        activation: any tensor on the way to the main loss.
        loss: its ``value`` is what gets the gradient.

    Returns:
        ``activation``, unchanged in value; its gradient is unchanged too.
    """
    return _AttachLoss.apply(activation, loss.value)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.dtype, loss.device)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dtype, device = ctx.like
        scale = _LossScale.value
        if isinstance(scale, Tensor):
            return grads[0], scale.to(device, dtype).reshape(())
        return grads[0], torch.full((), scale, dtype=dtype, device=device)


def balance_loss(score_sums: Tensor, counts: Tensor, total_tokens: Tensor, top_k: int) -> Tensor:
    """Penalise experts that are both often chosen and highly scored.

    ``E * sum_e f_e * P_e`` with ``f_e = counts_e / (top_k * T)`` and ``P_e = score_sums_e / T`` (Switch Transformer,
    arXiv 2101.03961; with counts of a global batch, arXiv 2501.11873). 1 where the load is even. Counts carry no
    gradient; where ``counts`` and ``total_tokens`` span several ranks, each rank's value is its part of a sum.

    Args:
        score_sums: ``[..., num_experts]``, sums of this rank's score distributions.
        counts: ``[..., num_experts]``, assignments per expert over all ranks.
        total_tokens: 0-d, T, the tokens behind ``counts``.
        top_k: experts per token.

    Returns:
        0-d, the sum over leading dimensions; 0 without tokens.
    """
    total = total_tokens.to(score_sums.dtype)
    total = torch.where(total > 0, total, torch.ones_like(total))
    return (score_sums * counts).sum() * (score_sums.shape[-1] / top_k) / total.square()


def z_loss(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906).

    Args:
        logits: floating ``[tokens, num_experts]``.
        valid: bool ``[tokens]``, the tokens to average over; None for all.

    Returns:
        0-d, fp32, or fp64 for fp64 logits; 0 without tokens.
    """
    squares = logits.to(score_dtype(logits.dtype)).logsumexp(-1).square()
    if valid is None:
        return squares.sum() / max(len(squares), 1)
    return (squares * valid).sum() / valid.sum().clamp(min=1)
