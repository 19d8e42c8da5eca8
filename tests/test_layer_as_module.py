"""EPMoELayer as one module among others: copied, moved, loaded, compiled, checkpointed, and given what does not fit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ep_moe import Config, ConfigError, EPMoELayer
from ep_moe.config import ExpertsConfig, ModelConfig, MoEConfig, PhaseConfig, PhasesConfig, RouterConfig
from ep_moe.data_parallel import is_expert_parameter

HIDDEN = 32
MOE = MoEConfig(num_experts=4, top_k=2, experts=ExpertsConfig(ffn_hidden_size=16))
BIASED = replace(MOE, router=RouterConfig(score_function="sigmoid", expert_bias=True, global_aux_loss_coeff=0.01))


def make_config(moe: MoEConfig = MOE, expert_chunks: int = 1) -> Config:
    phases = PhasesConfig(train=PhaseConfig(expert_chunks=expert_chunks))
    return Config(model=ModelConfig(hidden_size=HIDDEN, init_std=0.3), moe=moe, phases=phases)


def make_layer(config: Config | None = None, **kind: Any) -> EPMoELayer:
    torch.manual_seed(7)
    return EPMoELayer(config or make_config(), dist.group.WORLD, **kind)


def tokens_of(rank: int, number: int = 6) -> Tensor:
    return torch.randn(number, HIDDEN, generator=torch.Generator().manual_seed(rank))


def gradients(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output of ``call`` on ``x``, and the gradients of ``x`` and of the parameters of ``layer``."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = call(x)
    out.square().sum().backward()
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _copied(rank: int, world: int) -> list[bool]:
    layer, x = make_layer(make_config(BIASED)), tokens_of(rank)
    wanted = gradients(layer, layer, x)  # so that there are communicators, which must not be copied
    model = copy.deepcopy(nn.Sequential(nn.Identity(), layer))
    mine = model[1]
    return [
        same(gradients(mine, mine, x), wanted),
        all(is_expert_parameter(p) for p in mine.experts.parameters()),
        mine.experts.fc1_weight.data_ptr() != layer.experts.fc1_weight.data_ptr(),
        mine._phases is not layer._phases,
    ]


def test_a_deep_copy_is_a_layer_in_the_same_groups() -> None:
    assert run_ranks(2, _copied) == [[True] * 4] * 2


def _marks(rank: int, world: int) -> list[list[bool]]:
    layer = make_layer()
    loaded, assigned = make_layer(), make_layer(device="meta")
    loaded.load_state_dict(layer.state_dict())
    assigned.load_state_dict(layer.state_dict(), assign=True)
    emptied = make_layer(device="meta").to_empty(device="cpu")
    layers = [layer, loaded, assigned, emptied, make_layer().double()]
    return [[is_expert_parameter(p) for p in one.parameters()] for one in layers]


@pytest.mark.parametrize("ranks", [1, 2])
def test_expert_parameters_stay_marked(ranks: int) -> None:
    for layers in run_ranks(ranks, _marks):
        assert layers == [[False, ranks > 1, ranks > 1]] * 5  # the router, two projections


def _from_meta(rank: int, world: int) -> bool:
    layer, empty = make_layer(make_config(BIASED)), make_layer(make_config(BIASED), device="meta")
    empty = empty.to_empty(device="cpu")
    for tensor in [*empty.parameters(), *empty.buffers()]:
        tensor.data.fill_(77)  # which uninitialised memory might hold
    empty.router.reset_parameters()
    empty.load_state_dict(layer.state_dict())
    return same(list(empty.buffers()), list(layer.buffers())) and same(
        *(gradients(m, m, x) for m, x in ((layer, tokens_of(rank)), (empty, tokens_of(rank))))
    )


def test_a_layer_made_on_meta_is_whole_after_reset_and_load() -> None:
    assert run_ranks(2, _from_meta) == [True, True]


def _pickled(rank: int, world: int) -> str:
    try:
        torch.save(make_layer(), io.BytesIO())
    except TypeError as error:
        return str(error)
    return ""


def test_pickling_says_what_to_save_instead() -> None:
    assert "save its state_dict()" in run_ranks(1, _pickled)[0]


def _default_group(rank: int, world: int) -> Tensor:
    torch.manual_seed(7)
    layer = EPMoELayer(make_config(BIASED))
    layer(tokens_of(rank, 50))
    layer.router.update_expert_bias()
    assert layer.router.expert_bias is not None
    return layer.router.expert_bias


def test_without_groups_all_ranks_move_the_bias_alike() -> None:
    first, second = run_ranks(2, _default_group)
    assert torch.equal(first, second) and first.abs().sum() > 0


def _compiled(rank: int, world: int, expert_chunks: int) -> bool:
    layer, x = make_layer(make_config(expert_chunks=expert_chunks)), tokens_of(rank)

    def around(x: Tensor) -> Tensor:
        return layer(x * 2) + 1

    return same(gradients(torch.compile(around, backend="aot_eager"), layer, x), gradients(around, layer, x))


@pytest.mark.parametrize("expert_chunks", [1, 2])
def test_compiling_around_the_layer_changes_nothing(expert_chunks: int) -> None:
    assert run_ranks(2, _compiled, expert_chunks) == [True, True]


def _checkpointed(rank: int, world: int, reentrant: bool) -> bool:
    layer, x = make_layer(), tokens_of(rank, 3 * rank)  # no tokens on rank 0
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant), layer, x)
    return same(again, gradients(layer, layer, x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    assert run_ranks(2, _checkpointed, reentrant) == [True, True]


def _edges(rank: int, world: int) -> list[bool]:
    layer, x = make_layer(), tokens_of(rank)
    by_columns, poisoned = x.t().contiguous().t(), x.clone()
    poisoned[0] = float("nan")
    with torch.no_grad():
        wanted, got = layer(x), layer(poisoned)
        results = [torch.equal(layer(by_columns), wanted)]
    results.append(bool(got[0].isnan().all()) and torch.equal(got[1:], wanted[1:]))
    with torch.inference_mode():
        results.append(torch.equal(layer(x), wanted))
    one_each = replace(MOE, num_experts=world, top_k=1, router=RouterConfig(score_function="sigmoid"))
    layer = make_layer(make_config(one_each))
    with torch.no_grad():
        layer.router.weight.zero_()[0] = 1.0
    gradients(layer, layer, x.abs())  # so all to the expert of rank 0
    used = layer.experts.fc1_weight.grad
    results.append(used is not None and bool(used.abs().sum() > 0) == (rank == 0))
    return results


def test_strides_nan_and_uneven_loads_are_ordinary_input() -> None:
    assert run_ranks(2, _edges) == [[True] * 4] * 2


def _outside_the_group(rank: int, world: int) -> list[str]:
    first_alone = dist.new_group([0])
    messages = []
    for group in (first_alone, "world"):
        try:
            EPMoELayer(make_config(), group)  # type: ignore[arg-type]
            messages.append("")
        except ConfigError as error:
            messages.append(str(error))
    if rank == 0:
        dist.destroy_process_group(first_alone)
    return messages


def test_a_rank_outside_the_group_is_told_so() -> None:
    (inside, other), (outside, _) = run_ranks(2, _outside_the_group)
    expected = "group: expected a torch.distributed.ProcessGroup that holds this rank, got "
    assert inside == "" and outside == f"{expected}a group without rank 1, this one"
    assert other == f"{expected}str"


def _fp64_under_autocast(rank: int, world: int) -> bool:
    layer, x = make_layer(dtype=torch.float64), tokens_of(rank).double()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    return torch.equal(out, layer(x))


def test_fp64_stays_out_of_autocast() -> None:
    assert run_ranks(2, _fp64_under_autocast) == [True, True]


def _refused(rank: int, world: int) -> list[str]:
    layer, x = make_layer(), tokens_of(rank)

    def twice() -> None:
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(y).square().sum(), y, create_graph=True)
        gradient.sum().backward()

    def integers_under_autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            layer(x.long())

    attempts: list[Callable[[], Any]] = [
        lambda: layer(x.bfloat16()),
        lambda: layer(x.to("meta")),
        integers_under_autocast,
        lambda: EPMoELayer({"moe": {}}),  # type: ignore[arg-type]
        twice,
    ]
    messages = []
    for attempt in attempts:
        try:
            attempt()
            messages.append("no error")
        except (RuntimeError, TypeError, ValueError) as error:
            messages.append(str(error))
    return messages


def test_what_does_not_fit_is_refused_by_name() -> None:
    for dtype, device, integers, config, double in run_ranks(2, _refused):
        expected = "hidden_states: expected torch.float32 on cpu as the parameters, got "
        assert dtype == f"{expected}torch.bfloat16 on cpu"
        assert device == f"{expected}torch.float32 on meta"
        assert integers == "hidden_states: expected floating point on cpu as the parameters, got torch.int64 on cpu"
        assert config.startswith("config: expected an ep_moe.Config") and config.endswith("got dict")
        assert "differentiate twice" in double
