"""One MoE layer, forward and forward plus backward: the whole, its GEMMs alone, and where the rest goes.

    python benchmarks/layer.py --ranks 2 --shapes deepseek_v3 mixtral_8x7b --overlap none wgrad --out results

One process a GPU (or under ``torchrun``). Shapes give each GPU the rows of its model's layer: the local experts of a
rank, with random routing of 4,096 tokens a rank to them. With one process all rows are local. Times are medians of
the slowest rank, bf16; gradients are written, or with ``--main-grad`` added to fp32 buffers. The GEMMs alone are the
layer's grouped GEMMs on rows of the same segments. ``--calls 1`` (the default) starts each call on an idle GPU, which
shows all of the host's time; with more, calls follow each other as the layers of a model do, and the host runs ahead
where it can.

``--overlap`` takes strategies of docs/overlap.md, several joined by ``+``; experts in 4 chunks are ``expert_chunks:4``.
With ``two_batch`` the tokens come as two halves in turns, forward only; hold it against ``halves``, the same two one
after the other.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe import EPMoELayer
from ep_moe.comm import ExpertSegments
from ep_moe.config import (
    Config,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    PhaseConfig,
    PhasesConfig,
    SharedExpertsConfig,
)
from ep_moe.experts.gemm import grouped_linear
from ep_moe.tracing import trace
from ep_moe.two_batch import two_batch
from machine import Machine, add_ranks_argument, launch, say, start
from results import save
from shapes import SHAPES, Shape, gemm_of, shapes_for
from timeline import draw_traces, hidden_share, read_spans
from timing import repeat, time_call

HALVES = ("halves", "two_batch")  # forward of two micro-batches


@dataclass(frozen=True)
class Line:
    """One line of the table; milliseconds, and GiB that a step takes beyond weights and inputs."""

    shape: str
    experts: int
    backend: str
    overlap: str
    sms: int | None
    forward: float
    both: float
    gemms_forward: float
    gemms_both: float
    peak_gib: float


@dataclass(frozen=True)
class Times:
    """Milliseconds."""

    forward: float
    both: float


def main() -> None:
    """Measure the shapes asked for."""
    arguments = parse_arguments()
    launch(arguments.ranks)
    machine = start()
    say(f"{arguments.tokens} tokens a rank, bf16" + (", experts in FP8" if arguments.precision == "fp8" else ""))
    say(
        "shape             back end    overlap              SMs | layer: fwd  fwd+bwd | GEMMs: fwd  fwd+bwd | "
        "ratio: fwd  both | peak GiB"
    )
    shapes = arguments.shapes or shapes_for(machine.ranks)
    choices = itertools.product(shapes, arguments.backends, arguments.overlap, arguments.sms)
    lines = [measure(name, backend, overlap, sms, arguments, machine) for name, backend, overlap, sms in choices]
    save("layer", arguments.out, machine, vars(arguments), lines, functools.partial(draw, lines))
    dist.barrier()
    dist.destroy_process_group()


def measure(
    name: str, backend: str, overlap: str, sms: int | None, arguments: argparse.Namespace, machine: Machine
) -> Line:
    """Measure and print one shape, back end and choice of strategies."""
    shape, size, device = SHAPES[name], machine.ranks, machine.device
    config = layer_config(shape, size, backend, overlap, sms, arguments)
    torch.manual_seed(1)
    layer = EPMoELayer(config, device=device, dtype=torch.bfloat16)
    if arguments.main_grad:
        give_main_grads(layer)
    torch.manual_seed(2 + dist.get_rank())
    x = torch.randn(arguments.tokens, shape.hidden, device=device).bfloat16().requires_grad_()
    grad = torch.randn_like(x)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    def forward() -> object:
        halves = x.chunk(2)
        if overlap == "two_batch":
            return two_batch(*(layer.forward_steps(half) for half in halves))
        return [layer(half) for half in halves] if overlap == "halves" else layer(x)

    def both() -> None:
        layer(x).backward(grad)
        clear(layer, x)

    in_halves = overlap in HALVES
    whole = time_both(lambda: without_grad(forward), None if in_halves else both, arguments.calls, machine)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    if arguments.trace is not None:
        path = arguments.trace / f"{name}_{backend}_{overlap.replace(':', '')}_rank{dist.get_rank()}.json"
        with trace(path, layer) as profile:
            without_grad(forward) if in_halves else both()
        say(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))
        say(f"{hidden_share(read_spans(path)):.0%} of communication ran behind something else")
        if dist.get_rank() == 0:
            draw_traces([path])
    gemms = time_gemms(layer, shape, arguments.tokens * shape.top_k, backend, arguments.calls, machine)
    ratios = f"{whole.forward / gemms.forward:10.2f} {whole.both / gemms.both:5.2f}"
    times = " | ".join(f"{t.forward:10.2f} {t.both:8.2f}" for t in (whole, gemms))
    say(f"{name:<17} {backend:<11} {overlap:<20} {sms or '':>3} | {times} | {ratios} | {peak:8.1f}")
    figures = (whole.forward, whole.both, gemms.forward, gemms.both, peak)
    return Line(name, shape.local_experts * size, backend, overlap, sms, *figures)


def layer_config(
    shape: Shape, size: int, backend: str, overlap: str, sms: int | None, arguments: argparse.Namespace
) -> Config:
    """The configuration of a layer of ``shape`` over ``size`` ranks."""
    phase = PhaseConfig(num_sms=sms, max_tokens_per_rank=arguments.tokens, dispatch_dtype=arguments.dispatch_dtype)
    train = replace(phase, **strategies(overlap))
    return Config(
        model=ModelConfig(hidden_size=shape.hidden, num_attention_heads=shape.hidden // 128),
        moe=MoEConfig(
            num_experts=shape.local_experts * size,
            top_k=shape.top_k,
            comm=arguments.comm,
            experts=ExpertsConfig(
                ffn_hidden_size=shape.ffn,
                activation="swiglu",
                backend=backend,  # type: ignore[arg-type]
                precision=arguments.precision,
                wgrad_precision=arguments.wgrad_precision,
                recompute_activation=not arguments.keep_activations,
            ),
            shared_experts=SharedExpertsConfig(ffn_hidden_size=arguments.shared_ffn),
            capacity_rows=arguments.capacity_rows,
        ),
        phases=replace(PhasesConfig(), train=train, prefill=phase),
    )


def strategies(overlap: str) -> dict[str, Any]:
    """Keys of a phase from a choice of strategies."""
    names = [] if overlap in ("none", *HALVES) else overlap.split("+")
    chunks = [int(name.partition(":")[2]) for name in names if name.startswith("expert_chunks:")]
    return {
        "overlap": tuple(name for name in names if not name.startswith("expert_chunks:")),
        "expert_chunks": chunks[-1] if chunks else 1,
    }


def give_main_grads(layer: EPMoELayer) -> None:
    """Buffers that the experts add their gradients to, as Megatron's data parallelism gives them."""
    for parameter in layer.experts.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]


def time_gemms(layer: EPMoELayer, shape: Shape, rows: int, backend: str, calls: int, machine: Machine) -> Times:
    """The two projections of the experts on random rows, with what backward computes of them."""
    device = machine.device
    counts = torch.bincount(torch.randint(shape.local_experts, (rows,)), minlength=shape.local_experts)
    segments = ExpertSegments(counts.to(device), counts.cumsum(0).int().to(device), tuple(counts.tolist()))
    gemm = gemm_of(shape, backend, device)
    first = torch.randn(rows, shape.hidden, device=device).bfloat16().requires_grad_()
    second = torch.randn(rows, shape.ffn, device=device).bfloat16().requires_grad_()
    fc1, fc2 = layer.experts.fc1_weight, layer.experts.fc2_weight
    grad1 = torch.randn(rows, fc1.shape[1], device=device).bfloat16()
    grad2 = torch.randn(rows, shape.hidden, device=device).bfloat16()

    def forward() -> tuple[Tensor, Tensor]:
        return grouped_linear(first, fc1, segments, gemm), grouped_linear(second, fc2, segments, gemm)

    def both() -> None:
        torch.autograd.backward(forward(), (grad1, grad2))
        clear(layer, first, second)

    return time_both(lambda: without_grad(forward), both, calls, machine)


def without_grad(call: Callable[[], object]) -> object:
    """``call`` as inference runs it."""
    with torch.no_grad():
        return call()


def clear(layer: EPMoELayer, *tensors: Tensor) -> None:
    """Forget gradients, so that the next ones are written and not added."""
    layer.zero_grad(set_to_none=True)
    for tensor in tensors:
        tensor.grad = None


def time_both(forward: Callable[[], object], both: Callable[[], object] | None, calls: int, machine: Machine) -> Times:
    """Medians of the two, of ``calls`` one after the other; NaN for one that is missing."""

    def milliseconds(call: Callable[[], object] | None) -> float:
        if call is None:
            return math.nan
        return time_call(functools.partial(repeat, call, calls), machine, calls=calls).median / 1e3

    return Times(milliseconds(forward), milliseconds(both))


def draw(lines: list[Line], pyplot: Any) -> Any:
    """Bars of the layer, a line where its GEMMs alone are."""
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 5))
    labels = [f"{x.shape}\n{x.backend}, {x.overlap}" + ("" if x.sms is None else f", {x.sms} SMs") for x in lines]
    for axis, whole, gemms in ((axes[0], "forward", "gemms_forward"), (axes[1], "both", "gemms_both")):
        axis.bar(labels, [getattr(x, whole) for x in lines], 0.6, label="layer")
        for place, line in enumerate(lines):
            least = getattr(line, gemms)
            axis.hlines(least, place - 0.3, place + 0.3, color="black", label=None if place else "its GEMMs alone")
        axis.set(title="forward" if whole == "forward" else "forward + backward", ylabel="ms")
        axis.tick_params(axis="x", labelrotation=30, labelsize=7)
        axis.legend()
    return figure


def parse_arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description="One MoE layer.")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: whole models")
    parser.add_argument("--backends", nargs="+", default=["native", "grouped_mm"])
    parser.add_argument("--precision", choices=["input", "fp8"], default="input", help="the GEMMs alone stay bf16")
    parser.add_argument("--wgrad-precision", choices=["input", "fp8"], default="input", help="of weights' gradients")
    parser.add_argument("--dispatch-dtype", choices=["input", "fp8"], default="input", help="of rows on their way")
    parser.add_argument(
        "--overlap",
        nargs="+",
        default=["none"],
        help="none, halves, two_batch, or strategies by +, such as expert_chunks:4+wgrad",
    )
    parser.add_argument("--shared-ffn", type=int, default=0, help="inner width of shared experts, 0 for none")
    parser.add_argument("--capacity-rows", type=int, help="rows to make room for; the host then waits for no sizes")
    parser.add_argument("--keep-activations", action="store_true", help="instead of computing them again in backward")
    parser.add_argument("--main-grad", action="store_true", help="add expert gradients to fp32 buffers")
    parser.add_argument("--comm", choices=["auto", "portable", "nvlink"], default="auto")
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--calls", type=int, default=1, help="of the layer between two time stamps")
    parser.add_argument("--sms", type=int, nargs="+", default=[None], help="SM budgets of communication")
    parser.add_argument("--trace", type=Path, help="folder for a timeline of each line, and its picture")
    parser.add_argument("--out", type=Path, help="folder for layer.json and layer.png")
    add_ranks_argument(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
