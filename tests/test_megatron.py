"""The Megatron-Core adapter in a model: the same for every split, and what Megatron asks of a layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("megatron.core")

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron_models import (
    EXPERTS,
    batch,
    expert_parallel,
    gpt_model,
    submodules_of,
    transformer_config,
)
from ranks import run_ranks

from ep_moe.megatron import MegatronEPMoELayer, use_ep_moe


def _train_step(rank: int, world: int, ep: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient sums on the same four sequences, however the ranks share them and the experts."""
    with expert_parallel(ep):
        torch.manual_seed(3)
        # The balance loss is not linear in the tokens of a rank, so it would depend on the split.
        model = gpt_model(transformer_config(moe_aux_loss_coeff=0.0, moe_shared_expert_intermediate_size=16))
        share = 4 // world
        tokens, positions = (t[rank * share : (rank + 1) * share] for t in batch(0, 4))
        loss = model(tokens, positions, None, labels=tokens).sum()
        loss.backward()
        return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _whole_gradients(results: list[tuple[float, dict[str, torch.Tensor]]], ep: int) -> dict[str, torch.Tensor]:
    out = {}
    for name in results[0][1]:
        values = [gradients[name] for _, gradients in results]
        if ".mlp.experts." in name:
            by_place = [sum(values[place::ep]) for place in range(ep)]
            out[name] = torch.cat(by_place)  # type: ignore[arg-type]
        else:
            out[name] = sum(values)  # type: ignore[assignment]
    return out


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 4), (4, 2), (4, 1)])
def test_gpt_model_computes_the_same_for_every_split(world: int, ep: int) -> None:
    alone = run_ranks(1, _train_step, 1)
    split = run_ranks(world, _train_step, ep)
    assert sum(loss for loss, _ in split) == pytest.approx(alone[0][0], rel=1e-5)
    want, got = _whole_gradients(alone, 1), _whole_gradients(split, ep)
    assert want.keys() == got.keys() and any(".mlp.experts.fc1_weight" in name for name in want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def _attributes(rank: int, world: int) -> dict[str, Any]:
    with expert_parallel(world):
        layer = gpt_model(transformer_config()).decoder.layers[1].mlp
        return {
            "allreduce": {name: getattr(p, "allreduce", True) for name, p in layer.named_parameters()},
            "sequence_parallel": layer.router.weight.sequence_parallel,
            "layer_number": (layer.layer_number, layer.router.layer_number),
            "local": layer.local_expert_indices,
            "flags": (layer.use_shared_expert, layer.shared_expert_overlap),
        }


def test_attributes_that_megatron_reads() -> None:
    for rank, found in enumerate(run_ranks(2, _attributes)):
        assert found["allreduce"] == {
            "router.weight": True,
            "experts.fc1_weight": False,
            "experts.fc2_weight": False,
        }
        assert found["sequence_parallel"] is False and found["layer_number"] == (2, 2)
        assert found["local"] == list(range(rank * 4, rank * 4 + 4)) and found["flags"] == (False, False)


def _default_groups(rank: int, world: int) -> tuple[bool, dict[str, Any]]:
    built: dict[str, Any] = {}

    def shared_experts(**arguments: Any) -> torch.nn.Module:
        built.update(arguments)
        return torch.nn.Identity()

    with expert_parallel(world):
        config = transformer_config(moe_shared_expert_intermediate_size=16)
        spec = use_ep_moe(get_gpt_layer_local_spec(num_experts=EXPERTS)).submodules.mlp
        submodules = copy.copy(submodules_of(spec))
        submodules.shared_experts = shared_experts
        layer = MegatronEPMoELayer(config, submodules, layer_number=1, name="decoder.layers.0.mlp", newer=True)
        default = layer.ep_group is parallel_state.get_expert_model_parallel_group()
        return default, {"name": built["name"], "gate": built["gate"], "arguments": sorted(built)}


def test_default_process_groups_names_and_unknown_keywords() -> None:
    expected = {
        "name": "decoder.layers.0.mlp.shared_experts",
        "gate": False,
        "arguments": ["config", "gate", "name", "pg_collection"],
    }
    assert run_ranks(2, _default_groups) == [(True, expected)] * 2
