"""What a router keeps between calls: bias, counts under recompute, replayed choices, statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from routers import (
    BIASED,
    EXPERTS,
    HIDDEN,
    LOSSES,
    REENTRANT,
    SCORING,
    TOP_K,
    counts_of,
    make_router,
    select_oracle,
    tokens,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ep_moe.router import (
    RouterStatistics,
    TopKRouter,
    record_routing,
    replay_routing,
)


@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "group_topk": 2}], ids=["", "groups"])
def test_bias_moves_the_choice_not_the_weights(groups: dict[str, int]) -> None:
    router, x = make_router(**BIASED, **groups), tokens(50)
    unbiased = router(x).topk_idx
    router.expert_bias.copy_(torch.randn(EXPERTS))  # type: ignore[union-attr]
    routing = router(x)
    scores = 1 / (1 + (-(x @ router.weight.T)).exp())
    rows = (scores + router.expert_bias).tolist()
    num_groups, group_topk = groups.get("num_groups", 1), groups.get("group_topk", 1)
    assert routing.topk_idx.tolist() == [select_oracle(row, TOP_K, num_groups, group_topk) for row in rows]
    assert not torch.equal(routing.topk_idx.sort().values, unbiased.sort().values)
    chosen = scores.gather(1, routing.topk_idx)
    torch.testing.assert_close(routing.topk_weights, chosen / chosen.sum(1, keepdim=True))


def _updated_bias(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    router = make_router(global_batch_group=dist.group.WORLD, capacity_factor=1.0, **BIASED)
    for step in range(2):
        router.eval()(tokens(50, seed=90))  # does not count
        counts = torch.zeros(EXPERTS, dtype=torch.float64)
        for micro_batch in range(3):
            counts += counts_of(router.train()(tokens(16 + 8 * rank, seed=10 * rank + micro_batch)).topk_idx)
        assert torch.equal(router.local_tokens_per_expert.double(), counts)  # after dropping
        before = router.expert_bias.clone()
        router.update_expert_bias()
        assert not router.local_tokens_per_expert.any(), step
    return counts, before, router.expert_bias


def test_bias_update_over_ranks() -> None:
    results = run_ranks(2, _updated_bias)
    counts = results[0][0] + results[1][0]
    mean = float(counts.sum()) / EXPERTS
    signs = [(mean > count) - (mean < count) for count in counts.tolist()]
    assert 1 in signs and -1 in signs
    for _, before, after in results:
        assert before.any() and torch.equal(before, results[0][1])
        torch.testing.assert_close(after, before + 0.25 * torch.tensor(signs, dtype=torch.float32))


def test_no_update_without_bias() -> None:
    router = make_router()
    router.update_expert_bias()
    assert router.expert_bias is None and router.local_tokens_per_expert is None
    assert set(router.state_dict()) == {"weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_bias_and_counts_stay_fp32(dtype: torch.dtype) -> None:
    router = make_router(**BIASED)
    bias, counts = torch.randn(EXPERTS), torch.arange(EXPERTS) + 16777201.0  # neither fits in 16 bits
    router.expert_bias.copy_(bias)  # type: ignore[union-attr]
    router.local_tokens_per_expert.copy_(counts)  # type: ignore[union-attr]
    casts = {torch.bfloat16: [nn.Module.bfloat16], torch.float16: [nn.Module.half], torch.float64: [nn.Module.double]}
    parent = nn.Sequential(router)
    for cast in [lambda module: module.to(dtype), *casts[dtype]]:
        cast(parent)
        assert router.weight.dtype == dtype
        for buffer, want in ((router.expert_bias, bias), (router.local_tokens_per_expert, counts)):
            assert buffer is not None and buffer.dtype == torch.float32 and torch.equal(buffer, want)
    other = make_router(**BIASED).to(dtype)
    state = router.state_dict()
    assert set(state) == {"weight", "expert_bias"} and state["expert_bias"].dtype == torch.float32
    other.load_state_dict(state)
    assert other.expert_bias.dtype == torch.float32 and torch.equal(other.expert_bias, bias)  # type: ignore[union-attr]
    assert torch.equal(other.weight, router.weight)


@REENTRANT
@pytest.mark.parametrize("together", [False, True], ids=["one-by-one", "all-forwards-first"])
def test_recompute_changes_no_count_and_no_gradient(reentrant: bool, together: bool) -> None:
    """Two micro-batches with and without checkpointing, in two orders of forward and backward."""
    # Without the global loss: recompute sees its running average as it is by then.
    options = {**LOSSES, "global_aux_loss_coeff": 0.0, **BIASED}
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        router = make_router(**options)
        router.statistics = RouterStatistics(EXPERTS)
        outs = []
        for seed in (1, 2):
            x = tokens(10, seed=seed).requires_grad_()

            # Squaring keeps the weights for backward, so that the recompute runs through the whole router.
            def forward(t: Tensor, router: TopKRouter = router) -> Tensor:
                return router(t).topk_weights.square()

            out = checkpoint(forward, x, use_reentrant=reentrant) if recompute else forward(x)
            loss = (out[:, 0] * torch.arange(10)).sum()
            outs.append(loss) if together else loss.backward()
        for loss in outs:
            loss.backward()
        results.append((router.local_tokens_per_expert, router.statistics.collect(), router.weight.grad))
    (counts, summary, grad), (counts_again, summary_again, grad_again) = results
    assert counts.sum() == 2 * 10 * TOP_K and torch.equal(counts, counts_again)
    assert summary.tokens == 20 and summary == summary_again
    torch.testing.assert_close(grad, grad_again)


@REENTRANT
def test_recompute_counts_the_global_batch_once(reentrant: bool) -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        router = make_router(global_aux_loss_coeff=0.5, pre_softmax=True)
        for seed in (1, 2):
            x = tokens(10, seed=seed).requires_grad_()
            if recompute:
                out = checkpoint(lambda t, router=router: router(t).topk_weights, x, use_reentrant=reentrant)
            else:
                out = router(x).topk_weights
            out.square().sum().backward()
        losses = router.balance_losses
        assert int(losses.global_micro_batches) == 2 and int(losses.global_counts.sum()) == 2 * 10 * TOP_K
        results.append(router.weight.grad)
    torch.testing.assert_close(*results)


def test_nothing_is_counted_in_eval() -> None:
    router = make_router(**BIASED, global_aux_loss_coeff=0.5).eval()
    x = tokens(10).requires_grad_()
    router(x)
    for reentrant in (False, True):
        checkpoint(lambda t: router(t).topk_weights, x, use_reentrant=reentrant).sum().backward()
    assert not router.local_tokens_per_expert.any()  # type: ignore[union-attr]
    assert int(router.balance_losses.global_micro_batches) == 0


class TwoRouters(nn.Module):
    """Two routers on the same tokens; returns both routings."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = make_router(**options)
        self.second = make_router(**options)

    def forward(self, x: Tensor) -> Tensor:
        weights = [router(x).topk_weights for router in (self.first, self.second)]
        return torch.cat(weights, dim=1)


@pytest.mark.parametrize("scoring", [*SCORING, "bias"])
def test_replay_repeats_choices_in_order(scoring: str) -> None:
    options = BIASED if scoring == "bias" else SCORING[scoring]
    model = TwoRouters(**options)
    batches = [tokens(6, seed=1), tokens(6, seed=2), tokens(3, 2, seed=3), tokens(9, seed=4)]
    before = model.first.select_experts
    with record_routing(model) as recorded:
        first = [model.first(x) for x in batches]
        for x in batches:
            model.second(x)
    assert set(recorded) == {"first", "second"} and all(len(choices) == 4 for choices in recorded.values())
    assert all(torch.equal(choice, want.topk_idx) for choice, want in zip(recorded["first"], first, strict=True))
    copies = [choice.clone() for choice in recorded["first"]]
    with torch.no_grad():
        model.first.weight.normal_()
    for _ in range(2):  # a recording can be replayed again
        with replay_routing(model, recorded):
            for x, choice in zip(batches, first, strict=True):
                model.second(x)
                again = model.first(x)
                assert torch.equal(again.topk_idx, choice.topk_idx)
                assert not torch.allclose(again.topk_weights, choice.topk_weights)
    assert all(torch.equal(*pair) for pair in zip(copies, recorded["first"], strict=True))
    again.topk_weights[:, 0].sum().backward()
    assert model.first.weight.grad is not None and model.first.weight.grad.any()
    assert model.first.select_experts is before
    assert not torch.equal(model.first(batches[0]).topk_idx, first[0].topk_idx)


def test_replay_with_capacity() -> None:
    router, x = make_router(capacity_factor=0.5), tokens(40)
    with record_routing(router) as recorded:
        routing = router(x)
    assert (routing.topk_idx < 0).any() and (recorded[""][0] >= 0).all()  # recorded before dropping
    with replay_routing(router, recorded):
        assert torch.equal(router(x).topk_idx, routing.topk_idx)


@REENTRANT
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["first-in-first-out", "last-in-first-out"])
def test_record_and_replay_under_recompute(reentrant: bool, order: tuple[int, ...]) -> None:
    model = TwoRouters()
    batches = [tokens(6, seed=seed).requires_grad_() for seed in range(3)]

    def run(checkpointed: bool) -> Tensor:
        model.zero_grad()
        outs = [checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x) for x in batches]
        for place in order:
            outs[place].square().sum().backward()
        return torch.cat([router.weight.grad for router in (model.first, model.second)])

    with record_routing(model) as recorded:
        run(checkpointed=True)
    assert [len(choices) for choices in recorded.values()] == [3, 3]
    for router, choices in ((model.first, recorded["first"]), (model.second, recorded["second"])):
        assert all(torch.equal(choice, router(x).topk_idx) for choice, x in zip(choices, batches, strict=True))
    with torch.no_grad():
        for router in (model.first, model.second):
            router.weight.normal_()
    gradients = []
    for checkpointed in (False, True):
        with replay_routing(model, recorded):
            gradients.append(run(checkpointed))
    torch.testing.assert_close(*gradients)


def test_replay_errors() -> None:
    model, x = TwoRouters(), tokens(4)
    with record_routing(model) as recorded:
        model(x)
    before = model.first.select_experts
    for wrong in ({}, {"first": recorded["first"]}, {**recorded, "third": []}):
        with pytest.raises(ValueError, match=r"recording is of routers .* the module has \['first', 'second'\]"):  # noqa: SIM117
            with replay_routing(model, wrong):
                pytest.fail("entered")
    with replay_routing(model, recorded):
        model(x)
        with pytest.raises(ValueError, match="router 'first': forward pass 2, but the recording holds only 1"):
            model(x)
    for other in (tokens(5), tokens(2, 3)):
        shape = rf"router 'first', forward pass 1: .* \(4, 2\), the tokens need \({other.numel() // HIDDEN}, 2\)"
        with pytest.raises(ValueError, match=shape), replay_routing(model, recorded):
            model(other)
    assert model.first.select_experts is before  # also after an error
    out = checkpoint(model, x.requires_grad_(), use_reentrant=False)
    with (
        pytest.raises(ValueError, match="router 'first': a recomputed forward pass was not replayed"),
        replay_routing(model, recorded),
    ):
        out.sum().backward()


def entropy_oracle(probabilities: list[list[float]]) -> float:
    return sum(-p * math.log(p) for row in probabilities for p in row) / len(probabilities)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_statistics_of_one_rank(score_function: str) -> None:
    router = make_router(score_function=score_function, capacity_factor=0.75)
    router.statistics = RouterStatistics(EXPERTS)
    batches = [tokens(20, seed=1), tokens(7, 2, seed=2)]
    idx = [router.train(training)(x).topk_idx for training, x in zip((True, False), batches, strict=True)]
    logits = torch.cat([x.view(-1, HIDDEN) for x in batches]) @ router.weight.T
    scores = logits.exp() if score_function == "softmax" else 1 / (1 + (-logits).exp())
    summary = router.statistics.collect()
    assert summary.tokens == 34
    assert list(summary.assignments) == counts_of(torch.cat(idx)).tolist()
    assert summary.dropped == int((torch.cat(idx) < 0).sum()) > 0
    assert summary.entropy == pytest.approx(entropy_oracle((scores / scores.sum(1, keepdim=True)).tolist()))
    empty = router.statistics.collect()
    assert (empty.tokens, empty.dropped, sum(empty.assignments)) == (0, 0, 0) and math.isnan(empty.entropy)
    with torch.no_grad():
        router.weight.zero_()
    router(batches[0])
    assert router.statistics.collect().entropy == pytest.approx(math.log(EXPERTS))


def _collected(rank: int, world: int, idle: int | None) -> Any:
    torch.manual_seed(1)
    router = make_router(capacity_factor=0.75)
    statistics = [RouterStatistics(EXPERTS), RouterStatistics(EXPERTS)]  # over both ranks, and of this one
    if rank != idle:
        for each in statistics:
            router.statistics = each
            router(tokens(10 + 20 * rank, seed=rank))
    return statistics[0].collect(dist.group.WORLD), statistics[1].collect(), statistics[0].collect(dist.group.WORLD)


@pytest.mark.parametrize("idle", [None, 0])
def test_statistics_over_ranks(idle: int | None) -> None:
    (both, *alone), (same, *other) = run_ranks(2, _collected, idle)
    assert both == same
    assert both.tokens == (40 if idle is None else 30) == alone[0].tokens + other[0].tokens
    assert both.dropped == alone[0].dropped + other[0].dropped > 0
    pairs = zip(alone[0].assignments, other[0].assignments, strict=True)
    assert both.assignments == tuple(a + b for a, b in pairs)
    entropy = sum(part.entropy * part.tokens for part in (alone[0], other[0]) if part.tokens)
    assert both.entropy == pytest.approx(entropy / both.tokens)
    assert alone[1].tokens == other[1].tokens == 0
