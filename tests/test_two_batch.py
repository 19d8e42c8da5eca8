"""Two micro-batches in turns: the same bits as one after the other, and who computes while whose rows travel."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from communicators import rank_device
from ranks import run_ranks
from torch import Tensor, nn

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
from ep_moe.tracing import trace
from ep_moe.two_batch import Steps, two_batch

HIDDEN, TOKENS, LAYERS = 256, 8, 3
DEVICES = [
    pytest.param("cpu", "portable", torch.float32, id="portable-cpu"),
    pytest.param("cuda", "portable", torch.bfloat16, id="portable-cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "nvlink", torch.bfloat16, id="nvlink", marks=pytest.mark.gpu),
]


class Model(nn.Module):
    """Attention and MoE layers in turn, as a plain loop and as one in steps."""

    def __init__(self, rank: int, device: str, comm: Any, dtype: torch.dtype, dispatch_dtype: Any) -> None:
        super().__init__()
        decode = PhaseConfig(mode="low_latency", dispatch_dtype=dispatch_dtype, max_tokens_per_rank=TOKENS)
        config = Config(
            model=ModelConfig(hidden_size=HIDDEN, init_std=0.1),
            moe=MoEConfig(
                num_experts=8,
                top_k=3,
                comm=comm,
                experts=ExpertsConfig(ffn_hidden_size=128),
                shared_experts=SharedExpertsConfig(ffn_hidden_size=64),
            ),
            phases=PhasesConfig(prefill=PhaseConfig(dispatch_dtype=dispatch_dtype), decode=decode),
        )
        on = rank_device(device, rank)
        torch.manual_seed(3)
        self.mixers = nn.ModuleList(
            nn.Linear(HIDDEN, 3 * HIDDEN, device=on, dtype=dtype, bias=False) for _ in range(LAYERS)
        )
        self.moes = nn.ModuleList(EPMoELayer(config, dist.group.WORLD, device=on, dtype=dtype) for _ in range(LAYERS))
        self.eval()
        self.calls: list[str] = []

    def attention(self, mixer: nn.Module, x: Tensor, name: str) -> Tensor:
        self.calls.append(f"{name}: attention")
        if x.numel() == 0:  # which attention on a GPU refuses
            return x
        query, key, value = mixer(x).view(*x.shape[:-1], 3, 4, HIDDEN // 4).permute(2, 1, 3, 0, 4)
        return F.scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        for mixer, moe in zip(self.mixers, self.moes, strict=True):
            x = x + self.attention(mixer, x, "")
            x = x + moe(x)
        return x

    def steps(self, x: Tensor, name: str = "") -> Steps[Tensor]:
        for mixer, moe in zip(self.mixers, self.moes, strict=True):
            x = x + self.attention(mixer, x, name)
            x = x + (yield from moe.forward_steps(x))
        return x

    def set_phase(self, name: str) -> None:
        for moe in self.moes:
            moe.phase(name)


def batches_of(rank: int, seed: int, like: Tensor) -> list[Tensor]:
    """Two micro-batches ``[sequence, batch, hidden]`` of random tokens, of other sizes on every rank, also empty."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    sizes = ((4, 2), (3, (rank + seed) % 3)) if seed % 2 else ((2, (rank + seed) % 4), (8, 1))
    return [torch.randn(*size, HIDDEN, generator=generator).to(like.device, like.dtype) for size in sizes]


def _in_turns(
    rank: int, world: int, device: str, comm: str, dtype: torch.dtype, phase: str, dispatch_dtype: str
) -> list[bool]:
    model = Model(rank, device, comm, dtype, dispatch_dtype)
    model.set_phase(phase)
    same = []
    with torch.no_grad():
        for seed in range(6):
            first, second = batches_of(rank, seed, model.mixers[0].weight)
            alone = model(first), model(second)
            in_turns = two_batch(model.steps(first), model.steps(second))
            same += [torch.equal(a, b) for a, b in zip(alone, in_turns, strict=True)]
    return same


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("device", "comm", "dtype"), DEVICES)
@pytest.mark.parametrize("dispatch_dtype", ["input", "fp8"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_turns_change_no_bit(
    ranks: int, device: str, comm: str, dtype: torch.dtype, dispatch_dtype: str, phase: str
) -> None:
    if phase == "decode" and (device, comm) == ("cuda", "portable"):
        pytest.skip("decode over torch.distributed is tested on CPUs")
    for same in run_ranks(ranks, _in_turns, device, comm, dtype, phase, dispatch_dtype):
        assert same and all(same)


def _order(rank: int, world: int, phase: str) -> list[str]:
    """What the host issues, in order; ``start`` and ``end`` of exchanges are those of the dispatcher."""
    model = Model(rank, "cpu", "portable", torch.float32, "input")
    model.set_phase(phase)
    first, second = batches_of(rank, 0, model.mixers[0].weight)
    names = {len(first.flatten(0, 1)): "A", len(second.flatten(0, 1)): "B"}
    assert len(names) == 2
    for moe in model.moes:
        dispatcher = moe._phases._get(phase, first.device)[0]
        for kind in ("dispatch", "combine"):
            record(dispatcher, kind, model.calls, names)
    with torch.no_grad():
        two_batch(model.steps(first, "A"), model.steps(second, "B"))
    return model.calls


def record(dispatcher: Any, kind: str, calls: list[str], names: dict[int, str]) -> None:
    """Note in ``calls`` when ``dispatcher`` starts and ends an exchange of ``kind``, and whose it is."""
    start = getattr(dispatcher, f"start_{kind}")

    def started(x: Tensor, other: Any, *rest: Tensor) -> Any:
        # A dispatch is told by its tokens, a combine by the name its dispatch left in the handle.
        name = names[len(x)] if kind == "dispatch" else names[id(other)]
        calls.append(f"{name}: start {kind}")
        finish = start(x, other, *rest)

        def ended() -> Any:
            calls.append(f"{name}: end {kind}")
            result = finish()
            if kind == "dispatch":
                names[id(result.handle)] = name
                keep.append(result.handle)
            return result

        return ended

    keep: list[Any] = []  # so that no two handles have one id
    setattr(dispatcher, f"start_{kind}", started)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_one_computes_while_rows_of_the_other_travel(phase: str) -> None:
    (calls,) = run_ranks(1, _order, phase)
    layer = [
        ["A: attention", "A: start dispatch"],
        ["B: attention", "B: start dispatch"],
        ["A: end dispatch", "A: start combine"],
        ["B: end dispatch", "B: start combine"],
        ["A: end combine"],
        ["B: end combine"],
    ]
    # The end of a layer and the start of the next are one turn.
    turns = layer[:4]
    for _ in range(LAYERS - 1):
        turns += [layer[4] + layer[0], layer[5] + layer[1], *layer[2:4]]
    turns += layer[4:]
    assert calls == [call for turn in turns for call in turn]


def _traced(rank: int, world: int, phase: str, path: str) -> None:
    model = Model(rank, "cpu", "portable", torch.float32, "input")
    model.set_phase(phase)
    first, second = (batch.requires_grad_() for batch in batches_of(rank, 0, model.mixers[0].weight))
    with torch.no_grad(), trace(path, model):
        two_batch(model.steps(first), model.steps(second))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_steps_have_ranges(phase: str, tmp_path: Path) -> None:
    run_ranks(1, _traced, phase, str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for stage in ("route", "dispatch", "dispatch end", "experts", "combine", "combine end"):
        assert all(names.count(f"moes.{layer} {stage}") == 2 for layer in range(LAYERS))


def _gradients(rank: int, world: int, phase: str) -> str:
    model = Model(rank, "cpu", "portable", torch.float32, "input")
    model.set_phase(phase)
    first, second = batches_of(rank, 0, model.mixers[0].weight)
    try:
        two_batch(model.steps(first), model.steps(second))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("phase", "message"), [("prefill", "forward_steps computes no gr"), ("decode", "low_latency mode computes no gr")]
)
def test_gradients_are_refused(phase: str, message: str) -> None:
    assert message in run_ranks(1, _gradients, phase)[0]


def test_an_error_of_one_closes_the_other() -> None:
    closed = []

    def fails() -> Generator[None, None, int]:
        yield
        raise ValueError("first")

    def waits() -> Generator[None, None, int]:
        try:
            yield
            yield
        finally:
            closed.append(True)
        return 1

    with pytest.raises(ValueError, match="first"):
        two_batch(fails(), waits())
    assert closed == [True]


def test_computations_of_different_length() -> None:
    def counts(steps: int) -> Generator[None, None, int]:
        for _ in range(steps):
            yield
        return steps

    assert two_batch(counts(0), counts(3)) == (0, 3)
    assert two_batch(counts(5), counts(2)) == (5, 2)


def _captured(rank: int, world: int) -> list[bool]:
    """A decode step of two micro-batches in one CUDA graph, with other tokens at every replay."""
    model = Model(rank, "cuda", "nvlink", torch.bfloat16, "fp8")
    model.set_phase("decode")
    on = model.mixers[0].weight
    batches = [torch.zeros(1, TOKENS // 2 * (place + 1), HIDDEN, device=on.device, dtype=on.dtype) for place in (0, 1)]

    def step() -> tuple[Tensor, Tensor]:
        first, second = (model.steps(batch) for batch in batches)
        return two_batch(first, second)

    same = []
    with torch.no_grad():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for seed in range(10):
            generator = torch.Generator().manual_seed(100 * seed + rank)
            for batch in batches:
                batch.copy_(torch.randn(batch.shape, generator=generator))
            graph.replay()
            replayed = [result.clone() for result in results]
            alone = [model(batch) for batch in batches]
            same += [torch.equal(a, b) for a, b in zip(replayed, alone, strict=True)]
    return same


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_two_batches_can_be_captured(ranks: int) -> None:
    for same in run_ranks(ranks, _captured):
        assert same and all(same)
