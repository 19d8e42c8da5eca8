"""Communicators: moving token rows between ranks."""

from ep_moe.comm.communicator import Communicator, Dispatched, ExpertSegments
from ep_moe.comm.factory import CommunicatorFactory, communicator_factory
from ep_moe.comm.nvlink import NvlinkCommunicator, PeerTimeoutError
from ep_moe.comm.portable import PortableCommunicator

__all__ = [
    "Communicator",
    "CommunicatorFactory",
    "Dispatched",
    "ExpertSegments",
    "NvlinkCommunicator",
    "PeerTimeoutError",
    "PortableCommunicator",
    "communicator_factory",
]
