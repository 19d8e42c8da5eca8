"""The FP8 copies of the experts' weights: how often they are made, and that they follow the weights."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from test_fp8_experts import make_experts, segments_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ep_moe.comm import ExpertSegments
from ep_moe.experts.fp8 import Fp8WeightPair
from ep_moe.experts.fp8_emulated import EMULATED
from ep_moe.experts.native_fp8 import NATIVE
from ep_moe.experts.quantized_weight import QuantizedWeight


class Counting:
    """The emulation, which counts the weights that it quantises."""

    def __init__(self) -> None:
        self.quantised = 0
        self.gemm = dataclasses.replace(EMULATED, quantize_weight=self._quantize_weight)

    def _quantize_weight(self, weight: Tensor, transposed: bool) -> Fp8WeightPair:
        self.quantised += 1
        return EMULATED.quantize_weight(weight, transposed)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr("ep_moe.experts.grouped.select_fp8_backend", lambda *_, **__: counting.gemm)
    return counting


SEGMENTS = segments_of([2, 2, 2, 2], "cpu")


def step(experts: nn.Module, rows: Tensor, optimizer: torch.optim.Optimizer) -> None:
    experts(rows, None, SEGMENTS).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_the_optimizer_is_followed_by_one_quantisation(counting: Counting, fused: bool) -> None:
    experts, rows = make_experts("fp8"), torch.randn(8, 128)
    optimizer = torch.optim.AdamW(experts.parameters(), lr=0.1, fused=fused)  # which counts no version
    for _ in range(3):  # micro-batches
        experts(rows, None, SEGMENTS).square().sum().backward()
    assert counting.quantised == 2
    optimizer.step()
    with torch.no_grad():
        after = experts(rows, None, SEGMENTS)
        experts(rows, None, SEGMENTS)
    assert counting.quantised == 4
    experts.forget_quantized_weights()
    assert torch.equal(experts(rows, None, SEGMENTS), after)


def test_writes_through_data_by_any_optimizer_are_seen() -> None:
    class ThroughData(torch.optim.Optimizer):
        """As Megatron's: an optimizer of PyTorch's kind steps, then parameters are written through ``data``."""

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(0.5)

    experts, rows = make_experts("fp8"), torch.randn(8, 128)
    before = experts(rows, None, SEGMENTS)
    step(experts, rows, ThroughData([experts.fc2_weight], {}))
    torch.testing.assert_close(experts(rows, None, SEGMENTS), before / 2)


def test_other_changes() -> None:
    experts, rows = make_experts("fp8"), torch.randn(8, 128)
    first = experts(rows, None, SEGMENTS)
    with torch.no_grad():
        experts.fc2_weight.mul_(2.0)
        torch.testing.assert_close(experts(rows, None, SEGMENTS), 2 * first)
    experts.load_state_dict({**experts.state_dict(), "fc2_weight": experts.fc2_weight.detach() * 2})
    torch.testing.assert_close(experts(rows, None, SEGMENTS), 4 * first)
    experts.fc2_weight.data = experts.fc2_weight.data * 2
    torch.testing.assert_close(experts(rows, None, SEGMENTS), 8 * first)
    experts.fc2_weight.data.mul_(2.0)
    experts.forget_quantized_weights()
    torch.testing.assert_close(experts(rows, None, SEGMENTS), 16 * first)


@torch.no_grad()
def test_other_tensors_at_the_address_of_one_that_is_gone() -> None:
    experts, rows = make_experts("fp8"), torch.randn(8, 128)
    first = experts(rows, None, SEGMENTS)
    memory = bytearray(experts.fc2_weight.nbytes)
    for factor in (2.0, 4.0):
        torch.frombuffer(memory, dtype=torch.float32).copy_(experts.fc2_weight.flatten() * factor)
        other = torch.frombuffer(memory, dtype=torch.float32).view_as(experts.fc2_weight)  # of the same version, too
        got = torch.func.functional_call(experts, {"fc2_weight": other}, (rows, None, SEGMENTS))
        torch.testing.assert_close(got, factor * first)


def test_backward_reads_the_weight_of_its_forward() -> None:
    experts = make_experts("fp8")
    rows = torch.randn(8, 128, requires_grad=True)
    (expected,) = torch.autograd.grad(experts(rows, None, SEGMENTS).sum(), [rows])
    out = experts(rows, None, SEGMENTS)
    with torch.no_grad():
        experts.fc1_weight.zero_()
        experts(rows, None, SEGMENTS)
    assert torch.equal(torch.autograd.grad(out.sum(), [rows])[0], expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_passes_share_the_copies(counting: Counting, reentrant: bool) -> None:
    experts, rows = make_experts("fp8"), torch.randn(8, 128, requires_grad=True)
    for _ in range(2):
        checkpoint(experts, rows, None, SEGMENTS, use_reentrant=reentrant).sum().backward()
    # A reentrant checkpoint runs forward without gradients first, for which the transposed copies are not made.
    assert counting.quantised == (4 if reentrant else 2)


def test_inference_makes_no_transposed_copy() -> None:
    weight, copies = torch.randn(1, 128, 256), QuantizedWeight()
    with torch.no_grad():
        assert copies.get(weight, EMULATED).transposed is None
    pair = copies.get(weight, EMULATED)
    assert pair.transposed is not None
    with torch.no_grad():
        assert copies.get(weight, EMULATED) is pair


def test_copies_of_the_module_have_none() -> None:
    experts, rows = make_experts("fp8"), torch.randn(8, 128)
    expected = experts(rows, None, SEGMENTS)
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(other(rows, None, SEGMENTS), expected)
        with torch.no_grad():
            other.fc2_weight.mul_(2.0)
        torch.testing.assert_close(other(rows, None, SEGMENTS), 2 * expected)
        assert torch.equal(experts(rows, None, SEGMENTS), expected)


@pytest.mark.gpu
def test_captured_inference() -> None:
    experts = make_experts("fp8", "cuda", torch.bfloat16)
    rows = torch.randn(64, 128, device="cuda").bfloat16()
    counts = torch.tensor([10, 20, 0, 4], device="cuda")
    ends = counts.cumsum(0).int()
    segments = ExpertSegments(counts, ends, None, 64)
    with torch.no_grad():
        experts(rows, None, segments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = experts(rows, None, segments)
        rows.normal_()
        ends.copy_(torch.tensor([0, 1, 40, 64], device="cuda"))
        experts.forget_quantized_weights()  # those that the graph reads stay
        graph.replay()
        torch.testing.assert_close(out, experts(rows, None, segments), rtol=0, atol=0)


@pytest.mark.gpu
def test_captured_training_follows_the_weights() -> None:
    experts, segments = make_experts("fp8", "cuda", torch.bfloat16), segments_of([2, 2, 2, 2], "cuda")
    rows = torch.randn(8, 128, device="cuda").bfloat16().requires_grad_()

    def both() -> tuple[Tensor, ...]:
        out = experts(rows, None, segments)
        return out, *torch.autograd.grad(out.float().square().sum(), [rows, *experts.parameters()])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(2):
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.mul_(-1.5)
        graph.replay()
        for found, expected in zip(captured, both(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_capture_before_any_pass_keeps_nothing() -> None:
    weight, copies = torch.randn(1, 128, 128, device="cuda").bfloat16(), QuantizedWeight()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            captured = copies.get(weight, NATIVE)
        eager = copies.get(weight, NATIVE)
        assert eager is not captured
        weight.mul_(-2.0)
        graph.replay()
    assert torch.equal(captured.weight.scales, 2 * eager.weight.scales)
