"""``TopKRouter`` with what Megatron expects of a router: its loss scale, its loss log, its replay, its attributes."""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, save_to_aux_losses_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ep_moe.config import MoEConfig
from ep_moe.router import AuxLoss, TopKRouter


class MegatronRouter(TopKRouter):
    """Routes like :class:`~ep_moe.router.TopKRouter`.

    Megatron's ``finalize_model_grads`` finds ``expert_bias`` and ``local_tokens_per_expert`` by name and updates the
    bias itself; with Megatron's optimizer there is no need to call ``update_expert_bias``.
    """

    def __init__(self, config: TransformerConfig, moe: MoEConfig, groups: ProcessGroupCollection, **kind: Any) -> None:
        """Build the router.

        Args:
            config: Megatron's configuration.
            moe: its MoE part, translated.
            groups: Megatron's process groups; ``tp_cp`` share a micro-batch, ``tp_dp_cp`` the global batch.
            kind: device and dtype of the weight.
        """
        super().__init__(
            config.hidden_size,
            moe,
            init_method=config.init_method,
            micro_batch_group=groups.tp_cp,
            global_batch_group=groups.tp_dp_cp,
            attach_loss=self._attach_loss,
            **kind,
        )
        self.layer_number: int | None = None
        self._config = config
        # Megatron sums the gradients of such parameters over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if config.moe_enable_routing_replay:
            self._use_megatron_replay()

    def set_layer_number(self, layer_number: int) -> None:
        """Remember which line of Megatron's loss log is this layer's."""
        self.layer_number = layer_number

    def reset_global_aux_loss_tracker(self) -> None:
        """Megatron's name for :meth:`~ep_moe.router.TopKRouter.reset_global_balance`."""
        self.reset_global_balance()

    def _use_megatron_replay(self) -> None:
        # Imported here: older versions of Megatron have no replay.
        from megatron.core.transformer.moe.router_replay import RouterReplay

        replay = RouterReplay()
        self.router_replay = replay
        self.select_experts = functools.partial(replay.get_replay_topk, default_compute_topk=self.select_experts)

    def _attach_loss(self, activation: Tensor, loss: AuxLoss) -> Tensor:
        """Attach by Megatron's scaler, so that its gradient scaling applies, and log to Megatron's tracker."""
        layers = self._config.num_layers + (self._config.mtp_num_layers or 0)
        save_to_aux_losses_tracker(
            loss.name,
            loss.value / loss.coefficient,
            self.layer_number,
            layers,
            reduce_group=loss.group,
            reduce_group_has_dp=loss.name == "global_load_balancing_loss",
        )
        value = loss.value
        if self._config.calculate_per_token_loss:
            # Megatron then divides all gradients by the number of tokens, which this loss already did.
            value = value * loss.valid_tokens
        return MoEAuxLossAutoScaler.apply(activation, value)
