"""Telling a first forward pass from its repetition under activation recompute."""

from __future__ import annotations

import torch


def in_backward() -> bool:
    """Whether the caller runs inside a backward pass: a forward pass there is an activation recompute."""
    # torch.utils.checkpoint asks the same question the same way; there is no public spelling.
    return torch._C._current_graph_task_id() != -1


class OncePerMicroBatch:
    """Decides which forward passes count, so that a recomputed micro-batch counts once.

    A micro-batch counts in its first forward pass that has grad enabled. Without recompute, and under
    non-reentrant checkpointing, that is the pass before backward; under reentrant checkpointing (also
    Megatron's), whose first pass runs without grad, it is the recompute. In a backward pass the two are told
    apart by the passes without grad that still await their recompute.
    """

    def __init__(self) -> None:
        self._awaiting_recompute = 0

    def counts(self) -> bool:
        """Whether the current forward pass counts. Call once per forward pass in training mode."""
        if not torch.is_grad_enabled():
            if not in_backward():
                self._awaiting_recompute += 1
            return False
        if not in_backward():
            return True
        if self._awaiting_recompute:
            self._awaiting_recompute -= 1
            return True
        return False

    def reset(self) -> None:
        """Forget passes without grad that never saw a recompute. Call between global batches."""
        self._awaiting_recompute = 0
