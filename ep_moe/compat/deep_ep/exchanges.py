"""What the calls of a ``Buffer`` share: its communicators, made when first needed, its stream, and its end."""

from __future__ import annotations

import math
import os
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm import Communicator, LowLatencyCommunicator, communicator_factory
from ep_moe.compat.deep_ep import normal
from ep_moe.compat.deep_ep.events import CommunicationStream
from ep_moe.config import MAX_TIMEOUT_S

COMM_VARIABLE, TIMEOUT_VARIABLE = "EP_MOE_COMM", "EP_MOE_COMM_TIMEOUT_S"


class Exchanges:
    """The communicators of one buffer.

    Attributes:
        rank: this one.
        size: ranks of the group.
        stream: of operations that the caller's stream does not wait for.
        masked: ranks that low-latency exchanges leave out.
        normal: the communicators that there are, by device; :meth:`communicator` makes others.
        low_latency: likewise, by device, most tokens, hidden size and experts.
        room: the most ``num_worst_tokens`` for which there is room, by device.
        destroyed: whether :meth:`destroy` has been called.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Prepare for ``group``, as the environment says; nothing is allocated or exchanged yet.

        Raises:
            ConfigError: if ``torch.distributed`` has not been initialised.
            ValueError: if one of the variables has no such value.
        """
        choice = os.environ.get(COMM_VARIABLE, "auto")
        if choice not in ("auto", "portable", "nvlink"):
            raise ValueError(f"{COMM_VARIABLE}: expected one of auto, portable, nvlink, got {choice!r}")
        self._factory = communicator_factory(
            cast(Literal["auto", "portable", "nvlink"], choice),
            group,
            max_tokens=None,
            timeout_s=_timeout(),
        )
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.stream = CommunicationStream()
        self.masked: set[int] = set()
        self.normal: dict[torch.device, Communicator] = {}
        self.room: dict[torch.device, int] = {}
        self.low_latency: dict[tuple[torch.device, int, int, int], LowLatencyCommunicator] = {}
        self.destroyed = False

    def check_alive(self) -> None:
        """Raise ``RuntimeError`` after :meth:`destroy`."""
        if self.destroyed:
            raise RuntimeError("this Buffer has been destroyed")

    def communicator(self, device: torch.device) -> Communicator:
        """That of normal mode, for tensors on ``device``; collective when it is the first time."""
        self.check_alive()
        if device not in self.normal:
            refuse_capture("a Buffer is used for the first time")
            self.normal[device] = self._factory.build(device)
        return self.normal[device]

    def low_latency_communicator(
        self, device: torch.device, max_tokens: int, hidden: int, num_experts: int
    ) -> LowLatencyCommunicator:
        """That of low-latency mode, for exchanges of these sizes; collective when it is the first time."""
        self.check_alive()
        key = (device, max_tokens, hidden, num_experts)
        if key not in self.low_latency:
            refuse_capture("a Buffer is used for the first time with these sizes")
            communicator = self._factory.build_low_latency(*key)
            for rank in self.masked:
                communicator.mask_rank(rank)
            self.low_latency[key] = communicator
        return self.low_latency[key]

    def make_room(self, x: Tensor, num_worst_tokens: int, experts: int, top_k: int) -> None:
        """More than :attr:`room`: the share of each rank in ``num_worst_tokens``; collective, on all ranks then."""
        share = -(-num_worst_tokens // self.size)
        normal.make_room(self.communicator(x.device), x, share, experts, top_k)
        self.room[x.device] = share * self.size

    def mask(self, rank: int, masked: bool) -> None:
        """Leave a rank out of low-latency exchanges, or let it take part again."""
        for communicator in self.low_latency.values():
            communicator.mask_rank(rank, masked)
        (self.masked.add if masked else self.masked.discard)(rank)

    def destroy(self) -> None:
        """Let go of all memory, once the devices are done with it."""
        for device in self.normal.keys() | {key[0] for key in self.low_latency}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        for kept in (self.normal, self.room, self.low_latency):
            kept.clear()
        self.destroyed = True


def _timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, "30")
    try:
        timeout = float(text)
    except ValueError:
        timeout = math.nan
    if not 0.1 <= timeout <= MAX_TIMEOUT_S:
        raise ValueError(f"{TIMEOUT_VARIABLE}: expected 0.1 to {MAX_TIMEOUT_S} seconds, got {text!r}")
    return timeout


def refuse_capture(what: str) -> None:
    """Raise ``RuntimeError`` while a CUDA graph is captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} while a CUDA graph is captured: do it before, where memory can be allocated")
