"""Weight gradients that the backward pass of the experts leaves for later."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

WeightGradientTask = Callable[[], Tensor]


class DeferredGradients:
    """Weight gradients of the experts, computed when somebody asks for them.

    The experts' backward pass computes the gradients of rows and adds one task per weight here. Data that waits to be
    used by the tasks (rows and their gradients) stays in memory until then.

    Attributes:
        weights: the tensors whose gradients these are.
        tasks: those left so far, each with the place of its weight among ``weights``. Passes may share one list.
    """

    def __init__(self, *weights: Tensor, tasks: list[tuple[int, WeightGradientTask]] | None = None) -> None:
        self.weights = weights
        self.tasks: list[tuple[int, WeightGradientTask]] = [] if tasks is None else tasks

    def add(self, place: int, task: WeightGradientTask) -> None:
        """Leave the gradient of ``weights[place]`` for later."""
        self.tasks.append((place, task))

    def compute(self) -> list[Tensor | None]:
        """Run all tasks left since the last call, on the current stream.

        Returns:
            For each weight the sum of its gradients, or ``None`` if none was left.
        """
        tasks = self.tasks.copy()
        self.tasks.clear()
        gradients: list[Tensor | None] = [None] * len(self.weights)
        for place, task in tasks:
            gradient, earlier = task(), gradients[place]
            gradients[place] = gradient if earlier is None else earlier + gradient
        return gradients
