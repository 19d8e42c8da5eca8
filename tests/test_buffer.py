"""The simple ``Buffer``: the published pieces of code, gradients, the example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from communicators import DEEP_EP_DEVICES, use_deep_ep
from ranks import run_ranks
from routing_cases import Case, make_inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ep_moe import Buffer

CASE = Case(tokens=(11, 6), num_experts=8, top_k=3, hidden=128, pattern="some_unrouted")


def matrices() -> Tensor:
    """Of all experts, ``[experts, hidden, hidden]``."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(CASE.num_experts, CASE.hidden, CASE.hidden, generator=generator) / CASE.hidden**0.5


def local_experts(rows: Tensor, topk_idx: Tensor, topk_weights: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of each row's experts, those of ``weights``, in plain PyTorch."""
    every = torch.einsum("th,ehg->teg", rows, weights).tanh()
    chosen = every.gather(1, topk_idx.clamp(min=0)[..., None].expand(-1, -1, rows.shape[1]))
    return (chosen * torch.where(topk_idx >= 0, topk_weights, 0)[..., None]).sum(1)


def _published_normal(rank: int, world: int, device: str) -> list[str]:
    on, group = use_deep_ep(device, rank), dist.group.WORLD
    x, topk_idx, topk_weights = (t.to(on) for t in make_inputs(CASE, rank))
    num_experts, hidden_bytes = CASE.num_experts, x.shape[1] * 2
    mine = matrices()[rank * 4 : rank * 4 + 4].to(on).requires_grad_()
    x.requires_grad_(), topk_weights.requires_grad_()

    _buffer = Buffer(group, hidden_bytes, hidden_bytes)
    recv_x, recv_topk_idx, recv_topk_weights, handle, _event = _buffer.dispatch(x, topk_idx, topk_weights, num_experts)

    y = local_experts(recv_x, recv_topk_idx, recv_topk_weights, mine)
    out, _ = _buffer.combine(y, handle)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(rank)).to(on)
    out.backward(grad)
    got = [t.detach().cpu() for t in (out, x.grad, topk_weights.grad, mine.grad)]

    weights = matrices().requires_grad_()
    wanted: list[Tensor] = []
    for source in range(world):
        x, topk_idx, topk_weights = make_inputs(CASE, source)
        x.requires_grad_(), topk_weights.requires_grad_()
        out = local_experts(x, topk_idx, topk_weights, weights)
        out.backward(torch.randn(x.shape, generator=torch.Generator().manual_seed(source)))
        if source == rank:
            wanted = [out.detach(), x.grad, topk_weights.grad]
    wanted.append(weights.grad[rank * 4 : rank * 4 + 4])
    names = ("out", "x", "topk_weights", "experts")
    tolerance = 1e-5 if device == "cpu" else 1e-3  # GPUs may use tf32
    pairs = zip(names, got, wanted, strict=True)
    return [name for name, a, b in pairs if not torch.allclose(a, b, rtol=tolerance, atol=tolerance)]


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_published_normal_mode(device: str) -> None:
    assert run_ranks(2, _published_normal, device) == [[], []]


def _recomputed(rank: int, world: int, device: str) -> list[bool]:
    """Three layers on one buffer, so that several handles are alive until the backward pass."""
    on, buffer = use_deep_ep(device, rank), Buffer(dist.group.WORLD)
    x, topk_idx, topk_weights = (t.to(on) for t in make_inputs(CASE, rank))
    mine = matrices()[rank * 4 : rank * 4 + 4].to(on)

    def layer(x: Tensor, topk_weights: Tensor) -> Tensor:
        recv_x, recv_topk_idx, recv_topk_weights, handle, _ = buffer.dispatch(x, topk_idx, topk_weights, 8)
        out, _ = buffer.combine(local_experts(recv_x, recv_topk_idx, recv_topk_weights, mine), handle)
        return x + out

    results = []
    for recompute in (False, True):
        leaves = [x.clone().requires_grad_(), topk_weights.clone().requires_grad_()]
        hidden = leaves[0]
        for _ in range(3):
            hidden = (
                checkpoint(layer, hidden, leaves[1], use_reentrant=False) if recompute else layer(hidden, leaves[1])
            )
        hidden.square().sum().backward()
        results.append([hidden.detach(), leaves[0].grad, leaves[1].grad])
    return [torch.equal(plain, again) for plain, again in zip(*results, strict=True)]


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_recompute_changes_nothing(device: str) -> None:
    assert run_ranks(2, _recomputed, device) == [[True] * 3] * 2


def _only_weights(rank: int, world: int, device: str) -> list[bool]:
    on, buffer = use_deep_ep(device, rank), Buffer(dist.group.WORLD)
    x, topk_idx, topk_weights = (t.to(on) for t in make_inputs(CASE, rank))
    topk_weights.requires_grad_()
    _, _, recv_topk_weights, *_ = buffer.dispatch(x, topk_idx, topk_weights, CASE.num_experts)
    recv_topk_weights.sum().backward()
    got = topk_weights.grad
    try:
        buffer.dispatch(x, topk_idx, None, CASE.num_experts)  # type: ignore[arg-type]
        message = ""
    except ValueError as error:
        message = str(error)
    return [torch.equal(got, (topk_idx >= 0).float()), message.startswith("topk_weights: expected a tensor")]


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_weights_of_experts_elsewhere_take_no_gradient(device: str) -> None:
    assert run_ranks(2, _only_weights, device) == [[True, True]] * 2


def _published_low_latency(rank: int, world: int, device: str, hooks: bool) -> bool:
    on, group = use_deep_ep(device, rank), dist.group.WORLD
    x, topk_idx, topk_weights = (t.to(on) for t in make_inputs(CASE, rank))
    hidden_states = x.bfloat16()
    num_max_tokens, hidden, num_experts = 16, x.shape[1], CASE.num_experts

    _buffer = Buffer(group, 0, num_max_tokens * hidden * num_experts, low_latency_mode=True)
    if hooks:
        arrived = _buffer.low_latency_dispatch(
            hidden_states, topk_idx, num_max_tokens, num_experts, return_recv_hook=True
        )
        recv_hidden_states, recv_expert_count, handle, event, hook = arrived
    else:
        recv_hidden_states, recv_expert_count, handle, event, hook = _buffer.low_latency_dispatch(
            hidden_states, topk_idx, num_max_tokens, num_experts
        )
    hook()
    event.current_stream_wait()

    assert isinstance(recv_hidden_states, Tensor) and recv_expert_count.shape == (4,)
    factors = torch.arange(rank * 4 + 1, rank * 4 + 5, device=on)[:, None, None]
    combined, _, hook = _buffer.low_latency_combine(
        recv_hidden_states * factors, topk_idx, topk_weights, handle, return_recv_hook=hooks
    )
    hook()
    _buffer.destroy()
    exact = hidden_states.double() * ((topk_idx + 1) * topk_weights.double()).sum(1, keepdim=True)
    return bool(((combined - exact).abs() <= 2**-6 * exact.abs() + 1e-6).all())


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
@pytest.mark.parametrize("hooks", [False, True])
def test_published_low_latency_mode(device: str, hooks: bool) -> None:
    assert run_ranks(2, _published_low_latency, device, hooks) == [True, True]


def test_example_learns() -> None:
    example = Path(__file__).resolve().parent.parent / "examples" / "buffer.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(example)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "EP_MOE_COMM": "portable"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    difference = float(re.findall(r"at most ([\d.]+)", done.stdout)[0])
    assert losses[-1] < losses[0] / 3 and difference < 0.1
