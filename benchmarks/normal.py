"""Normal-mode dispatch and combine: ours over SM budgets, beside ``torch.distributed`` collectives and the floors.

    torchrun --nproc-per-node=2 benchmarks/normal.py --tokens 4096 --hidden 7168 --top-k 8 --experts 256 --out results

One process a GPU. Times are of the slowest rank of each call, from CUDA events after a collective barrier with flushed
caches; a figure is their median. Dispatch counts from ``topk_idx`` on the GPU to rows in place, combine from
expert-major rows to the final sum. `captured` is the same in a CUDA graph, with a capacity instead of exact sizes:
without the host. A floor is the larger of remote bytes over the rate of this machine's links and memory traffic over
that of its memory, both measured here. With one process there are no remote bytes: the figures are the local work's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

from ep_moe.comm import Communicator, NvlinkCommunicator, PortableCommunicator, RowLayout

REPEATS, WARM_UP = 20, 5
FLUSH_BYTES = 256 * 1024**2
COPY_BYTES = 512 * 1024**2


@dataclass(frozen=True)
class Problem:
    """One rank's inputs, and how much must move."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    experts: int
    remote_rows: int  # that arrive from other ranks
    rows: int  # that arrive, each once
    slots: int  # expert-major rows


@dataclass(frozen=True)
class Line:
    """One line of the table; microseconds."""

    communicator: str
    rows: str
    sms: int | None
    what: str
    median: float
    least: float
    most: float
    floor: float


@dataclass(frozen=True)
class Rates:
    """Bytes a microsecond that this machine reaches: into a rank while all receive, and reading plus writing."""

    link: float
    memory: float

    def floor(self, remote_bytes: int, memory_bytes: int) -> float:
        """Microseconds that moving these takes at least."""
        return max(remote_bytes / self.link, memory_bytes / self.memory)


def main() -> None:
    """Measure one shape."""
    arguments = parse_arguments()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    shared = int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count()
    dist.init_process_group("gloo" if shared else "nccl", device_id=None if shared else device)
    assert dist.group.WORLD is not None
    problem = make_problem(arguments, device)
    rates = measure_rates(device)
    machine = f"{torch.cuda.get_device_name(device)} x {dist.get_world_size()}"
    say(f"{machine}, PyTorch {torch.__version__}, {vars(arguments)}")
    say(f"to rank 0: {problem.remote_rows} remote rows of {problem.rows}, {problem.slots} slots")
    say(f"rates: links {rates.link / 1e3:.0f} GB/s, memory {rates.memory / 1e6:.2f} TB/s")
    say(
        f"{'communicator':<12} {'rows':<18} {'SMs':>4} {'what':<28} {'median':>8} {'min':>8} {'max':>8} {'floor':>8} us"
    )
    lines = []
    for fp8 in (False, True):
        nvlink = NvlinkCommunicator(dist.group.WORLD, device, max_tokens=arguments.tokens)
        for sms in arguments.sms:
            lines += list(measure("nvlink", nvlink, problem, fp8, sms, rates))
        lines += list(measure("portable", PortableCommunicator(dist.group.WORLD), problem, fp8, None, rates))
        say(f"symmetric buffer: {nvlink.symmetric_bytes / 1e6:.0f} MB")
    if arguments.out is not None and dist.get_rank() == 0:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "normal.json").write_text(json.dumps([asdict(line) for line in lines], indent=1))
        plot(lines, arguments.out / "normal.png")
    dist.destroy_process_group()


def measure(
    name: str, communicator: Communicator, problem: Problem, fp8: bool, sms: int | None, rates: Rates
) -> Iterator[Line]:
    """Time every stage of one communicator."""
    x, hidden = problem.x, problem.x.shape[1]
    row_bytes = hidden + hidden // 32 if fp8 else 2 * hidden
    layouts: tuple[RowLayout, ...] = ("rows", "expert_major")
    for layout in layouts:

        def dispatch(max_rows: int | None = None, layout: RowLayout = layout) -> object:
            return communicator.dispatch(
                x,
                problem.topk_idx,
                problem.topk_weights,
                num_experts=problem.experts,
                fp8=fp8,
                layout=layout,
                max_rows=max_rows,
                num_sms=sms,
            )

        written = problem.slots if layout == "expert_major" else problem.rows
        # Read by the quantisation or the copy, written, read by the pull, written to its places.
        local = x.numel() * 2 + len(x) * row_bytes + (problem.rows + written) * row_bytes
        floor = rates.floor(problem.remote_rows * row_bytes, local)
        kind = f"{'fp8' if fp8 else 'bf16'} {layout}"
        yield line(name, kind, sms, "dispatch", dispatch, floor, x.device)
        if name == "nvlink":
            replay = capture(lambda call=dispatch, written=written: call(max_rows=written))  # type: ignore[misc]
            yield line(name, kind, sms, "dispatch, captured", replay, floor, x.device)
    if fp8:
        return
    arrived = communicator.dispatch(x, problem.topk_idx, problem.topk_weights, num_experts=problem.experts, num_sms=sms)
    rows = torch.randn(problem.slots, hidden, device=x.device).to(x.dtype)
    assert arrived.weights is not None
    weights = arrived.weights
    calls: dict[str, Callable[[], object]] = {
        "combine": lambda: communicator.combine(rows, arrived.handle),
        "backward of combine": lambda: communicator.dispatch_cached(x, arrived.handle),
        "backward of dispatch": lambda: (
            communicator.combine(rows, arrived.handle),
            communicator.combine_weights(weights, arrived.handle),
        ),
    }
    # Slots read once; a sum a row written and, of remote ones, read again; the result written.
    local = (problem.slots + 2 * problem.rows + len(x)) * row_bytes
    floor = rates.floor(problem.remote_rows * row_bytes, local)
    for what, call in calls.items():
        yield line(name, "bf16 expert_major", sms, what, call, floor, x.device)
        if name == "nvlink":
            yield line(name, "bf16 expert_major", sms, f"{what}, captured", capture(call), floor, x.device)


def line(
    name: str, kind: str, sms: int | None, what: str, call: Callable[[], object], floor: float, device: torch.device
) -> Line:
    """Time ``call`` on all ranks and print it."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    times = []
    for repeat in range(WARM_UP + REPEATS):
        flush.fill_(repeat)
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        slowest = torch.tensor(start.elapsed_time(end) * 1000.0, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if repeat >= WARM_UP:
            times.append(float(slowest))
    result = Line(name, kind, sms, what, statistics.median(times), min(times), max(times), floor)
    say(
        f"{name:<12} {kind:<18} {sms or '':>4} {what:<28} {result.median:8.1f} {result.least:8.1f} {result.most:8.1f} "
        f"{floor:8.1f}"
    )
    return result


def capture(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` in a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_rates(device: torch.device) -> Rates:
    """Copies on all ranks at once: within the GPU, and from the next rank's."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    memory = 2 * COPY_BYTES / time_copy(source, target)
    size, rank = dist.get_world_size(), dist.get_rank()
    if size == 1:
        return Rates(float("inf"), memory)
    assert dist.group.WORLD is not None
    mine = symmetric_memory.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    mapped = symmetric_memory.rendezvous(mine, dist.group.WORLD.group_name)
    peer = mapped.get_buffer((rank + 1) % size, (COPY_BYTES,), torch.uint8)
    return Rates(COPY_BYTES / time_copy(peer, target), memory)


def time_copy(source: Tensor, target: Tensor) -> float:
    """Microseconds of a copy while all ranks make one; of the slowest rank."""
    times = []
    for _ in range(WARM_UP):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000.0)
    slowest = torch.tensor(min(times), device=target.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def make_problem(arguments: argparse.Namespace, device: torch.device) -> Problem:
    """bf16 tokens, random distinct experts and weights of this rank."""
    size, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator(device).manual_seed(1 + rank)
    x = torch.randn(arguments.tokens, arguments.hidden, device=device, generator=generator).bfloat16()
    scores = torch.rand(arguments.tokens, arguments.experts, device=device, generator=generator)
    weights, topk_idx = scores.topk(arguments.top_k, dim=1)
    ranks = topk_idx // (arguments.experts // size)
    owners = torch.nn.functional.one_hot(ranks, size).amax(1)  # [tokens, ranks]
    sent = torch.stack([owners.sum(0), torch.bincount(ranks.flatten(), minlength=size)])  # rows, slots to each rank
    total = sent.clone()
    dist.all_reduce(total)
    rows, slots = (int(n) for n in total[:, rank])
    return Problem(x, topk_idx, weights, arguments.experts, rows - int(sent[0, rank]), rows, slots)


def plot(lines: list[Line], path: Path) -> None:
    """Time over SM budget, a panel for each kind of rows and operation."""
    try:
        from matplotlib import pyplot
    except ImportError:
        say("no picture: matplotlib is not installed")
        return
    panels = list(dict.fromkeys((entry.rows, entry.what) for entry in lines if entry.sms is not None))
    figure, axes = pyplot.subplots(-(-len(panels) // 3), 3, figsize=(12, 2.6 * -(-len(panels) // 3)), squeeze=False)
    for axis, (rows, what) in zip(axes.flat, panels, strict=False):
        ours = [entry for entry in lines if (entry.rows, entry.what) == (rows, what) and entry.sms is not None]
        axis.plot([entry.sms for entry in ours], [entry.median for entry in ours], "o-", label="nvlink")
        axis.axhline(ours[0].floor, color="gray", linestyle=":", label="floor")
        for entry in lines:
            if (entry.rows, entry.what) == (rows, what) and entry.sms is None:
                axis.axhline(entry.median, color="tab:orange", label=entry.communicator)
        axis.set(title=f"{what}\n{rows}", xlabel="SMs", ylabel="us", ylim=(0, None))
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def say(text: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def parse_arguments() -> argparse.Namespace:
    """The shape, and the SM budgets to try."""
    parser = argparse.ArgumentParser(description="Normal-mode dispatch and combine.")
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--sms", type=int, nargs="+", default=[8, 16, 24, 32, 64, 128])
    parser.add_argument("--out", type=Path, help="folder for normal.json and normal.png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
