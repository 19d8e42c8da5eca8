"""What a communicator that moves all rows of an exchange at once does where parts of one are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ep_moe.comm.communicator import Communicator, Dispatched
from ep_moe.comm.expert_groups import expert_groups


class UndividedExchanges:
    """The methods of a :class:`~ep_moe.comm.communicator.Communicator` that follow from its whole exchanges.

    Its handles say by ``shape`` how many tokens, and how many experts of each, were dispatched.
    """

    def dispatch_in_groups(
        self: Communicator,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        *,
        groups: int,
        num_experts: int,
        **options: Any,
    ) -> tuple[Dispatched, Iterator[None]]:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch_in_groups`; all rows come with the first group."""
        steps = len(expert_groups(num_experts // self.size, groups)) - 1
        arrived = self.dispatch(x, topk_idx, topk_weights, num_experts=num_experts, **options)
        return arrived, itertools.repeat(None, steps)

    def dispatch_cached_in_groups(
        self: Communicator, x: Tensor, handle: Any, groups: int
    ) -> tuple[Tensor, Iterator[None]]:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch_cached_in_groups`; all rows at first."""
        return self.dispatch_cached(x, handle), itertools.repeat(None, groups - 1)

    def combine_in_groups(self: Communicator, rows: Tensor, handle: Any, groups: int) -> tuple[Tensor, Iterator[None]]:
        """See :meth:`ep_moe.comm.communicator.Communicator.combine_in_groups`; all rows leave with the last group."""
        out = rows.new_empty(handle.shape[0], rows.shape[1])

        def steps() -> Iterator[None]:
            yield from itertools.repeat(None, groups - 1)
            out.copy_(self.combine(rows, handle))
            yield

        return out, steps()

    def combine_received(self: Communicator, values: Tensor, handle: Any) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.combine_received`; in rows of a multiple of 16 bytes."""
        top_k = values.shape[1]
        summed = self.combine(pad(values, (0, -top_k % 4)), handle, "rows")
        return summed[:, :top_k].contiguous()
