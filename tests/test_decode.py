"""The decode phase of the layer: low-latency mode computes what normal mode does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from communicators import rank_device
from gpu_ranks import gpu_ranks
from ranks import run_ranks
from torch import Tensor

from ep_moe import EPMoELayer
from ep_moe.config import (
    Config,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    PhaseConfig,
    PhasesConfig,
    SharedExpertsConfig,
)

HIDDEN, TOKENS = 256, 6
DEVICES = [
    pytest.param("cpu", "portable", id="portable-cpu"),
    pytest.param("cuda", "nvlink", id="nvlink", marks=pytest.mark.gpu),
]


def build_layer(
    rank: int, device: str, comm: Any, dtype: torch.dtype, dispatch_dtype: Any = "input", precision: Any = "input"
) -> EPMoELayer:
    decode = PhaseConfig(mode="low_latency", dispatch_dtype=dispatch_dtype, max_tokens_per_rank=TOKENS)
    config = Config(
        model=ModelConfig(hidden_size=HIDDEN, init_std=0.1),
        moe=MoEConfig(
            num_experts=8,
            top_k=3,
            comm=comm,
            experts=ExpertsConfig(ffn_hidden_size=128, precision=precision),
            shared_experts=SharedExpertsConfig(ffn_hidden_size=64),
        ),
        phases=PhasesConfig(decode=decode),
    )
    torch.manual_seed(3)
    layer = EPMoELayer(config, dist.group.WORLD, device=rank_device(device, rank), dtype=dtype)
    return layer.eval()


def tokens_of(rank: int, count: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(count, HIDDEN, generator=generator).to(device, dtype)


def _compare(
    rank: int, world: int, device: str, comm: str, dtype: torch.dtype, dispatch_dtype: str, precision: str
) -> list[float]:
    """Relative distance of decode from prefill, for several numbers of tokens, and by automatic choice."""
    on, layer = rank_device(device, rank), build_layer(rank, device, comm, dtype, dispatch_dtype, precision)
    distances = []
    with torch.no_grad():
        for counts in ((6, 6), (1, 4), (0, 5), (0, 0)):
            x = tokens_of(rank, counts[rank % 2], on, dtype)
            with layer.phase("prefill"):
                normal = layer(x)
            with layer.phase("decode"):
                decoded = layer(x)
            chosen = layer(x)  # few tokens: decode
            distances.append(float((decoded - normal).norm() / (normal.norm() + 1e-9)))
            distances.append(0.0 if torch.equal(chosen, decoded) else float("inf"))
    return distances


@pytest.mark.parametrize(("device", "comm"), DEVICES)
@pytest.mark.parametrize(("dispatch_dtype", "tolerance"), [("input", 0.01), ("fp8", 0.06)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["input", "fp8"])
def test_decode_agrees_with_prefill(
    device: str, comm: str, dtype: torch.dtype, dispatch_dtype: str, tolerance: float, precision: str
) -> None:
    if precision == "fp8" and device == "cuda" and dtype != torch.bfloat16:
        pytest.skip("the kernels multiply rows of bf16 tokens")
    for distances in run_ranks(2, _compare, device, comm, dtype, dispatch_dtype, precision):
        # Where routing weights are applied, and bf16 on the way, change which numbers of e4m3 are the nearest.
        assert max(distances) < (tolerance if precision == "input" else 0.06)


def _gradients(rank: int, world: int) -> str:
    layer = build_layer(rank, "cpu", "portable", torch.float32)
    try:
        with layer.phase("decode"):
            layer(tokens_of(rank, 2, torch.device("cpu"), torch.float32))
    except RuntimeError as error:
        return str(error)
    return ""


def test_gradients_are_refused() -> None:
    (message,) = run_ranks(1, _gradients)
    assert "low_latency mode computes no gradients" in message


def _captured(rank: int, world: int, precision: str) -> list[bool]:
    """A decode step of the layer in a CUDA graph, with other tokens at every replay."""
    on, layer = rank_device("cuda", rank), build_layer(rank, "cuda", "nvlink", torch.bfloat16, "fp8", precision)
    x = tokens_of(rank, TOKENS, on, torch.bfloat16)
    same = []
    with torch.no_grad(), layer.phase("decode"):
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        for seed in range(20):
            x.copy_(tokens_of(rank, TOKENS, on, torch.bfloat16, seed))
            graph.replay()
            replayed = out.clone()
            same.append(torch.equal(replayed, layer(x)))
    return same


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", gpu_ranks(1, 2))
@pytest.mark.parametrize("precision", ["input", "fp8"])
def test_a_decode_step_can_be_captured(ranks: int, precision: str) -> None:
    for same in run_ranks(ranks, _captured, precision):
        assert all(same)
