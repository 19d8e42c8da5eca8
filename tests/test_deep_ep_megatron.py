"""Megatron's flex dispatcher, unchanged, over the installed DeepEP interface."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from communicators import rank_device
from forking import FROM_NOTHING
from ranks import RankPool, join_over_nccl
from torch import Tensor

# Found, not imported: Megatron looks for DeepEP when it is imported.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core")

EXPERTS, TOKENS, HIDDEN, TOP_K = 8, (24, 40), 32, 3


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Processes that have not imported Megatron yet."""
    with contextlib.closing(RankPool(2, FROM_NOTHING)) as processes:
        yield processes


def rank_inputs(rank: int, capacity: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``hidden_states``, routing map, probabilities ``[tokens, experts]`` and the gradient of the output."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS[rank], 1, HIDDEN, generator=generator)
    chosen = torch.rand(TOKENS[rank], EXPERTS, generator=generator).topk(TOP_K, dim=1)
    probs = torch.zeros(TOKENS[rank], EXPERTS).scatter(1, chosen.indices, chosen.values)
    if capacity:  # some pairs are dropped
        probs = torch.where(torch.rand(probs.shape, generator=generator) < 0.3, 0, probs)
    grad = torch.randn(x.shape, generator=generator)
    return x.to(device), (probs > 0).to(device), probs.to(device), grad.to(device)


def expert_weights(device: torch.device) -> Tensor:
    return (torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(99)) / 6).to(device)


def dispatched(dispatcher: Any, rank: int, capacity: bool, device: torch.device) -> list[Tensor]:
    """Output and gradients of a layer of small experts, in the steps of Megatron's ``MoELayer``."""
    x, routing_map, probs, grad = rank_inputs(rank, capacity, device)
    x.requires_grad_(), probs.requires_grad_()
    weights = expert_weights(device)[rank * EXPERTS // 2 :][: EXPERTS // 2].requires_grad_()
    hidden, sent_probs = dispatcher.dispatch_preprocess(x, routing_map, probs)
    hidden, sent_probs = dispatcher.token_dispatch(hidden, sent_probs)
    rows, per_expert, row_probs = dispatcher.dispatch_postprocess(hidden, sent_probs)
    parts = zip(rows.split(per_expert.tolist()), weights, strict=True)
    out = torch.cat([(part @ weight).tanh() for part, weight in parts]) * row_probs[:, None]
    out = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(out)))
    out.backward(grad)
    return [t.detach().cpu() for t in (out, x.grad, probs.grad * routing_map, weights.grad)]


def expected(rank: int, capacity: bool) -> list[Tensor]:
    """The same, every expert here."""
    on, weights, results = torch.device("cpu"), expert_weights(torch.device("cpu")).requires_grad_(), []
    for source in range(len(TOKENS)):
        x, routing_map, probs, grad = rank_inputs(source, capacity, on)
        x.requires_grad_(), probs.requires_grad_()
        out = (torch.einsum("tbh,ehg->tbeg", x, weights).tanh() * probs[:, None, :, None]).sum(2)
        out.backward(grad)
        results.append([out.detach(), x.grad, probs.grad * routing_map])
    return [*results[rank], weights.grad[rank * EXPERTS // 2 :][: EXPERTS // 2]]


def _flex(rank: int, world: int, device: str, capacity: bool) -> list[str]:
    os.environ["EP_MOE_COMM"] = "portable" if device == "cpu" else "auto"
    torch.compiler.set_stance("force_eager")
    from ep_moe.compat import install

    install()
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoEFlexTokenDispatcher
    from megatron_models import expert_parallel, transformer_config

    on, problems = rank_device(device, rank), []
    settings = {"hidden_size": HIDDEN, "num_moe_experts": EXPERTS, "moe_router_topk": TOP_K}
    settings["moe_expert_capacity_factor"] = 1.0 if capacity else None
    local = list(range(rank * EXPERTS // world, (rank + 1) * EXPERTS // world))
    with expert_parallel(world):
        config = transformer_config(
            moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="deepep", moe_enable_deepep=False, **settings
        )
        groups = get_default_pg_collection()
        wanted = {"dense": expected(rank, capacity)}
        if device == "cuda":
            oracle = MoEAlltoAllTokenDispatcher(len(local), local, transformer_config(**settings), groups)
            wanted["all-to-all"] = dispatched(oracle, rank, capacity, on)
        for turn in range(2):  # the buffer is made anew if it is too small, and used again if not
            got = dispatched(MoEFlexTokenDispatcher(len(local), local, config, groups), rank, capacity, on)
            for name, exact in wanted.items():
                for what, a, b in zip(("out", "x", "probs", "weights"), got, exact, strict=True):
                    if not torch.allclose(a, b, rtol=1e-4, atol=1e-4 if device == "cuda" else 1e-5):
                        problems.append(f"turn {turn}: {what} differs from {name}")
    if sys.modules["deep_ep"].__name__ != "ep_moe.compat.deep_ep":
        problems.append("another deep_ep was used")
    return problems


@pytest.mark.parametrize("capacity", [False, True])
def test_flex_dispatcher(pool: RankPool, capacity: bool) -> None:
    assert pool.run(_flex, "cpu", capacity) == [[], []]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("capacity", [False, True])
def test_flex_dispatcher_equals_all_to_all_dispatcher(capacity: bool) -> None:
    with contextlib.closing(RankPool(2, FROM_NOTHING)) as processes, tempfile.TemporaryDirectory() as folder:
        processes.run(join_over_nccl, f"{folder}/store")
        assert processes.run(_flex, "cuda", capacity) == [[], []]
