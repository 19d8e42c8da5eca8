"""Normal mode: the calls of ``Buffer`` for training and prefill."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ep_moe.compat.deep_ep import normal
from ep_moe.compat.deep_ep.config import DEFAULT_NUM_SMS, Config
from ep_moe.compat.deep_ep.events import EventOverlap, NothingToWaitFor
from ep_moe.compat.deep_ep.exchanges import Exchanges
from ep_moe.compat.deep_ep.normal import Rows
from ep_moe.compat.deep_ep.normal_handle import NormalHandle
from ep_moe.compat.deep_ep.routing_counts import count

Dispatched = tuple[Rows, Tensor | None, Tensor | None, list[int] | None, NormalHandle, EventOverlap]


class NormalCalls:
    """The part of ``Buffer`` that moves each token once to every rank of its experts."""

    num_sms: int = DEFAULT_NUM_SMS
    _exchanges: Exchanges

    @classmethod
    def set_num_sms(cls, new_num_sms: int) -> None:
        """SMs that kernels may occupy from the next dispatch without ``config`` on; 20 leaves it to this library.

        Raises:
            ValueError: for less than one.
        """
        if new_num_sms < 1:
            raise ValueError(f"new_num_sms: expected at least 1, got {new_num_sms}")
        NormalCalls.num_sms = new_num_sms

    @classmethod
    def get_dispatch_config(cls, num_ranks: int) -> Config:
        """The default hints for dispatch."""
        return Config(cls.num_sms)

    @classmethod
    def get_combine_config(cls, num_ranks: int) -> Config:
        """The default hints for combine."""
        return Config(cls.num_sms)

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """How many tokens go where; not collective.

        Args:
            topk_idx: int64 ``[tokens, top_k]``, global expert or -1.
            num_experts: over all ranks.
            previous_event: waited for before, instead of everything on the current stream.
            async_finish: leave it to the caller to wait for the event.
            allocate_on_comm_stream: ignored; memory is safe on either stream.

        Returns:
            Tokens per rank int32 ``[ranks]``; ``None`` (tokens per node, on several); (token, expert) pairs per expert
            int32 ``[num_experts]``; bool ``[tokens, ranks]``, whether a token goes to a rank; the event.

        Raises:
            ValueError: if the arguments do not fit together.
        """
        exchanges = self._exchanges
        if exchanges.destroyed:
            exchanges.check_alive()
        if previous_event is None and not async_finish:
            per_rank, per_expert, in_rank = count(topk_idx, num_experts, exchanges.size)
            return per_rank, None, per_expert, in_rank, NothingToWaitFor()
        operation = partial(count, topk_idx, num_experts, exchanges.size)
        (per_rank, per_expert, in_rank), event = exchanges.stream.run(
            topk_idx.device, operation, [topk_idx], previous_event, async_finish
        )
        return per_rank, None, per_expert, in_rank, event

    def dispatch(
        self,
        x: Rows,
        handle: NormalHandle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Dispatched:
        """Bring each token once to every rank that has an expert of it.

        Args:
            x: ``[tokens, hidden]``; or rows of one byte an element and their scales, of four bytes an element,
                ``[tokens, any]`` or ``[tokens]`` of any strides.
            handle: of an earlier dispatch: send along its routes, without anything else. The backward pass of combine.
            num_tokens_per_rank: not read: it follows from the rest.
            num_tokens_per_rdma_rank: not read.
            is_token_in_rank: bool ``[tokens, ranks]``; read only if there is no ``topk_idx``.
            num_tokens_per_expert: int32 ``[num_experts]`` of :meth:`get_dispatch_layout`; needed without ``handle``.
            topk_idx: int64 ``[tokens, top_k]``, global expert or -1.
            topk_weights: fp32 ``[tokens, top_k]``.
            expert_alignment: tokens per expert are rounded up to a multiple of it.
            num_worst_tokens: rows of the results, the same on all ranks, no rank bringing more than its share of them;
                the host then waits for nothing. 0 for the rows that arrive.
            config: how many SMs to use.
            previous_event: waited for before, instead of everything on the current stream.
            async_finish: leave it to the caller to wait for the event.
            allocate_on_comm_stream: ignored; memory is safe on either stream.

        Returns:
            The rows that arrive, by source rank, then token, or rows and scales; int64 ``[rows, top_k]`` local expert
            or -1; fp32 ``[rows, top_k]`` weights, 0 where -1; tokens of each local expert, empty with
            ``num_worst_tokens``; the handle, whose first entry is int32 ``[ranks, ranks]`` with rows from ranks 0 to
            ``i`` at ``[i][rank]``; the event. Indices, weights and tokens are ``None`` with ``handle``.

        Raises:
            ValueError: before anything is sent, naming the argument, what was given and what is allowed.
            CapacityError: if more than ``num_worst_tokens`` rows arrived; on GPUs by a later call.
        """
        data = x[0] if isinstance(x, tuple) else x
        exchanges, here = self._exchanges, previous_event is None and not async_finish
        communicator = exchanges.normal.get(data.device)
        if communicator is None:
            communicator = exchanges.communicator(data.device)
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise ValueError("topk_idx, topk_weights: must be None with handle, which has the routes")
            if not isinstance(handle, NormalHandle):
                raise _no_handle(handle)
            if here:
                return normal.dispatch_cached(x, handle), None, None, None, handle, NothingToWaitFor()
            again = partial(normal.dispatch_cached, x, handle)
            rows, event = exchanges.stream.run(data.device, again, [x], previous_event, async_finish)
            return rows, None, None, None, handle, event
        if num_tokens_per_expert is None:
            raise ValueError("num_tokens_per_expert: needed without handle; get_dispatch_layout returns it")
        if topk_idx is None and topk_weights is not None:
            raise ValueError("topk_weights: must be None without topk_idx, whose experts they weight")
        num_experts = num_tokens_per_expert.size(0)
        if num_worst_tokens and num_worst_tokens > exchanges.room.get(data.device, 0):
            top_k = exchanges.size if topk_idx is None else topk_idx.shape[1]
            exchanges.make_room(data, num_worst_tokens, num_experts, top_k)
        num_sms = self.num_sms if config is None else config.num_sms
        budget = None if num_sms == DEFAULT_NUM_SMS else num_sms
        if here and topk_idx is not None:
            rows, topk_idx, topk_weights, counts, handle = normal.dispatch(
                communicator, x, topk_idx, topk_weights, num_experts, expert_alignment, num_worst_tokens, budget
            )
            return rows, topk_idx, topk_weights, counts, handle, NothingToWaitFor()
        sizes = (expert_alignment, num_worst_tokens, budget)
        if topk_idx is None:
            operation = partial(
                normal.dispatch_by_rank, communicator, x, is_token_in_rank, num_tokens_per_expert, *sizes
            )
        else:
            operation = partial(normal.dispatch, communicator, x, topk_idx, topk_weights, num_experts, *sizes)
        inputs = [x, topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert]
        received, event = exchanges.stream.run(data.device, operation, inputs, previous_event, async_finish)
        return (*received, event)

    def combine(
        self,
        x: Tensor,
        handle: NormalHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sum the rows of each token, without weights, at its rank. The backward pass of dispatch.

        Args:
            x: ``[rows, hidden]``, as dispatched.
            handle: of the dispatch.
            topk_weights: fp32 ``[rows, top_k]``, to be summed too.
            bias: one or two ``[tokens, hidden]`` to be added to the sum.
            config: ignored; the dispatch of the handle fixed the SMs.
            previous_event: waited for before, instead of everything on the current stream.
            async_finish: leave it to the caller to wait for the event.
            allocate_on_comm_stream: ignored; memory is safe on either stream.

        Returns:
            ``[tokens, hidden]`` in the dtype of ``x``, zero for tokens routed nowhere; fp32 ``[tokens, top_k]`` or
            ``None``; the event.

        Raises:
            ValueError: if arguments do not fit the handle.
        """
        exchanges = self._exchanges
        if exchanges.destroyed:
            exchanges.check_alive()
        if not isinstance(handle, NormalHandle):
            raise _no_handle(handle)
        biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        if previous_event is None and not async_finish:
            out, weights = normal.combine(x, handle, topk_weights, biases)
            return out, weights, NothingToWaitFor()
        operation = partial(normal.combine, x, handle, topk_weights, biases)
        (out, weights), event = exchanges.stream.run(
            x.device, operation, [x, topk_weights, biases], previous_event, async_finish
        )
        return out, weights, event


def _no_handle(handle: object) -> ValueError:
    return ValueError(f"handle: expected what dispatch returned, got {type(handle).__name__}")
