"""Training of a small Megatron model in one of several ways, on the same data from the same weights."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron_cuda import cuda_for_megatron, overlapped_schedule
from megatron_models import batch, gpt_model, megatrons_gpt_model, transformer_config
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ep_moe.megatron import from_native

MICRO_BATCHES, SEQUENCES = 2, 2
FIRST_SEED = 100_000  # of data with which no choice of experts hangs on less than 5e-6 of a logit
SIZES = {"hidden_size": 128, "moe_ffn_hidden_size": 64, "init_method_std": 0.06}


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        ours: with our layer, or with Megatron's own.
        dtype: of weights and computation; a copy of the weights in fp32 takes the steps.
        comm: communicator of our layer.
        settings: changes to Megatron's configuration, names and values.
        scheduled: by the combined 1F1B schedule, forward passes beside backward passes.
        distributed: by Megatron's data parallelism and distributed optimizer, with Adam; otherwise by plain SGD.
        shifted: from weights of which each is off by half a rounding step of fp32.
        steps: how many.
    """

    ours: bool
    dtype: torch.dtype = torch.float32
    comm: Any = "portable"
    settings: tuple[tuple[str, Any], ...] = ()
    scheduled: bool = False
    distributed: bool = False
    shifted: bool = False
    steps: int = 50


@dataclass(frozen=True)
class Outcome:
    """Of one rank: the mean loss of each step, before it is taken, and the weights in the end."""

    losses: Tensor
    weights: dict[str, Tensor]


@functools.cache
def losses(device: torch.device, training: Training) -> Tensor:
    """Those of :func:`train`; several tests compare with the same ones."""
    return train(device, training).losses


def train(device: torch.device, training: Training) -> Outcome:
    """Train on this rank and those of its expert-parallel group; all must call it alike."""
    environment = overlapped_schedule if training.scheduled else cuda_for_megatron
    # Other kernels of attention add in any order in their backward pass.
    with environment(device), sdpa_kernel(SDPBackend.MATH):
        model = build_model(device, training)
        stepper = DistributedAdam(model) if training.distributed else Sgd(model)
        run = scheduled_passes if training.scheduled else plain_passes
        found = []
        for step in range(training.steps):
            first = FIRST_SEED + 1000 * step + 10 * dist.get_rank()
            batches = [[t.to(device) for t in batch(first + number, SEQUENCES)] for number in range(MICRO_BATCHES)]
            found.append(run(stepper, batches))
            stepper.step()
        weights = {name: value.detach().cpu() for name, value in model.named_parameters()}
        return Outcome(torch.stack(found).cpu(), weights)


def build_model(device: torch.device, training: Training) -> GPTModel:
    settings = {**SIZES, **dict(training.settings), "params_dtype": training.dtype}
    config = transformer_config(**settings, bf16=training.dtype == torch.bfloat16)
    model = gpt_model(config, comm=training.comm) if training.ours else megatrons_gpt_model(config)
    weights = initial_weights(config.moe_shared_expert_intermediate_size)
    if training.shifted:
        generator = torch.Generator().manual_seed(0)  # alike on all ranks, for most weights are replicas
        weights = {name: shifted(value, generator) for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("_extra_state" in name for name in missing)
    return model.to(device, training.dtype).train()


@functools.cache
def initial_weights(shared: int | None) -> dict[str, Tensor]:
    """What every training starts from, in fp32 but exact in bf16; experts in the layout of ``SequentialMLP``."""
    torch.manual_seed(3)
    model = gpt_model(transformer_config(**SIZES, moe_shared_expert_intermediate_size=shared), comm="portable")
    weights = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {name: value.bfloat16().float() for name, value in from_native(weights, "sequential").items()}


def shifted(value: Tensor, generator: torch.Generator) -> Tensor:
    sign = 2 * torch.randint(2, value.shape, generator=generator) - 1
    return value * (1 + sign * torch.finfo(torch.float32).eps / 2)


class Stepper(Protocol):
    """A model, and how its gradients become steps."""

    model: nn.Module

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """To be around the passes of one micro-batch, the last one of a step or not."""

    def step(self) -> None: ...


def plain_passes(stepper: Stepper, batches: list[list[Tensor]]) -> Tensor:
    """Forward and backward of one micro-batch after the other; the mean loss."""
    found = []
    for number, (tokens, positions) in enumerate(batches, 1):
        with stepper.micro_batch(last=number == len(batches)):
            loss = stepper.model(tokens, positions, None, labels=tokens).float().mean()
            (loss / len(batches)).backward()
        found.append(loss.detach())
    return torch.stack(found).mean()


def scheduled_passes(stepper: Stepper, batches: list[list[Tensor]]) -> Tensor:
    """The same, the forward pass of a micro-batch interleaved with the backward pass of the one before."""
    before, loss, found = None, None, []
    for micro_batch in [*batches, None]:
        grad = None if loss is None else torch.full_like(loss, 1 / (len(batches) * loss.numel()))
        plan = None
        if micro_batch is not None:
            tokens, positions = micro_batch
            plan = stepper.model.build_schedule_plan(tokens, positions, None, labels=tokens)
        loss = TransformerModelChunkSchedulePlan.run(plan, before, b_grad=grad)
        if plan is not None:
            found.append(loss.detach().float().mean())
        before = plan
    return torch.stack(found).mean()


class Sgd:
    """Plain steps down the gradient of the mean loss over all ranks, taken by a copy of the weights in fp32."""

    def __init__(self, model: GPTModel, rate: float = 0.05) -> None:
        self.model = model
        self._rate = rate
        self._exact = {parameter: parameter.detach().float().clone() for parameter in model.parameters()}

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @torch.no_grad()
    def step(self) -> None:
        gradients = {parameter: parameter.grad.float() for parameter in self._exact}
        replicas = [gradient for parameter, gradient in gradients.items() if getattr(parameter, "allreduce", True)]
        everyones = torch.cat([gradient.flatten() for gradient in replicas])
        dist.all_reduce(everyones)
        for gradient, summed in zip(replicas, everyones.split([g.numel() for g in replicas]), strict=True):
            gradient.copy_(summed.view_as(gradient))
        for parameter, gradient in gradients.items():
            self._exact[parameter] -= self._rate / dist.get_world_size() * gradient
            parameter.copy_(self._exact[parameter])
            parameter.grad = None


class DistributedAdam:
    """Megatron's data parallelism, whose gradients of our experts must come in ``main_grad``, and its optimizer."""

    def __init__(self, model: GPTModel) -> None:
        config = model.config
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=True, use_distributed_optimizer=True
        )
        self.model = DistributedDataParallel(config, settings, model)
        # Far from gradients as small as eps Adam would make a step of any size out of a rounding.
        options = {"optimizer": "adam", "lr": 0.01, "adam_eps": 1e-2, "weight_decay": 0.0}
        dtypes = {"bf16": config.bf16, "params_dtype": config.params_dtype}
        optimizer_config = OptimizerConfig(**options, **dtypes, use_distributed_optimizer=True)
        self._optimizer = get_megatron_optimizer(optimizer_config, [self.model])

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self.model.no_sync()

    def step(self) -> None:
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is None and parameter.main_grad.dtype == torch.float32
            fused = ".experts.fc" in name  # ours; Megatron's need packages that may be missing
            assert parameter.grad_added_to_main_grad == fused, name
        finalize_model_grads([self.model])
        updated, *_ = self._optimizer.step()
        assert updated
        self.model.zero_grad_buffer()
        self._optimizer.zero_grad()
