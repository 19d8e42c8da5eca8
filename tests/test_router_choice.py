"""Which experts a token gets, with which weights: scoring, groups, capacity, jitter, inputs; against fp64 oracles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routers import (
    EXPERTS,
    HIDDEN,
    SCORING,
    TOP_K,
    counts_of,
    make_router,
    select_oracle,
    tokens,
)
from torch import Tensor

from ep_moe.config import RouterConfig
from ep_moe.router import (
    AuxLoss,
    select_experts,
)
from ep_moe.router.capacity import drop_beyond_capacity, expert_capacity
from ep_moe.router.gating import gating_logits
from ep_moe.router.scoring import route


@pytest.mark.parametrize(("top_k", "num_groups", "group_topk"), [(1, 4, 1), (4, 4, 2), (6, 3, 2), (5, 4, 3), (3, 1, 1)])
def test_group_limited_choice(top_k: int, num_groups: int, group_topk: int) -> None:
    scores = torch.randn(30, 12, dtype=torch.float64)
    values, indices = select_experts(scores, top_k, num_groups, group_topk)
    assert indices.tolist() == [select_oracle(row, top_k, num_groups, group_topk) for row in scores.tolist()]
    assert torch.equal(values, scores.gather(1, indices))


@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("scoring", ["softmax", "pre-softmax", "sigmoid"])
def test_weights(scoring: str, top_k: int, factor: float) -> None:
    logits = torch.randn(40, EXPERTS, dtype=torch.float64)
    config = RouterConfig(routed_scaling_factor=factor, **SCORING[scoring])
    topk_idx, weights = route(logits, top_k, config)
    assert topk_idx.tolist() == [sorted(range(EXPERTS), key=lambda e: -row[e])[:top_k] for row in logits.tolist()]
    chosen = logits.gather(1, topk_idx)
    if scoring == "softmax":
        want = chosen.exp() / chosen.exp().sum(1, keepdim=True)
    elif scoring == "pre-softmax":
        want = chosen.exp() / logits.exp().sum(1, keepdim=True)
    else:
        scores = 1 / (1 + (-chosen).exp())
        want = scores / scores.sum(1, keepdim=True) if top_k > 1 else scores
    torch.testing.assert_close(weights, want * factor)
    sums = weights.sum(1) / factor
    if scoring == "softmax" or (scoring == "sigmoid" and top_k > 1) or top_k == EXPERTS:
        torch.testing.assert_close(sums, torch.ones_like(sums))
    else:
        assert (sums < 1).all()


@pytest.mark.parametrize("scoring", list(SCORING))
def test_gradients_of_weights(scoring: str) -> None:
    logits = torch.randn(5, EXPERTS, dtype=torch.float64, requires_grad=True)
    config = RouterConfig(routed_scaling_factor=1.5, **SCORING[scoring])
    assert torch.autograd.gradcheck(lambda t: route(t, TOP_K, config)[1], logits)


def test_gradients_of_gating() -> None:
    x, weight = tokens(5).requires_grad_(), tokens(EXPERTS, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: gating_logits(x, w, torch.float64), (x, weight))
    # Low-precision operands, fp32 product, also under autocast; gradients in the dtypes of the operands.
    low_x, low_weight = (t.detach().bfloat16().requires_grad_() for t in (x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = gating_logits(low_x, low_weight, torch.float32)
    torch.testing.assert_close(logits, low_x.float() @ low_weight.float().T)
    logits.sum().backward()
    assert low_x.grad is not None and low_x.grad.dtype == torch.bfloat16
    assert low_weight.grad is not None and low_weight.grad.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_gating_loses_nothing_to_low_precision_operands(half: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 7168, generator=generator).to("cuda", half) for n in (300, 24))
    exact = x.double() @ weight.double().T
    error = (gating_logits(x, weight, torch.float32).double() - exact).abs().max()
    # That of sums in fp32: operands or results in half precision would be further off.
    assert error <= 2e-6 * 7168**0.5 * exact.abs().max()
    assert gating_logits(x, weight, torch.float32).dtype == torch.float32


@pytest.mark.gpu
def test_gpu_gating_gradients_keep_the_bits_of_fp32() -> None:
    x, weight = (torch.randn(n, 1024, device="cuda").bfloat16().requires_grad_() for n in (700, 24))
    grad = torch.randn(700, 24, device="cuda") * torch.logspace(-20, 4, 24, device="cuda")
    gating_logits(x, weight, torch.float32).backward(grad)
    assert x.grad is not None and weight.grad is not None
    exact_x, exact_weight = grad.double() @ weight.double(), grad.double().T @ x.double()
    # One rounding to bf16, and what 16 bits of the gradient leave open.
    torch.testing.assert_close(x.grad.double(), exact_x, rtol=2**-8, atol=1e-4 * float(grad.abs().max()))
    scale = grad.double().abs().T @ x.double().abs()
    assert ((weight.grad.double() - exact_weight).abs() <= exact_weight.abs() * 2**-8 + scale * 2**-15).all()


def drop_oracle(idx: list[list[int]], weights: list[list[float]], capacity: int, policy: str) -> list[list[int]]:
    """What is left of ``idx`` in plain Python: every expert ranks its tokens and keeps the first ``capacity``."""
    kept = [list(row) for row in idx]
    for expert in {e for row in idx for e in row}:
        rows = [(t, row.index(expert)) for t, row in enumerate(idx) if expert in row]
        if policy == "probs":
            rows.sort(key=lambda place: (-weights[place[0]][place[1]], place[0]))
        for t, k in rows[capacity:]:
            kept[t][k] = -1
    return kept


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, Tensor, Tensor]:
    """A number of experts, a choice without repetition, and weights with many ties."""
    num_experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, num_experts))
    permutations = st.permutations(range(num_experts)).map(lambda p: list(p)[:top_k])
    idx = draw(st.lists(permutations, max_size=12))
    weight = st.sampled_from([0.25, 0.5, 0.75])
    weights = [[draw(weight) for _ in range(top_k)] for _ in idx]
    as_tensor = torch.tensor(idx, dtype=torch.int64).view(len(idx), top_k)
    return num_experts, as_tensor, torch.tensor(weights, dtype=torch.float64).view(len(idx), top_k)


@settings(max_examples=150, deadline=None)
@given(
    routing=routings(), factor=st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.4]), policy=st.sampled_from(["probs", "position"])
)
def test_capacity_oracle(routing: tuple[int, Tensor, Tensor], factor: float, policy: Any) -> None:
    num_experts, idx, weights = routing
    capacity = math.ceil(len(idx) * idx.shape[1] / num_experts * factor)
    assert expert_capacity(len(idx), idx.shape[1], num_experts, factor) == capacity
    kept_idx, kept_weights = drop_beyond_capacity(idx, weights, num_experts, factor, policy)
    assert kept_idx.tolist() == drop_oracle(idx.tolist(), weights.tolist(), capacity, policy)
    assert torch.equal(kept_weights, weights.masked_fill(kept_idx < 0, 0.0))


@settings(max_examples=60, deadline=None)
@given(routing=routings(), policy=st.sampled_from(["probs", "position"]))
def test_nothing_is_dropped_with_room_for_every_token(routing: tuple[int, Tensor, Tensor], policy: Any) -> None:
    num_experts, idx, weights = routing
    factor = num_experts / idx.shape[1]  # room for exactly all tokens
    for larger in (1.0, 1.5):
        kept_idx, kept_weights = drop_beyond_capacity(idx, weights, num_experts, factor * larger, policy)
        assert torch.equal(kept_idx, idx) and torch.equal(kept_weights, weights)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_dropped_assignments_have_no_weight_and_no_gradient(policy: str) -> None:
    x = tokens(64)
    free = make_router(pre_softmax=True)
    limited = make_router(pre_softmax=True, capacity_factor=0.5, drop_policy=policy)
    limited.load_state_dict(free.state_dict())
    want, got = free(x), limited(x)
    dropped = got.topk_idx < 0
    assert 0 < dropped.sum() < dropped.numel()
    assert counts_of(got.topk_idx).max() <= expert_capacity(64, TOP_K, EXPERTS, 0.5)
    assert torch.equal(got.topk_idx[~dropped], want.topk_idx[~dropped])
    assert (got.topk_weights[dropped] == 0).all()
    assert torch.equal(got.topk_weights[~dropped], want.topk_weights[~dropped])  # not renormalised
    (got.topk_weights * 3).sum().backward()
    (want.topk_weights * 3)[~dropped].sum().backward()
    torch.testing.assert_close(limited.weight.grad, free.weight.grad)


def test_jitter_is_bounded_and_only_in_training() -> None:
    seen: list[Tensor] = []

    def attach(activation: Tensor, loss: AuxLoss) -> Tensor:
        seen.append(activation.detach())  # the z-loss is attached to the logits
        return activation

    router, x = make_router(input_jitter=0.1, z_loss_coeff=1.0, attach=attach), tokens(500)
    with torch.no_grad():
        router.weight.copy_(torch.eye(EXPERTS, HIDDEN))
    router(x)
    ratio = seen[0] / x[:, :EXPERTS]
    assert 0.9 - 1e-9 <= ratio.min() < 0.905 and 1.095 < ratio.max() <= 1.1 + 1e-9
    assert abs(float(ratio.mean()) - 1) < 0.01
    router.eval()
    plain = make_router().eval()
    plain.load_state_dict(router.state_dict())
    assert torch.equal(router(x).topk_weights, plain(x).topk_weights)


def test_force_balance_is_even_and_passes_the_gradient() -> None:
    router, x = make_router(force_balance=True, pre_softmax=True), tokens(2000) * 0 + 10.0
    torch.manual_seed(5)
    routing = router(x)
    counts = counts_of(routing.topk_idx)
    assert counts.min() > 400 and counts.max() < 600  # 500 each, standard deviation about 20
    upstream = torch.randn(2000, TOP_K, dtype=torch.float64)
    routing.topk_weights.backward(upstream)
    torch.manual_seed(5)
    logits = torch.randn(2000, EXPERTS, dtype=torch.float64).requires_grad_()
    logits.softmax(1).topk(TOP_K).values.backward(upstream)
    torch.testing.assert_close(router.weight.grad, logits.grad.T @ x)  # type: ignore[union-attr]


@pytest.mark.parametrize("scoring", list(SCORING))
def test_sequences_route_like_flat_tokens(scoring: str) -> None:
    router, x = make_router(**SCORING[scoring]), tokens(7, 3)
    flat, sequences = router(x.view(-1, HIDDEN)), router(x)
    strided = router(x.transpose(0, 1).contiguous().transpose(0, 1))
    for other in (sequences, strided):
        assert torch.equal(flat.topk_idx, other.topk_idx)
        torch.testing.assert_close(flat.topk_weights, other.topk_weights)


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(HIDDEN), None, r"x has shape \(12,\), expected \[tokens, 12\] or \[sequence, batch, 12\]"),
        (torch.zeros(2, 2, 2, HIDDEN), None, r"x has shape \(2, 2, 2, 12\), expected"),
        (torch.zeros(4, 5), None, r"x has shape \(4, 5\), expected \[tokens, 12\]"),
        (torch.zeros(4, HIDDEN), torch.zeros(3).bool(), r"torch.bool \(3,\), expected torch.bool \(4,\)"),
        (torch.zeros(4, HIDDEN), torch.zeros(4), r"torch.float32 \(4,\), expected torch.bool \(4,\)"),
        (torch.zeros(4, 2, HIDDEN), torch.zeros(2, 4).bool(), r"torch.bool \(2, 4\), expected torch.bool \(4, 2\)"),
    ],
)
def test_input_errors_name_given_and_expected(x: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router()(x, mask)


@pytest.mark.parametrize("dtype", ["input", "fp32", "fp64"])
def test_dtypes_of_weights_and_gradients(dtype: str) -> None:
    router = make_router(dtype=dtype).to(torch.bfloat16)
    x = tokens(5).bfloat16().requires_grad_()
    weights = router(x).topk_weights
    assert weights.dtype == {"fp32": torch.float32, "fp64": torch.float64, "input": torch.bfloat16}[dtype]
    weights[:, 0].sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert router.weight.grad is not None and router.weight.grad.dtype == torch.bfloat16
