"""Experts in chunks: the bits of the plain layer, forward and backward, whatever is set beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from communicators import rank_device
from gemm_doubles import device_started
from ranks import RankError, run_ranks
from test_overlap import HIDDEN, MOE, results_of, tokens_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ep_moe import EPMoELayer
from ep_moe.comm import PortableCommunicator
from ep_moe.comm.expert_groups import expert_groups
from ep_moe.comm.portable import PortableHandle
from ep_moe.config import (
    Config,
    ConfigError,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    PhaseConfig,
    PhasesConfig,
)
from ep_moe.experts import grouped

EXPERTS = MOE.experts
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the phase, of moe
    "alone": ({}, {}),
    "strategies": ({"overlap": ("shared_experts", "wgrad")}, {}),
    "loop": ({}, {"experts": replace(EXPERTS, backend="loop", activation="gelu")}),
    "keeps activations": ({}, {"experts": replace(EXPERTS, recompute_activation=False, activation="geglu")}),
    "capacity": ({}, {"capacity_rows": 1000}),
    "fp8 on the way": ({"dispatch_dtype": "fp8"}, {}),
    "two hops": ({}, {"comm_ranks_per_node": 1}),
}


def build(rank: int, device: str, chunks: int, phase: dict[str, Any], moe: dict[str, Any]) -> EPMoELayer:
    config = Config(
        model=ModelConfig(hidden_size=HIDDEN, init_std=0.2),
        moe=replace(MOE, comm="portable" if device == "cpu" else "nvlink", **moe),
        phases=PhasesConfig(
            train=PhaseConfig(expert_chunks=chunks, **phase), prefill=PhaseConfig(expert_chunks=chunks)
        ),
    )
    torch.manual_seed(7)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return EPMoELayer(config, dist.group.WORLD, device=rank_device(device, rank), dtype=dtype)


def force_routing(layer: EPMoELayer, experts: Any) -> None:
    """Let all tokens go to ``experts`` (-1 for none) in this order."""
    choose = layer.router.forward

    def forward(*args: Any) -> Any:
        routing = choose(*args)
        topk_idx = torch.tensor(experts, device=routing.topk_idx.device).expand_as(routing.topk_idx).contiguous()
        return replace(routing, topk_idx=topk_idx, topk_weights=torch.where(topk_idx < 0, 0, routing.topk_weights))

    layer.router.forward = forward  # type: ignore[method-assign]


def train(layer: EPMoELayer, rank: int, seed: int) -> dict[str, Tensor]:
    x, upstream = tokens_of(rank, seed, layer.router.weight)
    layer.zero_grad()
    out = layer(x)
    out.backward(upstream)
    return results_of(layer, x, out)


def _trained(rank: int, world: int, device: str, chunks: int, variant: str) -> list[dict[str, Tensor]]:
    layer = build(rank, device, chunks, *VARIANTS[variant])
    passes = [train(layer, rank, seed) for seed in range(3)]
    for experts in ([5, 5, 5], [0, -1, 7], [-1, -1, -1], [2, 6, 2]):
        layer = build(rank, device, chunks, *VARIANTS[variant])
        force_routing(layer, experts)
        passes.append(train(layer, rank, 1))
    with torch.no_grad(), layer.phase("prefill"):
        passes.append({"inference": layer(tokens_of(rank, 2, layer.router.weight)[0])})
    return passes


def check_same(plain: list[Any], chunked: list[Any], what: str) -> None:
    for want, got in zip(plain, chunked, strict=True):
        for place, (one, other) in enumerate(zip(want, got, strict=True)):
            assert one.keys() == other.keys()
            different = [name for name in one if not torch.equal(one[name], other[name])]
            assert not different, f"{what}, pass {place}: {different}"


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_chunks_change_no_bit(ranks: int, variant: str) -> None:
    plain = run_ranks(ranks, _trained, "cpu", 1, variant)
    local_experts = MOE.num_experts // ranks
    for chunks in {2, min(3, local_experts), local_experts}:
        check_same(plain, run_ranks(ranks, _trained, "cpu", chunks, variant), f"{chunks} chunks of {ranks} ranks")


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "two hops"])
def test_gpu_chunks_change_no_bit(ranks: int, variant: str) -> None:
    plain = run_ranks(ranks, _trained, "cuda", 1, variant)
    local_experts = MOE.num_experts // ranks
    for chunks in {2, min(3, local_experts), local_experts}:
        check_same(plain, run_ranks(ranks, _trained, "cuda", chunks, variant), f"{chunks} chunks of {ranks} ranks")


def _on_double(rank: int, world: int, chunks: int, recompute: bool) -> list[dict[str, Tensor]]:
    """With a capacity, by a back end that starts where the device says; unwritten rows are NaN."""
    experts = replace(EXPERTS, recompute_activation=recompute)
    layer = build(rank, "cpu", chunks, {}, {"capacity_rows": 1000, "experts": experts})
    select, grouped.select_backend = grouped.select_backend, lambda *args, **kwargs: device_started()
    try:
        return [train(layer, rank, seed) for seed in range(3)]
    finally:
        grouped.select_backend = select


@pytest.mark.parametrize("recompute", [True, False])
def test_groups_may_start_where_only_the_device_knows(recompute: bool) -> None:
    plain = run_ranks(2, _on_double, 1, recompute)
    for chunks in (2, 3):
        check_same(plain, run_ranks(2, _on_double, chunks, recompute), f"{chunks} chunks")


class _InTime(PortableCommunicator):
    """Takes the rows of a group when it is its turn: what is computed later does not arrive."""

    def combine_in_groups(self, rows: Tensor, handle: PortableHandle, groups: int) -> tuple[Tensor, Iterator[None]]:
        taken, out = torch.full_like(rows, float("nan")), rows.new_empty(handle.shape[0], rows.shape[1])
        starts = [0, *handle.segments.ends.tolist()]

        def take() -> Iterator[None]:
            for first, end in expert_groups(len(starts) - 1, groups):
                own = slice(starts[first], starts[end])
                taken[own] = rows[own]
                if end == len(starts) - 1:
                    out.copy_(self.combine(taken, handle))
                yield

        return out, take()


def _in_time(rank: int, world: int, chunks: int) -> list[dict[str, Tensor]]:
    layer = build(rank, "cpu", chunks, {}, {})
    dispatcher, _ = layer._phases._get("train", layer.router.weight.device)
    dispatcher.communicator = _InTime(dist.group.WORLD)  # type: ignore[attr-defined]
    return [train(layer, rank, seed) for seed in range(2)]


def test_a_group_leaves_when_it_has_been_computed() -> None:
    check_same(run_ranks(2, _in_time, 1), run_ranks(2, _in_time, 4), "in time")


def _ways(rank: int, world: int, chunks: int) -> list[dict[str, Tensor]]:
    """Uses of autograd other than one plain backward pass."""
    layer = build(rank, "cpu", chunks, {}, {})
    weight = layer.experts.fc1_weight
    found = []

    x, upstream = tokens_of(rank, 1, weight)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.backward(upstream)
    found.append(results_of(layer, x, out))

    layer.zero_grad()
    x, _ = tokens_of(rank, 1, weight)
    checkpoint(layer, x, use_reentrant=False).backward(upstream)
    found.append(results_of(layer, x, x.detach()))

    x, _ = tokens_of(rank, 1, weight)
    out = layer(x)
    out.backward(upstream, retain_graph=True)
    out.backward(upstream)
    found.append(results_of(layer, x, out))

    out = layer(x)
    gradients = torch.autograd.grad(out, (x, layer.experts.fc2_weight), upstream, retain_graph=True)
    (alone,) = torch.autograd.grad(out, x, upstream)
    found.append({"x": gradients[0], "fc2": gradients[1], "alone": alone})

    layer.zero_grad()
    layer(x.detach()).backward(upstream)
    found.append({name: p.grad for name, p in layer.named_parameters()})

    layer.zero_grad()
    layer.experts.requires_grad_(False)
    x, _ = tokens_of(rank, 1, weight)
    out = layer(x)
    out.backward(upstream)
    found.append(results_of(layer, x, out))

    layer.experts.fc2_weight.requires_grad_(True)
    layer.router.requires_grad_(False)
    layer(x.detach()).backward(upstream)
    found.append({"fc2": layer.experts.fc2_weight.grad})
    return found


def test_every_use_of_autograd_gives_the_same_bits() -> None:
    check_same(run_ranks(2, _ways, 1), run_ranks(2, _ways, 3), "ways")


def _main_grads(rank: int, world: int, chunks: int) -> list[dict[str, Tensor]]:
    """Two passes whose weight gradients are added to buffers, as Megatron's data parallelism has them."""
    layer = build(rank, "cpu", chunks, {}, {})
    for parameter in layer.experts.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for seed in (1, 2):
        train(layer, rank, seed)
    assert all(parameter.grad_added_to_main_grad for parameter in layer.experts.parameters())  # type: ignore[attr-defined]
    return [{name: p.main_grad for name, p in layer.experts.named_parameters()}]  # type: ignore[attr-defined]


def test_gradients_are_added_to_main_grad() -> None:
    check_same(run_ranks(2, _main_grads, 1), run_ranks(2, _main_grads, 2), "main_grad")


def _too_many(rank: int, world: int) -> None:
    build(rank, "cpu", 5, {}, {})


def test_more_chunks_than_experts_are_refused() -> None:
    with pytest.raises(RankError, match=r"phases.train.expert_chunks = 5: must be at most 4, the experts of a rank"):
        run_ranks(2, _too_many)


def test_chunks_are_for_normal_mode_and_the_precision_of_the_rows() -> None:
    decode = PhaseConfig(mode="low_latency", max_tokens_per_rank=8, expert_chunks=2)
    with pytest.raises(ConfigError, match=r"phases.decode.expert_chunks = 2: must be 1 for low_latency"):
        PhasesConfig(decode=decode)
    experts = MoEConfig(experts=ExpertsConfig(precision="fp8", ffn_hidden_size=128))
    with pytest.raises(ConfigError, match=r"phases.train.expert_chunks = 2: must be 1 with moe.experts.precision: fp8"):
        Config(moe=experts, phases=PhasesConfig(train=PhaseConfig(expert_chunks=2)))


def _captured(rank: int, world: int, num_sms: int | None) -> bool:
    """Forward and backward with a capacity in one CUDA graph; replays equal eager passes of the plain layer."""
    tokens = 64
    capacity = {"capacity_rows": world * tokens * MOE.top_k}
    layer, plain = (build(rank, "cuda", chunks, {"num_sms": num_sms}, capacity) for chunks in (3, 1))
    on = layer.router.weight
    x, upstream = (torch.zeros(tokens, HIDDEN, device=on.device, dtype=on.dtype) for _ in range(2))

    def step(layer: EPMoELayer) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        out = layer(leaf)
        return [out.detach(), *torch.autograd.grad(out, [leaf, *layer.parameters()], upstream)]

    side = torch.cuda.Stream(on.device)
    side.wait_stream(torch.cuda.current_stream(on.device))
    with torch.cuda.stream(side):
        for _ in range(2):
            step(layer)
    torch.cuda.current_stream(on.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(layer)
    same = True
    for seed in range(5):
        for offset, tensor in enumerate((x, upstream)):
            generator = torch.Generator().manual_seed(100 * seed + 10 * offset + rank)
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        graph.replay()
        replayed = [tensor.clone() for tensor in results]
        same = same and all(torch.equal(a, b) for a, b in zip(replayed, step(plain), strict=True))
    return same


@pytest.mark.gpu
@pytest.mark.parametrize("num_sms", [None, 16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_gpu_chunks_can_be_captured(ranks: int, num_sms: int | None) -> None:
    assert all(run_ranks(ranks, _captured, num_sms))
