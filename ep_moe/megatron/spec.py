"""Putting our layer into a Megatron model spec."""

from __future__ import annotations

import copy
from typing import Any

from ep_moe.config import PhasesConfig
from ep_moe.megatron.layer import MegatronEPMoELayer
from ep_moe.megatron.releases import replace_moe_layer
from ep_moe.megatron.translate import Backend, BetweenNodes, Comm, Precision


def use_ep_moe(
    spec: Any,
    *,
    phases: PhasesConfig | None = None,
    comm: Comm = "auto",
    backend: Backend = "auto",
    precision: Precision = "input",
    wgrad_precision: Precision = "input",
    ranks_per_node: int | None = None,
    between_nodes: BetweenNodes = "portable",
    comm_timeout_s: float = 30.0,
    capacity_rows: int | None = None,
) -> Any:
    """Replace Megatron's ``MoELayer`` by ours in a layer spec, a block of layer specs or the spec of a hybrid stack.

    Args:
        spec: what ``get_gpt_layer_local_spec``, ``get_gpt_layer_with_transformer_engine_spec`` or
            ``get_gpt_decoder_block_spec`` return, or a ``hybrid_stack_spec``; left as it is. Give the result to
            ``get_gpt_mtp_block_spec``, and multi-token prediction has our layer too.
        phases: how tokens travel in each phase; the defaults of ``ep_moe.config.PhasesConfig`` if ``None``.
        comm: communicator (key ``moe.comm``).
        backend: grouped GEMM (key ``moe.experts.backend``).
        precision: of its products (key ``moe.experts.precision``).
        wgrad_precision: of the gradients of weights (key ``moe.experts.wgrad_precision``).
        ranks_per_node: key ``moe.comm_ranks_per_node``.
        between_nodes: key ``moe.comm_between_nodes``.
        comm_timeout_s: key ``moe.comm_timeout_s``.
        capacity_rows: key ``moe.capacity_rows``.

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
        "wgrad_precision": wgrad_precision,
        "ranks_per_node": ranks_per_node,
        "between_nodes": between_nodes,
        "comm_timeout_s": comm_timeout_s,
        "capacity_rows": capacity_rows,
    }
    replaced, count = _replace(spec, params)
    if count == 0:
        raise ValueError(
            "spec: expected the spec of a layer, block or stack with a MoELayer; "
            "pass num_experts to the function that builds it"
        )
    return replaced


def _replace(spec: Any, params: dict[str, Any]) -> tuple[Any, int]:
    """The spec with every ``MoELayer`` replaced, and how many there were."""
    if hasattr(spec, "layer_specs"):
        block = copy.copy(spec)
        results = [_replace(layer, params) for layer in spec.layer_specs]
        block.layer_specs = [layer for layer, _ in results]
        return block, sum(count for _, count in results)
    submodules: Any = getattr(spec, "submodules", None)
    if hasattr(submodules, "moe_layer"):
        inside, count = _replace(submodules.moe_layer, params)
        return _with_submodule(spec, "moe_layer", inside), count
    mlp = replace_moe_layer(getattr(submodules, "mlp", None), MegatronEPMoELayer, params)
    return (spec, 0) if mlp is None else (_with_submodule(spec, "mlp", mlp), 1)


def _with_submodule(spec: Any, name: str, value: Any) -> Any:
    """A copy of ``spec`` with another submodule."""
    changed = copy.copy(spec)
    changed.submodules = copy.copy(spec.submodules)
    setattr(changed.submodules, name, value)
    return changed
