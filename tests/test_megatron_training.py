"""Training with our layer against training with Megatron's own: the same losses, whatever is switched on.

The reference is Megatron's ``MoELayer`` with its all-to-all dispatcher and ``SequentialMLP``, from the same weights on
the same data, the experts over two ranks. On GPUs that is over NCCL; on a CPU, in fewer steps, over gloo with
stand-ins for what Megatron asks of CUDA.

How far losses may be apart is measured beside them:

- In fp32 the layers form the same sums in other orders, so they differ by a few roundings a pass. How much a rounding
  grows in training is seen where Megatron's layer starts from weights of which each is off by half a rounding step.
  Ours may be ``ROUNDINGS`` times as far away as that, or as a rounding step of the loss itself.
- In bf16 roundings change what tokens choose. The fp32 losses are the truth for both layers, and ours may be ``RATIO``
  times as far from them as Megatron's in bf16, or as the typical rounding of a loss in bf16, a quarter of a step; in
  the root of the mean square, and not closer, for deviations of neighbouring steps are much the same one.
"""

from __future__ import annotations

import contextlib
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("megatron.core")

import torch
from communicators import rank_device
from megatron.core import parallel_state
from megatron_training import Training, losses, train
from ranks import RankError, RankPool, join_over_nccl
from torch import Tensor

ROUNDINGS, RATIO = 16, 3
STEPS = {"cpu": 12, "cuda": 50}

SHARED = (("moe_shared_expert_intermediate_size", 64),)
SELECTIVE = ("recompute_granularity", "selective")
OVERLAPPED = (("overlap_moe_expert_parallel_comm", True), ("delay_wgrad_compute", True))
# What to train with our layer and what with Megatron's.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "shared experts overlapped": ({"settings": (*SHARED, ("moe_shared_expert_overlap", True))}, {"settings": SHARED}),
    "layer recomputed": ({"settings": (SELECTIVE, ("recompute_modules", ("moe",)))}, {}),
    "activation recomputed": (
        {"settings": (SELECTIVE, ("recompute_modules", ("moe_act",)), ("moe_grouped_gemm", True))},
        {},
    ),
    "distributed optimizer": ({"distributed": True}, {"distributed": True}),
    "combined 1F1B": ({"settings": (*SHARED, *OVERLAPPED), "scheduled": True}, {"settings": SHARED}),
}
IN_FP32 = [way for way in WAYS if way != "combined 1F1B"]  # which is for bf16 only


def on_gpus(comm: str, *ways: str) -> list[Any]:
    return [pytest.param("cuda", comm, way, id=f"{comm}-cuda-{way}", marks=pytest.mark.multi_gpu) for way in ways]


def on_cpu(*ways: str) -> list[Any]:
    return [pytest.param("cpu", "portable", way, id=f"cpu-{way}") for way in ways]


class Pools:
    """Two processes a device that stay in Megatron's groups: to form those of NCCL takes longer than a training."""

    def __init__(self) -> None:
        self._pools: dict[str, RankPool] = {}
        self._stores = tempfile.TemporaryDirectory()  # where processes find each other whenever they form a group

    def run(self, device: str, function: Callable[..., Any], *args: Any) -> list[Any]:
        """See ``RankPool.run``; after an error the next call gets new processes."""
        if device not in self._pools:
            self._pools[device] = RankPool(2)
            if device == "cuda":
                self.run(device, join_over_nccl, f"{self._stores.name}/{uuid.uuid4()}")
            self.run(device, _join_megatron)
        try:
            return self._pools[device].run(function, *args)
        except RankError:
            self._pools.pop(device).close()
            raise

    def losses(self, device: str, training: Training) -> Tensor:
        """``[ranks, steps]``."""
        return torch.stack(self.run(device, _losses, device, replace(training, steps=STEPS[device]))).double()

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._stores.cleanup()


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    with contextlib.closing(Pools()) as opened:
        yield opened


def _join_megatron(rank: int, world: int) -> None:
    torch.compiler.set_stance("force_eager")  # Megatron would compile small functions
    parallel_state.initialize_model_parallel(expert_model_parallel_size=world)


def _losses(rank: int, world: int, device: str, training: Training) -> Tensor:
    return losses(rank_device(device, rank), training)


@pytest.mark.parametrize(
    ("device", "comm", "way"),
    [*on_cpu(*IN_FP32), *on_gpus("portable", *IN_FP32), *on_gpus("nvlink", "plain", "layer recomputed")],
)
def test_fp32_losses_are_megatrons(pools: Pools, device: str, comm: str, way: str) -> None:
    ours, theirs = WAYS[way]
    reference = Training(ours=False, **theirs)
    want = pools.losses(device, reference)
    moved = pools.losses(device, replace(reference, shifted=True))
    got = pools.losses(device, Training(ours=True, comm=comm, **ours))
    assert (want[:, -1] < 0.95 * want[:, 0]).all(), "nothing was learned"
    rounding = torch.finfo(torch.float32).eps * float(want.max())
    growth = max(float((moved - want).abs().max()), rounding)
    assert growth < 1e-5 * float(want.max()), "this training would hide an error behind its roundings"
    assert float((got - want).abs().max()) <= ROUNDINGS * growth


@pytest.mark.parametrize(
    ("device", "comm", "way"),
    [
        *on_cpu("distributed optimizer", "combined 1F1B"),
        *on_gpus("portable", "combined 1F1B"),
        *on_gpus("nvlink", *WAYS),
    ],
)
def test_bf16_losses_are_as_exact_as_megatrons(pools: Pools, device: str, comm: str, way: str) -> None:
    ours, theirs = WAYS[way]
    reference = Training(ours=False, **theirs)
    exact = pools.losses(device, reference)
    want = pools.losses(device, replace(reference, dtype=torch.bfloat16))
    got = pools.losses(device, Training(ours=True, dtype=torch.bfloat16, comm=comm, **ours))
    assert (want[:, -1] < 0.95 * want[:, 0]).all(), "nothing was learned"
    theirs_off, ours_off = (float((found - exact).square().mean().sqrt()) for found in (want, got))
    rounding = torch.finfo(torch.bfloat16).eps / 4 * float(exact.max())
    learned = float((exact[:, 0] - exact[:, -1]).mean())
    assert theirs_off < 0.04 * learned, "this training would hide an error behind its roundings"
    assert ours_off <= RATIO * max(theirs_off, rounding)


def _twice(rank: int, world: int, device: str, training: Training) -> tuple[list[str], list[str]]:
    """The weights that differ between two runs, and those of the layer that the last steps have not moved."""
    on = rank_device(device, rank)
    first, second, start = (train(on, replace(training, steps=steps)) for steps in (10, 10, 1))
    assert torch.equal(first.losses, second.losses)
    different = [name for name, weight in first.weights.items() if not torch.equal(weight, second.weights[name])]
    still = [name for name, weight in first.weights.items() if torch.equal(weight, start.weights[name])]
    return different, [name for name in still if ".mlp." in name]


@pytest.mark.parametrize(
    ("device", "comm", "way"),
    [
        *on_cpu("distributed optimizer", "combined 1F1B"),
        *on_gpus("portable", "distributed optimizer"),
        *on_gpus("nvlink", "plain", "distributed optimizer", "combined 1F1B"),
    ],
)
def test_two_runs_end_with_the_same_bits(pools: Pools, device: str, comm: str, way: str) -> None:
    training = Training(ours=True, dtype=torch.bfloat16, comm=comm, **WAYS[way][0])
    for different, still in pools.run(device, _twice, device, training):
        assert not different and not still
