"""Communicators: moving token rows between ranks."""

from ep_moe.comm.communicator import CapacityError, Communicator, Dispatched, ExpertSegments, RowLayout
from ep_moe.comm.factory import CommunicatorFactory, communicator_factory
from ep_moe.comm.nvlink import NvlinkCommunicator
from ep_moe.comm.nvlink_faults import PeerTimeoutError
from ep_moe.comm.portable import PortableCommunicator

__all__ = [
    "CapacityError",
    "Communicator",
    "CommunicatorFactory",
    "Dispatched",
    "ExpertSegments",
    "NvlinkCommunicator",
    "PeerTimeoutError",
    "PortableCommunicator",
    "RowLayout",
    "communicator_factory",
]
