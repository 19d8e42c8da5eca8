"""Which stage of a layer runs on which stream, and when.

The stages and their order are the layer's; this file only places them. Results do not depend on the placement:
every strategy runs the same operations on the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_moe.streams import record_use


@dataclass(frozen=True)
class Stages:
    """The two independent parts of a layer's forward pass, as functions of the tokens.

    Attributes:
        routed: route, dispatch, experts, combine: ``[tokens, hidden]`` to the same shape.
        shared: the shared experts, or ``None``; same shapes.
    """

    routed: Callable[[Tensor], Tensor]
    shared: Callable[[Tensor], Tensor] | None


class OverlapScheduler:
    """Runs the stages of a layer with the strategies of a phase.

    Args:
        strategies: key ``phases.<name>.overlap``.
        expert_chunks: key ``phases.<name>.expert_chunks``.

    Attributes:
        expert_chunks: groups of experts that compute while rows of others travel; 1 for none.
        wgrad_behind_dispatch: whether the backward pass computes the weight gradients of the experts while the
            gradients of their rows travel back.
    """

    def __init__(self, strategies: tuple[str, ...], expert_chunks: int = 1) -> None:
        self.expert_chunks = expert_chunks
        self.wgrad_behind_dispatch = "wgrad" in strategies
        self.shared_on_side_stream = "shared_experts" in strategies
        self._side_stream: torch.cuda.Stream | None = None

    def run(self, stages: Stages, x: Tensor) -> Tensor:
        """The sum of routed and shared output for tokens ``x`` (``[tokens, hidden]``)."""
        if stages.shared is None:
            return stages.routed(x)
        finish_shared = self.start_shared(stages.shared, x)
        return stages.routed(x) + finish_shared()

    def start_shared(self, shared: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
        """Start the shared experts on ``x``, on a stream of their own if a strategy says so.

        Autograd replays the placement in the backward pass.

        Returns:
            A function to call once; it gives the output for use on the current stream.
        """
        if not (self.shared_on_side_stream and x.is_cuda):
            out = shared(x)
            return lambda: out
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(x.device)
        side = self._side_stream
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            shared_out = shared(x)
            record_use(x)  # in the backward pass too, so nobody can hold it for long enough instead

        def finish() -> Tensor:
            torch.cuda.current_stream(x.device).wait_stream(side)
            record_use(shared_out)
            return shared_out

        return finish
