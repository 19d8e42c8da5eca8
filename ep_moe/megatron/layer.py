"""``EPMoELayer`` in the shape of Megatron-Core's ``MoELayer``.

Megatron's schedules ask ``isinstance(layer.mlp, MoELayer)`` and call the layer's steps one by one, so this is a
real subclass that replaces every step. What the steps hand to each other (routing weights, expert-major rows) is
ours; Megatron only passes it along. Like Megatron's own dispatchers the layer keeps the routes of the forward pass
in progress between its steps, so a layer runs one forward pass at a time; the backward pass needs none of it. A
schedule may run each step on another stream, so steps tell the allocator what they read of earlier ones.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import utils as megatron_utils
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoECudaGraphTensorStore, get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ep_moe.comm import communicator_factory
from ep_moe.comm.fp8_rows import QuantizedRows
from ep_moe.config import PHASES, ConfigError, PhasesConfig
from ep_moe.dispatcher import ExchangeShape, NormalDispatcher, TokenDispatcher
from ep_moe.expert_chunks import run_in_chunks
from ep_moe.experts.deferred import DeferredGradients
from ep_moe.layer import to_compute_dtype
from ep_moe.megatron.experts import MegatronExperts
from ep_moe.megatron.handover import Handover
from ep_moe.megatron.router import MegatronRouter
from ep_moe.megatron.translate import Backend, BetweenNodes, Comm, Precision, honour_overlap, moe_config
from ep_moe.phases import PhaseSelector, check_expert_chunks, most_tokens
from ep_moe.streams import record_use
from ep_moe.tracing import StageRanges

logger = logging.getLogger(__name__)


class MegatronEPMoELayer(MoELayer):
    """A drop-in for Megatron-Core's ``MoELayer``; put into a model by :func:`ep_moe.megatron.use_ep_moe`."""

    token_dispatcher: TokenDispatcher

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool | None = None,
        name: str | None = None,
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
        **ignored: Any,
    ) -> None:
        """Build the layer from Megatron's configuration.

        Args:
            config: Megatron's configuration; what cannot be honoured is refused.
            submodules: only ``shared_experts`` is used, Megatron's own module.
            layer_number: of the layer in the model, from 1.
            pg_collection: process groups; Megatron's global ones if ``None``.
            is_mtp_layer: whether the layer is part of multi-token prediction, where layers are numbered anew; ``None``
                where Megatron does not tell.
            name: of the layer in the model; for the shared experts.
            phases: how tokens travel in each phase.
            comm: communicator (key ``moe.comm``).
            backend: grouped GEMM (key ``moe.experts.backend``).
            precision: of its products (key ``moe.experts.precision``).
            wgrad_precision: of the gradients of weights (key ``moe.experts.wgrad_precision``).
            ranks_per_node: key ``moe.comm_ranks_per_node``.
            between_nodes: key ``moe.comm_between_nodes``.
            comm_timeout_s: key ``moe.comm_timeout_s``.
            capacity_rows: key ``moe.capacity_rows``.
            ignored: keyword arguments that newer versions of Megatron add.

        Raises:
            ConfigError: for a setting of ``config`` that the layer would not honour.
            TypeError: if ``phases`` is not a ``PhasesConfig``.
        """
        if phases is not None and not isinstance(phases, PhasesConfig):
            raise TypeError(f"phases: expected an ep_moe.config.PhasesConfig or None, got {type(phases).__name__}")
        moe = moe_config(
            config,
            comm=comm,
            backend=backend,
            precision=precision,
            wgrad_precision=wgrad_precision,
            ranks_per_node=ranks_per_node,
            between_nodes=between_nodes,
            comm_timeout_s=comm_timeout_s,
            capacity_rows=capacity_rows,
        )
        if is_mtp_layer is None and getattr(config, "mtp_use_repeated_layer", False):
            raise ConfigError(
                "TransformerConfig.mtp_use_repeated_layer = True: this release of Megatron does not tell the layer "
                "whether it is repeated; EPMoELayer needs False"
            )
        groups = pg_collection if pg_collection is not None else get_default_pg_collection()
        ep_size = megatron_utils.get_pg_size(groups.ep)
        if moe.num_experts % ep_size != 0:
            raise ConfigError(
                f"TransformerConfig.num_moe_experts = {moe.num_experts}: must be divisible by the expert-parallel size "
                f"({ep_size}, expert_model_parallel_size)"
            )
        # Not MoELayer's own constructor: it would build Megatron's router, dispatcher and experts as well.
        BaseMoELayer.__init__(self, config=config, layer_number=layer_number, pg_collection=groups)
        if ignored:
            logger.info("MegatronEPMoELayer ignores %s", ", ".join(ignored))
        self.submodules = submodules
        self.is_mtp_layer = bool(is_mtp_layer)
        self.tp_group = groups.tp
        self._set_megatron_flags(config)

        kind = {
            "device": "cpu" if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device()),
            "dtype": config.params_dtype,
        }
        phases = honour_overlap(config, phases if phases is not None else PhasesConfig())
        check_expert_chunks(phases, self.num_local_experts)
        communicators = communicator_factory(
            moe.comm,
            groups.ep,
            max_tokens=most_tokens(phases),
            timeout_s=moe.comm_timeout_s,
            ranks_per_node=moe.comm_ranks_per_node,
            between_nodes=moe.comm_between_nodes,
        )
        self.router = MegatronRouter(config, moe, groups, is_mtp_layer=self.is_mtp_layer, **kind)
        self.experts = MegatronExperts(
            config.hidden_size,
            self.num_local_experts,
            moe.experts,
            first_expert=communicators.rank * self.num_local_experts,
            init_method=config.init_method,
            output_init_method=config.output_layer_init_method,
            ep_rank=communicators.rank,
            ep_size=communicators.size,
            expert_data_parallel_rank=megatron_utils.get_pg_rank(groups.expt_dp),
            delay_wgrad=getattr(config, "delay_wgrad_compute", False),
            **kind,
        )
        if self.use_shared_expert:
            assert submodules is not None
            # Built as if nothing overlapped: Megatron's overlap is a part of its own dispatchers.
            plain = copy.copy(config)
            plain.moe_shared_expert_overlap = False
            # Releases that name their modules pass a name; the others know no such argument.
            named = {} if name is None else {"name": f"{name}.shared_experts"}
            self.shared_experts = submodules.shared_experts(
                config=plain, pg_collection=groups, gate=config.moe_shared_expert_gate, **named
            )
        shape = ExchangeShape(
            moe.num_experts,
            config.hidden_size,
            self.experts.alignment,
            self.experts.takes_packed_rows,
            moe.capacity_rows,
            self.experts.takes_fp8_rows,
        )
        self._phases = PhaseSelector(phases, communicators, shape)
        self._overlaps_shared = any("shared_experts" in getattr(phases, name).overlap for name in PHASES)
        self._finish_shared: Callable[[], Tensor] | None = None
        self.ranges = StageRanges()
        self._tokens = Handover(stand_ins=config.overlap_moe_expert_parallel_comm)
        self._rows = Handover(stand_ins=config.overlap_moe_expert_parallel_comm)
        self._shape = torch.Size()
        self._topk_idx: Tensor | None = None
        self._routes: Any = None
        self._fp8_rows: QuantizedRows | None = None  # those that the rows on their way stand for
        self._deferred: DeferredGradients | None = None
        self._chunks = 1

    def _set_megatron_flags(self, config: TransformerConfig) -> None:
        """What ``MoELayer.forward`` and the transformer layer read besides the steps."""
        recompute = config.recompute_modules if config.recompute_granularity == "selective" else []
        self.moe_layer_recompute = "moe" in recompute
        self.shared_experts_recompute = "shared_experts" in recompute
        self.shared_expert_overlap = False
        self.cudagraph_tensor_store = MoECudaGraphTensorStore()
        self.fwd_execution_map = ["route", "expert_compute", "postprocess"]

    def phase(self, name: str | None) -> contextlib.AbstractContextManager[None]:
        """See :meth:`ep_moe.layer.EPMoELayer.phase`."""
        return self._phases.set(name)

    def shared_experts_compute(self, hidden_states: Tensor) -> Tensor | None:
        """The output of Megatron's shared experts, or ``None`` if :meth:`postprocess` will wait for it."""
        compute = super().shared_experts_compute
        if not (self.use_shared_expert and self._overlaps_shared):
            return compute(hidden_states)
        tokens = hidden_states.numel() // hidden_states.shape[-1]
        _, scheduler = self._phases.select(self.training, tokens, hidden_states.device)
        self._finish_shared = scheduler.start_shared(compute, hidden_states)
        return None

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Routing weights ``[tokens, top_k]`` and experts ``[tokens, top_k]`` of ``[sequence, batch, hidden]``."""
        routing = self.ranges.run("route", self.router, hidden_states, padding_mask)
        return routing.topk_weights, routing.topk_idx

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """Flatten the tokens to ``[tokens, hidden]`` and remember shape and experts for the steps to come."""
        self._shape, self._topk_idx = hidden_states.shape, routing_map
        x = to_compute_dtype(hidden_states.reshape(-1, hidden_states.shape[-1]))
        self.token_dispatcher, scheduler = self._phases.select(self.training, x.shape[0], x.device)
        self._chunks = scheduler.expert_chunks
        defers = scheduler.wgrad_behind_dispatch or self.experts.delay_wgrad
        self._deferred = self.experts.defer_gradients() if defers else None
        x, probs = self._tokens.leave(x, probs)
        return x, probs

    def dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Bring tokens and routing weights to their experts: expert-major rows and the weight of each row.

        With experts in chunks :meth:`routed_experts_compute` does so, and combines.
        """
        assert self._topk_idx is not None
        hidden_states, probs = self._tokens.take(hidden_states, probs)
        record_use((hidden_states, probs, self._topk_idx))
        if self._chunks > 1:
            return hidden_states, probs
        behind = None if self.experts.delay_wgrad else self._deferred
        arrived = self.ranges.run(
            "dispatch", self.token_dispatcher.dispatch, hidden_states, self._topk_idx, probs, behind=behind
        )
        self._routes = arrived.handle
        self._fp8_rows = arrived.rows if isinstance(arrived.rows, QuantizedRows) else None
        (rows,) = self._rows.leave(arrived.rows if isinstance(arrived.rows, Tensor) else arrived.rows.stand_in)
        return rows, arrived.weights

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor | None) -> tuple[Tensor, None]:
        """Apply the experts to their rows."""
        if self._chunks > 1:
            dispatcher, topk_idx = self.token_dispatcher, self._topk_idx
            assert isinstance(dispatcher, NormalDispatcher) and probs is not None and topk_idx is not None
            arguments = (hidden_states, probs, topk_idx, dispatcher, self.experts, self._chunks)
            return self.ranges.run("dispatch to combine", run_in_chunks, *arguments), None
        rows: Tensor | QuantizedRows
        (rows,) = self._rows.take(hidden_states)
        if self._fp8_rows is not None:
            rows, self._fp8_rows = dataclasses.replace(self._fp8_rows, stand_in=rows), None
        record_use((rows, probs, self._routes.segments))
        return self.ranges.run("experts", self.experts, rows, probs, self._routes.segments, self._deferred), None

    def combine(self, output: Tensor) -> Tensor:
        """Sum the rows of each token at its source: ``[tokens, hidden]``."""
        if self._chunks > 1:
            return output
        return self.ranges.run("combine", self.token_dispatcher.combine, output, self._routes)

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Back to the shape of the input, with the shared experts' output added."""
        output = output.view(self._shape)
        if self._finish_shared is not None:
            shared_expert_output, self._finish_shared = self._finish_shared(), None
        return output if shared_expert_output is None else output + shared_expert_output
