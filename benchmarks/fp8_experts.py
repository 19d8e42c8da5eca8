"""The experts of one rank in FP8: every pass of a training step alone, and the module beside the one in bf16.

    python benchmarks/fp8_experts.py --ranks 1 --shapes deepseek_v3_ep8 --out results

SwiGLU with routing weights, random counts of a rank's share of 4,096 tokens a rank, no communication. A pass is one
kernel. Its floor is the larger of its bytes over the rate of a large copy, measured here, and its operations over twice
the rate of a large bf16 GEMM (once for gradients of weights in bf16). Gradients of weights come in bf16, and in FP8
with the passes that quantise their operands along tokens. The module comes with rows in bf16 and rows that arrived in
FP8, each with either kind of weights' gradients; ``kept`` passes find the quantised weights of an earlier one, as all
but the first micro-batch of an optimizer's step do, ``fresh`` ones make them.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm.fp8 import quantize_e4m3
from ep_moe.comm.fp8_rows import QuantizedRows, dequantize_rows
from ep_moe.experts.backends import select_fp8_backend
from ep_moe.experts.fp8 import Fp8Gemm, Fp8Rows
from ep_moe.experts.grouped import GroupedExperts
from experts import SQUARE, Case, make_experts, measure_gemm_rate
from gemm_cost import random_counts
from machine import add_ranks_argument, launch, measure_rates, say, start
from results import save
from shapes import SHAPES, gemm_of
from timing import time_call


@dataclass(frozen=True)
class Line:
    """One line of the table; milliseconds. ``floor`` is the sum of those of its passes where it has several."""

    shape: str
    what: str
    median: float
    floor: float
    gigabytes: float
    tflop: float


@dataclass(frozen=True)
class Pass:
    """One kernel: what it moves and computes at least."""

    what: str
    call: Callable[[], object]
    bytes: int = 0
    flops: int = 0
    fp8: bool = True


def main() -> None:
    """Measure the shapes asked for."""
    arguments = parse_arguments()
    launch(arguments.ranks)
    machine = start()
    gemm_rate, memory_rate = measure_gemm_rate(machine), measure_rates(machine).memory * 1e3
    say(f"rate of a bf16 GEMM of {SQUARE}^3: {gemm_rate / 1e9:.0f} TFLOP/s")
    say(f"{'shape':<16} {'what':<38} {'median':>8} {'floor':>8} ms {'TB/s':>6} {'TFLOP/s':>8}")
    lines: list[Line] = []
    for name in arguments.shapes:
        shape = SHAPES[name]
        counts = random_counts(arguments.tokens * shape.top_k, shape.local_experts, False, seed=1 + dist.get_rank())
        case = Case(machine, name, shape, "random", counts, gemm_rate, memory_rate)
        lines += map(shown, measure(case))
    facts = {"gemm_tflops": gemm_rate / 1e9, "memory_gb_s": memory_rate / 1e6}
    save("fp8_experts", arguments.out, machine, vars(arguments) | facts, lines, functools.partial(draw, lines))
    dist.barrier()
    dist.destroy_process_group()


def measure(case: Case) -> Iterator[Line]:
    """Lines of one shape."""
    bf16, fp8, both = (make_experts(case, "native") for _ in range(3))
    fp8.config = replace(fp8.config, precision="fp8")
    both.config = replace(fp8.config, wgrad_precision="fp8")
    for each in passes(case, fp8):
        rate = case.gemm_rate * (2 if each.fp8 else 1)
        floor = max(each.bytes / case.memory_rate, each.flops / rate)
        median = time_call(each.call, case.machine).median / 1e3
        yield Line(case.name, each.what, median, floor, each.bytes / 1e9, each.flops / 1e12)
    rows = torch.randn(sum(case.counts), case.shape.hidden, device=case.machine.device, dtype=torch.bfloat16)
    arrived = QuantizedRows(*quantize_e4m3(rows), rows.new_empty(()).expand(rows.shape).requires_grad_())
    rows.requires_grad_()
    modules = (
        ("bf16", bf16, rows),
        ("FP8", fp8, rows),
        ("FP8, rows in FP8", fp8, arrived),
        ("FP8 and wgrad", both, rows),
        ("FP8 and wgrad, rows in FP8", both, arrived),
    )
    for name, experts, given in modules:
        for fresh in (False, True) if experts is fp8 else (False,):
            for what, call in steps_of(case, experts, given, fresh):
                weights = "" if experts is bf16 else ", fresh" if fresh else ", kept"
                yield Line(case.name, f"{name}: {what}{weights}", time_call(call, case.machine).median / 1e3, 0, 0, 0)


def passes(case: Case, experts: GroupedExperts) -> Iterator[Pass]:
    """The kernels of a step, in their order."""
    shape, device, segments = case.shape, case.machine.device, case.segments
    rows, hidden, ffn = sum(case.counts), shape.hidden, shape.ffn
    sizes = {"num_local_experts": shape.local_experts, "hidden_size": hidden, "ffn_hidden_size": ffn}
    fp8 = select_fp8_backend("native", dtype=torch.bfloat16, device=device, **sizes)
    wgrad = gemm_of(shape, "native", device).wgrad
    x, grad = (torch.randn(rows, hidden, device=device, dtype=torch.bfloat16) for _ in range(2))
    pre, inner = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for width in (2 * ffn, ffn))
    weights = torch.rand(rows, device=device)
    fc1, fc2 = (fp8.quantize_weight(weight.detach(), True) for weight in (experts.fc1_weight, experts.fc2_weight))
    assert fc1.transposed is not None and fc2.transposed is not None
    x8, grad8, pre8, inner8 = (fp8.quantize_rows(tensor, segments) for tensor in (x, grad, pre, inner))
    parameters = experts.fc1_weight.numel() + experts.fc2_weight.numel()
    by_row = x8.scales.t()

    def multiply(of: Any, weight: Any) -> Callable[[], Tensor]:
        return lambda: fp8.multiply(of, weight, segments, torch.bfloat16)

    def quantise_weights() -> None:
        for weight in (experts.fc1_weight, experts.fc2_weight):
            fp8.quantize_weight(weight.detach(), True)

    flops1, flops2 = (case.work(projection).flops for projection in ("fc1", "fc2"))
    yield Pass("weights quantised, two kernels", quantise_weights, 4 * parameters)
    yield Pass("rows quantised", lambda: fp8.quantize_rows(x, segments), 3 * rows * hidden)
    yield Pass("fc1 forward", multiply(x8, fc1.weight), flops=flops1)
    yield Pass("activation", lambda: fp8.activate(pre, "swiglu", weights, segments), 5 * rows * ffn)
    yield Pass("fc2 forward", multiply(inner8, fc2.weight), flops=flops2)
    yield Pass("gradient quantised", lambda: fp8.quantize_rows(grad, segments), 3 * rows * hidden)
    yield Pass("gradient quantised both ways", lambda: fp8.quantize_both(grad, segments, False), 4 * rows * hidden)
    yield Pass("fc2 dgrad", multiply(grad8, fc2.transposed), flops=flops2)
    backward = functools.partial(
        fp8.activation_gradients, inner, pre, "swiglu", weights, segments, need_weights=True, need_activated=True
    )
    yield Pass("activation backward", backward, 14 * rows * ffn)
    yield Pass("fc2 wgrad, bf16", lambda: wgrad(grad, inner, segments), flops=flops2, fp8=False)
    yield from wgrad_passes(case, fp8, "fc2", grad, inner, flops2)
    yield Pass("fc1 dgrad", multiply(pre8, fc1.transposed), flops=flops1)
    yield Pass("rows dequantised", lambda: dequantize_rows(x8.values, by_row, torch.bfloat16), 3 * rows * hidden)
    yield Pass("fc1 wgrad, bf16", lambda: wgrad(pre, x, segments), flops=flops1, fp8=False)
    yield from wgrad_passes(case, fp8, "fc1", pre, x, flops1)
    arrived = Fp8Rows(x8.values, by_row.contiguous().t())
    yield Pass("fc1 FP8 rows by tokens", lambda: fp8.quantize_columns(arrived, segments, True), 3 * rows * hidden)
    total = torch.zeros(experts.fc1_weight.shape, device=device)
    added: dict[str, Any] = {"out": total, "accumulate": True}
    moved = 8 * total.numel()
    yield Pass("fc1 wgrad, bf16, added to fp32", lambda: wgrad(pre, x, segments, **added), moved, flops1, False)
    columns = fp8.quantize_columns(pre, segments, False), fp8.quantize_columns(x, segments, True)
    in_fp8 = functools.partial(fp8.wgrad, *columns, segments, torch.bfloat16, **added)
    yield Pass("fc1 wgrad, FP8, added to fp32", in_fp8, moved, flops1)


def wgrad_passes(case: Case, fp8: Fp8Gemm, name: str, grad: Tensor, rows: Tensor, flops: int) -> Iterator[Pass]:
    """A gradient of weights in FP8, of operands in bf16."""
    segments = case.segments
    yield Pass(f"{name} gradient by tokens", lambda: fp8.quantize_columns(grad, segments, False), 3 * grad.numel())
    yield Pass(f"{name} rows by tokens", lambda: fp8.quantize_columns(rows, segments, True), 5 * rows.numel())
    columns = fp8.quantize_columns(grad, segments, False), fp8.quantize_columns(rows, segments, True)
    yield Pass(f"{name} wgrad, FP8", lambda: fp8.wgrad(*columns, segments, torch.bfloat16), flops=flops)


def steps_of(
    case: Case, experts: GroupedExperts, rows: Tensor | QuantizedRows, fresh: bool
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The module forward, as inference runs it, and forward plus backward."""
    like = rows.stand_in if isinstance(rows, QuantizedRows) else rows
    segments, weights = case.segments, torch.rand(len(like), device=like.device).requires_grad_()
    grad = torch.randn_like(like, memory_format=torch.contiguous_format)
    leaves = (like, weights, *experts.parameters())

    def prepare() -> None:
        if fresh:
            experts.forget_quantized_weights()

    def forward() -> None:
        prepare()
        with torch.no_grad():
            experts(rows, weights, segments)

    def both() -> None:
        prepare()
        torch.autograd.grad(experts(rows, weights, segments), leaves, grad)

    yield "forward", forward
    yield "forward + backward", both


def shown(line: Line) -> Line:
    """Print a line."""
    rates = f"{line.gigabytes / line.median:6.2f} {line.tflop / line.median * 1e3:8.0f}" if line.floor else ""
    say(f"{line.shape:<16} {line.what:<38} {line.median:8.3f} {line.floor:8.3f}    {rates}")
    return line


def draw(lines: list[Line], pyplot: Any) -> Any:
    """Bars of the passes, a line where the floor of each is, a panel a shape."""
    shapes = list(dict.fromkeys(line.shape for line in lines))
    figure, axes = pyplot.subplots(len(shapes), 1, figsize=(12, 4 * len(shapes)), squeeze=False)
    for (axis,), shape in zip(axes, shapes, strict=True):
        chosen = [line for line in lines if line.shape == shape and line.floor]
        axis.bar([line.what for line in chosen], [line.median for line in chosen], 0.6)
        for place, line in enumerate(chosen):
            axis.hlines(line.floor, place - 0.3, place + 0.3, color="black")
        axis.set(title=f"{shape} (line: floor)", ylabel="ms")
        axis.tick_params(axis="x", labelrotation=30, labelsize=7)
    return figure


def parse_arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description="The experts of one rank in FP8.")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["deepseek_v3_ep8", "mixtral_8x7b"])
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--out", type=Path, help="folder for fp8_experts.json and fp8_experts.png")
    add_ranks_argument(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
