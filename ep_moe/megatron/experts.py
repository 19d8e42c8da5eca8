"""``GroupedExperts`` with Megatron's checkpoints: every layout loads, every layout can be written.

Megatron stores the same expert weights in three ways. With ``L`` local experts, hidden size ``H``, first
projection ``F1`` wide and second ``F`` deep:

====================  ==============================================================================
``sequential``        ``local_experts.{i}.linear_fc1.weight [F1, H]``, ``...linear_fc2.weight [H, F]``
``grouped``           ``weight1 [H, L * F1]``, ``weight2 [L * F, H]``
``te_grouped``        ``linear_fc1.weight{i} [F1, H]``, ``linear_fc2.weight{i} [H, F]``, or, with
                      ``moe_single_grouped_weight``, ``linear_fc1.weight`` and ``linear_fc2.weight`` with all of them
ours (``native``)     ``fc1_weight [L, F1, H]``, ``fc2_weight [L, H, F]``
====================  ==============================================================================

Distributed checkpoints name weights by global expert (``experts.linear_fc1.weight``), the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from torch import Tensor

from ep_moe.experts import GroupedExperts
from ep_moe.experts.deferred import DeferredGradients, WeightGradientTask
from ep_moe.experts.grouped import autocast

Layout = Literal["native", "sequential", "grouped", "te_grouped"]

_NAMES = (("fc1_weight", "linear_fc1", "weight1"), ("fc2_weight", "linear_fc2", "weight2"))


def to_native(state: Mapping[str, Tensor], prefix: str, num_local_experts: int) -> dict[str, Tensor]:
    """Rewrite the expert weights under ``prefix`` from whichever layout they have to ours.

    Args:
        state: a state dict; left as it is.
        prefix: of the experts module, with its dot.
        num_local_experts: experts of this rank.

    Returns:
        A new state dict: entries elsewhere unchanged, ``_extra_state`` entries of Megatron's experts left out.
    """
    out = {name: value for name, value in state.items() if not _is_extra_state(name, prefix)}
    for native, linear, grouped in _NAMES:
        sequential = [f"{prefix}local_experts.{i}.{linear}.weight" for i in range(num_local_experts)]
        te = [f"{prefix}{linear}.weight{i}" for i in range(num_local_experts)]
        for names in (sequential, te):
            if all(name in out for name in names):
                out[f"{prefix}{native}"] = torch.stack([out.pop(name) for name in names])
        if f"{prefix}{linear}.weight" in out:
            weight = out.pop(f"{prefix}{linear}.weight")
            out[f"{prefix}{native}"] = weight.reshape(num_local_experts, -1, weight.shape[-1])
        if f"{prefix}{grouped}" in out:
            weight = out.pop(f"{prefix}{grouped}")
            hidden_first = native == "fc1_weight"
            shape = (
                (num_local_experts, weight.shape[0], -1) if hidden_first else (num_local_experts, -1, weight.shape[1])
            )
            # Megatron views the stored matrix as [L, in, out]; ours is [L, out, in].
            out[f"{prefix}{native}"] = weight.reshape(shape).transpose(1, 2).contiguous()
    return out


def from_native(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Rewrite all expert weights of a whole model's state dict from our layout to one of Megatron's.

    Args:
        state: of a model with :class:`MegatronExperts` anywhere in it.
        layout: ``sequential``, ``grouped``, ``te_grouped``, or ``native`` for a plain copy.

    Raises:
        ValueError: for an unknown layout.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout: expected one of {', '.join(get_args(Layout))}, got {layout!r}")
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        for native, linear, grouped in _NAMES:
            if name.endswith(native) and layout != "native":
                prefix = name[: -len(native)]
                out.update(_split(value, prefix, linear, grouped, layout))
                break
        else:
            out[name] = value
    return out


def _split(weight: Tensor, prefix: str, linear: str, grouped: str, layout: Layout) -> dict[str, Tensor]:
    if layout == "sequential":
        return {f"{prefix}local_experts.{i}.{linear}.weight": w for i, w in enumerate(weight.unbind())}
    if layout == "te_grouped":
        return {f"{prefix}{linear}.weight{i}": w for i, w in enumerate(weight.unbind())}
    by_input = weight.transpose(1, 2).contiguous()
    shape = (by_input.shape[1], -1) if linear == "linear_fc1" else (-1, by_input.shape[2])
    return {f"{prefix}{grouped}": by_input.view(shape)}


def _is_extra_state(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name.endswith("_extra_state")


class MegatronExperts(GroupedExperts):
    """Routed experts as a Megatron model stores, shards and reduces them."""

    def __init__(
        self,
        *args: Any,
        ep_rank: int,
        ep_size: int,
        expert_data_parallel_rank: int,
        delay_wgrad: bool = False,
        **kwargs: Any,
    ) -> None:
        """As :class:`~ep_moe.experts.GroupedExperts`, plus what Megatron's schedules and checkpoints need.

        Args:
            args: of ``GroupedExperts``.
            ep_rank: of this rank in the expert-parallel group.
            ep_size: of that group.
            expert_data_parallel_rank: this rank among those that hold the same experts.
            delay_wgrad: leave weight gradients to :meth:`backward_dw`.
            kwargs: of ``GroupedExperts``.
        """
        super().__init__(*args, **kwargs)
        self.ep_rank = ep_rank
        self.ep_size = ep_size
        self.expert_data_parallel_rank = expert_data_parallel_rank
        self.delay_wgrad = delay_wgrad
        self._delayed: list[tuple[int, WeightGradientTask]] = []
        self._gradient_hooks: list[Callable[[], None]] = []
        # By the first mark Megatron's DDP reduces gradients over the expert data-parallel group only; by the second it
        # hooks parameters through the method below, for their gradients come after the backward pass.
        self.mark_parameters(allreduce=ep_size == 1, skip_backward_post_hook=delay_wgrad)

    def defer_gradients(self) -> DeferredGradients:
        """As in ``GroupedExperts``; with ``delay_wgrad`` all passes leave all gradients in one place."""
        if not self.delay_wgrad:
            return super().defer_gradients()
        return DeferredGradients(*autocast(self.fc1_weight, self.fc2_weight), tasks=self._delayed)

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """Call ``hook``, of one parameter, whenever :meth:`backward_dw` is done; Megatron's DDP calls this."""
        self._gradient_hooks.append(hook)

    @torch.no_grad()
    def backward_dw(self) -> None:
        """With ``delay_wgrad`` compute the weight gradients of all backward passes since the last call.

        They are added to ``grad``, or to Megatron's ``main_grad`` where there is one.
        """
        if not self._delayed:
            return
        weights = (self.fc1_weight, self.fc2_weight)
        for weight, gradient in zip(weights, DeferredGradients(*weights, tasks=self._delayed).compute(), strict=True):
            if gradient is not None:
                gradient = gradient.to(weight.dtype)  # computed in another under autocast
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        for hook in self._gradient_hooks:
            hook()
        for weight in weights:
            if getattr(weight, "grad_added_to_main_grad", False):
                weight.grad = None  # has no meaning then; it was there for the hooks

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        native = to_native(state_dict, prefix, self.num_local_experts)
        # In place, because the caller looks in this very dict for keys nobody asked for.
        for name in state_dict.keys() - native.keys():
            del state_dict[name]
        state_dict.update(native)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Shards named by global expert, interchangeable with those of Megatron's own expert modules.

        Args:
            prefix: of this module, with its dot.
            sharded_offsets: sharding already applied by enclosing modules.
            metadata: with ``singleton_local_shards`` each expert gets a key of its own.
        """
        singleton = bool((metadata or {}).get("singleton_local_shards", False))
        gated = self.config.activation in ("swiglu", "geglu")
        replica_id = (0, 0, self.expert_data_parallel_rank)
        out: ShardedStateDict = {}
        for native, linear, _ in _NAMES:
            chunks = 2 if gated and native == "fc1_weight" else 1

            def build(
                key: str, tensor: Tensor, replica_id: Any, flattened_range: Any = None, chunks: int = chunks
            ) -> list[ShardedTensor]:
                return self._shards(key, tensor, replica_id, sharded_offsets, chunks, singleton)

            def merge(shards: list[Tensor], chunks: int = chunks) -> Tensor:
                return _merge(shards, chunks, singleton)

            parameter = getattr(self, native)
            key = f"{prefix}experts.{linear}.weight"
            out[f"{prefix}{native}"] = ShardedTensorFactory(key, parameter, build, merge, replica_id)
        return out

    def _shards(
        self,
        key: str,
        weight: Tensor,
        replica_id: Any,
        sharded_offsets: tuple[Any, ...],
        chunks: int,
        singleton: bool,
    ) -> list[ShardedTensor]:
        """Gate and up projection are separate pieces of one global tensor (or keys of their own: ``_w``, ``_v``)."""
        axes = len(sharded_offsets)
        pieces = weight.detach().chunk(chunks, dim=1)
        if not singleton:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    piece.contiguous(),
                    *sharded_offsets,
                    (axes, self.ep_rank, self.ep_size),
                    (axes + 1, place, chunks),
                    replica_id=replica_id,
                    prepend_axis_num=axes,
                )
                for place, piece in enumerate(pieces)
            ]
        suffixes = ("_w", "_v") if chunks == 2 else ("",)
        stem = key.split("experts.linear")[0]
        return [
            ShardedTensor.from_rank_offsets(
                key.replace(f"{stem}experts.", f"{stem}experts.{self.first_expert + i}.") + suffix,
                expert.contiguous(),
                *sharded_offsets,
                replica_id=replica_id,
                prepend_axis_num=axes,
            )
            for suffix, piece in zip(suffixes, pieces, strict=True)
            for i, expert in enumerate(piece)
        ]


def _merge(shards: list[Tensor], chunks: int, singleton: bool) -> Tensor:
    if not singleton:
        return torch.cat(shards, dim=1)
    experts = len(shards) // chunks
    return torch.cat([torch.stack(shards[place * experts : (place + 1) * experts]) for place in range(chunks)], dim=1)
