"""Gradient synchronisation and clipping against one process that sees all tokens and holds all experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, subgroup
from torch import Tensor, nn

from ep_moe.data_parallel import _make_buckets, clip_grad_norm, sync_gradients

WORLD, HIDDEN, EXPERTS, TOKENS = 4, 6, 8, 10


def parameters_of(experts: range, sharded: bool) -> dict[str, nn.Parameter]:
    """Shared and expert weights; the same values for any division of the experts."""
    generator = torch.Generator().manual_seed(0)
    values = {
        "shared": torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64),
        "bias": torch.randn(HIDDEN, generator=generator),
        "unused": torch.randn(3, generator=generator),
        "fc1": torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator)[experts.start : experts.stop],
        "fc2": torch.randn(EXPERTS, HIDDEN, generator=generator, dtype=torch.float64)[experts.start : experts.stop],
    }
    parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    for name in ("fc1", "fc2"):
        parameters[name].allreduce = not sharded  # type: ignore[attr-defined]
    return parameters


def loss_of(parameters: dict[str, nn.Parameter], experts: range, rank: int, used: int) -> Tensor:
    """Mean over the tokens of ``rank``, each through one of the first ``used`` experts, counting ``experts`` only.

    Rank 1 passes by the bias, as a layer that is used on some ranks only.
    """
    generator = torch.Generator().manual_seed(10 + rank)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    chosen = torch.randint(used, (TOKENS,), generator=generator)
    h = (x @ parameters["shared"]).tanh()
    if rank != 1:
        h = h + parameters["bias"]
    total = h.sum() if experts.start == 0 else torch.zeros((), dtype=torch.float64)
    for local, expert in enumerate(experts):
        if (chosen == expert).any():
            rows = (h[chosen == expert] @ parameters["fc1"][local].double()).tanh()
            total = total + (rows * parameters["fc2"][local]).sum()
    return total / TOKENS


def expected_gradients(used: int) -> dict[str, Tensor]:
    experts = range(EXPERTS)
    parameters = parameters_of(experts, sharded=False)
    (sum(loss_of(parameters, experts, rank, used) for rank in range(WORLD)) / WORLD).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}


def rank_gradients(
    rank: int, world_size: int, ep_size: int, used: int, bucket_bytes: int, max_norm: float
) -> dict[str, Any]:
    """What a dispatcher's backward leaves: experts have the gradients of their group's tokens, the rest its own."""
    expert_group, expert_data_group = subgroup(world_size, ep_size)
    place, first_rank = rank % ep_size, rank - rank % ep_size
    share = EXPERTS // ep_size
    experts = range(place * share, (place + 1) * share)
    parameters = parameters_of(experts, sharded=ep_size > 1)
    expert_weights = [parameters["fc1"], parameters["fc2"]]
    for source in range(first_rank, first_rank + ep_size):
        loss = loss_of(parameters, experts, source, used)
        if loss.requires_grad:
            loss.backward(inputs=[p for p in expert_weights if p.requires_grad])
    # All experts, for the gradient that the dispatcher brings back to this rank's own tokens.
    whole = parameters_of(range(EXPERTS), sharded=False)
    loss_of(whole, range(EXPERTS), rank, used).backward()
    for name in ("shared", "bias", "unused"):
        parameters[name].grad = whole[name].grad
    missing = sorted(name for name, p in parameters.items() if p.grad is None)

    sync_gradients(parameters.values(), dist.group.WORLD, expert_data_group, bucket_bytes)
    gradients = {name: p.grad.clone() for name, p in parameters.items()}
    norm = clip_grad_norm(parameters.values(), max_norm, expert_group)
    clipped = {name: p.grad for name, p in parameters.items()}
    return {"experts": experts, "missing": missing, "gradients": gradients, "norm": norm, "clipped": clipped}


def total_norm(gradients: dict[str, Tensor]) -> float:
    return sum(g.double().square().sum().item() for g in gradients.values()) ** 0.5


@pytest.mark.parametrize("bucket_bytes", [1, 400, 25 * 1024**2])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_ranks_equal_one_process(ep_size: int, bucket_bytes: int) -> None:
    expected = expected_gradients(used=EXPERTS)
    norm = total_norm(expected)
    results = run_ranks(WORLD, rank_gradients, ep_size, EXPERTS, bucket_bytes, norm / 2)
    for rank, result in enumerate(results):
        for name, gradient in result["gradients"].items():
            wanted = expected[name]
            if name in ("fc1", "fc2"):
                wanted = wanted[result["experts"].start : result["experts"].stop]
            torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(result["clipped"][name], wanted / 2, rtol=1e-5, atol=1e-7)
            # Bit by bit the same on every rank that holds the parameter.
            holder = results[rank % ep_size] if name in ("fc1", "fc2") else results[0]
            assert torch.equal(gradient, holder["gradients"][name])
            assert torch.equal(result["clipped"][name], holder["clipped"][name])
        assert result["norm"].dtype == torch.float32 and result["norm"].item() == pytest.approx(norm, rel=1e-6)
        assert torch.equal(result["norm"], results[0]["norm"])


@pytest.mark.parametrize("ep_size", [2, 4])
def test_gradients_missing_on_some_ranks_count_as_zero(ep_size: int) -> None:
    # Only the first two experts are used: the ranks that hold others have no expert gradient at all.
    expected = expected_gradients(used=2)
    results = run_ranks(WORLD, rank_gradients, ep_size, 2, 400, 0.0)
    assert "fc1" in results[1]["missing"] and "fc1" not in results[0]["missing"]
    assert "bias" in results[1]["missing"] and "bias" not in results[0]["missing"]
    assert all("unused" in result["missing"] for result in results)
    for result in results:
        span = slice(result["experts"].start, result["experts"].stop)
        for name, gradient in result["gradients"].items():
            wanted = expected[name][span] if name in ("fc1", "fc2") else expected[name]
            torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
            assert torch.equal(result["clipped"][name], gradient)  # 0 measures only
        assert result["norm"].item() == pytest.approx(total_norm(expected), rel=1e-6)


def test_one_process_without_groups() -> None:
    used, unused, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), False)
    used.grad = torch.tensor([0.0, 3.0, 4.0])
    sync_gradients([used, unused, frozen], None, None)
    assert used.grad.tolist() == [0.0, 3.0, 4.0] and frozen.grad is None
    assert unused.grad is not None and unused.grad.tolist() == [0.0, 0.0]
    assert clip_grad_norm([used, unused, frozen], 1.0, None).item() == 5.0
    torch.testing.assert_close(used.grad, torch.tensor([0.0, 0.6, 0.8]))
    assert clip_grad_norm([used, unused, frozen], 10.0, None).item() == pytest.approx(1.0)
    torch.testing.assert_close(used.grad, torch.tensor([0.0, 0.6, 0.8]))


def test_norm_of_narrow_and_large_values() -> None:
    narrow, large = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)), nn.Parameter(torch.ones(1))
    narrow.grad, large.grad = torch.full_like(narrow, 0.5), torch.full_like(large, 1e30)
    assert clip_grad_norm([narrow], 1.0, None).item() == pytest.approx(250**0.5, rel=1e-6)
    assert narrow.grad.dtype == torch.bfloat16
    assert clip_grad_norm([large], 0.0, None).item() == pytest.approx(1e30)
    large.grad = torch.tensor([float("nan")])
    assert clip_grad_norm([narrow, large], 1.0, None).isnan()
    with pytest.raises(ValueError, match="parameters: expected at least one"):
        clip_grad_norm([], 1.0, None)


def non_contiguous_gradient(rank: int, world_size: int) -> tuple[Tensor, bool]:
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = (torch.arange(6.0).view(3, 2) + rank).t()
    before = weight.grad
    sync_gradients([weight], dist.group.WORLD, None)
    assert weight.grad is before
    return weight.grad, weight.grad.is_contiguous()


def test_layout_of_gradients_is_kept() -> None:
    for gradient, contiguous in run_ranks(WORLD, non_contiguous_gradient):
        assert not contiguous
        torch.testing.assert_close(gradient, torch.arange(6.0).view(3, 2).t() + 1.5)


def test_buckets_are_of_one_kind_and_limited() -> None:
    shapes = [(100, torch.float32, True), (100, torch.float32, False), (60, torch.bfloat16, True)] * 3
    parameters = []
    for numel, dtype, shared in shapes:
        parameters.append(nn.Parameter(torch.zeros(numel, dtype=dtype)))
        parameters[-1].allreduce = shared  # type: ignore[attr-defined]
    buckets = _make_buckets(parameters, 800)
    assert [(b.is_expert, b.parameters[0].dtype, len(b.parameters)) for b in buckets] == [
        (False, torch.float32, 2),
        (True, torch.float32, 2),
        (False, torch.bfloat16, 3),
        (False, torch.float32, 1),
        (True, torch.float32, 1),
    ]
