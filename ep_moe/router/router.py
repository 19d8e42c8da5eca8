"""The router: which experts every token goes to, and with what weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ep_moe.config import MoEConfig
from ep_moe.router.balance import BalanceLosses
from ep_moe.router.capacity import drop_beyond_capacity
from ep_moe.router.counts import count_assignments, sum_over_group
from ep_moe.router.gating import gating_logits, random_logits
from ep_moe.router.losses import AuxLoss, LossAttacher, attach_loss, z_loss
from ep_moe.router.recompute import OncePerMicroBatch, in_backward
from ep_moe.router.scoring import SelectExperts, route, score_distribution, select_experts
from ep_moe.router.statistics import RouterStatistics

_FP32_BUFFERS = ("expert_bias", "local_tokens_per_expert")


@dataclass(frozen=True, eq=False)
class Routing:
    """Where tokens go.

    Attributes:
        topk_idx: int64 ``[tokens, top_k]``, experts; -1 where dropped.
        topk_weights: ``[tokens, top_k]`` in the router's dtype, 0 where dropped. Carries the gradient of the
            router, and the balance losses attached to it.
    """

    topk_idx: Tensor
    topk_weights: Tensor


class TopKRouter(nn.Module):
    """Routes every token to ``moe.top_k`` experts.

    Agrees with Megatron-Core's router (0.16 to 0.19) where both have an option; input jitter is for training mode only.
    Losses are attached in training mode with grad enabled. Tokens per expert (for the bias, and for the global
    balance loss) are counted once per micro-batch in training mode, see :class:`OncePerMicroBatch`.

    Attributes:
        weight: parameter ``[num_experts, hidden_size]``.
        expert_bias: fp32 buffer ``[num_experts]``, saved with the module; None unless ``router.expert_bias``.
            Stays fp32 when the module is cast: its small steps would be lost in bf16.
        local_tokens_per_expert: fp32 buffer ``[num_experts]``, this rank's counts since the last bias update,
            after dropping and without padding; None unless ``router.expert_bias``.
        select_experts: makes the choice from scores; replaceable, for instance by a replay.
        statistics: gathers figures of every forward pass; None for none.
    """

    expert_bias: Tensor | None
    local_tokens_per_expert: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        moe: MoEConfig,
        *,
        init_method: Callable[[Tensor], Any] | None = None,
        micro_batch_group: dist.ProcessGroup | None = None,
        global_batch_group: dist.ProcessGroup | None = None,
        attach_loss: LossAttacher = attach_loss,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the router with fresh weights.

        Args:
            hidden_size: width of the tokens.
            moe: number of experts, top_k, and the section ``router``.
            init_method: fills a tensor in place; default normal with standard deviation 0.02.
            micro_batch_group: ranks that share a micro-batch (Megatron: tensor x context parallel); None for
                this rank alone.
            global_batch_group: ranks that share the global batch, for the global balance loss and the bias;
                None for this rank alone.
            attach_loss: joins losses to the graph.
            device: of weight and buffers.
            dtype: of the weight; None for PyTorch's default.
        """
        super().__init__()
        self.hidden_size = hidden_size
        self.moe = moe
        self.global_batch_group = global_batch_group
        self.attach_loss = attach_loss
        self.select_experts: SelectExperts = select_experts
        self.statistics: RouterStatistics | None = None
        self._init_method = init_method or _default_init
        self._z_loss_coeff = moe.router.z_loss_coeff
        if micro_batch_group is not None:
            # Every rank of the group adds its own mean over its own tokens.
            self._z_loss_coeff /= dist.get_world_size(micro_batch_group)
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size, device=device, dtype=dtype))
        bias = torch.zeros(moe.num_experts, device=device, dtype=torch.float32) if moe.router.expert_bias else None
        self.register_buffer("expert_bias", bias)
        counts = None if bias is None else torch.zeros_like(bias)
        self.register_buffer("local_tokens_per_expert", counts, persistent=False)
        self.balance_losses = BalanceLosses(moe, micro_batch_group, global_batch_group, device)
        self._once = OncePerMicroBatch()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the weight by the init method, in fp32, and round: one seed gives one model in every dtype.

        Buffers begin anew too: bias and counts are zero.
        """
        weight = torch.empty_like(self.weight, dtype=torch.float32)
        self._init_method(weight)
        self.weight.copy_(weight)
        for buffer in (self.expert_bias, self.local_tokens_per_expert):
            if buffer is not None:
                buffer.zero_()
        self.reset_global_balance()

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route a micro-batch. Without host synchronisation.

        Args:
            x: floating ``[tokens, hidden_size]``, one sequence, or ``[sequence, batch, hidden_size]``.
            padding_mask: bool, shape of ``x`` without its last dimension; True marks padding, which is routed
                but left out of losses, counts and statistics.

        Returns:
            The routing of the ``tokens`` or ``sequence * batch`` rows of ``x``.

        Raises:
            ValueError: if a shape or the dtype of the mask is not as above.
        """
        self._check(x, padding_mask)
        sequences = x.shape[1] if x.dim() == 3 else 1
        valid = None if padding_mask is None else ~padding_mask.reshape(-1)
        config = self.moe.router
        counted = self.training and self._once.counts()
        with_losses = self.training and torch.is_grad_enabled()

        logits = self._logits(x.reshape(-1, self.hidden_size))
        if with_losses and self._z_loss_coeff > 0:
            logits = self._attach_z_loss(logits, valid)
        topk_idx, weights = route(logits, self.moe.top_k, config, self.expert_bias, self.select_experts)
        if config.capacity_factor is not None:
            topk_idx, weights = drop_beyond_capacity(
                topk_idx, weights, self.moe.num_experts, config.capacity_factor, config.drop_policy
            )
        if with_losses and self.balance_losses.enabled:
            for loss in self.balance_losses(logits, valid, sequences, counted):
                weights = self.attach_loss(weights, loss)
        if counted and self.local_tokens_per_expert is not None:
            self.local_tokens_per_expert += count_assignments(topk_idx, self.moe.num_experts, valid)[0]
        if self.statistics is not None and not in_backward():
            self.statistics.add(topk_idx, score_distribution(logits.detach(), config.score_function), valid)
        return Routing(topk_idx, weights)

    @torch.no_grad()
    def update_expert_bias(self) -> None:
        """Move the bias of every expert one step towards an even load; call after each global batch.

        ``bias += rate * sign(mean count - count)``, with counts summed over ``global_batch_group`` and then reset
        (DeepSeek-V3, arXiv 2408.15664). Collective over that group; does nothing without ``router.expert_bias``.
        """
        self._once.reset()
        if self.expert_bias is None or self.local_tokens_per_expert is None:
            return
        counts = sum_over_group(self.local_tokens_per_expert, self.global_batch_group)
        self.expert_bias += self.moe.router.expert_bias_update_rate * torch.sign(counts.mean() - counts)
        self.local_tokens_per_expert.zero_()

    def reset_global_balance(self) -> None:
        """Start a new global batch for the global balance loss; call before or after each."""
        self._once.reset()
        self.balance_losses.reset_global_balance()

    def extra_repr(self) -> str:
        """One line for ``print(module)``."""
        return f"hidden_size={self.hidden_size}, num_experts={self.moe.num_experts}, top_k={self.moe.top_k}"

    def _logits(self, x: Tensor) -> Tensor:
        config = self.moe.router
        if self.training and config.input_jitter > 0:
            x = x * torch.empty_like(x).uniform_(1.0 - config.input_jitter, 1.0 + config.input_jitter)
        dtype = {"input": x.dtype, "fp32": torch.float32, "fp64": torch.float64}[config.dtype]
        logits = gating_logits(x, self.weight, dtype)
        return random_logits(logits) if config.force_balance else logits

    def _attach_z_loss(self, logits: Tensor, valid: Tensor | None) -> Tensor:
        coefficient = self._z_loss_coeff
        tokens = len(logits) if valid is None else valid.sum()
        loss = AuxLoss("z_loss", z_loss(logits, valid) * coefficient, coefficient, None, tokens)
        return self.attach_loss(logits, loss)

    def _check(self, x: Tensor, padding_mask: Tensor | None) -> None:
        if x.dim() not in (2, 3) or x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected [tokens, {self.hidden_size}] "
                f"or [sequence, batch, {self.hidden_size}]"
            )
        if padding_mask is None:
            return
        if padding_mask.shape != x.shape[:-1] or padding_mask.dtype != torch.bool:
            raise ValueError(
                f"padding_mask is {padding_mask.dtype} {tuple(padding_mask.shape)}, "
                f"expected torch.bool {tuple(x.shape[:-1])} for x of shape {tuple(x.shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKRouter:
        # Casts reach buffers through here. Undoing the cast from the tensor before it keeps every bit.
        before = {name: self._buffers[name] for name in _FP32_BUFFERS}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != torch.float32:
                self._buffers[name] = buffer.to(after.device)
        return self


def _default_init(weight: Tensor) -> None:
    nn.init.normal_(weight, std=0.02)
