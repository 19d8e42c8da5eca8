"""Which communicator serves a group, and one for all layers that use it."""

from __future__ import annotations

import os
import socket
import weakref
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from ep_moe.comm.communicator import Communicator
from ep_moe.comm.low_latency import LowLatencyCommunicator
from ep_moe.comm.low_latency_reach import Reach, loopback_reach
from ep_moe.comm.nvlink import NvlinkCommunicator
from ep_moe.comm.nvlink_args import CHUNK_TOKENS, MAX_NODES, MAX_RANKS
from ep_moe.comm.nvlink_low_latency import NvlinkLowLatencyCommunicator
from ep_moe.comm.nvlink_low_latency_args import MAX_NODE_RANKS
from ep_moe.comm.portable import PortableCommunicator
from ep_moe.comm.portable_low_latency import PortableLowLatencyCommunicator
from ep_moe.comm.symmetric_transport import loopback_transport
from ep_moe.comm.topology import Topology, topology_of_group
from ep_moe.comm.transport import NodeTransport, PortableTransport
from ep_moe.comm.two_hop import two_hop_communicator
from ep_moe.config import ConfigError
from ep_moe.native import NativeLibraryError, load_library, open_nvshmem_library

_OVERLAP_VARIABLE = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"  # PyTorch reads it too

_T = TypeVar("_T")
BetweenNodes = Literal["portable", "loopback", "nvshmem"]

# Symmetric buffers are large: layers over one group and device share them as long as one of the layers lives.
_shared: weakref.WeakValueDictionary[tuple[object, ...], Communicator] = weakref.WeakValueDictionary()
_shared_low_latency: weakref.WeakValueDictionary[tuple[object, ...], LowLatencyCommunicator] = (
    weakref.WeakValueDictionary()
)


@dataclass(frozen=True)
class CommunicatorFactory:
    """Chooses the communicator of a group once the device of its tokens is known.

    Attributes:
        comm: key ``moe.comm``.
        group: the expert-parallel ranks.
        max_tokens: most tokens a rank will bring, for buffers; ``None`` if not known.
        timeout_s: key ``moe.comm_timeout_s``.
        ranks_per_node: key ``moe.comm_ranks_per_node``.
        between_nodes: key ``moe.comm_between_nodes``; takes part where nvlink serves the nodes.
    """

    comm: Literal["auto", "portable", "nvlink"]
    group: dist.ProcessGroup
    max_tokens: int | None
    timeout_s: float
    ranks_per_node: int | None = None
    between_nodes: BetweenNodes = "portable"

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return dist.get_world_size(self.group)

    def build(self, device: torch.device) -> Communicator:
        """The communicator for tokens on ``device``; collective over the group.

        Raises:
            ConfigError: if ``moe.comm`` asks for one that cannot run here; the message says why.
        """
        key = (self.group.group_name, device, self.comm, self.ranks_per_node, self.between_nodes)
        shared = _shared.get(key)
        # Names recur: a group may have been destroyed and another made.
        if shared is None or shared.group is not self.group:
            shared = self._new(device)
            _shared[key] = shared
        return shared

    def _new(self, device: torch.device) -> Communicator:
        portable = self.comm == "portable" or (self.comm == "auto" and device.type != "cuda")
        if portable and self.ranks_per_node is None:
            return PortableCommunicator(self.group)
        topology = self._topology()
        obstacle = None if portable else self._nvlink_obstacle(device, topology)
        if obstacle is not None and self.comm == "nvlink":
            raise ConfigError(f"moe.comm = nvlink: {obstacle}")
        portable = portable or obstacle is not None

        def of_node(group: dist.ProcessGroup) -> Communicator:
            if portable:
                return PortableCommunicator(group)
            most = self.max_tokens
            if most is not None and topology.nodes > 1:  # those of a node start at a multiple of a chunk
                most = -(-most // CHUNK_TOKENS) * CHUNK_TOKENS * topology.nodes
            return NvlinkCommunicator(group, device, max_tokens=most, timeout_s=self.timeout_s)

        if topology.nodes == 1:
            return of_node(self.group)

        def between_nodes(counterparts: dist.ProcessGroup) -> NodeTransport:
            ranks, node = topology.counterparts(self.rank), topology.node_of(self.rank)
            if portable or self.between_nodes == "portable":
                return PortableTransport(counterparts)
            if self.between_nodes == "loopback":
                return loopback_transport(counterparts, ranks, device, timeout_s=self.timeout_s)
            from ep_moe.comm.nvshmem import nvshmem_transport  # one node never needs it

            return nvshmem_transport(self.group, ranks, node, device, timeout_s=self.timeout_s)

        return two_hop_communicator(self.group, topology, of_node, between_nodes)

    def build_low_latency(
        self, device: torch.device, max_tokens: int, hidden: int, num_experts: int
    ) -> LowLatencyCommunicator:
        """The low-latency communicator of these sizes for tokens on ``device``; collective over the group.

        Raises:
            ConfigError: if ``moe.comm`` asks for one that cannot run here; the message says why.
            ValueError: if low-latency mode does not take the sizes.
        """
        sizes = {"max_tokens": max_tokens, "hidden": hidden, "num_experts": num_experts}
        key = (self.group.group_name, device, self.comm, self.ranks_per_node, self.between_nodes, *sizes.values())
        shared = _shared_low_latency.get(key)
        if shared is None or shared.group is not self.group:
            shared = self._new_low_latency(device, sizes)
            _shared_low_latency[key] = shared
        return shared

    def _new_low_latency(self, device: torch.device, sizes: dict[str, int]) -> LowLatencyCommunicator:
        if self.comm == "portable":
            return PortableLowLatencyCommunicator(self.group, **sizes)
        topology = self._topology()
        obstacle = self._low_latency_obstacle(device, topology)
        if obstacle is not None and self.comm == "nvlink":
            raise ConfigError(f"moe.comm = nvlink: {obstacle}")
        if obstacle is not None or (topology.nodes > 1 and self.between_nodes == "portable"):
            return PortableLowLatencyCommunicator(self.group, **sizes)
        reach: Reach | None = None
        if topology.nodes > 1 and self.between_nodes == "loopback":
            reach = loopback_reach(self.group, topology, device)
        elif topology.nodes > 1:
            from ep_moe.comm.nvshmem import nvshmem_reach  # one node never needs it

            reach = nvshmem_reach(self.group, topology, device)
        return NvlinkLowLatencyCommunicator(self.group, device, timeout_s=self.timeout_s, reach=reach, **sizes)

    def _topology(self) -> Topology:
        """The nodes to exchange between; one with several hosts only where that makes auto go portable."""
        if self.comm == "auto" and self.ranks_per_node is None:
            return Topology(self.size, self.size)
        return topology_of_group(self.group, self.ranks_per_node)

    def _low_latency_obstacle(self, device: torch.device, topology: Topology) -> str | None:
        """Why low-latency kernels cannot serve the group, or ``None``; the same answer on all ranks."""
        if topology.nodes > 1 and self.between_nodes != "portable" and self.size > MAX_NODE_RANKS:
            return (
                f"low-latency kernels between nodes serve at most {MAX_NODE_RANKS} ranks, the expert-parallel group "
                f"has {self.size}; set phases.<phase>.mode: normal, or moe.comm: portable"
            )
        return self._nvlink_obstacle(device, topology)

    def _nvlink_obstacle(self, device: torch.device, topology: Topology) -> str | None:
        """Why ranks of a node cannot exchange through symmetric memory, or ``None``; the same answer on all of them."""
        obstacle = _local_obstacle(device)
        if obstacle is None and topology.nodes > 1 and self.between_nodes == "nvshmem":
            obstacle = _nvshmem_obstacle()
        everyone = self._gather((socket.gethostname(), device.index, obstacle))
        if obstacle is not None:
            return obstacle
        for rank, (_, _, reason) in enumerate(everyone):
            if reason is not None:
                return f"rank {rank} of the group: {reason}"
        if topology.ranks_per_node > MAX_RANKS:
            return (
                f"a node has {topology.ranks_per_node} ranks of the expert-parallel group, kernels serve at most "
                f"{MAX_RANKS}"
            )
        if topology.nodes > MAX_NODES and self.between_nodes != "portable":
            return f"the group spans {topology.nodes} nodes, kernels between nodes serve at most {MAX_NODES}"
        # Loopback maps the memory of all nodes.
        loopback = self.between_nodes == "loopback"
        mapped = range(self.size) if loopback else topology.ranks_of_node(topology.node_of(self.rank))
        obstacles = self._gather(self._mapping_obstacle([everyone[rank][:2] for rank in mapped]))
        return next((obstacle for obstacle in obstacles if obstacle is not None), None)

    def _mapping_obstacle(self, places: list[tuple[str, int]]) -> str | None:
        """Why ranks in these places, (host, GPU) each, cannot map each other's memory, or ``None``."""
        hosts = sorted({host for host, _ in places})
        if len(hosts) > 1:
            advice = (
                "moe.comm_ranks_per_node" if self.between_nodes != "loopback" else "moe.comm_between_nodes: loopback"
            )
            return f"ranks that map each other's memory are on several hosts ({', '.join(hosts)}); correct {advice}"
        indices = {index for _, index in places}
        if len(indices) < len(places) and (self.comm == "auto" or os.environ.get(_OVERLAP_VARIABLE) != "1"):
            return f"several ranks share a GPU, where their kernels take turns; set {_OVERLAP_VARIABLE}=1 to allow it"
        for one in indices:
            for other in indices - {one}:
                if not torch.cuda.can_device_access_peer(one, other):
                    return f"GPU {one} cannot access GPU {other}; see: nvidia-smi topo -m"
        return None

    def _gather(self, mine: _T) -> list[_T]:
        """What every rank of the group passes."""
        everyone = [mine] * self.size
        if self.size > 1:
            dist.all_gather_object(everyone, mine, group=self.group)
        return everyone


def _local_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the tokens are on {device}, kernels need a CUDA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return f"GPU {device.index} has compute capability {major}.{minor}, kernels need 9.0 (Hopper) or newer"
    try:
        load_library()
    except NativeLibraryError as error:
        return str(error)
    return None


def _nvshmem_obstacle() -> str | None:
    try:
        open_nvshmem_library()
    except NativeLibraryError as error:
        return str(error)
    return None


def communicator_factory(
    comm: Literal["auto", "portable", "nvlink"],
    group: dist.ProcessGroup | None,
    *,
    max_tokens: int | None,
    timeout_s: float,
    ranks_per_node: int | None = None,
    between_nodes: BetweenNodes = "portable",
) -> CommunicatorFactory:
    """The factory for ``group`` (the default group if ``None``); arguments as the attributes of the factory.

    Raises:
        ConfigError: if ``torch.distributed`` has not been initialised, or this rank is not in ``group``.
    """
    if not dist.is_initialized():
        raise ConfigError(
            f"moe.comm = {comm}: needs torch.distributed; call torch.distributed.init_process_group first "
            "(torchrun sets the environment it reads)"
        )
    group = group if group is not None else dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        # What new_group returns to ranks that are not in the group, or a mistake.
        outside = group is dist.GroupMember.NON_GROUP_MEMBER
        found = f"a group without rank {dist.get_rank()}, this one" if outside else type(group).__name__
        raise ConfigError(f"group: expected a torch.distributed.ProcessGroup that holds this rank, got {found}")
    return CommunicatorFactory(comm, group, max_tokens, timeout_s, ranks_per_node, between_nodes)
