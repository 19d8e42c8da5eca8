"""EPMoELayer against a dense oracle: output and every gradient, for any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from communicators import rank_device
from ranks import run_ranks
from torch import Tensor

from ep_moe import EPMoELayer
from ep_moe.config import (
    Config,
    ConfigError,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    PhaseConfig,
    PhasesConfig,
    RouterConfig,
    SharedExpertsConfig,
)

HIDDEN = 32
SOFTMAX = MoEConfig(num_experts=8, top_k=3, experts=ExpertsConfig(ffn_hidden_size=24))
SIGMOID = MoEConfig(
    num_experts=8,
    top_k=2,
    router=RouterConfig(score_function="sigmoid", num_groups=4, group_topk=2, routed_scaling_factor=2.5),
    experts=ExpertsConfig(ffn_hidden_size=16, activation="geglu"),
    shared_experts=SharedExpertsConfig(ffn_hidden_size=40, gate=True),
)


def make_config(moe: MoEConfig, phases: PhasesConfig | None = None, logits: str = "fp64") -> Config:
    moe = replace(moe, router=replace(moe.router, dtype=logits))
    model = ModelConfig(hidden_size=HIDDEN, init_std=0.3)
    return Config(model=model, moe=moe, phases=phases or PhasesConfig())


@dataclass
class RankResult:
    """What one rank reports: its tokens, its output, and parameters with their gradients."""

    x: Tensor
    out: Tensor
    grad_x: Tensor
    upstream: Tensor
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]


def tokens_of(rank: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens ``[sequence, batch, hidden]`` and upstream gradient; another number of sequences on every rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    shape = (5, (2, 0, 3, 1)[rank % 4], HIDDEN)
    x, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(device, dtype), upstream.to(device, dtype)


def _train(rank: int, world: int, config: Config, dtype: torch.dtype, device: str) -> RankResult:
    on = rank_device(device, rank)
    torch.manual_seed(7)
    layer = EPMoELayer(config, dist.group.WORLD, dtype=dtype).to(on)
    x, upstream = tokens_of(rank, dtype, on)
    x.requires_grad_()
    out = layer(x)
    out.backward(upstream)
    assert out.shape == x.shape and out.dtype == dtype and x.grad is not None
    parameters = dict(layer.named_parameters())
    return RankResult(
        *(t.detach().cpu() for t in (x, out, x.grad, upstream)),
        {name: p.detach().cpu() for name, p in parameters.items()},
        {name: p.grad.cpu() for name, p in parameters.items() if p.grad is not None},
    )


def whole(results: list[RankResult], field: str) -> dict[str, Tensor]:
    """Parameters or gradients of the whole layer: experts concatenated over ranks, others equal or summed."""
    values = [getattr(result, field) for result in results]
    out = {}
    for name in values[0]:
        if name.startswith("experts."):
            out[name] = torch.cat([value[name] for value in values]).double()
        elif field == "gradients":
            out[name] = sum(value[name].double() for value in values)  # type: ignore[assignment]
        else:
            assert all(torch.equal(value[name], values[0][name]) for value in values), f"{name} differs between ranks"
            out[name] = values[0][name].double()
    return out


def dense(x: Tensor, w: dict[str, Tensor], moe: MoEConfig) -> Tensor:
    """The layer in plain fp64 math on all tokens at once."""
    logits, router = x @ w["router.weight"].T, moe.router
    if router.score_function == "softmax":
        values, idx = logits.topk(moe.top_k, dim=-1)
        weights = values.softmax(-1)
    else:
        scores = logits.sigmoid()
        per_group = scores.view(-1, router.num_groups, moe.num_experts // router.num_groups)
        best = per_group.topk(moe.top_k // router.group_topk, dim=-1).values.sum(-1).topk(router.group_topk).indices
        mask = torch.zeros_like(per_group).scatter(1, best[..., None].expand(-1, -1, per_group.shape[2]), 1)
        idx = scores.masked_fill(mask.view_as(scores) == 0, -1).topk(moe.top_k).indices
        weights = scores.gather(1, idx)
        weights = weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor
    gate = {"swiglu": F.silu, "geglu": F.gelu}[moe.experts.activation]

    def ffn(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        left, right = (x @ fc1.T).chunk(2, dim=-1)
        return (gate(left) * right) @ fc2.T

    out = torch.zeros_like(x)
    for expert in range(moe.num_experts):
        weight = (weights * (idx == expert)).sum(-1, keepdim=True)
        out = out + weight * ffn(x, w["experts.fc1_weight"][expert], w["experts.fc2_weight"][expert])
    if moe.shared_experts.ffn_hidden_size:
        scale = torch.sigmoid(x @ w["shared_experts.gate_weight"].T)
        out = out + scale * ffn(x, w["shared_experts.fc1_weight"], w["shared_experts.fc2_weight"])
    return out


def check_against_dense(results: list[RankResult], moe: MoEConfig, tolerance: float) -> None:
    """Compare outputs and all gradients by ``|difference| / |oracle|``."""
    weights = {name: value.requires_grad_() for name, value in whole(results, "parameters").items()}
    x = torch.cat([result.x.double().view(-1, HIDDEN) for result in results]).requires_grad_()
    upstream = torch.cat([result.upstream.double().view(-1, HIDDEN) for result in results])
    out = dense(x, weights, moe)
    out.backward(upstream)
    got = {
        "out": torch.cat([result.out.double().view(-1, HIDDEN) for result in results]),
        "x": torch.cat([result.grad_x.double().view(-1, HIDDEN) for result in results]),
        **whole(results, "gradients"),
    }
    want: dict[str, Any] = {"out": out, "x": x.grad, **{name: value.grad for name, value in weights.items()}}
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.linalg.norm(got[name] - value) <= tolerance * torch.linalg.norm(value), name


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("moe", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_output_and_gradients_match_dense(ranks: int, moe: MoEConfig, dtype: torch.dtype, tolerance: float) -> None:
    config = make_config(moe)
    check_against_dense(run_ranks(ranks, _train, config, dtype, "cpu"), moe, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("overlap", [(), ("shared_experts",)], ids=["plain", "overlap"])
@pytest.mark.parametrize(
    ("comm", "dtype", "tolerance"),
    [("portable", torch.float64, 1e-12), ("portable", torch.bfloat16, 1e-2), ("nvlink", torch.bfloat16, 1e-2)],
)
def test_output_and_gradients_match_dense_gpu(
    ranks: int, overlap: tuple[Any, ...], comm: Any, dtype: torch.dtype, tolerance: float
) -> None:
    config = make_config(replace(SIGMOID, comm=comm), PhasesConfig(train=PhaseConfig(overlap=overlap)))
    check_against_dense(run_ranks(ranks, _train, config, dtype, "cuda"), SIGMOID, tolerance)


def test_experts_do_not_depend_on_how_they_are_spread() -> None:
    config = make_config(SOFTMAX)
    one, four = (whole(run_ranks(n, _train, config, torch.float32, "cpu"), "parameters") for n in (1, 4))
    assert all(torch.equal(one[name], four[name]) for name in one)


def test_runs_are_bitwise_equal() -> None:
    config = make_config(SIGMOID)
    first, second = (run_ranks(4, _train, config, torch.bfloat16, "cpu") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.out, b.out) and all(torch.equal(a.gradients[n], b.gradients[n]) for n in a.gradients)


def _autocast(rank: int, world: int) -> tuple[torch.dtype, torch.dtype, float]:
    torch.manual_seed(7)
    layer = EPMoELayer(make_config(SOFTMAX, logits="fp32"), dist.group.WORLD)
    x = tokens_of(0, torch.float32, torch.device("cpu"))[0]
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.sum().backward()
    assert layer.experts.fc1_weight.grad is not None
    return out.dtype, layer.experts.fc1_weight.grad.dtype, float((out - exact).norm() / exact.norm())


def test_autocast_computes_in_bf16_and_keeps_fp32_parameters() -> None:
    for out, grad, error in run_ranks(2, _autocast):
        assert out == torch.float32 and grad == torch.float32
        assert 1e-4 < error < 2e-2


DECODE = PhaseConfig(dispatch_dtype="input", max_tokens_per_rank=4)


def _phases(rank: int, world: int) -> list[str]:
    layer = EPMoELayer(make_config(SOFTMAX, PhasesConfig(decode=DECODE), logits="fp32"), dist.group.WORLD)
    chosen: list[str] = []
    select = layer._phases._get
    layer._phases._get = lambda name, on: (chosen.append(name), select(name, on))[1]  # type: ignore[method-assign]
    few, many = torch.randn(3, HIDDEN), torch.randn(9, HIDDEN)
    layer(few)
    layer.eval()
    layer(few)
    layer(many)
    layer(many if rank == 0 else few)  # one rank with many tokens takes all to prefill
    with layer.phase("prefill"):
        layer(few)
    layer(few)
    layer.phase("decode")
    try:
        layer(many)
    except ValueError as error:
        chosen.append(str(error))
    layer.phase(None)
    layer(many)
    return chosen


def test_phase_choice() -> None:
    for chosen in run_ranks(2, _phases):
        assert chosen == [
            "train",
            "decode",
            "prefill",
            "prefill",
            "prefill",
            "decode",
            "hidden_states: 9 tokens exceed phases.decode.max_tokens_per_rank (4)",
            "prefill",
        ]


def _errors(rank: int, world: int) -> list[str]:
    config = make_config(SOFTMAX)
    layer = EPMoELayer(config, dist.group.WORLD)
    attempts = [
        lambda: layer(torch.zeros(3, HIDDEN + 1)),
        lambda: layer.phase("decoding"),
        lambda: EPMoELayer(replace(config, moe=replace(SOFTMAX, num_experts=7)), dist.group.WORLD),
        lambda: EPMoELayer(replace(config, moe=replace(SOFTMAX, ep_size=4)), dist.group.WORLD),
    ]
    messages = []
    for attempt in attempts:
        try:
            attempt()
            messages.append("no error")
        except (ValueError, ConfigError) as error:
            messages.append(str(error))
    return messages


def test_errors_name_what_was_given_and_what_is_allowed() -> None:
    shape, name, divide, ep_size = run_ranks(2, _errors)[0]
    assert "(model.hidden_size), got [3, 33]" in shape
    assert name == "phase: expected one of train, prefill, decode or None, got 'decoding'"
    assert divide == "moe.num_experts = 7: must be divisible by the expert-parallel size (2, key moe.ep_size)"
    assert ep_size == "moe.ep_size = 4: must equal the size of the expert-parallel group (2)"


def _nvlink_on_cpu(rank: int, world: int) -> str:
    layer = EPMoELayer(make_config(replace(SOFTMAX, comm="nvlink")), dist.group.WORLD)
    try:
        layer(torch.zeros(3, HIDDEN))
    except ConfigError as error:
        return str(error)
    return ""


def test_nvlink_without_a_gpu_says_what_is_missing() -> None:
    for message in run_ranks(2, _nvlink_on_cpu):
        assert message == "moe.comm = nvlink: the tokens are on cpu, kernels need a CUDA GPU"


def test_without_a_process_group_the_error_says_what_to_call() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        EPMoELayer(make_config(SOFTMAX))
