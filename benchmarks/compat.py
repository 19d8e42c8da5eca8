"""What the DeepEP interface costs over our own: the same exchanges through both, in one run.

    torchrun --nproc-per-node=2 benchmarks/compat.py --tokens 4096 --hidden 7168 --top-k 8 --experts 256 --out results

Times are of one call in microseconds, medians of the slowest rank, both interfaces taking turns; on GPUs from CUDA
events, on CPUs (a check that it runs) from the clock. ``alone`` is a call on a GPU that has nothing to do: all of the
host's time is in it, and how far apart the hosts of two ranks come. ``in a row`` is the mean of ten calls, where the
host works while the GPU does. Low-latency calls are also timed in a CUDA graph of several round trips, without the
host. On two H200 and with the default shape the last column holds what DeepEP's first version reached there in its own
benchmarks.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm import CommunicatorFactory, communicator_factory
from ep_moe.comm.fp8 import quantize_e4m3
from ep_moe.compat.deep_ep import Buffer
from ep_moe.compat.deep_ep.exchanges import COMM_VARIABLE
from machine import say
from timing import FLUSH_BYTES, Call, capture, repeat

REPEATS, WARM_UP = 30, 5
ROUND_TRIPS = 20  # of a CUDA graph
IN_A_ROW = 10

# Microseconds on 2 H200, hidden 7168, top-8 of 256; 4096 tokens, low latency 128. Best SM counts of its own tuning.
PEER = {"dispatch, bf16": 350.0, "dispatch, fp8": 247.0, "combine, bf16": 429.0, "round trip, fp8, captured": 75.0}
PEER_SHAPE = (4096, 128, 7168, 8, 256, 2)


@dataclass(frozen=True)
class Inputs:
    """Of one rank: bf16 rows, routing and weights; for normal and for low-latency mode."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor


@dataclass(frozen=True)
class Pair:
    """Microseconds of a call through both interfaces, medians."""

    native: float
    compat: float

    def __str__(self) -> str:
        return f"{self.native:9.1f} {self.compat:9.1f} {self.compat / self.native:6.2f}"


@dataclass(frozen=True)
class Line:
    """One line of the table. A graph is replayed alone only."""

    what: str
    alone: Pair
    in_a_row: Pair | None
    peer: float | None

    def __str__(self) -> str:
        return f"{self.what:<36} {self.alone} {self.in_a_row or ''!s:26} {self.peer or '':>10}"


def main() -> None:
    """Measure one shape."""
    arguments = parse_arguments()
    shared = int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if shared else "nccl", device_id=None if shared else device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    say(f"{machine} x {dist.get_world_size()}, PyTorch {torch.__version__}, {vars(arguments)}")
    shape = (arguments.tokens, arguments.low_latency_tokens, arguments.hidden, arguments.top_k, arguments.experts)
    compared = (*shape, dist.get_world_size()) == PEER_SHAPE and "H200" in machine
    say(f"{'':<36} {'alone':<26} {'in a row':<26}")
    pair = f"{'native':>9} {'compat':>9} {'ratio':>6}"
    say(f"{'what':<36} {pair} {pair} {'DeepEP V1' if compared else '':>10}  us")
    lines = []
    for what, native, compat in [*normal_mode(arguments, device), *low_latency_mode(arguments, device)]:
        calls, captured = (native, compat), what.endswith("captured")
        alone = time_pair(calls, ROUND_TRIPS if captured else 1, device)
        rows = tuple(functools.partial(repeat, call, IN_A_ROW) for call in calls)
        in_a_row = None if captured else time_pair(rows, IN_A_ROW, device)
        lines.append(Line(what, alone, in_a_row, PEER.get(what) if compared else None))
        say(str(lines[-1]))
    if arguments.out is not None and dist.get_rank() == 0:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "compat.json").write_text(json.dumps([asdict(line) for line in lines], indent=1))
    dist.destroy_process_group()


def normal_mode(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Call, Call]]:
    """(what, native call, the same through the DeepEP interface)."""
    group, experts = dist.group.WORLD, arguments.experts
    inputs = make_inputs(arguments.tokens, arguments, device)
    x, topk_idx, topk_weights = inputs.x, inputs.topk_idx, inputs.topk_weights
    buffer = Buffer(group, 1 << 30)
    native = factory().build(device)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, experts)
    layout: dict[str, Any] = {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_expert": per_expert,
        "is_token_in_rank": in_rank,
    }
    routing: dict[str, Any] = {"topk_idx": topk_idx, "topk_weights": topk_weights}
    values, scales = quantize_e4m3(x)

    def with_layout() -> object:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, experts)
        return buffer.dispatch(
            x, num_tokens_per_rank=per_rank, num_tokens_per_expert=per_expert, is_token_in_rank=in_rank, **routing
        )

    def dispatch(**changes: Any) -> object:
        return native.dispatch(x, topk_idx, topk_weights, num_experts=experts, layout="rows", **changes)

    yield "dispatch, bf16", dispatch, lambda: buffer.dispatch(x, **layout, **routing)
    yield "dispatch, bf16, with its layout", dispatch, with_layout
    yield (
        "dispatch, fp8",
        lambda: native.dispatch(values, topk_idx, topk_weights, num_experts=experts, scales=scales, layout="rows"),
        lambda: buffer.dispatch((values, scales), **layout, **routing),
    )
    worst = dist.get_world_size() * arguments.tokens
    yield (
        "dispatch, bf16, no host sync",
        lambda: dispatch(max_rows=worst),
        lambda: buffer.dispatch(x, num_worst_tokens=worst, **layout, **routing),
    )
    arrived = native.dispatch(x, topk_idx, topk_weights, num_experts=experts, layout="rows")
    rows, _, got_weights, _, handle, _ = buffer.dispatch(x, **layout, **routing)
    assert isinstance(rows, Tensor)
    yield (
        "cached dispatch, bf16",
        lambda: native.dispatch_cached(x, arrived.handle, "rows"),
        lambda: buffer.dispatch(x, handle=handle),
    )
    yield (
        "combine, bf16",
        lambda: native.combine(rows, arrived.handle, "rows"),
        lambda: buffer.combine(rows, handle),
    )
    assert arrived.weights is not None
    slot_weights = arrived.weights
    yield (
        "combine, bf16, with weights",
        lambda: (native.combine(rows, arrived.handle, "rows"), native.combine_weights(slot_weights, arrived.handle)),
        lambda: buffer.combine(rows, handle, topk_weights=got_weights),
    )


def low_latency_mode(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Call, Call]]:
    """(what, native call, the same through the DeepEP interface)."""
    group, most, experts = dist.group.WORLD, arguments.low_latency_tokens, arguments.experts
    inputs = make_inputs(most, arguments, device)
    x, topk_idx, topk_weights = inputs.x, inputs.topk_idx, inputs.topk_weights
    buffer = Buffer(group, 0, 1 << 30, low_latency_mode=True)
    native = factory().build_low_latency(device, most, arguments.hidden, experts)
    arrived = native.dispatch(x, topk_idx)
    _, _, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, most, experts, use_fp8=False)
    y = torch.randn(arrived.rows.shape, device=device).bfloat16()

    def native_round_trip() -> None:
        sent = native.dispatch(x, topk_idx, scale_format="fp32")
        native.combine(y, topk_idx, topk_weights, sent.handle)

    def compat_round_trip() -> None:
        *_, sent, _, _ = buffer.low_latency_dispatch(x, topk_idx, most, experts)
        buffer.low_latency_combine(y, topk_idx, topk_weights, sent)

    for name, use_fp8, scale_format in (("bf16", False, "none"), ("fp8", True, "fp32")):
        yield (
            f"low-latency dispatch, {name}",
            lambda form=scale_format: native.dispatch(x, topk_idx, scale_format=form),  # type: ignore[misc]
            lambda fp8=use_fp8: buffer.low_latency_dispatch(x, topk_idx, most, experts, use_fp8=fp8),  # type: ignore[misc]
        )
    yield (
        "low-latency combine, bf16",
        lambda: native.combine(y, topk_idx, topk_weights, arrived.handle),
        lambda: buffer.low_latency_combine(y, topk_idx, topk_weights, handle),
    )
    if device.type == "cuda":
        ours, theirs = (capture(call, ROUND_TRIPS) for call in (native_round_trip, compat_round_trip))
        yield "round trip, fp8, captured", ours, theirs


def factory() -> CommunicatorFactory:
    """That which buffers use; they share its communicators."""
    comm = cast(Literal["auto", "portable", "nvlink"], os.environ.get(COMM_VARIABLE, "auto"))
    return communicator_factory(comm, dist.group.WORLD, max_tokens=None, timeout_s=30.0)


def time_pair(calls: tuple[Call, ...], calls_in_each: int, device: torch.device) -> Pair:
    """Median times of both, of the slowest rank, over the calls that each makes; they take turns."""
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    times: list[list[float]] = [[] for _ in calls]
    for number in range(WARM_UP + REPEATS):
        for call, kept in zip(calls, times, strict=True):
            flush.fill_(number % 256)
            dist.barrier()
            slowest = torch.tensor(time_call(call, device), dtype=torch.float64, device=device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if number >= WARM_UP:
                kept.append(float(slowest))
    native, compat = (statistics.median(kept) / calls_in_each for kept in times)
    return Pair(native, compat)


def time_call(call: Call, device: torch.device) -> float:
    """Microseconds of one call on this rank."""
    if device.type == "cpu":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000.0


def make_inputs(tokens: int, arguments: argparse.Namespace, device: torch.device) -> Inputs:
    """Random tokens with distinct random experts."""
    generator = torch.Generator(device).manual_seed(1 + dist.get_rank())
    x = torch.randn(tokens, arguments.hidden, device=device, generator=generator).bfloat16()
    weights, topk_idx = torch.rand(tokens, arguments.experts, device=device, generator=generator).topk(arguments.top_k)
    return Inputs(x, topk_idx, weights)


def parse_arguments() -> argparse.Namespace:
    """The shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="per rank, in normal mode")
    parser.add_argument("--low-latency-tokens", type=int, default=128, help="per rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--out", type=Path, help="folder for compat.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
