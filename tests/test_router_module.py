"""The router as a module: bias, losses in the graph, recompute, replay, statistics, dtypes, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ep_moe.config import MoEConfig, RouterConfig
from ep_moe.router import (
    AuxLoss,
    RouterStatistics,
    TopKRouter,
    attach_loss,
    record_routing,
    replay_routing,
    set_loss_scale,
)

HIDDEN, EXPERTS = 16, 8


def make_router(group: Any = None, **options: Any) -> TopKRouter:
    moe = MoEConfig(num_experts=EXPERTS, top_k=2, router=RouterConfig(**options))
    return TopKRouter(HIDDEN, moe, init_method=lambda w: torch.nn.init.normal_(w, std=0.5), global_batch_group=group)


BIASED = {"score_function": "sigmoid", "expert_bias": True, "expert_bias_update_rate": 0.25}


def test_attached_losses_get_the_loss_scale_as_gradient() -> None:
    activation = torch.randn(4, requires_grad=True)
    value = torch.tensor(3.0, requires_grad=True)
    try:
        for scale in (0.5, torch.tensor(2.0)):
            set_loss_scale(scale)
            out = attach_loss(activation, AuxLoss("a", value * 2, 1.0, None, 4))
            assert torch.equal(out, activation)
            out.sum().backward()
            assert float(value.grad) == 2 * float(scale) and torch.equal(activation.grad, torch.ones(4))  # type: ignore[arg-type]
            value.grad = activation.grad = None
    finally:
        set_loss_scale(1.0)


def test_balance_loss_reaches_the_weight_only_in_training() -> None:
    for coefficient, training, expected in ((1.0, True, True), (0.0, True, False), (1.0, False, False)):
        router = make_router(pre_softmax=False, aux_loss_coeff=coefficient).train(training)
        weights = router(torch.randn(30, HIDDEN)).topk_weights
        (weights * 0).sum().backward()
        assert bool(router.weight.grad.abs().sum() > 0) is expected  # type: ignore[union-attr]


def test_bias_changes_the_choice_but_not_the_weights() -> None:
    router = make_router(**BIASED)
    x = torch.randn(40, HIDDEN)
    router.expert_bias[3] += 10.0  # type: ignore[index]
    routing = router(x)
    assert (routing.topk_idx[:, 0] == 3).all()
    scores = (x @ router.weight.T).sigmoid().gather(1, routing.topk_idx)
    torch.testing.assert_close(routing.topk_weights, scores / scores.sum(1, keepdim=True))


def _update_bias(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    router = make_router(dist.group.WORLD, **BIASED)
    torch.manual_seed(rank)
    for _ in range(2):
        router(torch.randn(20, HIDDEN))
    counts = router.local_tokens_per_expert.clone()  # type: ignore[union-attr]
    router.update_expert_bias()
    return counts, router.expert_bias, router.local_tokens_per_expert  # type: ignore[return-value]


def test_bias_moves_towards_an_even_load_of_all_ranks() -> None:
    results = run_ranks(2, _update_bias)
    counts = results[0][0] + results[1][0]
    assert counts.sum() == 2 * 2 * 20 * 2
    for _, bias, left in results:
        assert torch.equal(bias, 0.25 * torch.sign(counts.mean() - counts))
        assert not left.any()


def test_bias_stays_fp32_and_is_saved() -> None:
    router = make_router(**BIASED)
    router.expert_bias += 0.1234567  # type: ignore[operator]
    for cast in (torch.bfloat16, torch.float16):
        router.to(cast)
        assert router.weight.dtype == cast and router.expert_bias.dtype == torch.float32  # type: ignore[union-attr]
        assert float(router.expert_bias[0]) == pytest.approx(0.1234567, abs=1e-8)  # type: ignore[index]
    state = router.state_dict()
    assert set(state) == {"weight", "expert_bias"}
    other = make_router(**BIASED)
    other.load_state_dict(state)
    assert torch.equal(other.expert_bias, router.expert_bias)  # type: ignore[arg-type]


def test_tokens_are_counted_once_and_only_in_training() -> None:
    x = torch.randn(10, HIDDEN, requires_grad=True)
    for reentrant in (False, True):
        router = make_router(**BIASED)
        checkpoint(lambda t, r=router: r(t).topk_weights, x, use_reentrant=reentrant).sum().backward()
        assert router.local_tokens_per_expert.sum() == 20  # type: ignore[union-attr]
    router = make_router(**BIASED).eval()
    router(x)
    assert router.local_tokens_per_expert.sum() == 0  # type: ignore[union-attr]


def test_padding_is_not_counted() -> None:
    router = make_router(**BIASED)
    router.statistics = RouterStatistics(EXPERTS)
    mask = torch.tensor([True] * 4 + [False] * 6)
    router(torch.randn(10, HIDDEN), mask)
    assert router.local_tokens_per_expert.sum() == 12  # type: ignore[union-attr]
    assert router.statistics.collect().tokens == 6


def test_jitter_and_forced_balance() -> None:
    x = torch.randn(400, HIDDEN)
    router = make_router(input_jitter=0.3)
    assert not torch.equal(router(x).topk_weights, router(x).topk_weights)
    router.eval()
    assert torch.equal(router(x).topk_weights, router(x).topk_weights)
    forced = make_router(force_balance=True)
    routing = forced(x.abs() * 10)
    load = torch.bincount(routing.topk_idx.flatten(), minlength=EXPERTS).float()
    assert load.min() > 50 and load.max() < 150  # fair share 100
    routing.topk_weights[:, 0].sum().backward()
    assert forced.weight.grad is not None and forced.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "input"])
def test_router_dtype(dtype: Any) -> None:
    router = make_router(dtype=dtype).to(torch.bfloat16)
    x = torch.randn(5, HIDDEN).bfloat16().requires_grad_()
    weights = router(x).topk_weights
    assert weights.dtype == {"fp32": torch.float32, "fp64": torch.float64, "input": torch.bfloat16}[dtype]
    weights[:, 0].sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and router.weight.grad.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_replay_repeats_the_choice_with_current_weights() -> None:
    router = make_router()
    batches = [torch.randn(6, HIDDEN), torch.randn(9, HIDDEN)]
    with record_routing(router) as recorded:
        first = [router(x) for x in batches]
    with torch.no_grad():
        router.weight.normal_()
    with replay_routing(router, recorded):
        second = [router(x) for x in batches]
    free = router(batches[0])
    assert all(torch.equal(a.topk_idx, b.topk_idx) for a, b in zip(first, second, strict=True))
    assert not torch.allclose(first[0].topk_weights, second[0].topk_weights)
    assert not torch.equal(free.topk_idx, first[0].topk_idx)  # outside the block the router chooses again
    second[0].topk_weights[:, 0].sum().backward()
    assert router.weight.grad is not None and router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reversed_order", [False, True])
def test_replay_under_recompute(reversed_order: bool) -> None:
    router = make_router()
    batches = [torch.randn(6, HIDDEN, requires_grad=True) for _ in range(3)]
    with record_routing(router) as recorded:
        for x in batches:
            router(x)
    seen: list[Tensor] = []
    with torch.no_grad():
        router.weight.normal_()

    def forward(x: Tensor) -> Tensor:
        routing = router(x)
        seen.append(routing.topk_idx)
        return routing.topk_weights[:, 0]

    # Without early stop the recompute runs to the end of `forward`.
    with replay_routing(router, recorded), set_checkpoint_early_stop(False):
        outs = [checkpoint(forward, x, use_reentrant=False) for x in batches]
        order = [2, 1, 0] if reversed_order else [0, 1, 2]
        for place in order:
            outs[place].sum().backward()
    assert all(torch.equal(seen[3 + i], seen[place]) for i, place in enumerate(order))
    assert all(torch.equal(seen[i], recorded[""][i]) for i in range(3))


def test_replay_errors() -> None:
    router = make_router()
    with record_routing(router) as recorded:
        router(torch.randn(4, HIDDEN))
    with (
        pytest.raises(ValueError, match="the recording is of routers"),
        replay_routing(torch.nn.Linear(2, 2), recorded),
    ):
        pass
    with replay_routing(router, recorded):
        router(torch.randn(4, HIDDEN))
        with pytest.raises(ValueError, match="holds only 1"):
            router(torch.randn(4, HIDDEN))
    with replay_routing(router, recorded), pytest.raises(ValueError, match=r"shape \(4, 2\), the tokens need \(5, 2\)"):
        router(torch.randn(5, HIDDEN))


def _statistics(rank: int, world: int) -> Any:
    torch.manual_seed(1)
    router = make_router(capacity_factor=0.5)
    router.statistics = RouterStatistics(EXPERTS)
    torch.manual_seed(rank)
    kept = torch.zeros(EXPERTS, dtype=torch.int64)
    for tokens in (20, 30):
        idx = router(torch.randn(tokens, HIDDEN)).topk_idx.flatten()
        kept += torch.bincount(idx[idx >= 0], minlength=EXPERTS)
    summary = router.statistics.collect(dist.group.WORLD)
    empty = router.statistics.collect(dist.group.WORLD)
    return kept, summary, empty


def test_statistics_over_ranks() -> None:
    results = run_ranks(2, _statistics)
    kept = sum(result[0] for result in results)
    for _, summary, empty in results:
        assert summary.tokens == 100 and list(summary.assignments) == kept.tolist()
        assert summary.dropped == 200 - int(kept.sum()) > 0
        assert 0 < summary.entropy < torch.log(torch.tensor(float(EXPERTS)))
        assert empty.tokens == 0 and empty.entropy != empty.entropy


def test_zero_tokens_with_everything_on() -> None:
    options = {"aux_loss_coeff": 0.1, "seq_aux_loss_coeff": 0.1, "global_aux_loss_coeff": 0.1, "z_loss_coeff": 0.1}
    router = make_router(capacity_factor=1.0, **options, **BIASED)
    for shape in ((0, HIDDEN), (5, 0, HIDDEN), (0, 3, HIDDEN)):
        routing = router(torch.zeros(shape, requires_grad=True))
        assert routing.topk_idx.shape == (0, 2)
        routing.topk_weights.sum().backward()
    assert torch.isfinite(router.weight.grad).all()  # type: ignore[arg-type]


def _global_loss(rank: int, world: int) -> list[float]:
    torch.manual_seed(1)
    losses: list[float] = []
    router = make_router(dist.group.WORLD, global_aux_loss_coeff=1.0)
    router.attach_loss = lambda activation, loss: (losses.append(float(loss.value)), activation)[1]
    for micro_batch in range(2):
        router(global_tokens()[micro_batch][rank * 20 : rank * 20 + 20])
    router.reset_global_balance()
    router(global_tokens()[0][rank * 20 : rank * 20 + 20])
    return losses


def global_tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(40, HIDDEN, generator=generator) for _ in range(2)]


def test_global_balance_loss_is_that_of_the_whole_batch() -> None:
    results = run_ranks(2, _global_loss)
    torch.manual_seed(1)
    weight = make_router().weight.detach()
    counts, want = torch.zeros(EXPERTS), []
    for done, x in enumerate(global_tokens(), start=1):
        scores = (x @ weight.T).softmax(-1)
        counts += torch.bincount(scores.topk(2).indices.flatten(), minlength=EXPERTS)
        want.append(float((scores.sum(0) * counts / done).sum()) * EXPERTS / (2 * 40 * 40))
    want.append(want[0])
    # Each rank's value is its part; the parts add up.
    assert [sum(values) for values in zip(*results, strict=True)] == pytest.approx(want, rel=1e-5)


def test_sequences_and_flat_tokens_route_alike() -> None:
    router, x = make_router(), torch.randn(7, 3, HIDDEN)
    assert torch.equal(router(x).topk_idx, router(x.view(-1, HIDDEN)).topk_idx)


def test_bad_inputs_are_named() -> None:
    router = make_router()
    with pytest.raises(ValueError, match=r"x has shape \(4, 5\), expected \[tokens, 16\]"):
        router(torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"padding_mask is torch.bool \(3,\), expected torch.bool \(4,\)"):
        router(torch.zeros(4, HIDDEN), torch.zeros(3, dtype=torch.bool))


def test_dropped_entries_have_no_weight_and_no_gradient() -> None:
    router = make_router(capacity_factor=0.25)
    routing = router(torch.randn(64, HIDDEN))
    dropped = routing.topk_idx < 0
    assert dropped.any() and (routing.topk_weights[dropped] == 0).all()
