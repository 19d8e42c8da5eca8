"""From Megatron's ``TransformerConfig`` to ours, refusing by name what we do not implement."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer.transformer_config import TransformerConfig

from ep_moe.config import PHASES, ConfigError, ExpertsConfig, MoEConfig, PhasesConfig, RouterConfig

Activation = Literal["swiglu", "geglu", "gelu", "relu", "squared_relu"]
Backend = Literal["auto", "native", "grouped_mm", "loop", "te"]
Precision = Literal["input", "fp8"]
Comm = Literal["auto", "portable", "nvlink"]
BetweenNodes = Literal["portable", "loopback", "nvshmem"]

_ACTIVATIONS: dict[tuple[Any, bool], Activation] = {
    (F.silu, True): "swiglu",
    (F.gelu, True): "geglu",
    (F.gelu, False): "gelu",
    (F.relu, False): "relu",
    (squared_relu, False): "squared_relu",
}

# Settings that would change the result and that EPMoELayer does not implement: key, values that are fine, advice.
_UNSUPPORTED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("add_bias_linear", (False,), "the experts have no biases"),
    ("moe_apply_probs_on_input", (False,), "routing weights are applied in the activation"),
    ("moe_latent_size", (None,), "latent projections are not implemented"),
    ("moe_pad_expert_input_to_capacity", (False,), "rows are never padded to the capacity"),
    ("expert_tensor_parallel_size", (1, None), "experts are not split over tensor-parallel ranks"),
    ("expert_gtp_weight_remat_size", (1,), "experts are not split over other ranks either"),
    ("moe_expert_rank_capacity_factor", (None,), "capacity is per expert, not per rank"),
    ("moe_router_score_function", ("softmax", "sigmoid"), "other score functions are not implemented"),
    ("moe_router_force_biased", (None,), "random biases of experts are not implemented"),
    ("moe_mlp_glu_interleave_size", (None,), "gate and up projection are not interleaved"),
    ("transformer_impl", ("transformer_engine", "local"), "phases of the layer take the place of Megatron's inference"),
    ("fp8", (None, False), "experts compute in the dtype of their parameters"),
    ("fp4", (None, False), "experts compute in the dtype of their parameters"),
    ("cuda_graph_impl", (None, "none"), "the dispatch reads sizes on the host"),
    ("quant_recipe", (None,), "experts compute in the dtype of their parameters"),
    ("batch_invariant_mode", (False,), "results may depend on which tokens are computed together"),
    ("activation_func_fp8_input_store", (False,), "inputs of activations are kept in the dtype of the rows"),
    ("activation_func_clamp_value", (None,), "clamped activations are not implemented"),
    ("glu_linear_offset", (0, 0.0), "offset activations are not implemented"),
)

# Choices of ``offload_modules`` that lie inside of the layer, in any release.
_OFFLOADED_INSIDE = ("expert_fc1", "moe_act", "fused_group_mlp")

_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")


def moe_config(
    config: TransformerConfig,
    *,
    comm: Comm,
    backend: Backend,
    precision: Precision = "input",
    wgrad_precision: Precision = "input",
    ranks_per_node: int | None = None,
    between_nodes: BetweenNodes = "portable",
    comm_timeout_s: float = 30.0,
    capacity_rows: int | None = None,
) -> MoEConfig:
    """Translate the MoE part of a Megatron configuration.

    Shared experts are not part of it: the adapter keeps Megatron's own module for them.

    Args:
        config: Megatron's configuration.
        comm: communicator, as key ``moe.comm``.
        backend: grouped GEMM, as key ``moe.experts.backend``.
        precision: of its products, as key ``moe.experts.precision``.
        wgrad_precision: of the gradients of weights, as key ``moe.experts.wgrad_precision``.
        ranks_per_node: as key ``moe.comm_ranks_per_node``.
        between_nodes: as key ``moe.comm_between_nodes``.
        comm_timeout_s: how long a peer is waited for, as key ``moe.comm_timeout_s``.
        capacity_rows: rows to make room for, as key ``moe.capacity_rows``.

    Raises:
        ConfigError: naming the setting that cannot be honoured.
    """
    check_supported(config)
    return MoEConfig(
        num_experts=config.num_moe_experts,
        top_k=config.moe_router_topk,
        comm=comm,
        comm_ranks_per_node=ranks_per_node,
        comm_between_nodes=between_nodes,
        comm_timeout_s=comm_timeout_s,
        capacity_rows=capacity_rows,
        router=_router_config(config),
        experts=ExpertsConfig(
            ffn_hidden_size=config.moe_ffn_hidden_size,
            activation=_activation(config),
            backend=backend,
            precision=precision,
            wgrad_precision=wgrad_precision,
            recompute_activation=config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules,
        ),
    )


def check_supported(config: TransformerConfig) -> None:
    """Raise :class:`ConfigError` for the first setting whose meaning the layer would not honour."""
    for name, fine, advice in _UNSUPPORTED:
        # Settings come and go between Megatron versions; one that is absent cannot be in use.
        value = getattr(config, name, fine[0])
        if value not in fine:
            raise ConfigError(f"TransformerConfig.{name} = {value}: {advice}; EPMoELayer needs {fine[0]}")
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        raise ConfigError(
            "TransformerConfig.sequence_parallel = False: tensor-parallel ranks would all dispatch the same tokens; "
            "EPMoELayer needs True where tensor_model_parallel_size > 1"
        )
    if getattr(config, "fine_grained_activation_offloading", False):
        inside = [name for name in config.offload_modules or [] if name in _OFFLOADED_INSIDE]
        if inside:
            raise ConfigError(
                f"TransformerConfig.offload_modules = [{', '.join(config.offload_modules)}]: nothing inside of the "
                f"layer is offloaded; leave out {', '.join(inside)}"
            )
    if config.overlap_moe_expert_parallel_comm and config.moe_token_dispatcher_type == "flex":
        raise ConfigError(
            "TransformerConfig.moe_token_dispatcher_type = flex: Megatron's overlapped schedule reaches into its own "
            "flex dispatcher; set alltoall (the setting has no other effect on EPMoELayer)"
        )


def honour_overlap(config: TransformerConfig, phases: PhasesConfig) -> PhasesConfig:
    """``phases`` with the strategies that Megatron's configuration asks for as well.

    Raises:
        ConfigError: for strategies that Megatron's overlapped schedule leaves no place for.
    """
    if config.overlap_moe_expert_parallel_comm and phases.train.overlap:
        raise ConfigError(
            f"phases.train.overlap = [{', '.join(phases.train.overlap)}]: under overlap_moe_expert_parallel_comm "
            "Megatron's schedule places the stages; leave it empty (and set TransformerConfig.delay_wgrad_compute)"
        )
    for setting in ("overlap_moe_expert_parallel_comm", "delay_wgrad_compute"):
        if getattr(config, setting, False) and phases.train.expert_chunks > 1:
            raise ConfigError(
                f"phases.train.expert_chunks = {phases.train.expert_chunks}: must be 1 under {setting}, where "
                "Megatron's schedule places the stages"
            )
    if config.moe_shared_expert_overlap:
        phases = _with_overlap(phases, PHASES, "shared_experts")
    # A setting of newer releases.
    if getattr(config, "overlap_dispatch_backward_with_experts_wgrad", False):
        phases = _with_overlap(phases, ("train",), "wgrad")
    return phases


def _with_overlap(
    phases: PhasesConfig, names: Sequence[str], strategy: Literal["shared_experts", "wgrad"]
) -> PhasesConfig:
    """``phases`` with a strategy added to those of the phases named."""
    return dataclasses.replace(
        phases,
        **{
            name: dataclasses.replace(phase, overlap=tuple(dict.fromkeys((*phase.overlap, strategy))))
            for name, phase in ((name, getattr(phases, name)) for name in names)
        },
    )


def _router_config(config: TransformerConfig) -> RouterConfig:
    types = config.moe_router_load_balancing_type
    types = types if isinstance(types, list) else [types]
    coefficients = config.moe_aux_loss_coeff
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients] * len(types)
    for name in types:
        if name not in (*_LOSSES, "none"):
            raise ConfigError(
                f"TransformerConfig.moe_router_load_balancing_type = {name}: expected one of {', '.join(_LOSSES)}, none"
            )
    weights = dict(zip(types, coefficients, strict=True))
    return RouterConfig(
        score_function=config.moe_router_score_function,
        pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups if config.moe_router_group_topk else None,
        group_topk=config.moe_router_group_topk or None,
        routed_scaling_factor=config.moe_router_topk_scaling_factor or 1.0,
        expert_bias=config.moe_router_enable_expert_bias,
        expert_bias_update_rate=config.moe_router_bias_update_rate,
        aux_loss_coeff=weights.get("aux_loss", 0.0),
        seq_aux_loss_coeff=weights.get("seq_aux_loss", 0.0),
        global_aux_loss_coeff=weights.get("global_aux_loss", 0.0),
        z_loss_coeff=config.moe_z_loss_coeff or 0.0,
        input_jitter=config.moe_input_jitter_eps or 0.0,
        dtype=cast(Literal["input", "fp32", "fp64"], config.moe_router_dtype or "input"),
        capacity_factor=config.moe_expert_capacity_factor,
        drop_policy=config.moe_token_drop_policy,
        force_balance=config.moe_router_force_load_balancing,
    )


def _activation(config: TransformerConfig) -> Activation:
    found = _ACTIVATIONS.get((config.activation_func, config.gated_linear_unit))
    if found is None:
        name = getattr(config.activation_func, "__name__", config.activation_func)
        raise ConfigError(
            f"TransformerConfig.activation_func = {name} with gated_linear_unit = {config.gated_linear_unit}: "
            f"expected one of {', '.join(_ACTIVATIONS.values())}"
        )
    return found
