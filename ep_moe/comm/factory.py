"""Which communicator serves a group, and one for all layers that use it."""

from __future__ import annotations

import os
import socket
import weakref
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from ep_moe.comm.communicator import Communicator
from ep_moe.comm.low_latency import LowLatencyCommunicator
from ep_moe.comm.nvlink import NvlinkCommunicator
from ep_moe.comm.nvlink_args import MAX_RANKS
from ep_moe.comm.nvlink_low_latency import NvlinkLowLatencyCommunicator
from ep_moe.comm.portable import PortableCommunicator
from ep_moe.comm.portable_low_latency import PortableLowLatencyCommunicator
from ep_moe.config import ConfigError
from ep_moe.native import NativeLibraryError, load_library

_OVERLAP_VARIABLE = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"  # PyTorch reads it too

# Symmetric buffers are large: layers over one group and device share them as long as one of the layers lives.
_shared: weakref.WeakValueDictionary[tuple[str, torch.device], NvlinkCommunicator] = weakref.WeakValueDictionary()
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
    """

    comm: Literal["auto", "portable", "nvlink"]
    group: dist.ProcessGroup
    max_tokens: int | None
    timeout_s: float

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
        if self.comm == "portable" or (self.comm == "auto" and device.type != "cuda"):
            return PortableCommunicator(self.group)
        key = (self.group.group_name, device)
        shared = _shared.get(key)
        # Names recur: a group may have been destroyed and another made.
        if shared is None or shared.group is not self.group:
            obstacle = self._nvlink_obstacle(device)
            if obstacle is not None and self.comm == "auto":
                return PortableCommunicator(self.group)
            if obstacle is not None:
                raise ConfigError(f"moe.comm = nvlink: {obstacle}")
            shared = NvlinkCommunicator(self.group, device, max_tokens=self.max_tokens, timeout_s=self.timeout_s)
            _shared[key] = shared
        return shared

    def build_low_latency(
        self, device: torch.device, max_tokens: int, hidden: int, num_experts: int
    ) -> LowLatencyCommunicator:
        """The low-latency communicator of these sizes for tokens on ``device``; collective over the group.

        Raises:
            ConfigError: if ``moe.comm`` asks for one that cannot run here; the message says why.
            ValueError: if low-latency mode does not take the sizes.
        """
        sizes = (max_tokens, hidden, num_experts)
        key = (self.group.group_name, device, *sizes)
        shared = _shared_low_latency.get(key)
        if shared is None or shared.group is not self.group:
            obstacle = None if self.comm == "portable" else self._nvlink_obstacle(device)
            if obstacle is not None and self.comm == "nvlink":
                raise ConfigError(f"moe.comm = nvlink: {obstacle}")
            named = {"max_tokens": max_tokens, "hidden": hidden, "num_experts": num_experts}
            if self.comm == "portable" or obstacle is not None:
                shared = PortableLowLatencyCommunicator(self.group, **named)
            else:
                shared = NvlinkLowLatencyCommunicator(self.group, device, timeout_s=self.timeout_s, **named)
            _shared_low_latency[key] = shared
        return shared

    def _nvlink_obstacle(self, device: torch.device) -> str | None:
        """Why the ranks cannot exchange through symmetric memory, or ``None``; the same answer on all of them."""
        obstacle = _local_obstacle(device)
        mine = (socket.gethostname(), device.index, obstacle)
        everyone: list[tuple[str, int, str | None]] = [mine] * self.size
        if self.size > 1:
            dist.all_gather_object(everyone, mine, group=self.group)
        if obstacle is not None:
            return obstacle
        for rank, (_, _, reason) in enumerate(everyone):
            if reason is not None:
                return f"rank {rank} of the group: {reason}"
        if self.size > MAX_RANKS:
            return f"the expert-parallel group has {self.size} ranks, kernels serve at most {MAX_RANKS}"
        hosts = sorted({host for host, _, _ in everyone})
        if len(hosts) > 1:
            return f"the ranks are on several hosts ({', '.join(hosts)}); use moe.comm: portable"
        indices = {index for _, index, _ in everyone}
        if len(indices) < self.size and (self.comm == "auto" or os.environ.get(_OVERLAP_VARIABLE) != "1"):
            return f"several ranks share a GPU, where their kernels take turns; set {_OVERLAP_VARIABLE}=1 to allow it"
        for one in indices:
            for other in indices - {one}:
                if not torch.cuda.can_device_access_peer(one, other):
                    return f"GPU {one} cannot access GPU {other}; see: nvidia-smi topo -m"
        return None


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


def communicator_factory(
    comm: Literal["auto", "portable", "nvlink"],
    group: dist.ProcessGroup | None,
    *,
    max_tokens: int | None,
    timeout_s: float,
) -> CommunicatorFactory:
    """The factory for ``group`` (the default group if ``None``); arguments as the attributes of the factory.

    Raises:
        ConfigError: if ``torch.distributed`` has not been initialised.
    """
    if not dist.is_initialized():
        raise ConfigError(
            f"moe.comm = {comm}: needs torch.distributed; call torch.distributed.init_process_group first "
            "(torchrun sets the environment it reads)"
        )
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    return CommunicatorFactory(comm, group, max_tokens, timeout_s)
