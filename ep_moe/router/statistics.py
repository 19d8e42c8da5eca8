"""How a router spreads tokens, gathered on the device for logging."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.router.counts import count_assignments, sum_over_group


@dataclass(frozen=True)
class RoutingSummary:
    """Figures of one router since the last :meth:`RouterStatistics.collect`.

    Attributes:
        tokens: tokens routed, without padding.
        assignments: (token, expert) pairs per expert, after dropping.
        dropped: pairs dropped beyond capacity.
        entropy: mean over tokens of the entropy of the score distribution, in nats; NaN without tokens.
    """

    tokens: int
    assignments: tuple[int, ...]
    dropped: int
    entropy: float


class RouterStatistics:
    """Sums over forward passes; set as ``router.statistics`` to switch gathering on.

    Adding costs a few small kernels and never waits for the device; only :meth:`collect` does. Passes repeated
    by activation recompute are not added.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        # One vector, so that collecting is one collective: assignments per expert, tokens, dropped, entropy.
        # fp64 holds counts up to 2^53 exactly.
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, topk_idx: Tensor, scores: Tensor, valid: Tensor | None = None) -> None:
        """Add one forward pass.

        Args:
            topk_idx: int64 ``[tokens, top_k]`` after dropping, -1 for dropped.
            scores: floating ``[tokens, num_experts]``, distributions that sum to 1.
            valid: bool ``[tokens]``, tokens that are not padding; None for all.
        """
        if valid is None:
            valid = torch.ones(len(topk_idx), dtype=torch.bool, device=topk_idx.device)
        assignments = count_assignments(topk_idx, self.num_experts, valid)[0]
        dropped = ((topk_idx < 0) & valid.unsqueeze(1)).sum()
        entropy = (torch.special.entr(scores.double()).sum(-1) * valid).sum()
        sums = torch.cat([assignments.double(), torch.stack([valid.sum().double(), dropped.double(), entropy])])
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums

    def collect(self, group: dist.ProcessGroup | None = None) -> RoutingSummary:
        """Sum over the ranks of ``group`` (None: this rank alone), start anew, and return the figures.

        Collective over ``group``, and waits for the device. A rank that added nothing must still call it, and
        then needs a CPU-capable group.
        """
        sums = torch.zeros(self.num_experts + 3, dtype=torch.float64) if self._sums is None else self._sums
        self._sums = None
        *assignments, tokens, dropped, entropy = sum_over_group(sums, group).tolist()
        return RoutingSummary(
            tokens=int(tokens),
            assignments=tuple(int(count) for count in assignments),
            dropped=int(dropped),
            entropy=entropy / tokens if tokens else float("nan"),
        )
