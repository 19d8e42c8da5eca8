"""One MoE layer, forward and forward plus backward: the whole, its GEMMs alone, and where the rest goes.

    torchrun --nproc-per-node=2 benchmarks/layer.py --shapes deepseek_v3 mixtral --trace traces

Shapes give each GPU the rows of its model's layer: the local experts of a rank, with random routing of 4,096 tokens a
rank to them. With one process all rows are local. Times are medians over calls of the slowest rank, bf16; gradients are
written, not accumulated. The GEMMs alone are the layer's grouped GEMMs on rows of the same segments.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe import EPMoELayer
from ep_moe.comm import ExpertSegments
from ep_moe.config import Config, ExpertsConfig, ModelConfig, MoEConfig, PhaseConfig, PhasesConfig
from ep_moe.experts.backends import GroupedLinear, select_backend
from shapes import SHAPES, Shape

REPEATS, WARM_UP = 20, 5


@dataclass(frozen=True)
class Times:
    """Milliseconds."""

    forward: float
    both: float


def main() -> None:
    """Measure the shapes asked for."""
    arguments = parse_arguments()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    shared = int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count()
    dist.init_process_group("gloo" if shared else "nccl", device_id=None if shared else device)
    machine = f"{torch.cuda.get_device_name(device)} x {dist.get_world_size()}"
    say(f"{machine}, PyTorch {torch.__version__}, {arguments.tokens} tokens a rank, bf16")
    say("shape             back end    SMs | layer: fwd  fwd+bwd | GEMMs: fwd  fwd+bwd | ratio: fwd  both | peak GiB")
    for name in arguments.shapes:
        for backend in arguments.backends:
            for sms in arguments.sms:
                measure(name, backend, sms, arguments, device)
    dist.destroy_process_group()


def measure(name: str, backend: str, sms: int | None, arguments: argparse.Namespace, device: torch.device) -> None:
    """Print the line of one shape and back end."""
    shape, size = SHAPES[name], dist.get_world_size()
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

    whole = Times(time_call(lambda: without_grad(lambda: layer(x))), time_call(both))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    if arguments.trace is not None:
        trace(both, arguments.trace / f"{name}_{backend}.json")
    gemms = time_gemms(layer, shape, arguments.tokens * shape.top_k, backend, device)
    ratios = f"{whole.forward / gemms.forward:10.2f} {whole.both / gemms.both:5.2f}"
    times = " | ".join(f"{t.forward:10.2f} {t.both:8.2f}" for t in (whole, gemms))
    say(f"{name:<17} {backend:<11} {sms or '':>3} | {times} | {ratios} | {peak:8.1f}")


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


def time_gemms(layer: EPMoELayer, shape: Shape, rows: int, backend: str, device: torch.device) -> Times:
    """The two projections of the experts on random rows, with what backward computes of them."""
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

    return Times(time_call(lambda: without_grad(forward)), time_call(both))


def without_grad(call: Callable[[], object]) -> object:
    """``call`` as inference runs it."""
    with torch.no_grad():
        return call()


def clear(layer: EPMoELayer, *tensors: Tensor) -> None:
    """Forget gradients, so that the next ones are written and not added."""
    layer.zero_grad(set_to_none=True)
    for tensor in tensors:
        tensor.grad = None


def time_call(call: Callable[[], object]) -> float:
    """Median milliseconds of ``call`` on the slowest rank."""
    times = []
    for repeat in range(WARM_UP + REPEATS):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        slowest = torch.tensor(start.elapsed_time(end), device="cuda")
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if repeat >= WARM_UP:
            times.append(float(slowest))
    return statistics.median(times)


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


def say(text: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def parse_arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description="One MoE layer.")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--backends", nargs="+", default=["grouped_mm"])
    parser.add_argument("--comm", choices=["auto", "portable", "nvlink"], default="auto")
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--sms", type=int, nargs="+", default=[None], help="SM budgets of communication")
    parser.add_argument("--trace", type=Path, help="folder for a timeline of each line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
