"""One MoE layer, forward and forward plus backward: the whole, its parts alone, and the layers of others beside it.

    python benchmarks/layer.py --ranks 2 --shapes deepseek_v3 mixtral_8x7b --overlap none wgrad --out results

One process a GPU (or under ``torchrun``). Shapes give each GPU the rows of its model's layer: the local experts of a
rank, with random routing of 4,096 tokens a rank to them. With one process all rows are local. Times are medians of
the slowest rank, bf16; gradients are written, or with ``--main-grad`` added to fp32 buffers. The GEMMs alone are the
layer's grouped GEMMs on rows of the same segments. ``--calls 1`` (the default) starts each call on an idle GPU, which
shows all of the host's time; with more, calls follow each other as the layers of a model do, and the host runs ahead
where it can.

Besides the GEMMs, the layer's exchanges are timed without experts and its computation without exchanges; ``hidden`` is
the share of the exchanges that the layer hides, which ``layer_parts.py`` defines.

``--peers`` adds lines for Megatron-Core's own layer and for plain PyTorch over all-to-all and over all-gather
(``layer_peers.py``), in bf16 with the same router, experts, tokens and gradients. Where one cannot run, its line says
why. Beside each are the GEMMs of the first back end, as beside our first line of the shape: all ratios have one bound.

``--overlap`` takes strategies of docs/overlap.md, several joined by ``+``; experts in 4 chunks are ``expert_chunks:4``.
With ``two_batch`` the tokens come as two halves in turns, forward only; hold it against ``halves``, the same two one
after the other.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
from layer_parts import Part, computation_alone, exchanges_alone, forget_gradients, hidden_part
from layer_peers import PEERS, PeerMissing, Weights, weights_of
from layer_table import HEADER, Line, draw, format_line
from machine import Machine, add_ranks_argument, launch, say, start
from results import save
from shapes import SHAPES, Shape, gemm_of, shapes_for
from timeline import draw_traces, hidden_share, read_spans
from timing import meet, repeat, time_call

TRACE_HEAD_START_CYCLES = 40_000_000  # some 20 ms: a profiled step is launched meanwhile, where no size is waited for
HALVES = ("halves", "two_batch")  # forward of two micro-batches


@dataclass(frozen=True)
class Times:
    """Milliseconds; NaN for what was not measured."""

    forward: float = math.nan
    both: float = math.nan


def main() -> None:
    """Measure the shapes asked for."""
    arguments = parse_arguments()
    launch(arguments.ranks)
    machine = start()
    say(f"{arguments.tokens} tokens a rank, bf16" + (", experts in FP8" if arguments.precision == "fp8" else ""))
    say(HEADER)
    lines: list[Line] = []
    for name in arguments.shapes or shapes_for(machine.ranks):
        choices = itertools.product(arguments.backends, arguments.overlap, arguments.sms)
        ours = [measure(name, backend, overlap, sms, arguments, machine) for backend, overlap, sms in choices]
        bound = Times(ours[0].gemms_forward, ours[0].gemms_both)
        lines += [*ours, *measure_peers(name, bound, arguments, machine)]
    save("layer", arguments.out, machine, vars(arguments), lines, functools.partial(draw, lines))
    dist.barrier()
    dist.destroy_process_group()


def measure(
    name: str, backend: str, overlap: str, sms: int | None, arguments: argparse.Namespace, machine: Machine
) -> Line:
    """Measure and print one shape, back end and choice of strategies of our layer."""
    shape = SHAPES[name]
    layer = build_layer(shape, backend, overlap, sms, arguments, machine)
    if arguments.main_grad:
        give_main_grads(layer)
    x, grad = make_inputs(shape, arguments, machine)

    def forward() -> object:
        halves = x.chunk(2)
        if overlap == "two_batch":
            return two_batch(*(layer.forward_steps(half) for half in halves))
        return [layer(half) for half in halves] if overlap == "halves" else layer(x)

    def both() -> None:
        layer(x).backward(grad)
        forget_gradients(*layer.parameters(), x)

    call = None if overlap in HALVES else both
    label = f"{backend}_{overlap.replace(':', '')}"
    whole, peak = measure_whole(forward, call, f"{name}_{label}", layer, arguments, machine)
    gemms = time_gemms(layer, shape, arguments.tokens * shape.top_k, backend, arguments.calls, machine)
    exchanges = time_part(exchanges_alone(layer, x), arguments.calls, machine)
    computation = time_part(computation_alone(layer, x), arguments.calls, machine)
    line = Line(
        name,
        shape.local_experts * machine.ranks,
        "ep_moe",
        backend,
        overlap,
        sms,
        whole.forward,
        whole.both,
        gemms.forward,
        gemms.both,
        exchanges.forward,
        exchanges.both,
        computation.forward,
        computation.both,
        hidden_part(whole.forward, computation.forward, exchanges.forward),
        hidden_part(whole.both, computation.both, exchanges.both),
        peak,
    )
    say(format_line(line))
    return line


def measure_peers(name: str, bound: Times, arguments: argparse.Namespace, machine: Machine) -> list[Line]:
    """Measure and print the peers asked for, on the weights that our layer of the shape has."""
    if not arguments.peers:
        return []
    shape = SHAPES[name]
    weights = weights_of(build_layer(shape, arguments.backends[0], "none", None, arguments, machine))
    lines = []
    for peer in arguments.peers:
        free_memory()  # of the one before
        lines.append(measure_peer(name, peer, weights, bound, arguments, machine))
        say(format_line(lines[-1]))
    return lines


def measure_peer(
    name: str, kind: str, weights: Weights, bound: Times, arguments: argparse.Namespace, machine: Machine
) -> Line:
    """Measure one peer, whose weights and memory are gone afterwards; or say why not."""
    shape = SHAPES[name]
    line = Line(name, len(weights.router), kind, "")
    try:
        refuse_unlike_peers(arguments, machine)
        peer = PEERS[kind](weights, shape.top_k, machine.group)
    except PeerMissing as missing:
        return replace(line, skipped=str(missing))
    x, grad = make_inputs(shape, arguments, machine)

    def both() -> None:
        peer.run(x).backward(grad)
        forget_gradients(*peer.parameters, x)

    whole, peak = measure_whole(lambda: peer.run(x), both, f"{name}_{kind}", nn.Module(), arguments, machine)
    return replace(
        line,
        backend=peer.experts,
        forward=whole.forward,
        both=whole.both,
        gemms_forward=bound.forward,
        gemms_both=bound.both,
        peak_gib=peak,
    )


def refuse_unlike_peers(arguments: argparse.Namespace, machine: Machine) -> None:
    """Raise :class:`PeerMissing` where peers would not do what our layer does."""
    if machine.shared:
        raise PeerMissing("ranks that share a GPU have no NCCL")
    if arguments.shared_ffn:
        raise PeerMissing("no shared experts")
    if arguments.main_grad:
        raise PeerMissing("gradients are written, not added to fp32")


def measure_whole(
    forward: Callable[[], object],
    both: Callable[[], object] | None,
    label: str,
    layer: nn.Module,
    arguments: argparse.Namespace,
    machine: Machine,
) -> tuple[Times, float]:
    """Times of a layer and GiB over what is there before; with ``--trace`` a timeline too."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole = time_both(lambda: without_grad(forward), both, arguments.calls, machine)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    if arguments.trace is not None:
        path = arguments.trace / f"{label}_rank{dist.get_rank()}.json"
        with trace(path, layer) as profile:
            meet(machine)
            torch.cuda._sleep(TRACE_HEAD_START_CYCLES)
            without_grad(forward) if both is None else both()
        say(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))
        say(f"{hidden_share(read_spans(path)):.0%} of communication ran behind something else")
        if dist.get_rank() == 0:
            draw_traces([path])
    return whole, peak


def build_layer(
    shape: Shape, backend: str, overlap: str, sms: int | None, arguments: argparse.Namespace, machine: Machine
) -> EPMoELayer:
    """Our layer; its weights depend on the shape alone."""
    free_memory()
    torch.manual_seed(1)
    config = layer_config(shape, machine.ranks, backend, overlap, sms, arguments)
    return EPMoELayer(config, device=machine.device, dtype=torch.bfloat16)


def make_inputs(shape: Shape, arguments: argparse.Namespace, machine: Machine) -> tuple[Tensor, Tensor]:
    """Tokens of this rank and the gradient of the result, the same for every layer."""
    torch.manual_seed(2 + dist.get_rank())
    x = torch.randn(arguments.tokens, shape.hidden, device=machine.device).bfloat16().requires_grad_()
    return x, torch.randn_like(x)


def free_memory() -> None:
    """Return what layers before have left, some of it in cycles, to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


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
        forget_gradients(fc1, fc2, first, second)

    return time_both(lambda: without_grad(forward), both, calls, machine)


def without_grad(call: Callable[[], object]) -> object:
    """``call`` as inference runs it."""
    with torch.no_grad():
        return call()


def time_part(part: Part, calls: int, machine: Machine) -> Times:
    """Times of a part of the layer."""
    return time_both(lambda: without_grad(part.forward), part.both, calls, machine)


def time_both(forward: Callable[[], object], both: Callable[[], object] | None, calls: int, machine: Machine) -> Times:
    """Medians of the two, of ``calls`` one after the other; NaN for one that is missing."""

    def milliseconds(call: Callable[[], object] | None) -> float:
        if call is None:
            return math.nan
        return time_call(functools.partial(repeat, call, calls), machine, calls=calls).median / 1e3

    return Times(milliseconds(forward), milliseconds(both))


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
    parser.add_argument(
        "--peers", nargs="*", choices=[*PEERS, "none"], default=list(PEERS), help="layers of others; none for none"
    )
    parser.add_argument("--comm", choices=["auto", "portable", "nvlink"], default="auto")
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--calls", type=int, default=1, help="of the layer between two time stamps")
    parser.add_argument("--sms", type=int, nargs="+", default=[None], help="SM budgets of communication")
    parser.add_argument("--trace", type=Path, help="folder for a timeline of each line, and its picture")
    parser.add_argument("--out", type=Path, help="folder for layer.json and layer.png")
    add_ranks_argument(parser)
    arguments = parser.parse_args()
    arguments.peers = [peer for peer in arguments.peers if peer != "none"]
    return arguments


if __name__ == "__main__":
    main()
