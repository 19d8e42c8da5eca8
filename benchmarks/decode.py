"""A decode step of one MoE layer: experts on packed, gathered and all rows; and in normal mode, ours and over NCCL.

    python benchmarks/decode.py --tokens 128 8 --out results

Each GPU holds ``--experts`` experts of DeepSeek-V3's dimensions. Low-latency steps (dispatch, experts, combine) are
captured in a CUDA graph; ``all rows`` gives the experts every place of the packed buffers, as GEMMs would that know no
counts. ``nccl`` is the layer in normal mode with ``moe.comm: portable``; ``weights`` is what it takes to read those of
the experts that have rows, at ``--bandwidth``. Times are medians in microseconds. With ``--precision fp8`` rows travel
in FP8 (but for ``all rows``), and experts multiply in it.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe import EPMoELayer
from ep_moe.comm import ExpertSegments, LowLatencyCommunicator, communicator_factory
from ep_moe.config import Config, ExpertsConfig, ModelConfig, MoEConfig, PhaseConfig, PhasesConfig
from ep_moe.dispatcher.low_latency import LowLatencyDispatcher
from machine import Machine, add_ranks_argument, launch, say, start
from results import save
from shapes import SHAPES
from timing import Call, capture, time_call


@dataclass(frozen=True)
class Line:
    """One line of the table; microseconds."""

    tokens: int
    experts: int
    experts_with_rows: int
    packed: float
    gathered: float
    all_rows: float
    layer: float
    normal: float
    nccl: float
    weights: float


def main() -> None:
    """Measure every number of tokens."""
    arguments = parse_arguments()
    launch(arguments.ranks)
    machine = start()
    shape = SHAPES[arguments.shape]
    num_experts, most = arguments.experts * machine.ranks, arguments.max_tokens
    precision = arguments.precision
    config = Config(
        model=ModelConfig(hidden_size=shape.hidden, num_attention_heads=shape.hidden // 128),
        moe=MoEConfig(
            num_experts=num_experts,
            top_k=shape.top_k,
            experts=ExpertsConfig(ffn_hidden_size=shape.ffn, precision=precision),
        ),
        phases=PhasesConfig(
            prefill=PhaseConfig(dispatch_dtype=precision),
            decode=PhaseConfig(mode="low_latency", max_tokens_per_rank=most, dispatch_dtype=precision),
        ),
    )
    torch.manual_seed(1)
    layer = EPMoELayer(config, device=machine.device, dtype=torch.bfloat16).eval()
    over_nccl = replace(config, moe=replace(config.moe, comm="portable"))
    nccl_layer = EPMoELayer(over_nccl, device=machine.device, dtype=torch.bfloat16).eval()
    nccl_layer.load_state_dict(layer.state_dict())
    factory = communicator_factory("auto", dist.group.WORLD, max_tokens=None, timeout_s=30.0)
    communicator = factory.build_low_latency(machine.device, most, shape.hidden, num_experts)
    say(f"{arguments.experts} experts a rank, room for {most} tokens a rank, {precision}, us")
    say("                          |                              |                  layer:       |")
    say("tokens  experts with rows |   packed  gathered  all rows | packed  normal, no graph  nccl | weights")
    lines = [measure(tokens, layer, nccl_layer, communicator, arguments, machine) for tokens in arguments.tokens]
    save("decode", arguments.out, machine, vars(arguments), lines, functools.partial(draw, lines))
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def measure(
    tokens: int,
    layer: EPMoELayer,
    nccl_layer: EPMoELayer,
    communicator: LowLatencyCommunicator,
    arguments: argparse.Namespace,
    machine: Machine,
) -> Line:
    """Measure and print one number of tokens a rank."""
    torch.manual_seed(tokens + dist.get_rank())
    x = torch.randn(tokens, layer.config.model.hidden_size, device=machine.device).bfloat16()
    routing = layer.router(x)

    def step(packed: bool) -> Call:
        dispatcher = LowLatencyDispatcher(
            communicator,
            fp8=arguments.precision == "fp8",
            takes_packed_rows=lambda dtype, device: packed,
            takes_fp8_rows=layer.experts.takes_fp8_rows,
        )

        def call() -> Tensor:
            arrived = dispatcher.dispatch(x, routing.topk_idx, routing.topk_weights)
            return dispatcher.combine(layer.experts(arrived.rows, None, arrived.segments), arrived.handle)

        return call

    def all_rows() -> Tensor:
        packed = communicator.dispatch(x, routing.topk_idx)
        local_experts, room, hidden = packed.rows.shape
        segments = ExpertSegments(torch.full_like(ends, room, dtype=torch.int64), ends, (room,) * local_experts)
        rows = layer.experts(packed.rows.view(-1, hidden), None, segments).view_as(packed.rows)
        return communicator.combine(rows, routing.topk_idx, routing.topk_weights.float(), packed.handle)

    arrived = communicator.dispatch(x, routing.topk_idx)
    local_experts, room, _ = arrived.rows.shape
    ends = torch.arange(room, (local_experts + 1) * room, room, dtype=torch.int32, device=machine.device)
    with_rows = int((arrived.counts > 0).sum())
    element_bytes = 1 if arguments.precision == "fp8" else 2
    per_expert = sum(weight[0].numel() * element_bytes for weight in layer.experts.parameters())
    least = with_rows * per_expert / (arguments.bandwidth * 1e6)

    def time_captured(call: Call) -> float:
        return time_call(capture(call, arguments.steps), machine, calls=arguments.steps).median

    with layer.phase("decode"):
        whole = time_captured(lambda: layer(x))
    with layer.phase("prefill"), nccl_layer.phase("prefill"):
        normal, nccl = (time_call(functools.partial(run, x), machine).median for run in (layer, nccl_layer))
    packed, gathered, every = (time_captured(call) for call in (step(True), step(False), all_rows))
    line = Line(tokens, local_experts, with_rows, packed, gathered, every, whole, normal, nccl, least)
    say(
        f"{tokens:6}  {with_rows:17} | {line.packed:8.1f} {line.gathered:9.1f} {line.all_rows:9.1f} | "
        f"{line.layer:6.1f}  {line.normal:16.1f} {line.nccl:6.1f} | {line.weights:7.1f}"
    )
    return line


def draw(lines: list[Line], pyplot: Any) -> Any:
    """Bars of the variants, in groups by the number of tokens."""
    figure, axis = pyplot.subplots(figsize=(9, 5))
    variants = ("packed", "gathered", "all_rows", "layer", "normal", "nccl", "weights")
    for place, variant in enumerate(variants):
        at = [group + place * 0.115 for group in range(len(lines))]
        axis.bar(at, [getattr(line, variant) for line in lines], 0.105, label=variant.replace("_", " "))
    axis.set_xticks([group + 0.345 for group in range(len(lines))], [f"{line.tokens} tokens" for line in lines])
    axis.set(title="a decode step of one layer", ylabel="us")
    axis.legend()
    return figure


def parse_arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description="A decode step of one MoE layer.")
    parser.add_argument("--shape", choices=list(SHAPES), default="deepseek_v3")
    parser.add_argument("--precision", choices=["input", "fp8"], default="input", help="input is bf16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 8], help="per rank")
    parser.add_argument("--max-tokens", type=int, default=128, help="room, per rank")
    parser.add_argument("--experts", type=int, default=128, help="per rank")
    parser.add_argument("--steps", type=int, default=4, help="in a graph")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="TB/s that the memory can give, by its data sheet")
    parser.add_argument("--out", type=Path, help="folder for decode.json")
    add_ranks_argument(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
