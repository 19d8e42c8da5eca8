"""Putting the layer into Megatron's specs, and settings: translated, or refused by name."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core")

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron_models import (
    EXPERTS,
    expert_parallel,
    module_of,
    submodules_of,
    transformer_config,
)
from ranks import run_ranks

from ep_moe.config import ConfigError
from ep_moe.megatron import MegatronEPMoELayer, use_ep_moe
from ep_moe.megatron.releases import replace_moe_layer
from ep_moe.megatron.translate import moe_config


def test_a_block_spec_keeps_its_dense_layers() -> None:
    dense, moe = (get_gpt_layer_local_spec(num_experts=n) for n in (None, EXPERTS))
    block = TransformerBlockSubmodules(layer_specs=[dense, moe, moe])
    replaced = use_ep_moe(block)
    kinds = [module_of(layer.submodules.mlp) for layer in replaced.layer_specs]
    assert kinds == [module_of(dense.submodules.mlp), MegatronEPMoELayer, MegatronEPMoELayer]
    assert module_of(moe.submodules.mlp) is MoELayer  # the original is left as it is


def test_a_hybrid_stack_keeps_its_other_layers() -> None:
    attention, moe = (get_gpt_layer_local_spec(num_experts=n) for n in (None, EXPERTS))
    stack = ModuleSpec(torch.nn.Module, submodules=SimpleNamespace(attention_layer=attention, moe_layer=moe))
    replaced = use_ep_moe(stack)
    assert replaced.submodules.attention_layer is attention and stack.submodules.moe_layer is moe
    assert module_of(replaced.submodules.moe_layer.submodules.mlp) is MegatronEPMoELayer


def test_a_spec_without_moe_is_an_error() -> None:
    with pytest.raises(ValueError, match="pass num_experts"):
        use_ep_moe(get_gpt_layer_local_spec(num_experts=None))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"add_bias_linear": True}, "add_bias_linear = True"),
        ({"moe_pad_expert_input_to_capacity": True}, "moe_pad_expert_input_to_capacity = True"),
        ({"moe_latent_size": 16}, "moe_latent_size = 16"),
        ({"expert_tensor_parallel_size": 2}, "expert_tensor_parallel_size = 2"),
        ({"expert_gtp_weight_remat_size": 2}, "expert_gtp_weight_remat_size = 2"),
        ({"moe_expert_rank_capacity_factor": 1.5}, "moe_expert_rank_capacity_factor = 1.5"),
        ({"moe_router_score_function": "sqrtsoftplus"}, "moe_router_score_function = sqrtsoftplus"),
        ({"moe_router_force_biased": 0.5}, "moe_router_force_biased = 0.5"),
        ({"moe_mlp_glu_interleave_size": 32}, "moe_mlp_glu_interleave_size = 32"),
        ({"transformer_impl": "inference_optimized"}, "transformer_impl = inference_optimized"),
        ({"cuda_graph_impl": "full_iteration"}, "cuda_graph_impl = full_iteration"),
        ({"quant_recipe": "recipe"}, "quant_recipe = recipe"),
        ({"batch_invariant_mode": True}, "batch_invariant_mode = True"),
        ({"activation_func_fp8_input_store": True}, "activation_func_fp8_input_store = True"),
        (
            {"fine_grained_activation_offloading": True, "offload_modules": ["attn_norm", "expert_fc1", "moe_act"]},
            "offload_modules = [attn_norm, expert_fc1, moe_act]: nothing inside of the layer is offloaded; leave out "
            "expert_fc1, moe_act",
        ),
        ({"activation_func": torch.tanh}, "activation_func = tanh"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "moe_router_load_balancing_type = sinkhorn"),
        ({"moe_router_load_balancing_type": "quantile_balancing"}, "load_balancing_type = quantile_balancing"),
        ({"tensor_model_parallel_size": 2}, "sequence_parallel = False"),
    ],
)
def test_settings_that_would_not_be_honoured_are_refused(changes: dict[str, Any], named: str) -> None:
    config = transformer_config()
    for name, value in changes.items():
        # Afterwards: not every release has every setting, and some refuse by themselves what others may accept.
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=r"^TransformerConfig\.") as caught:
        moe_config(config, comm="auto", backend="auto")
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_offloading_outside_of_the_layer_is_megatrons_own_affair() -> None:
    moe_config(
        transformer_config(fine_grained_activation_offloading=True, offload_modules=["attn_norm", "mlp_norm"]),
        comm="auto",
        backend="auto",
    )


def _build(rank: int, world: int, changes: dict[str, Any], options: dict[str, Any]) -> str:
    with expert_parallel(world):
        try:
            MegatronEPMoELayer(transformer_config(**changes), **options)
        except (ConfigError, TypeError) as error:
            return str(error)
        return ""


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"between_nodes": "nvshmem"}, "moe.comm_between_nodes = nvshmem: needs moe.comm: nvlink (here auto)"),
        ({}, {"between_nodes": "x"}, "moe.comm_between_nodes = x: must be one of portable, loopback, nvshmem"),
        ({}, {"ranks_per_node": 0}, "moe.comm_ranks_per_node = 0: must be at least 1"),
        ({}, {"phases": {"train": {}}}, "phases: expected an ep_moe.config.PhasesConfig or None, got dict"),
        (
            {"num_moe_experts": 7},
            {},
            "TransformerConfig.num_moe_experts = 7: must be divisible by the expert-parallel size (2, "
            "expert_model_parallel_size)",
        ),
    ],
)
def test_what_the_layer_cannot_be_built_from(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    assert run_ranks(2, _build, changes, options) == [message] * 2


def test_translation() -> None:
    config = transformer_config(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_topk_scaling_factor=2.5,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=1e-4,
        moe_z_loss_coeff=1e-3,
        moe_expert_capacity_factor=1.5,
        moe_token_drop_policy="position",
        moe_router_dtype=None,
    )
    moe = moe_config(config, comm="portable", backend="loop")
    assert (moe.num_experts, moe.top_k, moe.comm) == (EXPERTS, 2, "portable")
    router = moe.router
    assert (router.score_function, router.expert_bias, router.dtype) == ("sigmoid", True, "input")
    assert (router.num_groups, router.group_topk, router.routed_scaling_factor) == (4, 2, 2.5)
    assert (router.aux_loss_coeff, router.seq_aux_loss_coeff, router.z_loss_coeff) == (0.0, 1e-4, 1e-3)
    assert (router.capacity_factor, router.drop_policy) == (1.5, "position")
    assert (moe.experts.activation, moe.experts.backend, moe.experts.ffn_hidden_size) == ("swiglu", "loop", 24)


@pytest.mark.parametrize("kind", [functools.partial, ModuleSpec])
def test_both_kinds_of_specs_are_replaced(kind: Any) -> None:
    """Releases of Megatron differ in the kind they make; they build from both."""
    native = kind(MoELayer, submodules="submodules of a MoELayer")
    ours = replace_moe_layer(native, MegatronEPMoELayer, {"comm": "portable"})
    assert type(ours) is type(native) and module_of(ours) is MegatronEPMoELayer and module_of(native) is MoELayer
    params, old_params = ((s.keywords if kind is functools.partial else s.params) for s in (ours, native))
    assert params["comm"] == "portable" and "comm" not in old_params
    assert submodules_of(ours) == "submodules of a MoELayer"
    assert replace_moe_layer(kind(dict), MegatronEPMoELayer, {}) is None
    assert replace_moe_layer(None, MegatronEPMoELayer, {}) is None
