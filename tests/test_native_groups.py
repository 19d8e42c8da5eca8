"""The grouped GEMMs and activations of the CUDA library on a group of experts at a time: the bits of all at once."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ep_moe.comm import ExpertSegments
from ep_moe.experts.activation import activate, activation_backward
from ep_moe.experts.gemm import GroupedGemm
from ep_moe.experts.groups import ExpertGroup, split_segments
from ep_moe.experts.native_gemm import NATIVE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]


class Case:
    """Random rows, weights and segments; with ``extra``, only the GPU knows the sizes, and NaN is behind the last."""

    def __init__(self, seed: int) -> None:
        choose = random.Random(seed)
        typical = choose.choice([1, 8, 40, 160, 300])
        counts = [choose.choice([0, choose.randrange(2 * typical + 1)]) for _ in range(choose.randrange(2, 40))]
        self.real = sum(counts)
        extra = choose.choice([None, 0, 33])
        self.ffn, self.hidden = 64 * choose.randrange(1, 8), 64 * choose.randrange(1, 8)
        on_device = torch.tensor(counts, device="cuda")
        self.segments = ExpertSegments(
            on_device,
            on_device.cumsum(0).int(),
            tuple(counts) if extra is None else None,
            None if extra is None else self.real + extra,
        )
        self.groups = split_segments(self.segments, choose.randrange(1, len(counts) + 1), NATIVE)
        self.generator = torch.Generator("cuda").manual_seed(seed)
        rows = self.segments.num_rows
        self.rows, self.wide = self.normal(rows, self.hidden), self.normal(rows, 2 * self.ffn)
        self.narrow, self.weights = self.normal(rows, self.ffn), torch.rand(rows, device="cuda")
        for tensor in (self.rows, self.wide, self.narrow, self.weights):
            tensor[self.real :] = math.nan
        self.fc1 = self.normal(len(counts), 2 * self.ffn, self.hidden)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=self.generator).bfloat16()

    def check(self, expected: Tensor, compute: Callable[[ExpertGroup, Tensor], None]) -> None:
        """Raise unless the groups together write ``expected`` and nothing behind it."""
        out = torch.full_like(expected, 7.0)
        for place in random.Random(self.real).sample(range(len(self.groups)), len(self.groups)):
            compute(self.groups[place], out)
        assert torch.equal(out[: self.real], expected[: self.real])
        assert (out[self.real :] == 7.0).all()


@pytest.mark.parametrize("gemm", [NATIVE, NATIVE.in_turns], ids=["at once", "in turns"])
def test_products_in_groups(gemm: GroupedGemm) -> None:
    for seed in range(150):
        case = Case(seed)

        def forward(group: ExpertGroup, out: Tensor, case: Case = case) -> None:
            gemm.forward(case.rows[group.rows], case.fc1[group.experts], group.segments, out=out[group.rows])

        def dgrad(group: ExpertGroup, out: Tensor, case: Case = case) -> None:
            gemm.dgrad(case.wide[group.rows], case.fc1[group.experts], group.segments, out=out[group.rows])

        case.check(NATIVE.forward(case.rows, case.fc1, case.segments), forward)
        case.check(NATIVE.dgrad(case.wide, case.fc1, case.segments), dgrad)
        assert NATIVE.swiglu is not None
        inner, kept = NATIVE.swiglu(case.rows, case.fc1, case.segments, case.weights, keep=True)
        assert kept is not None
        again = torch.full_like(kept, 7.0)

        def swiglu(group: ExpertGroup, out: Tensor, case: Case = case, again: Tensor = again) -> None:
            assert gemm.swiglu is not None
            gemm.swiglu(
                case.rows[group.rows],
                case.fc1[group.experts],
                group.segments,
                case.weights[group.rows],
                keep=True,
                out=out[group.rows],
                pre_activation=again[group.rows],
            )

        case.check(inner, swiglu)
        assert torch.equal(again[: case.real], kept[: case.real]) and (again[case.real :] == 7.0).all()
        gradient, total = NATIVE.wgrad(case.wide, case.rows, case.segments), case.fc1.float()
        assert torch.equal(gemm.wgrad(case.wide, case.rows, case.segments), gradient)
        sums = [
            product.wgrad(case.wide, case.rows, case.segments, out=total.clone(), accumulate=True)
            for product in (gemm, NATIVE)
        ]
        assert torch.equal(*sums)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu"])
def test_activations_in_groups(activation: str) -> None:
    for seed in range(100):
        case = Case(seed)
        x = case.narrow if activation == "gelu" else case.wide
        count = case.segments.row_count

        def forward(group: ExpertGroup, out: Tensor, case: Case = case, x: Tensor = x) -> None:
            own = group.segments
            activate(
                x[group.rows],
                activation,
                case.weights[group.rows],
                own.row_count,
                row_start=own.start,
                out=out[group.rows],
            )

        case.check(activate(x, activation, case.weights, count), forward)
        both = {"need_x": True, "need_weights": True}
        grad_x, grad_weights = activation_backward(case.narrow, x, activation, case.weights, count, **both)
        assert grad_x is not None and grad_weights is not None
        weights: dict[int, Tensor] = {}

        def backward(
            group: ExpertGroup,
            out: Tensor,
            case: Case = case,
            x: Tensor = x,
            weights: dict[int, Tensor] = weights,
        ) -> None:
            own = group.segments
            _, grad_weights = activation_backward(
                case.narrow[group.rows],
                x[group.rows],
                activation,
                case.weights[group.rows],
                own.row_count,
                need_x=True,
                need_weights=True,
                row_start=own.start,
                out=out[group.rows],
            )
            assert grad_weights is not None
            weights[group.experts.start] = grad_weights

        case.check(grad_x, backward)
        gathered = torch.zeros_like(grad_weights)
        for group in case.groups:
            group.keep(gathered, weights[group.experts.start])
        assert torch.equal(gathered[: case.real], grad_weights[: case.real])
