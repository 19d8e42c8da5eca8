"""Recording which experts were chosen, and choosing the same again.

Use: comparing two runs of a model without routing noise, or training on the routing of an inference engine (R3,
arXiv 2510.11370). Only the choice is replayed; weights come from the current scores and carry gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ep_moe.router.recompute import in_backward
from ep_moe.router.router import TopKRouter
from ep_moe.router.scoring import SelectExperts

RecordedRouting = dict[str, list[Tensor]]
"""Per router, by its name in the module: int64 ``[tokens, top_k]`` choices before dropping, one per forward pass."""


@contextmanager
def record_routing(module: nn.Module) -> Iterator[RecordedRouting]:
    """Record the choices of every :class:`TopKRouter` in ``module`` during the ``with`` block.

    Passes repeated by activation recompute are not recorded again.

    Args:
        module: any module that contains routers, or a router.

    Yields:
        The recording, which fills up as the block runs; plain tensors on the router's device.
    """
    recorded: RecordedRouting = {}
    selects: dict[str, SelectExperts] = {}
    for name, router in _routers(module).items():
        recorded[name] = []
        selects[name] = _Recorder(recorded[name], router.select_experts)
    with _selecting(module, selects):
        yield recorded


@contextmanager
def replay_routing(module: nn.Module, recorded: RecordedRouting) -> Iterator[None]:
    """Make every :class:`TopKRouter` in ``module`` choose as recorded, pass by pass, during the ``with`` block.

    Under activation recompute the block must enclose the backward pass; a recomputed pass gets the choice of the
    pass it repeats, in whatever order backward takes the micro-batches. ``recorded`` is left as it is.

    Args:
        module: the module that was recorded, or one with routers of the same names.
        recorded: from :func:`record_routing`.

    Raises:
        ValueError: on entry if the names of the routers differ from the recorded ones; in a forward pass if
            the recording is used up or holds a choice of another shape.
    """
    routers = _routers(module)
    if routers.keys() != recorded.keys():
        raise ValueError(f"the recording is of routers {sorted(recorded)}, the module has {sorted(routers)}")
    selects: dict[str, SelectExperts] = {name: _Replayer(name, recorded[name]) for name in routers}
    with _selecting(module, selects):
        yield


def _routers(module: nn.Module) -> dict[str, TopKRouter]:
    return {name: child for name, child in module.named_modules() if isinstance(child, TopKRouter)}


@contextmanager
def _selecting(module: nn.Module, selects: dict[str, SelectExperts]) -> Iterator[None]:
    routers = _routers(module)
    before = {name: router.select_experts for name, router in routers.items()}
    try:
        for name, router in routers.items():
            router.select_experts = selects[name]
        yield
    finally:
        for name, router in routers.items():
            router.select_experts = before[name]


class _Recorder:
    def __init__(self, recorded: list[Tensor], select: SelectExperts) -> None:
        self.recorded = recorded
        self.select = select

    def __call__(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None
    ) -> tuple[Tensor, Tensor]:
        values, indices = self.select(scores, topk, num_groups, group_topk)
        if not in_backward():
            self.recorded.append(indices.detach())
        return values, indices


class _Replayer:
    """Hands out choices in order, and hands the same one out again when a pass is recomputed.

    Backward may take micro-batches first-in-first-out (a pipeline schedule) or last-in-first-out (one backward
    over a sum of losses), so a recomputed pass is recognised by its scores rather than by its turn. Comparing
    happens on the device, without waiting for it.
    """

    def __init__(self, name: str, choices: list[Tensor]) -> None:
        self.name = name
        self.choices = choices
        self.fingerprints: list[Tensor] = []

    def __call__(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None
    ) -> tuple[Tensor, Tensor]:
        shape = (len(scores), topk)
        indices = self._repeated(scores, shape) if in_backward() else self._next(scores, shape)
        return scores.gather(1, indices), indices

    def _next(self, scores: Tensor, shape: tuple[int, int]) -> Tensor:
        turn = len(self.fingerprints)
        if turn == len(self.choices):
            raise ValueError(f"router '{self.name}': forward pass {turn + 1}, but the recording holds only {turn}")
        choice = self.choices[turn]
        if choice.shape != shape:
            raise ValueError(
                f"router '{self.name}', forward pass {turn + 1}: the recorded choice has shape "
                f"{tuple(choice.shape)}, the tokens need {shape}"
            )
        self.fingerprints.append(_fingerprint(scores))
        return choice.to(scores.device)

    def _repeated(self, scores: Tensor, shape: tuple[int, int]) -> Tensor:
        turns = [turn for turn in range(len(self.fingerprints)) if self.choices[turn].shape == shape]
        if not turns:
            raise ValueError(f"router '{self.name}': a recomputed forward pass was not replayed the first time")
        if len(turns) == 1:
            return self.choices[turns[0]].to(scores.device)
        distances = torch.stack([self.fingerprints[turn] for turn in turns]) - _fingerprint(scores)
        nearest = distances.abs().sum(-1).argmin(0, keepdim=True)
        return torch.stack([self.choices[turn].to(scores.device) for turn in turns]).index_select(0, nearest)[0]


@torch.no_grad()
def _fingerprint(scores: Tensor) -> Tensor:
    """``[num_experts]``, the scores summed over tokens, weighted by position so that order matters."""
    return torch.arange(1, len(scores) + 1, device=scores.device, dtype=torch.float32) @ scores.float()
