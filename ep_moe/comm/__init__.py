"""Communicators: moving token rows between ranks."""

from ep_moe.comm.communicator import Communicator, Dispatched, ExpertSegments

__all__ = ["Communicator", "Dispatched", "ExpertSegments"]
