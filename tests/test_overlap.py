"""Overlap strategies: the same bits as without them, forward and backward, and the order of stages they promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from communicators import rank_device
from ranks import run_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ep_moe import EPMoELayer
from ep_moe.config import (
    Config,
    ConfigError,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    PhaseConfig,
    PhasesConfig,
    SharedExpertsConfig,
)
from ep_moe.experts import grouped
from ep_moe.experts.backends import LOOP
from ep_moe.experts.gemm import GroupedGemm
from ep_moe.streams import Pending, start

HIDDEN = 128
MOE = MoEConfig(
    num_experts=8,
    top_k=3,
    experts=ExpertsConfig(ffn_hidden_size=64),
    shared_experts=SharedExpertsConfig(ffn_hidden_size=48, gate=True),
)
STRATEGIES: list[tuple[Any, ...]] = [("wgrad",), ("shared_experts",), ("shared_experts", "wgrad")]
DEVICES = [
    pytest.param("cpu", "portable", torch.float32, id="portable-cpu"),
    pytest.param("cuda", "portable", torch.bfloat16, id="portable-cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "nvlink", torch.bfloat16, id="nvlink", marks=pytest.mark.gpu),
]


def build_layer(rank: int, device: str, overlap: tuple[Any, ...], dtype: torch.dtype, **moe: Any) -> EPMoELayer:
    phases = PhasesConfig(train=PhaseConfig(overlap=overlap))
    config = Config(model=ModelConfig(hidden_size=HIDDEN, init_std=0.2), moe=replace(MOE, **moe), phases=phases)
    torch.manual_seed(7)
    return EPMoELayer(config, dist.group.WORLD, device=rank_device(device, rank), dtype=dtype)


def tokens_of(rank: int, seed: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and upstream gradient, of another number on every rank; random, so routing is random."""
    generator = torch.Generator().manual_seed(10 * seed + rank)
    shape = (2, (40 * seed + 17 * (rank + 1)) % 64, HIDDEN)
    x, upstream = torch.randn(shape, generator=generator).to(like.device, like.dtype)
    return x.requires_grad_(), upstream


def results_of(layer: EPMoELayer, x: Tensor, out: Tensor) -> dict[str, Tensor]:
    found = {"out": out, "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    return {name: value.detach().cpu() for name, value in found.items() if value is not None}


def _train(
    rank: int, world: int, device: str, comm: str, dtype: torch.dtype, overlap: tuple[Any, ...]
) -> list[dict[str, Tensor]]:
    """Outputs and all gradients of several passes; the last two accumulate into the gradients of the one before."""
    layer = build_layer(rank, device, overlap, dtype, comm=comm)
    passes = []
    for seed in range(4):
        x, upstream = tokens_of(rank, seed, layer.router.weight)
        if seed < 2:
            layer.zero_grad()
        out = layer(x)
        out.backward(upstream)
        passes.append(results_of(layer, x, out))
    return passes


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("device", "comm", "dtype"), DEVICES)
def test_strategies_change_no_bit(ranks: int, device: str, comm: str, dtype: torch.dtype) -> None:
    plain = run_ranks(ranks, _train, device, comm, dtype, ())
    assert all("experts.fc1_weight" in found for passes in plain for found in passes)
    for overlap in STRATEGIES:
        overlapped = run_ranks(ranks, _train, device, comm, dtype, overlap)
        for want, got in zip(plain, overlapped, strict=True):
            for one, other in zip(want, got, strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], other[name]) for name in one), (overlap, ranks)


def _ways(rank: int, world: int, overlap: tuple[Any, ...]) -> dict[str, dict[str, Tensor]]:
    """Uses of autograd other than one plain backward pass."""
    layer = build_layer(rank, "cpu", overlap, torch.float32)
    weight = layer.experts.fc1_weight
    found = {}

    x, upstream = tokens_of(rank, 1, weight)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.backward(upstream)
    found["autocast"] = results_of(layer, x, out)

    layer.zero_grad()
    x, _ = tokens_of(rank, 1, weight)
    out = checkpoint(layer, x, use_reentrant=False)
    out.backward(upstream)
    found["checkpoint"] = results_of(layer, x, out)

    layer.zero_grad()
    x, _ = tokens_of(rank, 1, weight)
    out = layer(x)
    out.backward(upstream, retain_graph=True)
    out.backward(upstream)
    found["twice"] = results_of(layer, x, out)

    out = layer(x)
    gradients = torch.autograd.grad(out, (x, layer.experts.fc2_weight), upstream, retain_graph=True)
    (alone,) = torch.autograd.grad(out, x, upstream)
    found["some gradients"] = {"x": gradients[0], "fc2": gradients[1], "alone": alone}

    layer.zero_grad()
    out = layer(x.detach())
    out.backward(upstream)
    found["tokens without gradient"] = {name: p.grad for name, p in layer.named_parameters()}

    layer.zero_grad()
    layer.experts.requires_grad_(False)
    x, _ = tokens_of(rank, 1, weight)
    out = layer(x)
    out.backward(upstream)
    found["frozen experts"] = results_of(layer, x, out)
    assert layer.experts.fc1_weight.grad is None
    return found


def test_every_use_of_autograd_gives_the_same_bits() -> None:
    plain, overlapped = (run_ranks(2, _ways, overlap) for overlap in ((), ("wgrad",)))
    for want, got in zip(plain, overlapped, strict=True):
        for way, tensors in want.items():
            assert tensors.keys() == got[way].keys(), way
            assert all(torch.equal(value, got[way][name]) for name, value in tensors.items()), way


def _order(rank: int, world: int, overlap: tuple[Any, ...]) -> list[str]:
    """The stages of a backward pass in the order in which the host issued them."""
    layer = build_layer(rank, "cpu", overlap, torch.float32)
    calls: list[str] = []

    def recorded(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: (calls.append(name), function(*args, **kwargs))[1]

    gemm = GroupedGemm(LOOP.forward, recorded("dgrad", LOOP.dgrad), recorded("wgrad", LOOP.wgrad))
    select, grouped.select_backend = grouped.select_backend, lambda *args, **kwargs: gemm
    try:
        x, upstream = tokens_of(rank, 1, layer.router.weight)
        out = layer(x)
    finally:
        grouped.select_backend = select
    communicator = layer._phases._get("train", x.device)[0].communicator  # type: ignore[attr-defined]
    for name in ("dispatch_cached", "combine", "combine_weights"):
        setattr(communicator, name, recorded(name, getattr(communicator, name)))
    out.backward(upstream)
    return calls


def test_order_of_the_backward_pass() -> None:
    (plain,), (overlapped,) = (run_ranks(1, _order, overlap) for overlap in ((), ("wgrad",)))
    travel = ["combine", "combine_weights"]
    assert plain == ["dispatch_cached", "dgrad", "wgrad", "dgrad", "wgrad", *travel]
    assert overlapped == ["dispatch_cached", "dgrad", "wgrad", "dgrad", *travel, "wgrad"]


def test_wgrad_is_for_training() -> None:
    with pytest.raises(ConfigError, match=r"phases.prefill.overlap = \[wgrad\]: wgrad is for phases.train"):
        PhasesConfig(prefill=PhaseConfig(overlap=("wgrad",)))


def test_without_a_stream_work_runs_at_once() -> None:
    done = []
    pending = start(lambda: (done.append(1), torch.ones(2))[1], None)
    assert done == [1] and torch.equal(pending.wait(), torch.ones(2))


@pytest.mark.gpu
def test_gpu_side_work_keeps_its_memory() -> None:
    """Inputs and results of delayed work on a side stream, with an allocator eager to reuse what was dropped."""
    stream = torch.cuda.Stream()
    size = 1 << 20

    def work(x: Tensor) -> Pending[tuple[Tensor, list[Tensor]]]:
        def add() -> tuple[Tensor, list[Tensor]]:
            torch.cuda._sleep(20_000_000)
            return x + 1, [x + 2]

        return start(add, stream)

    for value in range(5):
        pending = work(torch.full((size,), float(value), device="cuda"))
        poison = [torch.full((size,), float("nan"), device="cuda") for _ in range(3)]
        one, (two,) = pending.wait()
        torch.cuda._sleep(20_000_000)
        sums = one + two
        del one, two, poison
        with torch.cuda.stream(stream):
            [torch.full((size,), float("nan"), device="cuda") for _ in range(3)]
        assert torch.equal(sums, torch.full((size,), 2.0 * value + 3, device="cuda"))


def _captured(rank: int, world: int) -> bool:
    """Forward and backward of a layer with a capacity in one CUDA graph; replays equal eager passes bit for bit."""
    tokens = 64
    capacity = world * tokens * MOE.top_k
    layer = build_layer(rank, "cuda", STRATEGIES[-1], torch.bfloat16, comm="nvlink", capacity_rows=capacity)
    on = layer.router.weight
    x, upstream = (torch.zeros(tokens, HIDDEN, device=on.device, dtype=on.dtype) for _ in range(2))

    def step() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        out = layer(leaf)
        return [out.detach(), *torch.autograd.grad(out, [leaf, *layer.parameters()], upstream)]

    side = torch.cuda.Stream(on.device)
    side.wait_stream(torch.cuda.current_stream(on.device))
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream(on.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    same = True
    for seed in range(5):
        for offset, tensor in enumerate((x, upstream)):
            generator = torch.Generator().manual_seed(100 * seed + 10 * offset + rank)
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        graph.replay()
        replayed = [tensor.clone() for tensor in results]
        same = same and all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
    return same


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_gpu_strategies_can_be_captured(ranks: int) -> None:
    assert all(run_ranks(ranks, _captured))
