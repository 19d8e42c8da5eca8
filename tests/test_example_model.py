"""The example's model honours every key of the configuration that describes the layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from ranks import run_ranks

pytest.importorskip("megatron.core")

import torch
from megatron_models import expert_parallel

from ep_moe.config import Config, MoEConfig, PhasesConfig
from ep_moe.config_fields import Section
from ep_moe.config_loading import config_from_dict, config_to_dict
from moe_gpt.model import build_model, moe_layers

# A value other than the default for every key; groups stand or fall together, and so do shared experts and their gate.
MOE: dict[str, Any] = {
    "num_experts": 4,
    "top_k": 1,
    "ep_size": 1,
    "comm": "nvlink",
    "comm_ranks_per_node": 1,
    "comm_between_nodes": "loopback",
    "comm_timeout_s": 7.0,
    "capacity_rows": 99,
    "router": {
        "score_function": "sigmoid",
        "pre_softmax": True,
        "num_groups": 2,
        "group_topk": 1,
        "routed_scaling_factor": 2.0,
        "expert_bias": True,
        "expert_bias_update_rate": 0.5,
        "aux_loss_coeff": 0.1,
        "seq_aux_loss_coeff": 0.2,
        "global_aux_loss_coeff": 0.3,
        "z_loss_coeff": 0.4,
        "input_jitter": 0.5,
        "dtype": "fp64",
        "capacity_factor": 1.5,
        "drop_policy": "position",
        "force_balance": True,
    },
    "experts": {
        "ffn_hidden_size": 128,
        "activation": "geglu",
        "backend": "loop",
        "precision": "fp8",
        "wgrad_precision": "fp8",
        "recompute_activation": False,
    },
    "shared_experts": {"ffn_hidden_size": 24, "gate": True},
}


def leaves(section: Section, prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in config_to_dict(section).items():
        inner = getattr(section, name)
        out.update(leaves(inner, f"{prefix}{name}.") if isinstance(inner, Section) else {f"{prefix}{name}": value})
    return out


def _reached(rank: int, world: int, mapping: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any, Any]:
    """What the layer was told: of the configuration, of communicators, of phases, of shared experts."""
    with expert_parallel(1):
        config = config_from_dict(mapping)
        (layer,) = moe_layers(build_model(config, torch.device("cpu")))
        moe: MoEConfig = dataclasses.replace(layer.router.moe, experts=layer.experts.config)
        factory = layer._phases._communicators
        told = {
            "comm": factory.comm,
            "comm_ranks_per_node": factory.ranks_per_node,
            "comm_between_nodes": factory.between_nodes,
            "comm_timeout_s": factory.timeout_s,
            "capacity_rows": layer._phases._shape.max_rows,
        }
        shared = layer.shared_experts if layer.use_shared_expert else None
        gate = (
            None
            if shared is None
            else (layer.config.moe_shared_expert_intermediate_size, shared.use_shared_expert_gate)
        )
        return leaves(moe), told, layer._phases._phases, gate


@pytest.mark.parametrize("changed", [True, False], ids=["other values", "defaults"])
def test_every_key_of_the_layer_is_honoured(changed: bool) -> None:
    phases = {"train": {"expert_chunks": 1, "num_sms": 8}, "decode": {"mode": "low_latency", "max_tokens_per_rank": 3}}
    mapping: dict[str, Any] = {"model": {"num_layers": 1}, "data": {"sequence_length": 16}}
    if changed:
        mapping |= {"moe": MOE, "phases": phases}
        ours, defaults = leaves(config_from_dict(mapping).moe), leaves(MoEConfig())
        assert all(ours[key] != defaults[key] for key in defaults)
    config: Config = config_from_dict(mapping)
    moe, told, got_phases, shared = run_ranks(1, _reached, mapping)[0]
    wanted = leaves(config.moe)
    assert told == {key: wanted[key] for key in told}
    assert got_phases == config.phases and isinstance(got_phases, PhasesConfig)
    assert shared == ((24, True) if changed else None)
    elsewhere = ("ep_size", "comm", "capacity_rows", "shared_experts")  # held against their owners above
    same = {key for key in wanted if not key.startswith(elsewhere)}
    assert {key: moe[key] for key in same} == {key: wanted[key] for key in same}
