"""How all ranks learn each other's tallies (:mod:`ep_moe.comm.routing_tally`), for which the host waits once.

Between a call and the wait the host may launch what needs no sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm.all_to_all import staging_device
from ep_moe.comm.symmetric_transport import Spans, SymmetricTransport
from ep_moe.comm.topology import Topology

# Its name from PyTorch 2.13 on, where the former one warns.
all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


class TallyExchange(Protocol):
    """Tells all ranks what each of them passes."""

    def share(self, tally: Tensor) -> Callable[[], Tensor]:
        """Launch the exchange; collective.

        Args:
            tally: int32 ``[width]``, on the device of the tokens.

        Returns:
            A function that waits and returns int32 ``[ranks, width]`` on the CPU.
        """
        ...


class GatheredTallies:
    """A :class:`TallyExchange` by one collective of a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Exchange among the ranks of ``group``."""
        self._group, self._size = group, dist.get_world_size(group)

    def share(self, tally: Tensor) -> Callable[[], Tensor]:
        """See :meth:`TallyExchange.share`."""
        mine = tally.to(staging_device(self._group, tally.device))
        everyone = mine.new_empty(self._size * mine.numel())
        all_gather(everyone, mine, group=self._group)
        return _to_host(everyone.view(self._size, -1))


class PutTallies:
    """A :class:`TallyExchange` by our own kernel alone: to the ranks in one's place on every node, then on the node.

    A rank that never comes is named as by any other exchange of that kernel. No rank waits for ever: all launch the
    exchange between nodes ahead of the one on the node, each alone on its stream.
    """

    def __init__(self, topology: Topology, between: SymmetricTransport, within: SymmetricTransport | None) -> None:
        """Compose.

        Args:
            topology: of all ranks.
            between: among the ranks in this rank's place on every node.
            within: among those of its node; ``None`` if it is alone there.
        """
        self._topology, self._between, self._within = topology, between, within

    def share(self, tally: Tensor) -> Callable[[], Tensor]:
        """See :meth:`TallyExchange.share`."""
        nodes, ranks = self._topology.nodes, self._topology.ranks_per_node
        everyone = _put_to_all(self._between, tally.unsqueeze(0), nodes)
        if self._within is not None:
            everyone = _put_to_all(self._within, everyone, ranks)
        arrived = _to_host(everyone)

        def wait() -> Tensor:
            by_place = arrived().view(ranks, nodes, -1)
            for transport in (self._between, self._within):
                if transport is not None:
                    transport.check()
            return by_place.transpose(0, 1).flatten(0, 1)

        return wait


def _put_to_all(transport: SymmetricTransport, rows: Tensor, peers: int) -> Tensor:
    """The rows of all peers, by peer: ``[peers * rows, width]``; zero where a peer's did not come in time."""
    count = rows.shape[0]
    out = rows.new_zeros(peers * count, rows.shape[1])
    with transport:
        transport.reserve([rows])
        transport.move([rows], [out], None, Spans((0,) * peers, (count,) * peers), Spans.packed((count,) * peers))
    return out


def _to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """A function that waits for a copy on the CPU, and for nothing that is launched behind it."""
    if not tensor.is_cuda:
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait
