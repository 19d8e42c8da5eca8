"""Nodes of a group: which ranks share an NVLink domain, and which have the same place on other nodes."""

from __future__ import annotations

import itertools
import socket
from dataclasses import dataclass

import torch.distributed as dist

from ep_moe.config_fields import ConfigError


@dataclass(frozen=True)
class Topology:
    """An expert-parallel group: ``ranks`` GPUs, of which ``ranks_per_node`` consecutive ones share an NVLink domain.

    Attributes:
        ranks: of the group.
        ranks_per_node: of a node; of a smaller group all ranks.
    """

    ranks: int
    ranks_per_node: int

    @property
    def nodes(self) -> int:
        """That the group spans."""
        return self.ranks // self.ranks_per_node

    def node_of(self, rank: int) -> int:
        """The node of a rank."""
        return rank // self.ranks_per_node

    def ranks_of_node(self, node: int) -> list[int]:
        """The ranks of a node."""
        first = node * self.ranks_per_node
        return list(range(first, first + self.ranks_per_node))

    def counterparts(self, rank: int) -> list[int]:
        """The rank in this one's place on every node, itself included, by node."""
        return list(range(rank % self.ranks_per_node, self.ranks, self.ranks_per_node))


def topology_of_group(group: dist.ProcessGroup, ranks_per_node: int | None) -> Topology:
    """The topology of ``group``: nodes of ``ranks_per_node`` ranks, or its hosts by name if ``None``; then collective.

    Raises:
        ConfigError: if the ranks do not divide into nodes of one size, each of consecutive ranks; on all ranks.
    """
    ranks = dist.get_world_size(group)
    if ranks_per_node is not None:
        if ranks % ranks_per_node:
            raise ConfigError(
                f"moe.comm_ranks_per_node = {ranks_per_node}: must divide the {ranks} ranks of the expert-parallel "
                "group"
            )
        return Topology(ranks, ranks_per_node)
    hosts = [socket.gethostname()] * ranks
    if ranks > 1:
        dist.all_gather_object(hosts, socket.gethostname(), group=group)
    return topology_of_hosts(hosts)


def topology_of_hosts(hosts: list[str]) -> Topology:
    """The topology of ranks on these hosts, one name a rank.

    Raises:
        ConfigError: as :func:`topology_of_group`.
    """
    runs = [(host, len(list(run))) for host, run in itertools.groupby(hosts)]
    names, sizes = [host for host, _ in runs], {size for _, size in runs}
    found = ", ".join(f"{host}: {size}" for host, size in runs)
    if len(set(names)) < len(names):
        raise ConfigError(
            f"moe.comm: ranks of a host must be consecutive in the expert-parallel group, got {found}; start the "
            "processes host by host, or use moe.comm: portable"
        )
    if len(sizes) > 1:
        raise ConfigError(
            f"moe.comm: all hosts must hold equally many ranks of the expert-parallel group, got {found}; choose "
            "moe.ep_size accordingly, or use moe.comm: portable"
        )
    return Topology(len(hosts), sizes.pop())
