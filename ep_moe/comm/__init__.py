"""Communicators: moving token rows between ranks."""

from ep_moe.comm.communicator import (
    CapacityError,
    Communicator,
    Dispatched,
    ExpertSegments,
    ReceivedRouting,
    RowLayout,
)
from ep_moe.comm.factory import CommunicatorFactory, communicator_factory
from ep_moe.comm.low_latency import LowLatencyCommunicator, PackedRows, PackedSegments
from ep_moe.comm.nvlink import NvlinkCommunicator
from ep_moe.comm.nvlink_faults import PeerTimeoutError
from ep_moe.comm.nvlink_low_latency import NvlinkLowLatencyCommunicator
from ep_moe.comm.portable import PortableCommunicator
from ep_moe.comm.portable_low_latency import PortableLowLatencyCommunicator

__all__ = [
    "CapacityError",
    "Communicator",
    "CommunicatorFactory",
    "Dispatched",
    "ExpertSegments",
    "LowLatencyCommunicator",
    "NvlinkCommunicator",
    "NvlinkLowLatencyCommunicator",
    "PackedRows",
    "PackedSegments",
    "PeerTimeoutError",
    "PortableCommunicator",
    "PortableLowLatencyCommunicator",
    "ReceivedRouting",
    "RowLayout",
    "communicator_factory",
]
