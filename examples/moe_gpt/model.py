"""The model: Megatron-Core's ``GPTModel`` with our MoE layer, built from our configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ep_moe.config import Config, RouterConfig
from ep_moe.megatron import MegatronEPMoELayer, use_ep_moe

# Ours -> Megatron's activation_func and gated_linear_unit.
_ACTIVATIONS = {
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
    "gelu": (F.gelu, False),
    "relu": (F.relu, False),
    "squared_relu": (squared_relu, False),
}


class Cache(Protocol):
    """Remembers keys and values; see ``decoding.KeyValueCache``."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All keys and values, and which of them each new token may look at."""
        ...


class CausalAttention(nn.Module):
    """Core attention over PyTorch's SDPA, which runs everywhere; Megatron's own module needs a GPU.

    Attributes:
        cache: what came before, while decoding.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.cache: Cache | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[sequence, batch, heads, head_dim]`` each to ``[sequence, batch, heads * head_dim]``."""
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        mask = None
        if self.cache is not None:
            key, value, mask = self.cache.append(key, value)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def build_model(config: Config, device: torch.device) -> GPTModel:
    """Build the model on ``device`` with fp32 parameters.

    Megatron's process groups must exist; the experts are spread over its expert-parallel group. The default CPU
    generator decides the weights, the same on all ranks if they seed it alike.
    """
    model, dense_layers = config.model, config.model.num_dense_layers
    moe_spec = use_ep_moe(
        get_gpt_layer_local_spec(num_experts=config.moe.num_experts, normalization="RMSNorm"),
        phases=config.phases,
        comm=config.moe.comm,
        backend=config.moe.experts.backend,
        precision=config.moe.experts.precision,
        wgrad_precision=config.moe.experts.wgrad_precision,
        ranks_per_node=config.moe.comm_ranks_per_node,
        between_nodes=config.moe.comm_between_nodes,
        comm_timeout_s=config.moe.comm_timeout_s,
        capacity_rows=config.moe.capacity_rows,
    )
    dense_spec = get_gpt_layer_local_spec(num_experts=None, normalization="RMSNorm")
    for spec in (moe_spec, dense_spec):
        spec.submodules.self_attention.submodules.core_attention = CausalAttention
    layers = [dense_spec] * dense_layers + [moe_spec] * (model.num_layers - dense_layers)
    block = TransformerBlockSubmodules(layer_specs=layers, layer_norm=WrappedTorchNorm)
    gpt = GPTModel(
        transformer_config(config),
        block,
        vocab_size=model.vocab_size,
        max_sequence_length=config.data.sequence_length,
        # Megatron's rotary embedding needs a GPU.
        position_embedding_type="learned_absolute",
    )
    return gpt.to(device)


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron's configuration of the same model."""
    model, moe, router = config.model, config.moe, config.moe.router
    activation, gated = _ACTIVATIONS[moe.experts.activation]
    losses, coefficients = _balance_losses(router)
    recompute = moe.experts.recompute_activation
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        normalization="RMSNorm",
        init_method_std=model.init_std,
        activation_func=activation,
        gated_linear_unit=gated,
        add_bias_linear=False,
        bias_activation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        num_moe_experts=moe.num_experts,
        moe_ffn_hidden_size=moe.experts.ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.shared_experts.ffn_hidden_size or None,
        moe_shared_expert_gate=moe.shared_experts.gate,
        moe_token_dispatcher_type="alltoall",
        moe_router_topk=moe.top_k,
        moe_router_score_function=router.score_function,
        moe_router_pre_softmax=router.pre_softmax,
        moe_router_num_groups=router.num_groups,
        moe_router_group_topk=router.group_topk,
        moe_router_topk_scaling_factor=router.routed_scaling_factor,
        moe_router_enable_expert_bias=router.expert_bias,
        moe_router_bias_update_rate=router.expert_bias_update_rate,
        moe_router_load_balancing_type=losses,
        moe_aux_loss_coeff=coefficients,
        moe_z_loss_coeff=router.z_loss_coeff or None,
        moe_input_jitter_eps=router.input_jitter or None,
        moe_router_dtype=None if router.dtype == "input" else router.dtype,
        moe_expert_capacity_factor=router.capacity_factor,
        moe_token_drop_policy=router.drop_policy,
        moe_router_force_load_balancing=router.force_balance,
        recompute_granularity="selective" if recompute else None,
        recompute_modules=["moe_act"] if recompute else None,
        moe_grouped_gemm=True,  # without it Megatron refuses to recompute these; it chooses none of our GEMMs
    )


def moe_layers(model: nn.Module) -> Iterator[MegatronEPMoELayer]:
    """The MoE layers of a model, first to last."""
    for module in model.modules():
        if isinstance(module, MegatronEPMoELayer):
            yield module


def _balance_losses(router: RouterConfig) -> tuple[list[str], list[float]]:
    """The balance losses in use, as Megatron's two parallel lists."""
    weights = {
        "aux_loss": router.aux_loss_coeff,
        "seq_aux_loss": router.seq_aux_loss_coeff,
        "global_aux_loss": router.global_aux_loss_coeff,
    }
    used = [(name, weight) for name, weight in weights.items() if weight] or [("none", 0.0)]
    return [name for name, _ in used], [weight for _, weight in used]
