"""A layer with a capacity: the same results, without the host knowing sizes; and in a CUDA graph, backward too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from communicators import rank_device
from ranks import run_ranks
from torch import Tensor

from ep_moe import EPMoELayer
from ep_moe.comm import CapacityError
from ep_moe.config import Config, ExpertsConfig, ModelConfig, MoEConfig, PhaseConfig, PhasesConfig

HIDDEN, TOKENS, TOP_K, EXPERTS = 128, 24, 2, 4
CONFIG = Config(
    model=ModelConfig(hidden_size=HIDDEN, init_std=0.1),
    moe=MoEConfig(num_experts=EXPERTS, top_k=TOP_K, experts=ExpertsConfig(ffn_hidden_size=64)),
    phases=PhasesConfig(train=PhaseConfig(max_tokens_per_rank=TOKENS)),
)


def build(rank: int, device: str, capacity: int | None, dtype: torch.dtype) -> EPMoELayer:
    comm = "portable" if device == "cpu" else "nvlink"
    config = replace(CONFIG, moe=replace(CONFIG.moe, comm=comm, capacity_rows=capacity))
    torch.manual_seed(5)
    return EPMoELayer(config, dist.group.WORLD, device=rank_device(device, rank), dtype=dtype)


def tokens_of(rank: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(TOKENS, HIDDEN, generator=generator).to(device, dtype)


def step(layer: EPMoELayer, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients of one call."""
    x = x.detach().requires_grad_()
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], grad)]


def _with_and_without(rank: int, world: int, device: str) -> list[bool]:
    on, dtype = rank_device(device, rank), torch.float32 if device == "cpu" else torch.bfloat16
    x, grad = tokens_of(rank, on, dtype), tokens_of(rank, on, dtype, 1)
    exact = step(build(rank, device, None, dtype), x, grad)
    bounded = step(build(rank, device, TOKENS * TOP_K * world, dtype), x, grad)
    return [torch.equal(a, b) for a, b in zip(exact, bounded, strict=True)]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_capacity_changes_no_bit(device: str) -> None:
    for same in run_ranks(2, _with_and_without, device):
        assert all(same), same


def _overflow(rank: int, world: int, device: str) -> str:
    on, dtype = rank_device(device, rank), torch.float32 if device == "cpu" else torch.bfloat16
    layer = build(rank, device, 5, dtype)
    try:
        for _ in range(2):  # kernels report to a later call
            layer(tokens_of(rank, on, dtype))
            if device == "cuda":
                torch.cuda.synchronize()
    except CapacityError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("device", DEVICES)
def test_more_rows_than_the_capacity_are_an_error(device: str) -> None:
    (message,) = run_ranks(1, _overflow, device)
    assert message == f"max_rows = 5 (moe.capacity_rows): {TOKENS * TOP_K} rows arrived at rank 0"


def _captured(rank: int, world: int) -> list[bool]:
    """Forward and backward in one graph, replayed with other tokens."""
    on = rank_device("cuda", rank)
    layer = build(rank, "cuda", TOKENS * TOP_K * world, torch.bfloat16)
    x, grad = tokens_of(rank, on, torch.bfloat16), tokens_of(rank, on, torch.bfloat16, 1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(layer, x, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(layer, x, grad)
    same = []
    for seed in range(5):
        x.copy_(tokens_of(rank, on, torch.bfloat16, seed))
        graph.replay()
        replayed = [t.clone() for t in results]
        same += [torch.equal(a, b) for a, b in zip(replayed, step(layer, x, grad), strict=True)]
    return same


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_forward_and_backward_in_one_graph(ranks: int) -> None:
    for same in run_ranks(ranks, _captured):
        assert all(same), same
