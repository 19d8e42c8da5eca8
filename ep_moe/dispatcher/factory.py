"""How a phase's configuration becomes a dispatcher."""

from __future__ import annotations

from ep_moe.comm import Communicator
from ep_moe.config import ConfigError, PhaseConfig
from ep_moe.dispatcher.dispatcher import TokenDispatcher
from ep_moe.dispatcher.normal import NormalDispatcher


def check_mode(name: str, phase: PhaseConfig) -> None:
    """Raise :class:`ConfigError` if this version cannot run the mode of phase ``name``."""
    if phase.mode == "low_latency":
        raise ConfigError(
            f"phases.{name}.mode = low_latency: this version of ep_moe has no low-latency kernels; "
            f"set phases.{name}.mode: normal"
        )


def build_dispatcher(
    name: str, phase: PhaseConfig, communicator: Communicator, num_experts: int, alignment: int
) -> TokenDispatcher:
    """Build the dispatcher of phase ``name``.

    Args:
        name: the phase, for messages.
        phase: its configuration.
        communicator: what moves the rows.
        num_experts: experts over all ranks.
        alignment: rows per expert are padded to a multiple of this.

    Raises:
        ConfigError: if this machine or version cannot run the phase's mode.
    """
    check_mode(name, phase)
    return NormalDispatcher(
        communicator,
        num_experts,
        fp8=phase.dispatch_dtype == "fp8",
        alignment=alignment,
        num_sms=phase.num_sms,
    )
