"""Which phase a forward pass belongs to, and the dispatcher and scheduler that serve it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ep_moe.comm import CommunicatorFactory
from ep_moe.config import PHASES, ConfigError, PhaseConfig, PhasesConfig
from ep_moe.dispatcher import ExchangeShape, TokenDispatcher, build_dispatcher
from ep_moe.overlap import OverlapScheduler


class PhaseSelector:
    """Which phase applies, and its dispatcher and scheduler, built when first used."""

    def __init__(self, phases: PhasesConfig, communicators: CommunicatorFactory, shape: ExchangeShape) -> None:
        self._phases = phases
        self._communicators = communicators
        self._shape = shape
        self._explicit: str | None = None
        self._built: dict[tuple[str, torch.device], tuple[TokenDispatcher, OverlapScheduler]] = {}

    def set(self, name: str | None) -> contextlib.AbstractContextManager[None]:
        """Fix the phase (``None``: choose automatically); the returned context restores the previous choice."""
        if name is not None and name not in PHASES:
            raise ValueError(f"phase: expected one of {', '.join(PHASES)} or None, got {name!r}")
        previous, self._explicit = self._explicit, name
        return self._restore(previous)

    def select(self, training: bool, tokens: int, device: torch.device) -> tuple[TokenDispatcher, OverlapScheduler]:
        """Dispatcher and scheduler for a forward pass of ``tokens`` tokens at this rank."""
        name = self._explicit or ("train" if training else self._inference_phase(tokens, device))
        limit = self._settings(name).max_tokens_per_rank
        if limit is not None and tokens > limit:
            raise ValueError(f"hidden_states: {tokens} tokens exceed phases.{name}.max_tokens_per_rank ({limit})")
        return self._get(name, device)

    def _inference_phase(self, tokens: int, device: torch.device) -> str:
        limit = self._settings("decode").max_tokens_per_rank
        if limit is None:
            return "prefill"
        most = tokens
        if self._communicators.size > 1:
            # The ranks must agree, or they would wait for each other in different exchanges.
            agreed = torch.tensor(tokens, device=device)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._communicators.group)
            most = int(agreed)
        return "decode" if most <= limit else "prefill"

    def _settings(self, name: str) -> PhaseConfig:
        return getattr(self._phases, name)

    def _get(self, name: str, device: torch.device) -> tuple[TokenDispatcher, OverlapScheduler]:
        if (name, device) not in self._built:
            settings = self._settings(name)
            dispatcher = build_dispatcher(settings, self._communicators, self._shape, device)
            self._built[name, device] = dispatcher, OverlapScheduler(settings.overlap, settings.expert_chunks)
        return self._built[name, device]

    def __deepcopy__(self, memo: dict[int, Any]) -> PhaseSelector:
        # What was built holds memory that all layers of the group share.
        copied = PhaseSelector(self._phases, self._communicators, copy.deepcopy(self._shape, memo))
        copied._explicit = self._explicit
        return copied

    @contextlib.contextmanager
    def _restore(self, previous: str | None) -> Iterator[None]:
        try:
            yield
        finally:
            self._explicit = previous


def check_expert_chunks(phases: PhasesConfig, local_experts: int) -> None:
    """Raise :class:`ConfigError` unless ``expert_chunks`` of every phase leave each group one of ``local_experts``."""
    for name in PHASES:
        chunks = getattr(phases, name).expert_chunks
        if chunks > local_experts:
            raise ConfigError(
                f"phases.{name}.expert_chunks = {chunks}: must be at most {local_experts}, the experts of a rank"
            )


def most_tokens(phases: PhasesConfig) -> int | None:
    """The largest ``max_tokens_per_rank`` of the phases that set one."""
    limits = [getattr(phases, name).max_tokens_per_rank for name in PHASES]
    return max((limit for limit in limits if limit is not None), default=None)
