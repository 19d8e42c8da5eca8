"""Exchange between nodes over NVSHMEM: the second CUDA library, opened only where a configuration asks for it.

NVSHMEM knows one world a process: its processing elements are the ranks of the expert-parallel group that first uses
it, until :func:`shutdown`. It starts from an id that rank 0 broadcasts over the group; MPI plays no part.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm.low_latency_reach import Reach
from ep_moe.comm.nvlink_low_latency_args import MAX_NODE_RANKS, NODES_ENTRY_POINTS
from ep_moe.comm.symmetric import SymmetricBuffer
from ep_moe.comm.symmetric_transport import ENTRY_POINTS, SymmetricTransport
from ep_moe.comm.topology import Topology
from ep_moe.config_fields import ConfigError
from ep_moe.native import load_nvshmem_library


@dataclass
class _World:
    """NVSHMEM as it runs in this process.

    Attributes:
        group: whose ranks are the processing elements.
        device: this rank's GPU.
        memory: addresses of what is allocated.
    """

    group: dist.ProcessGroup
    device: torch.device
    memory: list[int] = field(default_factory=list)


_world: _World | None = None


@functools.cache
def load_entry_points() -> ctypes.CDLL:
    """The library with the signatures of its entry points declared.

    Raises:
        NativeLibraryError: if it was not built, or NVSHMEM is missing.
    """
    library = load_nvshmem_library(ENTRY_POINTS | NODES_ENTRY_POINTS)
    library.ep_moe_nvshmem_id_bytes.restype = ctypes.c_size_t
    library.ep_moe_nvshmem_new_id.restype = ctypes.c_char_p
    library.ep_moe_nvshmem_new_id.argtypes = (ctypes.c_void_p,)
    library.ep_moe_nvshmem_start.restype = ctypes.c_char_p
    library.ep_moe_nvshmem_start.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    library.ep_moe_nvshmem_allocate.restype = ctypes.c_void_p
    library.ep_moe_nvshmem_allocate.argtypes = (ctypes.c_size_t,)
    library.ep_moe_nvshmem_free.argtypes = (ctypes.c_void_p,)
    library.ep_moe_nvshmem_pointer.restype = ctypes.c_void_p
    library.ep_moe_nvshmem_pointer.argtypes = (ctypes.c_void_p, ctypes.c_int)
    return library


def nvshmem_transport(
    group: dist.ProcessGroup, ranks: Sequence[int], node: int, device: torch.device, *, timeout_s: float
) -> SymmetricTransport:
    """The transport between nodes; collective over ``group``.

    Args:
        group: all ranks, not only those in one place.
        ranks: the rank in this one's place on every node.
        node: of this rank.
        device: this rank's GPU.
        timeout_s: longest wait for a peer.

    Raises:
        NativeLibraryError: if the library or NVSHMEM is missing.
        ConfigError: if NVSHMEM already serves another group of this process.
    """
    library = load_entry_points()
    allocate = _allocator(library, group, device)

    def of_node(num_bytes: int) -> SymmetricBuffer:
        local = allocate(num_bytes, Tensor.zero_)
        pointers = tuple(local.data_ptr() if other == node else 0 for other in range(len(ranks)))
        return SymmetricBuffer(local, pointers)

    return SymmetricTransport(library, of_node, ranks, node, device, timeout_s=timeout_s)


def nvshmem_reach(group: dist.ProcessGroup, topology: Topology, device: torch.device) -> Reach:
    """How low-latency kernels reach ranks of all nodes; collective over ``group``.

    Args:
        group: all ranks.
        topology: of them.
        device: this rank's GPU.

    Raises:
        NativeLibraryError, ConfigError: as :func:`nvshmem_transport`.
    """
    library = load_entry_points()
    allocate = _allocator(library, group, device)
    node = tuple(topology.ranks_of_node(topology.node_of(dist.get_rank(group))))

    def mapped(num_bytes: int, fill: Callable[[Tensor], object]) -> SymmetricBuffer:
        local = allocate(num_bytes, fill)
        pointers = (
            (library.ep_moe_nvshmem_pointer(local.data_ptr(), rank) or 0) if rank in node else 0
            for rank in range(topology.ranks)
        )
        return SymmetricBuffer(local, tuple(pointers))

    return Reach(library, "low_latency_nodes", mapped, MAX_NODE_RANKS, node)


def _allocator(
    library: ctypes.CDLL, group: dist.ProcessGroup, device: torch.device
) -> Callable[[int, Callable[[Tensor], object]], Tensor]:
    """A function that gives symmetric memory, filled, and frees what it gave before; all collective."""
    world = _start(library, group, device)
    buffers: list[int] = []

    def allocate(num_bytes: int, fill: Callable[[Tensor], object]) -> Tensor:
        while buffers:  # all ranks have stopped using it: they synchronise before they get here
            dist.barrier(group)
            old = buffers.pop()
            world.memory.remove(old)
            library.ep_moe_nvshmem_free(old)
        address = library.ep_moe_nvshmem_allocate(num_bytes)
        if not address:
            raise RuntimeError(
                f"NVSHMEM: no room for {num_bytes} bytes; NVSHMEM_SYMMETRIC_SIZE sets the size of its heap"
            )
        buffers.append(address)
        world.memory.append(address)
        local = torch.as_tensor(_DeviceMemory(address, num_bytes), device=device)
        fill(local)
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody writes into memory before its owner has filled it
        return local

    return allocate


def shutdown() -> None:
    """End NVSHMEM in this process, if it runs; collective over its group. It may be started again.

    No communicator that uses it may be used afterwards. Memory of communicators that are gone is freed only here,
    for that is collective.
    """
    global _world
    if _world is None:
        return
    library = load_entry_points()
    torch.cuda.synchronize(_world.device)
    dist.barrier(_world.group)  # a peer may still put into this rank's memory
    for address in _world.memory:
        library.ep_moe_nvshmem_free(address)
    library.ep_moe_nvshmem_end()
    _world = None


class _DeviceMemory:
    """Memory that a tensor can be made of without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _start(library: ctypes.CDLL, group: dist.ProcessGroup, device: torch.device) -> _World:
    global _world
    if _world is not None:
        if _world.group is not group:
            raise ConfigError(
                "moe.comm_between_nodes = nvshmem: NVSHMEM already serves another expert-parallel group of this process"
            )
        return _world
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    unique = ctypes.create_string_buffer(library.ep_moe_nvshmem_id_bytes())
    # The id must exist on all ranks, or on none: an error of rank 0 travels in its place.
    error = library.ep_moe_nvshmem_new_id(unique) if rank == 0 else None
    shared: list[bytes | str] = [unique.raw if error is None else error.decode()]
    dist.broadcast_object_list(shared, src=dist.get_global_rank(group, 0), group=group)
    if isinstance(shared[0], str):
        raise RuntimeError(shared[0])
    unique.raw = shared[0]
    torch.cuda.set_device(device)
    error = library.ep_moe_nvshmem_start(unique, rank, size)
    if error is not None:
        raise RuntimeError(error.decode())
    _world = _World(group, device)
    return _world
