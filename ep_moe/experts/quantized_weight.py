"""The FP8 copies of the experts' weights: made once, kept until the weight may have changed.

A weight may have changed

- when it is another tensor or of another version: in-place operations, ``load_state_dict``, ``to``;
- after a step of any ``torch.optim.Optimizer``: PyTorch's fused ones count no version, and Megatron's write to
  parameters through ``data`` behind the step of such an optimizer. The step also frees the copies, of all weights;
- when its owner says so (:meth:`QuantizedWeight.forget`), which whoever writes through ``data`` otherwise has to.

So the passes of one optimizer step, micro-batches and recomputed ones among them, share one quantisation. A pass keeps
the copies that its backward will read, whatever becomes of the weight in between.

CUDA graphs: a pass with gradients that is captured quantises within the graph, so that replays follow the weight, and
keeps nothing. One without gradients reads the copies there are at capture, and replays go on reading them: capture
again after the weight has changed. If there are none, it too quantises within the graph. A step of an optimizer that is
replayed goes unseen; passes outside of that graph want :meth:`QuantizedWeight.forget` after it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ep_moe.experts.fp8 import Fp8Gemm, Fp8WeightPair


class QuantizedWeight:
    """The FP8 copies of one weight, while they are valid."""

    def __init__(self) -> None:
        self._weight: Callable[[], Tensor | None] = _nothing  # itself: another may come to lie at its address
        self._source: tuple[Any, ...] | None = None
        self._kept: Fp8WeightPair | None = None
        self._captured: list[Fp8WeightPair] = []
        _copies_of_live_weights().add(self)

    def get(self, weight: Tensor, gemm: Fp8Gemm) -> Fp8WeightPair:
        """The copies of ``weight``; with the transposed one where gradients are enabled."""
        transposed = torch.is_grad_enabled()
        source = (weight.data_ptr(), weight._version, weight.dtype, weight.device, gemm)
        found = self._kept if source == self._source and self._weight() is weight else None
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            if transposed or found is None:
                return gemm.quantize_weight(weight.detach(), transposed)
            self._captured.append(found)
        elif found is None or (transposed and found.transposed is None):
            self.forget()  # before there are new ones: room for one set is enough
            found = gemm.quantize_weight(weight.detach(), transposed)
            self._weight, self._source, self._kept = weakref.ref(weight), source, found
        return found

    def forget(self) -> None:
        """Quantise at the next call."""
        self._weight, self._source, self._kept = _nothing, None, None

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        return QuantizedWeight()

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantizedWeight, ()


def _nothing() -> None:
    """What a reference to a weight that is gone gives."""


@functools.cache
def _copies_of_live_weights() -> weakref.WeakSet[QuantizedWeight]:
    """Those that an optimizer's step empties."""
    live: weakref.WeakSet[QuantizedWeight] = weakref.WeakSet()

    def forget_all(*_: Any) -> None:
        for copies in list(live):
            copies.forget()

    register_optimizer_step_post_hook(forget_all)
    return live
