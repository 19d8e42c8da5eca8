"""Putting our layer into a Megatron model spec."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec

from ep_moe.config import PhasesConfig
from ep_moe.megatron.layer import MegatronEPMoELayer
from ep_moe.megatron.translate import Backend, BetweenNodes, Comm, Precision


def use_ep_moe(
    spec: Any,
    *,
    phases: PhasesConfig | None = None,
    comm: Comm = "auto",
    backend: Backend = "auto",
    precision: Precision = "input",
    ranks_per_node: int | None = None,
    between_nodes: BetweenNodes = "portable",
) -> Any:
    """Replace Megatron's ``MoELayer`` by ours in a layer spec or in a block of layer specs.

    Args:
        spec: what ``get_gpt_layer_local_spec``, ``get_gpt_layer_with_transformer_engine_spec`` or
            ``get_gpt_decoder_block_spec`` return; left as it is.
        phases: how tokens travel in each phase; the defaults of ``ep_moe.config.PhasesConfig`` if ``None``.
        comm: communicator (key ``moe.comm``).
        backend: grouped GEMM (key ``moe.experts.backend``).
        precision: of its products (key ``moe.experts.precision``).
        ranks_per_node: key ``moe.comm_ranks_per_node``.
        between_nodes: key ``moe.comm_between_nodes``.

    Returns:
        A spec of the same kind. Dense layers in it are unchanged.

    Raises:
        ValueError: if the spec holds no MoE layer.
    """
    params = {
        "phases": phases,
        "comm": comm,
        "backend": backend,
        "precision": precision,
        "ranks_per_node": ranks_per_node,
        "between_nodes": between_nodes,
    }
    replaced, count = _replace(spec, params)
    if count == 0:
        raise ValueError(
            "spec: expected a layer spec or block spec with a MoELayer; pass num_experts to the function that builds it"
        )
    return replaced


def _replace(spec: Any, params: dict[str, Any]) -> tuple[Any, int]:
    """The spec with every ``MoELayer`` replaced, and how many there were."""
    if hasattr(spec, "layer_specs"):
        block = copy.copy(spec)
        results = [_replace(layer, params) for layer in spec.layer_specs]
        block.layer_specs = [layer for layer, _ in results]
        return block, sum(count for _, count in results)
    mlp = getattr(getattr(spec, "submodules", None), "mlp", None)
    if not isinstance(mlp, ModuleSpec) or mlp.module is not MoELayer:
        return spec, 0
    layer = copy.copy(spec)
    layer.submodules = copy.copy(spec.submodules)
    layer.submodules.mlp = copy.copy(mlp)
    layer.submodules.mlp.module = MegatronEPMoELayer
    layer.submodules.mlp.params = {**mlp.params, **params}
    return layer, 1
