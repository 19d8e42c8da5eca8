"""``EPMoELayer``: route, dispatch, experts, combine."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ep_moe.comm import communicator_factory
from ep_moe.config import Config, ConfigError, check_ep_size
from ep_moe.dispatcher import ExchangeShape, NormalDispatcher, TokenDispatcher
from ep_moe.expert_chunks import run_in_chunks
from ep_moe.experts import GroupedExperts, SharedExperts
from ep_moe.overlap import OverlapScheduler, Stages
from ep_moe.phases import PhaseSelector, check_expert_chunks, most_tokens
from ep_moe.router import TopKRouter
from ep_moe.tracing import StageRanges
from ep_moe.two_batch import Steps


class EPMoELayer(nn.Module):
    """A Mixture-of-Experts layer whose experts are spread over an expert-parallel group.

    Every rank of the group brings its own tokens and holds ``num_experts / ep_size`` experts. Expert parameters
    (``layer.experts``) differ between the ranks of the group and carry ``allreduce = False`` where the group has
    more than one rank; all others are replicas (see ``ep_moe.data_parallel``).

    ``copy.deepcopy`` gives a layer of its own in the same groups. Inside what ``torch.compile`` compiles the layer runs
    as it does outside, between two graphs.

    Attributes:
        ranges: of its stages, off unless :func:`ep_moe.tracing.annotate_stages` turns them on.
    """

    def __init__(
        self,
        config: Config,
        ep_group: dist.ProcessGroup | None = None,
        *,
        global_batch_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the layer; collective over ``ep_group`` only in that every rank must build it.

        Weights are drawn from PyTorch's default generator: ranks that seed it alike get the same router and, between
        them, the same experts however many ranks share them.

        Args:
            config: sections ``model``, ``moe`` and ``phases`` are read.
            ep_group: the ranks that share the experts; the default group if ``None``.
            global_batch_group: ranks whose batches form the global batch, for the global balance loss and the expert
                bias; ``ep_group`` if ``None``.
            device: of the parameters. Nothing is initialised on meta: call ``to_empty``, then
                ``router.reset_parameters()`` for what no checkpoint holds, then ``load_state_dict``.
            dtype: of the parameters; PyTorch's default if ``None``.

        Raises:
            ConfigError: if ``torch.distributed`` has not been initialised, this rank is not in the group, the experts
                do not divide over it, ``moe.ep_size`` says otherwise, or a phase asks for more ``expert_chunks`` than a
                rank has experts.
            TypeError: if ``config`` is not a ``Config``.
        """
        super().__init__()
        if not isinstance(config, Config):
            raise TypeError(
                "config: expected an ep_moe.Config (ep_moe.config_loading.load_config reads one from a YAML file), "
                f"got {type(config).__name__}"
            )
        moe, hidden = config.moe, config.model.hidden_size
        self.config = config
        communicators = communicator_factory(
            moe.comm,
            ep_group,
            max_tokens=most_tokens(config.phases),
            timeout_s=moe.comm_timeout_s,
            ranks_per_node=moe.comm_ranks_per_node,
            between_nodes=moe.comm_between_nodes,
        )
        ep_size, ep_rank = communicators.size, communicators.rank
        if moe.ep_size is not None and moe.ep_size != ep_size:
            raise ConfigError(
                f"moe.ep_size = {moe.ep_size}: must equal the size of the expert-parallel group ({ep_size})"
            )
        check_ep_size(moe.num_experts, ep_size)
        local_experts = moe.num_experts // ep_size
        check_expert_chunks(config.phases, local_experts)

        def init_method(weight: Tensor) -> None:
            nn.init.normal_(weight, std=config.model.init_std)

        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = TopKRouter(
            hidden,
            moe,
            init_method=init_method,
            global_batch_group=global_batch_group if global_batch_group is not None else communicators.group,
            **kind,
        )
        self.experts = GroupedExperts(
            hidden,
            local_experts,
            moe.experts,
            first_expert=ep_rank * local_experts,
            init_method=init_method,
            output_init_method=init_method,
            **kind,
        )
        self.shared_experts = (
            SharedExperts(
                hidden,
                moe.shared_experts,
                moe.experts.activation,
                init_method=init_method,
                output_init_method=init_method,
                **kind,
            )
            if moe.shared_experts.ffn_hidden_size
            else None
        )
        self.experts.mark_parameters(allreduce=ep_size == 1)
        shape = ExchangeShape(
            moe.num_experts,
            hidden,
            self.experts.alignment,
            self.experts.takes_packed_rows,
            moe.capacity_rows,
            self.experts.takes_fp8_rows,
        )
        self._phases = PhaseSelector(config.phases, communicators, shape)
        self.ranges = StageRanges()
        self._groups = [communicators.group, self.router.global_batch_group]

    def phase(self, name: str | None) -> contextlib.AbstractContextManager[None]:
        """Use the settings of phase ``name`` from now on, or until the end of a ``with`` block.

        Args:
            name: ``train``, ``prefill`` or ``decode``; ``None`` returns to the automatic choice: training mode is
                ``train``; in eval mode it is ``decode`` if no rank has more than
                ``phases.decode.max_tokens_per_rank`` tokens, otherwise ``prefill``.

        Raises:
            ValueError: for an unknown name.
        """
        return self._phases.set(name)

    @torch.compiler.disable(reason="ep_moe.EPMoELayer exchanges rows between ranks, in sizes that depend on them")
    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            hidden_states: ``[tokens, hidden]`` or ``[sequence, batch, hidden]``, on the device of the parameters and in
                their dtype, or any floating one under ``torch.autocast``; the number of tokens may differ between
                ranks.
            padding_mask: bool ``[tokens]`` or ``[sequence, batch]``, true for padding, which does not count in
                balance losses and statistics.

        Returns:
            The same shape and dtype.

        Raises:
            ValueError: before rows travel, if a shape, dtype or device does not fit, or the phase's
                ``max_tokens_per_rank`` is exceeded.
        """
        x, dispatcher, scheduler = self._enter(hidden_states)
        run = self.ranges.run
        routing = run("route", self.router, hidden_states, padding_mask)

        def routed(x: Tensor) -> Tensor:
            if scheduler.expert_chunks > 1:
                assert isinstance(dispatcher, NormalDispatcher)  # which the configuration checks
                return run(
                    "dispatch to combine",
                    run_in_chunks,
                    x,
                    routing.topk_weights,
                    routing.topk_idx,
                    dispatcher,
                    self.experts,
                    scheduler.expert_chunks,
                )
            deferred = self.experts.defer_gradients() if scheduler.wgrad_behind_dispatch else None
            arrived = run("dispatch", dispatcher.dispatch, x, routing.topk_idx, routing.topk_weights, behind=deferred)
            rows = run("experts", self.experts, arrived.rows, arrived.weights, arrived.segments, deferred)
            return run("combine", dispatcher.combine, rows, arrived.handle)

        out = scheduler.run(Stages(routed, self.shared_experts), x)
        return out.to(hidden_states.dtype).view(hidden_states.shape)

    def forward_steps(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Steps[Tensor]:
        """:meth:`forward` for inference, in steps for :func:`ep_moe.two_batch.two_batch`.

        Yields twice, while rows travel to the experts and back. Results are those of ``forward``, bit for bit.

        Raises:
            RuntimeError: if a gradient would be needed.
            ValueError: as ``forward``.
        """
        x, dispatcher, _ = self._enter(hidden_states)
        run = self.ranges.run
        routing = run("route", self.router, hidden_states, padding_mask)
        receive_rows = run("dispatch", dispatcher.start_dispatch, x, routing.topk_idx, routing.topk_weights)
        shared = None if self.shared_experts is None else self.shared_experts(x)
        yield
        arrived = run("dispatch end", receive_rows)
        rows = run("experts", self.experts, arrived.rows, arrived.weights, arrived.segments)
        receive_sums = run("combine", dispatcher.start_combine, rows, arrived.handle)
        yield
        out = run("combine end", receive_sums)
        if shared is not None:
            out = out + shared
        return out.to(hidden_states.dtype).view(hidden_states.shape)

    def _enter(self, hidden_states: Tensor) -> tuple[Tensor, TokenDispatcher, OverlapScheduler]:
        """The tokens as they travel, ``[tokens, hidden]``, and what serves the phase they belong to."""
        hidden = self.config.model.hidden_size
        if hidden_states.dim() not in (2, 3) or hidden_states.shape[-1] != hidden:
            raise ValueError(
                f"hidden_states: expected [tokens, {hidden}] or [sequence, batch, {hidden}] (model.hidden_size), "
                f"got {list(hidden_states.shape)}"
            )
        weight, tokens = self.experts.fc1_weight, hidden_states.numel() // hidden
        # fp64 stays out of autocast, as in PyTorch.
        autocast = weight.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(weight.device.type)
        autocast = autocast and weight.dtype != torch.float64
        fits = hidden_states.is_floating_point() if autocast else hidden_states.dtype == weight.dtype
        if not fits or hidden_states.device != weight.device:
            wanted = "floating point" if autocast else str(weight.dtype)
            raise ValueError(
                f"hidden_states: expected {wanted} on {weight.device} as the parameters, got {hidden_states.dtype} on "
                f"{hidden_states.device}"
            )
        dispatcher, scheduler = self._phases.select(self.training, tokens, hidden_states.device)
        x = hidden_states.reshape(tokens, hidden)
        return to_compute_dtype(x) if autocast else x, dispatcher, scheduler

    def __deepcopy__(self, memo: dict[int, Any]) -> EPMoELayer:
        memo.update((id(group), group) for group in self._groups)  # which cannot be copied, nor need be
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("EPMoELayer belongs to a process group and cannot be pickled: save its state_dict() instead")


def to_compute_dtype(x: Tensor) -> Tensor:
    """Cast to the dtype of autocast where it is active, so that rows travel in the dtype the GEMMs read."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
