"""The three load-balancing losses of a router, and the counts they share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ep_moe.config import MoEConfig
from ep_moe.router.counts import count_assignments, sum_over_group
from ep_moe.router.losses import AuxLoss, balance_loss
from ep_moe.router.scoring import score_distribution


class BalanceLosses(nn.Module):
    """Computes the balance losses with a coefficient above 0: per micro-batch, per sequence, per global batch.

    They look at the plain top-k of the score distribution, without groups, bias or dropping, as in Megatron-Core:
    what the loss can change is the scores. Only counts travel between ranks, so no collective has a gradient.
    The loss of the global batch uses the running average of the counts of its micro-batches so far.
    """

    global_counts: Tensor
    global_micro_batches: Tensor

    def __init__(
        self,
        moe: MoEConfig,
        micro_batch_group: dist.ProcessGroup | None,
        global_batch_group: dist.ProcessGroup | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.moe = moe
        self.micro_batch_group = micro_batch_group
        self.global_batch_group = global_batch_group
        counts = torch.zeros(moe.num_experts, dtype=torch.int64, device=device)
        micro_batches = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("global_counts", counts, persistent=False)
        self.register_buffer("global_micro_batches", micro_batches, persistent=False)

    @property
    def enabled(self) -> bool:
        """Whether any coefficient is above 0."""
        router = self.moe.router
        return max(router.aux_loss_coeff, router.seq_aux_loss_coeff, router.global_aux_loss_coeff) > 0

    def forward(self, logits: Tensor, valid: Tensor | None, sequences: int, counted: bool) -> list[AuxLoss]:
        """Compute the losses of one micro-batch.

        Args:
            logits: floating ``[tokens, num_experts]``; token ``t`` belongs to sequence ``t % sequences``.
            valid: bool ``[tokens]``, tokens that are not padding; None for all.
            sequences: sequences in the micro-batch.
            counted: whether this pass adds the micro-batch to the global batch (a recompute must not, again).

        Returns:
            The enabled losses, in the order micro-batch, sequence, global batch.
        """
        router, top_k, num_experts = self.moe.router, self.moe.top_k, self.moe.num_experts
        scores = score_distribution(logits, router.score_function)
        with torch.no_grad():
            chosen = scores.topk(top_k, dim=-1).indices
            local_counts = count_assignments(chosen, num_experts, valid, sequences)
        valid_tokens: int | Tensor = len(scores)
        if valid is not None:
            scores = scores * valid.unsqueeze(1)
            valid_tokens = valid.sum()
        score_sums = scores.view(len(scores) // max(sequences, 1), sequences, num_experts).sum(0)
        losses = []

        def add(name: str, coefficient: float, value: Tensor, group: dist.ProcessGroup | None) -> None:
            losses.append(AuxLoss(name, value * coefficient, coefficient, group, valid_tokens))

        if router.aux_loss_coeff > 0 or router.seq_aux_loss_coeff > 0:
            counts = sum_over_group(local_counts.clone(), self.micro_batch_group)
            tokens = counts.sum() / top_k
            if router.aux_loss_coeff > 0:
                value = balance_loss(score_sums.sum(0), counts.sum(0), tokens, top_k)
                add("load_balancing_loss", router.aux_loss_coeff, value, self.micro_batch_group)
            if router.seq_aux_loss_coeff > 0:
                per_sequence = max(sequences, 1)
                value = balance_loss(score_sums, counts, tokens / per_sequence, top_k) / per_sequence
                add("seq_load_balancing_loss", router.seq_aux_loss_coeff, value, self.micro_batch_group)
        if router.global_aux_loss_coeff > 0:
            counts = sum_over_group(local_counts.sum(0), self.global_batch_group)
            if counted:
                self.global_counts += counts
                self.global_micro_batches += 1
            average = self.global_counts / self.global_micro_batches.clamp(min=1)
            value = balance_loss(score_sums.sum(0), average, counts.sum() / top_k, top_k)
            add("global_load_balancing_loss", router.global_aux_loss_coeff, value, self.global_batch_group)
        return losses

    def reset_global_balance(self) -> None:
        """Start a new global batch."""
        self.global_counts.zero_()
        self.global_micro_batches.zero_()
