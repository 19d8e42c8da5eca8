"""The training loop: steps, validation, figures."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from ep_moe.config import Config
from ep_moe.config_training import TrainingConfig
from ep_moe.data_parallel import clip_grad_norm, sync_gradients
from ep_moe.router import RouterStatistics
from moe_gpt.checkpoint import load_checkpoint, save_checkpoint
from moe_gpt.corpus import Corpus
from moe_gpt.model import build_model, moe_layers
from moe_gpt.processes import World
from moe_gpt.report import StepMetrics


@dataclass(frozen=True)
class StepResult:
    """Device-side figures of one step, read only when they are logged.

    Attributes:
        loss: mean over this process's tokens, nats per byte, 0-d.
        grad_norm: of the whole model before clipping, 0-d.
    """

    loss: Tensor
    grad_norm: Tensor


class Trainer:
    """A model in training: owns model and optimizer, counts steps."""

    def __init__(self, config: Config, corpus: Corpus, world: World) -> None:
        torch.manual_seed(config.training.seed)  # alike everywhere: one model, however many processes share it
        self.config = config
        self.corpus = corpus
        self.world = world
        self.step = 0
        self.model: GPTModel = build_model(config, world.device)
        self.routers = [layer.router for layer in moe_layers(self.model)]
        for router in self.routers:
            router.statistics = RouterStatistics(config.moe.num_experts)
        self.optimizer = build_optimizer(self.model, config.training)
        self._clock = time.perf_counter()
        self._logged_step = 0

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        self.step = load_checkpoint(folder, self.config, self.model, self.optimizer, self.corpus.digest)
        self._logged_step = self.step

    def save(self) -> Path:
        """Write a checkpoint; collective."""
        return save_checkpoint(self.config, self.model, self.optimizer, self.step, self.corpus.digest)

    def train_step(self) -> StepResult:
        """One optimizer step on this process's share of the global batch."""
        training = self.config.training
        # Random numbers depend on the step alone, so that a resumed run draws the same.
        torch.manual_seed(training.seed + 1_000_003 * (self.step + 1) + self.world.rank)
        learning_rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        batches = self._micro_batches()
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0 / len(batches), device=self.world.device))
        total = torch.zeros((), device=self.world.device)
        for sequences in batches:
            loss = self._loss(*self.corpus.train_batch(self.step, sequences, training.seed)) / len(batches)
            loss.backward()
            total += loss.detach()
        grad_norm = self._update()
        self.step += 1
        return StepResult(total, grad_norm)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over ``training.eval_sequences`` validation sequences, nats per byte; collective."""
        self.model.eval()
        gathered = [router.statistics for router in self.routers]
        for router in self.routers:
            router.statistics = None  # the figures are those of training
        for layer in moe_layers(self.model):
            layer.phase("prefill")
        mine = range(self.world.rank, self.config.training.eval_sequences, self.world.size)
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        # Every process runs the same number of forward passes: the experts of all of them take part in each.
        for start in range(0, math.ceil(self.config.training.eval_sequences / self.world.size), self._eval_batch):
            sequences = list(mine[start : start + self._eval_batch])
            loss = self._loss(*self.corpus.validation_batch(sequences or [0]))
            sums += len(sequences) * torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
        dist.all_reduce(sums)
        for layer in moe_layers(self.model):
            layer.phase(None)
        for router, statistics in zip(self.routers, gathered, strict=True):
            router.statistics = statistics
        return float(sums[0] / sums[1])

    def metrics(self, result: StepResult, validation_loss: float | None) -> StepMetrics:
        """Figures of the last step for the report; collective, and waits for the device."""
        loss = result.loss.clone()
        dist.all_reduce(loss)
        train_loss = float(loss) / self.world.size
        summaries = [router.statistics.collect(dist.group.WORLD) for router in self.routers if router.statistics]
        pairs = sum(s.tokens for s in summaries) * self.config.moe.top_k
        now = time.perf_counter()
        tokens = (self.step - self._logged_step) * self.config.training.global_batch_size
        tokens_per_second = tokens * self.config.data.sequence_length / (now - self._clock)
        self._clock, self._logged_step = now, self.step
        return StepMetrics(
            step=self.step,
            train_loss=train_loss,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            grad_norm=float(result.grad_norm),
            tokens_per_second=tokens_per_second,
            validation_loss=validation_loss,
            dropped_fraction=sum(s.dropped for s in summaries) / pairs if pairs else None,
            expert_load=[[n * len(s.assignments) / sum(s.assignments) for n in s.assignments] for s in summaries],
            routing_entropy=sum(s.entropy for s in summaries) / len(summaries) if summaries else None,
        )

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine down to the minimum (for the step about to be taken)."""
        training = self.config.training
        if self.step < training.warmup_steps:
            return training.learning_rate * (self.step + 1) / training.warmup_steps
        progress = (self.step - training.warmup_steps) / max(training.steps - training.warmup_steps, 1)
        low, high = training.min_learning_rate, training.learning_rate
        return low + 0.5 * (high - low) * (1 + math.cos(math.pi * min(progress, 1.0)))

    @property
    def _eval_batch(self) -> int:
        return len(self._micro_batches()[0])

    def _micro_batches(self) -> list[range]:
        """This process's sequences of the global batch, in micro-batches."""
        share = self.config.training.global_batch_size // self.world.size
        micro = self.config.training.micro_batch_size or share
        first = self.world.rank * share
        return [range(start, start + micro) for start in range(first, first + share, micro)]

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of ``[sequences, length]`` bytes."""
        device = self.world.device
        tokens, targets = tokens.to(device), targets.to(device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        with torch.autocast(device.type, self.world.dtype, enabled=self.world.dtype != torch.float32):
            return self.model(tokens, positions, None, labels=targets).float().mean()

    def _update(self) -> Tensor:
        parameters = list(self.model.parameters())
        sync_gradients(
            parameters,
            parallel_state.get_data_parallel_group(),
            parallel_state.get_expert_data_parallel_group(),
        )
        norm = clip_grad_norm(
            parameters, self.config.training.grad_clip, parallel_state.get_expert_model_parallel_group()
        )
        self.optimizer.step()
        for router in self.routers:
            router.update_expert_bias()
            router.reset_global_balance()
        return norm


def build_optimizer(model: torch.nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        fused=True,
    )
