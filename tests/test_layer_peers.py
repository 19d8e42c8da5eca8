"""What ``benchmarks/layer.py`` holds our layer against computes the same, and its parts are what they say."""

from __future__ import annotations

import contextlib
import math
import tempfile
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from communicators import rank_device
from ranks import RankPool, join_over_nccl, run_ranks
from torch import Tensor

from ep_moe import EPMoELayer
from ep_moe.comm import PortableCommunicator
from ep_moe.config import Config, ExpertsConfig, ModelConfig, MoEConfig, SharedExpertsConfig
from layer_parts import computation_alone, exchanges_alone, hidden_part
from layer_peers import PEERS, PeerMissing, megatron, weights_of
from layer_table import HEADER, Line, draw, format_line

HIDDEN, FFN, EXPERTS, TOP_K, TOKENS = 32, 24, 8, 3, 40
CPU = torch.device("cpu")
EXCHANGES = ("dispatch", "combine", "dispatch_cached", "combine_weights")


def make_layer(shared: int = 0, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> EPMoELayer:
    moe = MoEConfig(
        num_experts=EXPERTS,
        top_k=TOP_K,
        comm="portable",
        experts=ExpertsConfig(ffn_hidden_size=FFN),
        shared_experts=SharedExpertsConfig(ffn_hidden_size=shared),
    )
    torch.manual_seed(7)
    config = Config(model=ModelConfig(hidden_size=HIDDEN, init_std=0.3), moe=moe)
    return EPMoELayer(config, dist.group.WORLD, dtype=dtype).to(device)


def tokens_of(rank: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Tokens and the gradient of the result, each ``[TOKENS, HIDDEN]``."""
    torch.manual_seed(100 + rank)
    x, grad = (torch.randn(TOKENS, HIDDEN).to(device, dtype) for _ in range(2))
    return x.requires_grad_(), grad


def take_gradients(leaves: Any) -> list[Tensor]:
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return gradients


def _both(
    rank: int, world: int, name: str, device: str, dtype: torch.dtype
) -> tuple[str, dict[str, tuple[Tensor, Tensor]]]:
    """Of our layer and of a peer with the same weights: outputs and all gradients."""
    on = rank_device(device, rank)
    with contextlib.ExitStack() as stack:
        if name == "megatron":
            from megatron_cuda import cuda_for_megatron
            from megatron_models import expert_parallel

            stack.enter_context(expert_parallel(world))
            stack.enter_context(cuda_for_megatron(on))
        layer = make_layer(device=on, dtype=dtype)
        weights = weights_of(layer)
        peer = PEERS[name](weights, TOP_K, dist.group.WORLD)
        x, grad = tokens_of(rank, on, dtype)
        out = layer(x)
        out.backward(grad)
        ours = [out.detach(), *take_gradients((x, weights.router, weights.fc1, weights.fc2))]
        out = peer.run(x)
        assert out.shape == x.shape
        out.backward(grad)
        of_x, of_router, *of_experts = take_gradients((x, *peer.parameters))
        if peer.experts == "SequentialMLP":
            of_experts = [torch.stack(of_experts[place::2]) for place in range(2)]
        theirs = [out.detach(), of_x, of_router, *of_experts]
        names = ["output", "x", "router", "fc1", "fc2"]
        if len(theirs) != len(ours):  # other experts of Megatron's keep their weights in other ways
            del names[3:], ours[3:], theirs[3:]
        pairs = zip((t.float().cpu() for t in ours), (t.float().cpu() for t in theirs), strict=True)
        return peer.experts, dict(zip(names, pairs, strict=True))


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_what_our_layer_does(name: str) -> None:
    if name == "megatron":
        pytest.importorskip("megatron.core")
    for _, values in run_ranks(2, _both, name, "cpu", torch.float32):
        assert len(values) == 5
        for what, (ours, theirs) in values.items():
            assert ours.abs().max() > 0.01, what
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5, msg=lambda text, w=what: f"{w}: {text}")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_what_our_layer_does_over_nccl(name: str) -> None:
    """In bf16, where a token or two may go to other experts: the plain peers round logits to bf16."""
    if name == "megatron":
        pytest.importorskip("megatron.core")
    with contextlib.closing(RankPool(2)) as pool, tempfile.TemporaryDirectory() as folder:
        pool.run(join_over_nccl, f"{folder}/store")
        for _, values in pool.run(_both, name, "cuda", torch.bfloat16):
            for what, (ours, theirs) in values.items():
                assert (theirs - ours).norm() < 0.1 * ours.norm(), what


def test_a_peer_that_is_not_installed_is_named() -> None:
    with (
        mock.patch.dict("sys.modules", {"megatron.core": None}),
        pytest.raises(PeerMissing, match="megatron-core is not installed"),
    ):
        megatron(None, TOP_K, None)  # type: ignore[arg-type]


@contextlib.contextmanager
def counted_calls(layer: EPMoELayer) -> Any:
    """The names of all exchanges that begin meanwhile, and of the layer's modules that run."""
    calls: list[str] = []

    def counted(name: str) -> Any:
        before = getattr(PortableCommunicator, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return before(*args, **kwargs)

        return mock.patch.object(PortableCommunicator, name, call)

    modules = dict(layer.named_children())
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))  # type: ignore[misc]
        for name, module in modules.items()
    ]
    with contextlib.ExitStack() as stack:
        for name in EXCHANGES:
            stack.enter_context(counted(name))
        yield calls
    for hook in hooks:
        hook.remove()


def _calls_of_parts(rank: int, world: int) -> dict[str, list[str]]:
    layer = make_layer(shared=16)
    x, grad = tokens_of(rank)
    exchanges, computation = exchanges_alone(layer, x), computation_alone(layer, x)
    found = {}
    for name, call in (
        ("layer", lambda: layer(x).backward(grad)),
        ("exchanges", exchanges.both),
        ("computation", computation.both),
        ("exchanges forward", lambda: exchanges.forward()),
    ):
        with counted_calls(layer) as calls:
            call()
        found[name] = sorted(calls)
        if name == "layer":
            found["gradients"] = [n for n, p in layer.named_parameters() if p.grad is None]
            layer.zero_grad(set_to_none=True)
    out, rows, weights = exchanges.forward()
    assert out.shape == x.shape and len(rows) == len(weights)
    topk_weights, experts, shared = computation.forward()
    assert topk_weights.shape == (TOKENS, TOP_K) and experts.shape == rows.shape and shared.shape == x.shape
    assert all(parameter.grad is None for parameter in layer.parameters())
    return found


def test_the_parts_of_a_layer_are_all_it_does() -> None:
    for found in run_ranks(2, _calls_of_parts):
        assert not found["gradients"]
        assert sorted(found["exchanges"] + found["computation"]) == found["layer"]
        assert found["computation"] == ["experts", "router", "shared_experts"]
        assert found["exchanges"].count("combine") == 2 and "dispatch_cached" in found["exchanges"]
        assert found["exchanges forward"] == ["combine", "dispatch"]


def test_hidden_part() -> None:
    assert hidden_part(whole=12.0, computation=10.0, exchanges=4.0) == 0.5
    assert hidden_part(whole=15.0, computation=10.0, exchanges=4.0) == 0
    assert hidden_part(whole=9.0, computation=10.0, exchanges=4.0) == 1
    assert math.isnan(hidden_part(math.nan, 1.0, 1.0))


def test_lines_have_places_in_table_and_picture() -> None:
    line = Line("qwen3_235b", 128, "ep_moe", "native", forward=2.0, both=6.0, gemms_forward=1.0, gemms_both=4.0)
    skipped = replace(line, layer="megatron", forward=math.nan, both=math.nan, skipped="megatron-core is not installed")
    assert len(format_line(line)) == len(HEADER.splitlines()[1])
    assert "|  2.00  1.50 |     -     - |" in format_line(line)
    assert format_line(skipped).endswith("megatron: skipped, megatron-core is not installed")
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    figure = draw([line, skipped], pyplot)
    assert [len(axis.patches) for axis in figure.axes] == [1, 1]
    pyplot.close(figure)
