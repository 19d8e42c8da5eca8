"""The experts' network a group of experts at a time, without autograd: what overlaps with an exchange in steps.

Tensors of rows are those of all experts. A group reads and writes its own rows of them, so that what one group has
computed lies beside what others have, where an exchange expects it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_moe.comm import ExpertSegments
from ep_moe.comm.expert_groups import expert_groups
from ep_moe.experts.activation import activate, activation_backward
from ep_moe.experts.gemm import GroupedGemm


@dataclass(frozen=True)
class ExpertGroup:
    """Consecutive local experts.

    Attributes:
        experts: which.
        rows: their rows in tensors of all experts; all rows where only the device knows which are theirs.
        segments: of these rows.
    """

    experts: slice
    rows: slice
    segments: ExpertSegments

    def keep(self, gathered: Tensor, values: Tensor) -> None:
        """Write the group's ``values`` (``[rows of the group]``) to their places in those of all rows."""
        start = self.segments.start
        if start is None:
            gathered[self.rows] = values
        else:  # later groups write what is behind this one's
            behind = torch.arange(len(gathered), device=gathered.device) >= start
            torch.where(behind, values, gathered, out=gathered)


def split_segments(segments: ExpertSegments, groups: int, gemm: GroupedGemm) -> list[ExpertGroup]:
    """Cut the segments of all local experts into those of ``groups`` groups.

    Where the host does not know the sizes, the device cuts if ``gemm`` can start there; otherwise the host reads them,
    for which it waits.
    """
    bounds = expert_groups(segments.ends.shape[0], groups)
    if segments.sizes is None and gemm.reads_start:
        return [
            ExpertGroup(
                slice(first, end),
                slice(None),
                ExpertSegments(
                    segments.counts[first:end],
                    segments.ends[first:end],
                    None,
                    segments.capacity,
                    start=segments.ends[first - 1 : first] if first else None,
                ),
            )
            for first, end in bounds
        ]
    sizes = segments.host_sizes()
    starts = [0, *itertools.accumulate(sizes)]
    return [
        ExpertGroup(
            slice(first, end),
            slice(starts[first], starts[end]),
            ExpertSegments(segments.counts[first:end], segments.ends[first:end] - starts[first], sizes[first:end]),
        )
        for first, end in bounds
    ]


@dataclass(frozen=True)
class ExpertNetwork:
    """How the experts compute.

    Attributes:
        gemm: the back end.
        activation: of the inner rows.
        recompute: whether backward computes activations again instead of keeping them.
    """

    gemm: GroupedGemm
    activation: str
    recompute: bool


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of all local experts, row-major.

    Attributes:
        fc1: ``[local_experts, fc1 width, hidden]``.
        fc2: ``[local_experts, hidden, ffn]``.
    """

    fc1: Tensor
    fc2: Tensor


@dataclass(frozen=True)
class ExpertRows:
    """The rows of all experts on their way through the network.

    Attributes:
        rows: ``[num_rows, hidden]``.
        row_weights: ``[num_rows]``, the routing weight of each.
        fc1_out: ``[num_rows, fc1 width]``; ``None`` if nothing is kept for backward.
        inner: ``[num_rows, ffn]``; ``None`` if it is not kept.
        out: ``[num_rows, hidden]``.
    """

    rows: Tensor
    row_weights: Tensor
    fc1_out: Tensor | None
    inner: Tensor | None
    out: Tensor


def make_expert_rows(
    network: ExpertNetwork, weights: ExpertWeights, rows: Tensor, row_weights: Tensor, *, keep: bool
) -> ExpertRows:
    """Room for what the network makes of ``rows``; with ``keep`` also for what backward needs."""
    fc1_out = rows.new_empty(rows.shape[0], weights.fc1.shape[1]) if keep else None
    inner = rows.new_empty(rows.shape[0], weights.fc2.shape[2]) if keep and not network.recompute else None
    return ExpertRows(rows, row_weights, fc1_out, inner, torch.empty_like(rows))


def group_forward(network: ExpertNetwork, weights: ExpertWeights, group: ExpertGroup, all_rows: ExpertRows) -> None:
    """Compute a group's rows of ``all_rows.out``, and of what is kept."""
    gemm, segments = network.gemm, group.segments
    fc1, fc2 = weights.fc1[group.experts], weights.fc2[group.experts]
    rows, row_weights, out = (x[group.rows] for x in (all_rows.rows, all_rows.row_weights, all_rows.out))
    fc1_out = None if all_rows.fc1_out is None else all_rows.fc1_out[group.rows]
    inner = None if all_rows.inner is None else all_rows.inner[group.rows]
    if gemm.swiglu is not None and network.activation == "swiglu":
        inner, _ = gemm.swiglu(
            rows, fc1, segments, row_weights, keep=fc1_out is not None, out=inner, pre_activation=fc1_out
        )
    else:
        fc1_out = gemm.forward(rows, fc1, segments, out=fc1_out)
        inner = activate(
            fc1_out, network.activation, row_weights, segments.row_count, row_start=segments.start, out=inner
        )
    gemm.forward(inner, fc2, segments, out=out)


@dataclass(frozen=True)
class RowGradients:
    """Gradients of the rows of all experts, on their way back through the network.

    Attributes:
        out: ``[num_rows, hidden]``, of the results.
        fc1_out: ``[num_rows, fc1 width]``; ``None`` if not needed, as those that follow.
        row_weights: ``[num_rows]``.
        rows: ``[num_rows, hidden]``.
    """

    out: Tensor
    fc1_out: Tensor | None
    row_weights: Tensor | None
    rows: Tensor | None


def group_backward(
    network: ExpertNetwork,
    weights: ExpertWeights,
    group: ExpertGroup,
    fc1_out: Tensor,
    row_weights: Tensor,
    grads: RowGradients,
) -> None:
    """Compute a group's rows of ``grads`` from those of ``grads.out``.

    Args:
        network: as in the forward pass, like the next four.
        weights: of all experts.
        group: the group.
        fc1_out: of :class:`ExpertRows`.
        row_weights: likewise.
        grads: what is needed is written to.
    """
    if grads.fc1_out is None and grads.row_weights is None:
        return
    gemm, segments = network.gemm, group.segments
    grad_inner = gemm.dgrad(grads.out[group.rows], weights.fc2[group.experts], segments)
    grad_fc1_out, grad_row_weights = activation_backward(
        grad_inner,
        fc1_out[group.rows],
        network.activation,
        row_weights[group.rows],
        segments.row_count,
        need_x=grads.fc1_out is not None,
        need_weights=grads.row_weights is not None,
        row_start=segments.start,
        out=None if grads.fc1_out is None else grads.fc1_out[group.rows],
    )
    if grads.row_weights is not None and grad_row_weights is not None:
        group.keep(grads.row_weights, grad_row_weights)
    if grads.rows is not None and grad_fc1_out is not None:
        gemm.dgrad(grad_fc1_out, weights.fc1[group.experts], segments, out=grads.rows[group.rows])
