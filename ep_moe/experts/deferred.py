"""Weight gradients that the backward pass of the experts leaves for later."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

WeightGradientTask = Callable[[], Tensor | None]


class DeferredGradients:
    """Weight gradients of the experts, computed when somebody asks for them.

    The experts' backward pass computes the gradients of rows and adds one task per weight here. Data that waits to be
    used by the tasks (rows and their gradients) stays in memory until then.

    Attributes:
        weights: the tensors whose gradients these are.
    """

    def __init__(self, *weights: Tensor) -> None:
        self.weights = weights
        self._tasks: list[tuple[int, WeightGradientTask]] = []

    def add(self, place: int, task: WeightGradientTask) -> None:
        """Leave the gradient of ``weights[place]`` for later."""
        self._tasks.append((place, task))

    def compute(self) -> list[Tensor | None]:
        """Run all tasks left since the last call, on the current stream: a gradient for each weight.

        ``None`` stands for a gradient that nobody left, or that its task has put elsewhere.
        """
        tasks, self._tasks = self._tasks, []
        gradients: list[Tensor | None] = [None] * len(self.weights)
        for place, task in tasks:
            gradient, earlier = task(), gradients[place]
            gradients[place] = gradient if earlier is None or gradient is None else earlier + gradient
        return gradients
