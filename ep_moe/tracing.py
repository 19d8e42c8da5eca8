"""Seeing a layer at work: a named range for every stage, forward and backward, and a timeline that a browser opens.

Ranges are NVTX ranges, for Nsight Systems, and annotations of ``torch.profiler`` at once. Layers have none until
:func:`annotate_stages` names them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")


class StageRanges:
    """Runs the stages of one layer, in ranges if the layer has been given a name.

    Attributes:
        layer: the name of the layer, or ``None`` for no ranges.
    """

    def __init__(self) -> None:
        self.layer: str | None = None

    def run(self, stage: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """``function(*args, **kwargs)`` in the range ``<layer> <stage>``, and its backward pass in one of its own.

        The backward range lasts from when the gradients of all results are there until those of all arguments are:
        of positional arguments that are tensors, and of results that are tensors, alone or as fields of a dataclass.
        """
        if self.layer is None:
            return function(*args, **kwargs)
        name = f"{self.layer} {stage}"
        if not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in args):
            with _Range(name):
                return function(*args, **kwargs)
        backward = _Range(f"{name} backward")
        marked: Any = _mark(backward.end, args)
        with _Range(name):
            result: Any = function(*marked, **kwargs)
        if isinstance(result, Tensor):
            return _mark(backward.start, (result,))[0]
        fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
        values = _mark(backward.start, tuple(fields.values()))
        return dataclasses.replace(result, **dict(zip(fields, values, strict=True)))


def annotate_stages(model: nn.Module, *, on: bool = True) -> None:
    """Turn the ranges of all MoE layers in ``model`` on, under the names that the layers have there, or off."""
    for name, ranges in _ranges_in(model):
        ranges.layer = (name or "moe") if on else None


@contextlib.contextmanager
def trace(path: str | Path, model: nn.Module) -> Iterator[torch.profiler.profile]:
    """Record what runs in the block and write a timeline, for chrome://tracing or ui.perfetto.dev.

    Args:
        path: of the JSON file; its folder is made. Nothing is written if the block raises.
        model: whose MoE layers have ranges for the time of the block.

    Yields:
        The profile, which can be asked for sums once the block has ended.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    before = [(ranges, ranges.layer) for _, ranges in _ranges_in(model)]
    annotate_stages(model)
    try:
        with torch.profiler.profile(activities=activities) as profile:
            yield profile
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    finally:
        for ranges, layer in before:
            ranges.layer = layer
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))


def _ranges_in(model: nn.Module) -> Iterator[tuple[str, StageRanges]]:
    for name, module in model.named_modules():
        ranges = getattr(module, "ranges", None)
        if isinstance(ranges, StageRanges):
            yield name, ranges


class _Range:
    """A range that may be opened and closed by different functions of one thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._annotation: Any = None
        self._nvtx: int | None = None

    def start(self) -> None:
        self.end()  # a second backward pass over one graph may have left it open
        if torch.cuda.is_available():
            self._nvtx = torch.cuda.nvtx.range_start(self._name)
        self._annotation = torch.profiler.record_function(self._name)
        self._annotation.__enter__()

    def end(self) -> None:
        if self._annotation is None:
            return
        self._annotation.__exit__(None, None, None)
        self._annotation = None
        if self._nvtx is not None:
            torch.cuda.nvtx.range_end(self._nvtx)
            self._nvtx = None

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *exception: Any) -> None:
        self.end()


def _mark(call: Callable[[], None], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values; once the gradients of all tensors among them are there, backward calls ``call``."""
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
    if not places:
        return values
    out = list(values)
    for place, tensor in zip(places, _Mark.apply(call, *(values[place] for place in places)), strict=True):
        out[place] = tensor
    return tuple(out)


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.call()
        return None, *grads
