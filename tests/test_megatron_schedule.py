"""Megatron's combined 1F1B schedule (``overlap_moe_expert_parallel_comm``) over our layer, against plain passes."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("megatron.core")

import torch
from communicators import rank_device
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron_cuda import overlapped_schedule
from megatron_models import batch, expert_parallel, gpt_model, transformer_config
from ranks import run_ranks
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "moe_shared_expert_intermediate_size": 16}
MICRO_BATCHES = 3


def _train(
    rank: int, world: int, device: str, comm: Any, changes: dict[str, Any], scheduled: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of three micro-batches and the sums of their gradients."""
    on = rank_device(device, rank)
    # Other kernels of attention add in any order in their backward pass.
    with expert_parallel(world), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(3)
        model = gpt_model(transformer_config(**BF16, **changes), comm=comm).bfloat16().to(on)
        batches = [tuple(t.to(on) for t in batch(10 * rank + seed)) for seed in range(MICRO_BATCHES)]
        losses = []
        if scheduled:
            with overlapped_schedule(on):
                before, loss = None, None
                for tokens, positions in [*batches, (None, None)]:
                    plan = (
                        model.build_schedule_plan(tokens, positions, None, labels=tokens)
                        if tokens is not None
                        else None
                    )
                    # Forward of this micro-batch and backward of the one before, interleaved.
                    grad = None if loss is None else torch.ones_like(loss)
                    loss = TransformerModelChunkSchedulePlan.run(plan, before, b_grad=grad)
                    losses += [loss.detach().cpu()] if plan is not None else []
                    before = plan
        else:
            for tokens, positions in batches:
                loss = model(tokens, positions, None, labels=tokens).float()
                loss.backward(torch.ones_like(loss))
                losses.append(loss.detach().cpu())
        return losses, {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("delay_wgrad", [False, True])
@pytest.mark.parametrize(
    ("device", "comm"),
    [
        pytest.param("cpu", "portable", id="portable-cpu"),
        pytest.param("cuda", "portable", id="portable-cuda", marks=pytest.mark.gpu),
        pytest.param("cuda", "nvlink", id="nvlink", marks=pytest.mark.gpu),
    ],
)
def test_combined_1f1b_gives_the_gradients_of_plain_passes(device: str, comm: str, delay_wgrad: bool) -> None:
    overlapped = {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": delay_wgrad}
    plain = run_ranks(2, _train, device, comm, {}, False)
    scheduled = run_ranks(2, _train, device, comm, overlapped, True)
    for (want_losses, want), (got_losses, got) in zip(plain, scheduled, strict=True):
        assert len(want_losses) == MICRO_BATCHES
        assert all(torch.equal(a, b) for a, b in zip(want_losses, got_losses, strict=True))
        assert want["decoder.layers.1.mlp.experts.fc1_weight"].any()
        different = [name for name, gradient in want.items() if not torch.equal(gradient, got[name])]
        assert not different
