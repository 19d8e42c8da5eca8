"""Small Megatron models that build and run on a CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ep_moe.megatron import use_ep_moe
from ep_moe.megatron.releases import get_moe_metrics_tracker

HIDDEN, FFN, EXPERTS, VOCAB = 32, 24, 8, 64


class CausalAttention(nn.Module):
    """Core attention over PyTorch's SDPA; Megatron's own needs a GPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


@contextlib.contextmanager
def expert_parallel(size: int) -> Iterator[None]:
    """Megatron's process groups with ``size`` expert-parallel ranks, formed once a process.

    Each of the twenty groups keeps threads of gloo for as long as the process lives, so tests share them.
    """
    groups, without = vars(parallel_state), dict(vars(parallel_state))
    if size not in _groups:
        parallel_state.initialize_model_parallel(expert_model_parallel_size=size)
        _groups[size] = {name: value for name, value in groups.items() if value is not without.get(name)}
    groups.update(_groups[size])
    try:
        yield
    finally:
        groups.update({name: without[name] for name in _groups[size]})


_groups: dict[int, dict[str, Any]] = {}


def transformer_config(**changes: Any) -> TransformerConfig:
    """A two-layer MoE configuration."""
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": FFN,
        "moe_aux_loss_coeff": 0.01,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.2,
    }
    if parallel_state.model_parallel_is_initialized():
        settings["expert_model_parallel_size"] = parallel_state.get_expert_model_parallel_world_size()
    return TransformerConfig(**{**settings, **changes})


def gpt_model(config: TransformerConfig, **options: Any) -> GPTModel:
    """A ``GPTModel`` with our layer, also in multi-token prediction if the configuration has it."""
    return _gpt_model(config, use_ep_moe(get_gpt_layer_local_spec(num_experts=config.num_moe_experts), **options))


def megatrons_gpt_model(config: TransformerConfig) -> GPTModel:
    """The same model with Megatron's own layer."""
    return _gpt_model(config, get_gpt_layer_local_spec(num_experts=config.num_moe_experts))


def _gpt_model(config: TransformerConfig, spec: Any) -> GPTModel:
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    prediction = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if config.mtp_num_layers else None
    return GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=16,
        position_embedding_type="learned_absolute",
        mtp_block_spec=prediction,
    )


def batch(seed: int, sequences: int = 2) -> tuple[Tensor, Tensor]:
    """Random tokens and positions ``[sequences, 16]``."""
    tokens = torch.randint(VOCAB, (sequences, 16), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.arange(16).expand(sequences, 16)


def module_of(mlp: Any) -> Any:
    """What the MLP of a layer spec builds: the spec is a ``functools.partial`` in newer releases of Megatron."""
    return mlp.func if isinstance(mlp, functools.partial) else mlp.module


def submodules_of(mlp: Any) -> Any:
    """The submodules of that spec."""
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules


def take_logged_losses() -> dict[str, list[float]]:
    """The lines of Megatron's loss log by name, this rank's part; empties the log."""
    if get_moe_metrics_tracker is not None:
        log = get_moe_metrics_tracker().metrics
        found = {name: line.values.tolist() for name, line in log.items()}
    else:
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        log = get_moe_layer_wise_logging_tracker()
        found = {name: line["values"].tolist() for name, line in log.items()}
    log.clear()
    return found
