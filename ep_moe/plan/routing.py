"""Over how many ranks and nodes a token's experts lie: by routing random tokens as the layer would."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep_moe.comm.topology import Topology
from ep_moe.config import ConfigError, MoEConfig
from ep_moe.router.scoring import route

SIMULATED_TOKENS = 16384


@dataclass(frozen=True)
class TokenSpread:
    """Where one token goes.

    Attributes:
        ranks: mean number of ranks, its own included if it has one of the experts.
        nodes: mean number of nodes, its own included likewise.
        most_nodes: the largest number of nodes of any token.
    """

    ranks: float
    nodes: float
    most_nodes: int

    def remote_nodes(self, topology: Topology) -> float:
        """Mean number of nodes other than the token's own: every node is as likely to be its own."""
        return self.nodes * (1 - 1 / topology.nodes)


def topology_of(moe: MoEConfig, gpus: int, ranks_per_node: int) -> Topology:
    """The group that spreads the experts over as many of the GPUs as there are experts for.

    Raises:
        ConfigError: if that does not divide evenly.
    """
    if not spreads(moe, gpus, ranks_per_node):
        raise ConfigError(
            f"--gpus {gpus}: must be a multiple or a divisor of moe.num_experts ({moe.num_experts}), and of "
            f"--ranks-per-node ({ranks_per_node}) if larger than that"
        )
    ranks = min(gpus, moe.num_experts)
    return Topology(ranks, min(ranks, ranks_per_node))


def spreads(moe: MoEConfig, gpus: int, ranks_per_node: int) -> bool:
    """Whether the experts can be spread evenly over so many GPUs."""
    ranks = min(gpus, moe.num_experts)
    if gpus < 1 or gpus % ranks or moe.num_experts % ranks:
        return False
    return ranks % min(ranks, ranks_per_node) == 0


def simulate_routing(moe: MoEConfig, seed: int = 1) -> Tensor:
    """Experts of random tokens, int64 ``[SIMULATED_TOKENS, top_k]``: logits are normal, so load is even."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(SIMULATED_TOKENS, moe.num_experts, generator=generator)
    return route(logits, moe.top_k, moe.router)[0]


def spread_of(topk_idx: Tensor, num_experts: int, topology: Topology) -> TokenSpread:
    """Count the ranks and nodes of each token of ``topk_idx`` (``[tokens, top_k]``)."""
    ranks = topk_idx // (num_experts // topology.ranks)
    on_nodes = _distinct(ranks // topology.ranks_per_node)
    return TokenSpread(_distinct(ranks).mean().item(), on_nodes.mean().item(), int(on_nodes.max()))


def _distinct(x: Tensor) -> Tensor:
    """Number of different values in each row, fp64."""
    ordered = x.sort(dim=1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1).double()
