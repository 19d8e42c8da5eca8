"""How a phase's configuration becomes a dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ep_moe.comm import CommunicatorFactory
from ep_moe.config import PhaseConfig
from ep_moe.dispatcher.dispatcher import TokenDispatcher
from ep_moe.dispatcher.low_latency import LowLatencyDispatcher
from ep_moe.dispatcher.normal import NormalDispatcher


@dataclass(frozen=True)
class ExchangeShape:
    """What does not depend on the phase.

    Attributes:
        num_experts: over all ranks.
        hidden_size: channels of a token.
        alignment: rows per expert are padded to a multiple of this.
        takes_packed_rows: whether the experts take packed rows of a dtype on a device.
        max_rows: rows to make room for in normal mode, or ``None`` for those that arrive.
        takes_fp8_rows: whether the experts take rows in FP8 of tokens of a dtype on a device.
    """

    num_experts: int
    hidden_size: int
    alignment: int
    takes_packed_rows: Callable[[torch.dtype, torch.device], bool]
    max_rows: int | None
    takes_fp8_rows: Callable[[torch.dtype, torch.device], bool] = lambda dtype, device: False


def build_dispatcher(
    phase: PhaseConfig, communicators: CommunicatorFactory, shape: ExchangeShape, device: torch.device
) -> TokenDispatcher:
    """The dispatcher of a phase for tokens on ``device``; collective over the group of the communicators.

    Raises:
        ConfigError: if this machine cannot run what ``moe.comm`` asks for.
        ValueError: if low-latency mode does not take these sizes.
    """
    if phase.mode == "low_latency":
        assert phase.max_tokens_per_rank is not None  # which the configuration checks
        communicator = communicators.build_low_latency(
            device, phase.max_tokens_per_rank, shape.hidden_size, shape.num_experts
        )
        return LowLatencyDispatcher(
            communicator,
            fp8=phase.dispatch_dtype == "fp8",
            takes_packed_rows=shape.takes_packed_rows,
            takes_fp8_rows=shape.takes_fp8_rows,
        )
    return NormalDispatcher(
        communicators.build(device),
        shape.num_experts,
        fp8=phase.dispatch_dtype == "fp8",
        takes_fp8_rows=shape.takes_fp8_rows,
        alignment=shape.alignment,
        max_rows=shape.max_rows,
        num_sms=phase.num_sms,
        beside_others="shared_experts" in phase.overlap,
    )
