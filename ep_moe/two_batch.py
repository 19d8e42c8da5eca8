"""Two micro-batches in turns, for inference: one computes while the rows of the other travel.

A model loop takes part by being a generator that passes on the steps of its layers::

    def forward(x: Tensor) -> Generator[None, None, Tensor]:
        for block in blocks:
            x = x + block.attention(x)
            x = x + (yield from block.moe.forward_steps(x))
        return x

    with torch.no_grad():
        first, second = two_batch(forward(x[:half]), forward(x[half:]))

The turns depend on nothing but the number of steps, so all ranks issue their exchanges in one order, and everything
runs in one thread, so it can be captured in a CUDA graph where the layers can.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

Steps = Generator[None, None, T]
"""A computation that yields whenever it has started an exchange whose result it needs next."""


def two_batch(first: Steps[T], second: Steps[T]) -> tuple[T, T]:
    """Run two computations in turns, each until it waits for rows: the results of both.

    Results are those of running one after the other, bit for bit. The computations must not share state that one
    leaves while the other runs, such as a context (``torch.autocast``, ``layer.phase``) that is entered before a step
    and left after it: enter it around the call.

    Args:
        first: makes every first turn; all ranks must pass their micro-batches in the same order.
        second: makes every second turn. In low-latency mode more than two would have too much under way.
    """
    try:
        waiting: list[Steps[T]] = [first, second]
        results: dict[int, T] = {}
        while len(results) < 2:
            for place, steps in enumerate(waiting):
                if place in results:
                    continue
                try:
                    next(steps)
                except StopIteration as end:
                    results[place] = end.value
        return results[0], results[1]
    finally:
        first.close()
        second.close()
