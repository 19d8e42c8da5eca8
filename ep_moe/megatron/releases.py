"""What differs between releases of Megatron-Core, told by what the installed one offers, never by its number.

Everything else in this package is the same for all releases it supports (from 0.16 on).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

try:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
except ImportError:  # the log was a function
    from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

    get_moe_metrics_tracker = None


def replace_moe_layer(mlp: Any, layer: Callable[..., MoELayer], params: dict[str, Any]) -> Any | None:
    """Have the MLP of a transformer layer's spec build ``layer`` where it builds Megatron's ``MoELayer``.

    Args:
        mlp: ``submodules.mlp`` of the spec: a ``ModuleSpec``, or in newer releases a ``functools.partial``; left as
            it is.
        layer: takes the arguments of ``MoELayer``.
        params: keyword arguments for it, besides those in ``mlp``.

    Returns:
        A new spec of the same kind, or None if ``mlp`` builds something else.
    """
    if isinstance(mlp, functools.partial) and mlp.func is MoELayer:
        return functools.partial(layer, *mlp.args, **{**mlp.keywords, **params})
    if isinstance(mlp, ModuleSpec) and mlp.module is MoELayer:
        replaced = copy.copy(mlp)
        replaced.module = layer
        replaced.params = {**mlp.params, **params}
        return replaced
    return None


def log_aux_loss(
    name: str,
    value: Tensor,
    layer_number: int | None,
    num_layers: int,
    *,
    sum_over: dist.ProcessGroup | None,
    average_over: dist.ProcessGroup | None,
    average_over_data_parallel: bool,
) -> None:
    """Add a loss to its layer's line in Megatron's log, which reduces it between ranks when it reports.

    Args:
        name: of the loss.
        value: this rank's part of it, without its coefficient; 0-d.
        layer_number: from 1; None for a layer that is not logged.
        num_layers: lines in the log, those of multi-token prediction included.
        sum_over: ranks whose values add up to the loss.
        average_over: ranks that each have a value of their own.
        average_over_data_parallel: whether to average over data-parallel ranks besides.
    """
    if get_moe_metrics_tracker is not None:
        get_moe_metrics_tracker().record(
            name,
            value,
            layer_number,
            num_layers,
            reduce_group=sum_over,
            avg_group=average_over,
            needs_dp_avg=average_over_data_parallel,
        )
    else:
        save_to_aux_losses_tracker(
            name,
            value,
            layer_number,
            num_layers,
            reduce_group=sum_over,
            avg_group=average_over,
            reduce_group_has_dp=not average_over_data_parallel,
        )
