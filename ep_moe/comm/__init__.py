"""Communicators: moving token rows between ranks."""

from ep_moe.comm.communicator import Communicator, Dispatched, ExpertSegments
from ep_moe.comm.factory import build_communicator
from ep_moe.comm.portable import PortableCommunicator, PortableHandle

__all__ = [
    "Communicator",
    "Dispatched",
    "ExpertSegments",
    "PortableCommunicator",
    "PortableHandle",
    "build_communicator",
]
