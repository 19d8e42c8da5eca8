"""``TopKRouter`` with what Megatron expects of a router: its loss scale, its loss log, its replay, its attributes."""

from __future__ import annotations

import functools
from typing import Any

from megatron.core import utils as megatron_utils
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ep_moe.config import MoEConfig
from ep_moe.megatron.releases import log_aux_loss
from ep_moe.router import AuxLoss, TopKRouter


class MegatronRouter(TopKRouter):
    """Routes like :class:`~ep_moe.router.TopKRouter`.

    Megatron's ``finalize_model_grads`` finds ``expert_bias`` and ``local_tokens_per_expert`` by name and updates the
    bias itself; with Megatron's optimizer there is no need to call ``update_expert_bias``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        moe: MoEConfig,
        groups: ProcessGroupCollection,
        *,
        is_mtp_layer: bool = False,
        **kind: Any,
    ) -> None:
        """Build the router.

        Args:
            config: Megatron's configuration.
            moe: its MoE part, translated.
            groups: Megatron's process groups; ``tp_cp`` share a micro-batch, ``tp_dp_cp`` the global batch.
            is_mtp_layer: whether its layer is part of multi-token prediction.
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
        self.is_mtp_layer = is_mtp_layer
        self._config = config
        self._ranks_of_micro_batch = megatron_utils.get_pg_size(groups.tp_cp)
        # Megatron sums the gradients of such parameters over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if config.moe_enable_routing_replay:
            self._use_megatron_replay()

    def set_layer_number(self, layer_number: int) -> None:
        """Remember which line of Megatron's loss log is this layer's, and tell a replay."""
        self.layer_number = layer_number
        if self._config.moe_enable_routing_replay:
            self.router_replay.layer_number = layer_number

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
        config = self._config
        is_z_loss = loss.name == "z_loss"
        # A layer that predicts several tokens in turn has this loss once for each; z-losses Megatron attaches whole.
        value = loss.value if is_z_loss else loss.value / self._repetitions
        whole_batch = is_z_loss or loss.name == "global_load_balancing_loss"
        log_aux_loss(
            loss.name,
            loss.value / (loss.coefficient * self._repetitions),
            self._line_in_log,
            config.num_layers + (config.mtp_num_layers or 0),
            sum_over=loss.group,
            average_over=self.global_batch_group if is_z_loss else None,
            average_over_data_parallel=not whole_batch,
        )
        if config.calculate_per_token_loss:
            # Megatron then divides all gradients by the number of tokens, which this loss already did. The tokens of
            # a micro-batch lie on several ranks, whose gradients are summed.
            value = value * (loss.valid_tokens * self._ranks_of_micro_batch)
        return MoEAuxLossAutoScaler.apply(activation, value)

    @property
    def _line_in_log(self) -> int | None:
        """The layers of multi-token prediction come after all others."""
        if self.layer_number is None or not self.is_mtp_layer:
            return self.layer_number
        return self._config.num_layers + self.layer_number

    @property
    def _repetitions(self) -> int:
        """How often a forward pass of the model passes this layer."""
        repeated = self.is_mtp_layer and getattr(self._config, "mtp_use_repeated_layer", False)
        return (self._config.mtp_num_layers or 1) if repeated else 1
