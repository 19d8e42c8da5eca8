"""One MoE layer, forward and forward plus backward: the whole, its GEMMs alone, and where the rest goes.

    python benchmarks/layer.py --ranks 2 --shapes deepseek_v3 mixtral_8x7b --trace traces --out results

One process a GPU (or under ``torchrun``). Shapes give each GPU the rows of its model's layer: the local experts of a
rank, with random routing of 4,096 tokens a rank to them. With one process all rows are local. Times are medians over
calls of the slowest rank, bf16; gradients are written, not accumulated. The GEMMs alone are the layer's grouped GEMMs
on rows of the same segments.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe import EPMoELayer
from ep_moe.comm import ExpertSegments
from ep_moe.config import Config, ExpertsConfig, ModelConfig, MoEConfig, PhaseConfig, PhasesConfig
from ep_moe.experts.backends import GroupedLinear, select_backend
from machine import Machine, add_ranks_argument, launch, say, start
from results import save
from shapes import SHAPES, Shape, shapes_for
from timing import time_call


@dataclass(frozen=True)
class Line:
    """One line of the table; milliseconds, and GiB that a step takes beyond weights and inputs."""

    shape: str
    experts: int
    backend: str
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
    say(f"{arguments.tokens} tokens a rank, bf16")
    say("shape             back end    SMs | layer: fwd  fwd+bwd | GEMMs: fwd  fwd+bwd | ratio: fwd  both | peak GiB")
    lines = [
        measure(name, backend, sms, arguments, machine)
        for name in arguments.shapes or shapes_for(machine.ranks)
        for backend in arguments.backends
        for sms in arguments.sms
    ]
    save("layer", arguments.out, machine, vars(arguments), lines, functools.partial(draw, lines))
    dist.barrier()
    dist.destroy_process_group()


def measure(name: str, backend: str, sms: int | None, arguments: argparse.Namespace, machine: Machine) -> Line:
    """Measure and print one shape and back end."""
    shape, size, device = SHAPES[name], machine.ranks, machine.device
    config = layer_config(shape, size, backend, sms, arguments)
    torch.manual_seed(1)
    layer = EPMoELayer(config, device=device, dtype=torch.bfloat16)
    torch.manual_seed(2 + dist.get_rank())
    x = torch.randn(arguments.tokens, shape.hidden, device=device).bfloat16().requires_grad_()
    grad = torch.randn_like(x)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    def both() -> None:
        layer(x).backward(grad)
        clear(layer, x)

    whole = time_both(lambda: without_grad(lambda: layer(x)), both, machine)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    if arguments.trace is not None:
        trace(both, arguments.trace / f"{name}_{backend}.json")
    gemms = time_gemms(layer, shape, arguments.tokens * shape.top_k, backend, machine)
    ratios = f"{whole.forward / gemms.forward:10.2f} {whole.both / gemms.both:5.2f}"
    times = " | ".join(f"{t.forward:10.2f} {t.both:8.2f}" for t in (whole, gemms))
    say(f"{name:<17} {backend:<11} {sms or '':>3} | {times} | {ratios} | {peak:8.1f}")
    figures = (whole.forward, whole.both, gemms.forward, gemms.both, peak)
    return Line(name, shape.local_experts * size, backend, sms, *figures)


def layer_config(shape: Shape, size: int, backend: str, sms: int | None, arguments: argparse.Namespace) -> Config:
    """The configuration of a layer of ``shape`` over ``size`` ranks."""
    phase = PhaseConfig(num_sms=sms, max_tokens_per_rank=arguments.tokens)
    return Config(
        model=ModelConfig(hidden_size=shape.hidden, num_attention_heads=shape.hidden // 128),
        moe=MoEConfig(
            num_experts=shape.local_experts * size,
            top_k=shape.top_k,
            comm=arguments.comm,
            experts=ExpertsConfig(ffn_hidden_size=shape.ffn, activation="swiglu", backend=backend),  # type: ignore[arg-type]
        ),
        phases=replace(PhasesConfig(), train=phase, prefill=phase),
    )


def time_gemms(layer: EPMoELayer, shape: Shape, rows: int, backend: str, machine: Machine) -> Times:
    """The two projections of the experts on random rows, with what backward computes of them."""
    device = machine.device
    counts = torch.bincount(torch.randint(shape.local_experts, (rows,)), minlength=shape.local_experts)
    segments = ExpertSegments(counts.to(device), counts.cumsum(0).int().to(device), tuple(counts.tolist()))
    linear: GroupedLinear = select_backend(
        backend, dtype=torch.bfloat16, device=device, hidden_size=shape.hidden, ffn_hidden_size=shape.ffn
    )
    first = torch.randn(rows, shape.hidden, device=device).bfloat16().requires_grad_()
    second = torch.randn(rows, shape.ffn, device=device).bfloat16().requires_grad_()
    fc1, fc2 = layer.experts.fc1_weight, layer.experts.fc2_weight
    grad1 = torch.randn(rows, fc1.shape[1], device=device).bfloat16()
    grad2 = torch.randn(rows, shape.hidden, device=device).bfloat16()

    def forward() -> tuple[Tensor, Tensor]:
        return linear(first, fc1, segments), linear(second, fc2, segments)

    def both() -> None:
        torch.autograd.backward(forward(), (grad1, grad2))
        clear(layer, first, second)

    return time_both(lambda: without_grad(forward), both, machine)


def without_grad(call: Callable[[], object]) -> object:
    """``call`` as inference runs it."""
    with torch.no_grad():
        return call()


def clear(layer: EPMoELayer, *tensors: Tensor) -> None:
    """Forget gradients, so that the next ones are written and not added."""
    layer.zero_grad(set_to_none=True)
    for tensor in tensors:
        tensor.grad = None


def time_both(forward: Callable[[], object], both: Callable[[], object], machine: Machine) -> Times:
    """Medians of the two."""
    return Times(*(time_call(call, machine).median / 1e3 for call in (forward, both)))


def trace(call: Callable[[], object], path: Path) -> None:
    """Write a timeline of ``call`` for chrome://tracing or ui.perfetto.dev, and print its largest kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
        print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))


def draw(lines: list[Line], pyplot: Any) -> Any:
    """Bars of the layer, a line where its GEMMs alone are."""
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 5))
    labels = [f"{x.shape}\n{x.backend}" + (f", {x.sms} SMs" if x.sms is not None else "") for x in lines]
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
    parser.add_argument("--backends", nargs="+", default=["grouped_mm"])
    parser.add_argument("--comm", choices=["auto", "portable", "nvlink"], default="auto")
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--sms", type=int, nargs="+", default=[None], help="SM budgets of communication")
    parser.add_argument("--trace", type=Path, help="folder for a timeline of each line")
    parser.add_argument("--out", type=Path, help="folder for layer.json and layer.png")
    add_ranks_argument(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
