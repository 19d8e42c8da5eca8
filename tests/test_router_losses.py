"""The router's balance losses and z-loss, and how they reach the gradient; against fp64 oracles."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from routers import (
    BIASED,
    EXPERTS,
    HIDDEN,
    LOSSES,
    TOP_K,
    Captured,
    balance_oracle,
    counts_of,
    make_router,
    tokens,
)
from torch import Tensor

from ep_moe.router import (
    AuxLoss,
    RouterStatistics,
    attach_loss,
    set_loss_scale,
)
from ep_moe.router.losses import balance_loss, z_loss


@pytest.fixture
def restored_loss_scale() -> Iterator[None]:
    yield
    set_loss_scale(1.0)


@pytest.mark.usefixtures("restored_loss_scale")
@pytest.mark.parametrize("scale", [1.0, 0.125, torch.tensor(3.0), torch.tensor([4.0], dtype=torch.bfloat16)])
def test_attached_loss_gets_the_loss_scale(scale: float | Tensor) -> None:
    set_loss_scale(scale)
    activation = torch.randn(5, 3, dtype=torch.bfloat16, requires_grad=True)
    source = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    out = attach_loss(activation, AuxLoss("a", source * source, 1.0, None, 5))
    assert torch.equal(out, activation) and out.dtype == activation.dtype
    upstream = torch.randn(5, 3).bfloat16()
    out.backward(upstream)
    assert torch.equal(activation.grad, upstream)  # type: ignore[arg-type]
    assert float(source.grad) == 4.0 * float(scale)  # type: ignore[arg-type]


@pytest.mark.usefixtures("restored_loss_scale")
def test_module_gradient_is_main_loss_plus_scaled_losses() -> None:
    captured = Captured()
    router, x = make_router(attach=captured, pre_softmax=True, **LOSSES), tokens(6, 3)
    upstream = torch.randn(18, TOP_K, dtype=torch.float64)
    set_loss_scale(0.25)
    router(x).topk_weights.backward(upstream)
    got = router.weight.grad
    plain = make_router(pre_softmax=True)
    plain.load_state_dict(router.state_dict())
    logits = x.view(-1, HIDDEN) @ plain.weight.T
    scores = logits.exp() / logits.exp().sum(1, keepdim=True)
    idx = scores.topk(TOP_K).indices
    aux = balance_oracle(scores, counts_of(idx), 18)
    sequences = [balance_oracle(scores[s::3], counts_of(idx[s::3]), 6) for s in range(3)]
    z = logits.exp().sum(1).log().square().mean()
    values = {
        "z_loss": 0.07 * z,
        "load_balancing_loss": 0.02 * aux,
        "seq_load_balancing_loss": 0.03 * sum(sequences) / 3,
        "global_load_balancing_loss": 0.05 * aux,
    }
    assert captured.take() == pytest.approx({name: float(value.detach()) for name, value in values.items()})
    ((plain(x).topk_weights * upstream).sum() + 0.25 * sum(values.values())).backward()
    torch.testing.assert_close(got, plain.weight.grad)


def test_losses_only_in_training_with_grad() -> None:
    captured = Captured()
    router, x = make_router(attach=captured, **LOSSES), tokens(4)
    with torch.no_grad():
        router(x)
    router.eval()(x)
    assert not captured.losses and not router.balance_losses.global_counts.any()
    router.train()(x)
    assert len(captured.losses) == 4


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_losses(masked: bool) -> None:
    logits = torch.randn(6, EXPERTS, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([True, False, True, True, False, True]) if masked else None
    assert torch.autograd.gradcheck(lambda t: z_loss(t, valid), logits)
    for shape in ((EXPERTS,), (3, EXPERTS)):
        sums = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        counts, total = torch.randint(0, 9, shape), torch.tensor(12 if masked else 0)
        assert torch.autograd.gradcheck(lambda t: balance_loss(t, counts, total, TOP_K), sums)  # noqa: B023


def test_even_load_costs_one() -> None:
    sums, counts = torch.full((EXPERTS,), 40 / EXPERTS), torch.full((EXPERTS,), 40 * TOP_K / EXPERTS)
    assert float(balance_loss(sums, counts, torch.tensor(40), TOP_K)) == pytest.approx(1.0)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_padding_does_not_take_part(score_function: str) -> None:
    """Losses, gradients, counts and statistics with padding are those of the tokens that are left without it."""
    options = {**LOSSES, "score_function": score_function, "expert_bias": score_function == "sigmoid"}
    mask = torch.zeros(9, 2, dtype=torch.bool)
    mask[6:] = True  # the same number in every sequence, so that the sequence loss can be compared
    results = []
    for x, padding in ((tokens(9, 2), mask), (tokens(9, 2)[:6], None)):
        captured = Captured()
        torch.manual_seed(3)
        router = make_router(attach=captured, **options)
        router.statistics = RouterStatistics(EXPERTS)
        x = x.clone().requires_grad_()
        (router(x, padding).topk_weights * 0).sum().backward()
        assert {int(loss.valid_tokens) for loss in captured.losses} == {12}
        results.append((captured.take(), router, x.grad))
    (masked, masked_router, masked_grad), (short, short_router, short_grad) = results
    assert masked == pytest.approx(short)
    torch.testing.assert_close(masked_router.weight.grad, short_router.weight.grad)
    torch.testing.assert_close(masked_grad[:6], short_grad)
    assert not masked_grad[6:].any()
    assert torch.equal(masked_router.balance_losses.global_counts, short_router.balance_losses.global_counts)
    if score_function == "sigmoid":
        assert torch.equal(masked_router.local_tokens_per_expert, short_router.local_tokens_per_expert)
    stats = [router.statistics.collect() for router in (masked_router, short_router)]
    assert stats[0].entropy == pytest.approx(stats[1].entropy)
    assert stats[0].assignments == stats[1].assignments and stats[0].tokens == stats[1].tokens == 12


@pytest.mark.parametrize("dtype", ["input", "fp32", "fp64"])
@pytest.mark.parametrize(
    ("shape", "masked"),
    [(shape, masked) for shape in ((0,), (0, 3), (3, 0)) for masked in (False, True)] + [((4, 2), True)],
)
def test_no_tokens_and_only_padding(shape: tuple[int, ...], masked: bool, dtype: str) -> None:
    captured = Captured()
    router = make_router(attach=captured, capacity_factor=1.0, dtype=dtype, **LOSSES, **BIASED)
    router.statistics = RouterStatistics(EXPERTS)
    x = tokens(*shape).requires_grad_()
    routing = router(x, torch.ones(shape, dtype=torch.bool) if masked else None)
    assert routing.topk_idx.shape == routing.topk_weights.shape == (math.prod(shape), TOP_K)
    (routing.topk_weights * 0).sum().backward()
    assert captured.take() == dict.fromkeys(
        ["z_loss", "load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss"], 0.0
    )
    assert x.grad is not None and not x.grad.any() and not router.weight.grad.any()  # any() holds for NaN  # type: ignore[union-attr]
    router.update_expert_bias()
    assert not router.expert_bias.any()  # type: ignore[union-attr]
    summary = router.statistics.collect()
    assert summary.tokens == summary.dropped == sum(summary.assignments) == 0 and math.isnan(summary.entropy)


def _micro_batch_losses(rank: int, world: int) -> tuple[dict[str, float], Tensor]:
    torch.manual_seed(1)
    captured = Captured()
    router = make_router(attach=captured, micro_batch_group=dist.group.WORLD, **{**LOSSES, "global_aux_loss_coeff": 0})
    routing = router(tokens(10, 3)[rank * 5 : rank * 5 + 5])
    (routing.topk_weights * 0).sum().backward()
    return captured.take(), router.weight.grad


def test_losses_of_a_micro_batch_split_over_ranks() -> None:
    """Halves of every sequence on two ranks: values and gradients add up to those of one rank with all of it."""
    results = run_ranks(2, _micro_batch_losses)
    torch.manual_seed(1)
    captured = Captured()
    router = make_router(attach=captured, **{**LOSSES, "global_aux_loss_coeff": 0})
    (router(tokens(10, 3)).topk_weights * 0).sum().backward()
    want = captured.take()
    assert {name: results[0][0][name] + results[1][0][name] for name in want} == pytest.approx(want)
    torch.testing.assert_close(results[0][1] + results[1][1], router.weight.grad)


def _global_losses(rank: int, world: int, score_function: str) -> tuple[list[float], Tensor]:
    torch.manual_seed(1)
    captured = Captured()
    router = make_router(
        attach=captured, global_batch_group=dist.group.WORLD, global_aux_loss_coeff=0.5, score_function=score_function
    )
    values = []
    for seed in (1, 2, 3, None, 2):  # None: the next global batch
        if seed is None:
            router.reset_global_balance()
            continue
        half = slice(rank * 20, rank * 20 + 20)
        mask = torch.arange(40)[half] >= 37  # all padding on the second rank
        router(tokens(40, seed=seed)[half], mask)
        values.append(captured.take()["global_load_balancing_loss"])
    return values, router.weight.detach()


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_global_loss_over_ranks_and_micro_batches(score_function: str) -> None:
    results = run_ranks(2, _global_losses, score_function)
    weight = results[0][1]

    def of(seed: int) -> tuple[Tensor, Tensor]:
        logits = tokens(40, seed=seed)[:37] @ weight.T
        scores = logits.exp() if score_function == "softmax" else 1 / (1 + (-logits).exp())
        scores = scores / scores.sum(1, keepdim=True)
        return scores, counts_of(scores.topk(TOP_K).indices)

    want = []
    for seen in ([1], [1, 2], [1, 2, 3], [2]):
        average = sum(of(seed)[1] for seed in seen) / len(seen)
        want.append(0.5 * float(balance_oracle(of(seen[-1])[0], average, 37)))
    assert [sum(values) for values in zip(results[0][0], results[1][0], strict=True)] == pytest.approx(want)
