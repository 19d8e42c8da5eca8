"""What is particular to the low-latency kernels: CUDA graphs, hooks and streams, ranks that fail."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist
from communicators import make_reach, rank_device
from gpu_ranks import gpu_ranks, gpu_ranks_and_counts
from ranks import run_ranks
from routing_cases import Case, make_inputs
from torch import Tensor

from ep_moe.comm import PeerTimeoutError
from ep_moe.comm.nvlink_low_latency import NvlinkLowLatencyCommunicator

pytestmark = pytest.mark.gpu

HIDDEN, TOKENS, TOP_K = 256, 8, 3


def build(rank: int, world: int, kind: str = "nvlink", **options: float) -> NvlinkLowLatencyCommunicator:
    device = rank_device("cuda", rank)
    return NvlinkLowLatencyCommunicator(
        dist.group.WORLD,
        device,
        max_tokens=TOKENS,
        hidden=HIDDEN,
        num_experts=4 * world,
        reach=make_reach(kind, dist.group.WORLD, device),
        **options,  # type: ignore[arg-type]
    )


def inputs(rank: int, world: int, seed: int = 0, pattern: str = "some_unrouted") -> list[Tensor]:
    """bf16 x, topk_idx and fp32 topk_weights of one rank."""
    case = Case((TOKENS,) * world, 4 * world, TOP_K, HIDDEN, pattern, torch.bfloat16, seed)
    return [t.to(rank_device("cuda", rank)) for t in make_inputs(case, rank)]


def round_trip(
    communicator: NvlinkLowLatencyCommunicator, x: Tensor, idx: Tensor, weights: Tensor, early: bool = False
) -> Tensor:
    """The identity for experts, but for FP8: x times the sum of the weights of its routed entries.

    Weights travel with the sums, or, if ``early``, with the rows.
    """
    packed = communicator.dispatch(x, idx, weights if early else None)
    return communicator.combine(packed.rows, idx, None if early else weights, packed.handle)


def weighted_sum(x: Tensor, idx: Tensor, weights: Tensor, ranks: list[int]) -> Tensor:
    """What experts of ``ranks`` that do nothing make of ``x``, exactly."""
    there = sum(((idx // 4 == rank) & (idx >= 0)) for rank in ranks)
    return x.double() * (weights * there).double().sum(1, keepdim=True)


def close(out: Tensor, exact: Tensor) -> Tensor:
    """Whether a sum is right but for the rounding to bf16, of each rank's part and in the end; on the device."""
    return ((out.double() - exact).abs() <= 2**-7 * exact.abs() + 1e-30).all()


def is_weighted_sum(out: Tensor, x: Tensor, idx: Tensor, weights: Tensor, ranks: list[int]) -> bool:
    """Whether ``out`` is what experts of ``ranks`` that do nothing make of ``x``."""
    return bool(close(out, weighted_sum(x, idx, weights, ranks)))


def replay_changing_routing(rank: int, world: int, replays: int, kind: str = "nvlink") -> int:
    """The number of wrong results."""
    communicator = build(rank, world, kind)
    x, idx, weights = inputs(rank, world)
    for scale_format in ("none", "fp32"):
        communicator.dispatch(x, idx, scale_format=scale_format)  # type: ignore[arg-type]
    round_trip(communicator, x, idx, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = communicator.dispatch(x, idx)
        out = communicator.combine(packed.rows, idx, weights, packed.handle)
        early = round_trip(communicator, x, idx, weights, early=True)
        quantised = communicator.dispatch(x, idx, scale_format="fp32")
    # Drawn once, and judged on the GPU: otherwise ten thousand replays would spend their time with that.
    sets = [inputs(rank, world, seed) for seed in range(50)]
    expected = [weighted_sum(*tensors, list(range(world))) for tensors in sets]
    wrong = torch.zeros((), dtype=torch.int64, device=x.device)
    for replay in range(replays):
        for tensor, value in zip((x, idx, weights), sets[replay % len(sets)], strict=True):
            tensor.copy_(value)
        graph.replay()
        wrong += ~close(out, expected[replay % len(sets)])
        wrong += ~close(early, expected[replay % len(sets)])
        wrong += (quantised.counts != packed.counts).any()
    return int(wrong)


# Eight ranks that share an H200 take 0.055 s a replay, their kernels taking turns: 10,000 would be nine minutes.
@pytest.mark.parametrize(("ranks", "replays"), gpu_ranks_and_counts({1: 10_000, 2: 200, 4: 50, 8: 100}, 10_000))
def test_replays_with_changing_routing(ranks: int, replays: int) -> None:
    assert run_ranks(ranks, replay_changing_routing, replays) == [0] * ranks


def use_streams_and_threads(rank: int, world: int, kind: str = "nvlink") -> list[bool]:
    """Two micro-batches on two streams; each receive in another thread."""
    communicator = build(rank, world, kind)
    streams = [torch.cuda.Stream() for _ in range(2)]
    batches = [inputs(rank, world, seed) for seed in (1, 2)]
    torch.cuda.synchronize()
    right = []
    for _ in range(20):
        sent, outs = [], []
        for stream, (x, idx, weights) in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                sent.append(communicator.dispatch_send(x, idx, weights))
        for stream, (_, hook) in zip(streams, sent, strict=True):
            call_in_thread(stream, hook)
        for stream, (_, idx, _), (packed, _) in zip(streams, batches, sent, strict=True):
            with torch.cuda.stream(stream):
                outs.append(communicator.combine_send(packed.rows, idx, None, packed.handle))
        for stream, (_, hook) in reversed(list(zip(streams, outs, strict=True))):
            call_in_thread(stream, hook)
        torch.cuda.synchronize()
        right += [
            is_weighted_sum(out, *batch, list(range(world)))  # type: ignore[call-arg]
            for (out, _), batch in zip(outs, batches, strict=True)
        ]
    return right


def call_in_thread(stream: torch.cuda.Stream, hook: object) -> None:
    def call() -> None:
        with torch.cuda.stream(stream):  # and on its GPU: a thread begins on the first one
            hook()  # type: ignore[operator]

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@pytest.mark.parametrize("ranks", gpu_ranks(1, 2))
def test_hooks_in_other_threads_and_streams(ranks: int) -> None:
    for right in run_ranks(ranks, use_streams_and_threads):
        assert all(right)


def _misuse(rank: int, world: int) -> list[str]:
    communicator = build(rank, world)
    x, idx, weights = inputs(rank, world)
    messages = []

    def attempt(call: object) -> None:
        try:
            call()  # type: ignore[operator]
            messages.append("no error")
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))

    (_, first), (packed, second) = (communicator.dispatch_send(x, idx) for _ in range(2))
    attempt(lambda: communicator.dispatch_send(x, idx))
    second()
    attempt(lambda: communicator.dispatch_send(x, idx))  # still the first one
    first()
    attempt(first)
    attempt(lambda: communicator.dispatch(x.float(), idx))
    attempt(lambda: communicator.dispatch(x.repeat(2, 1), idx.repeat(2, 1)))
    attempt(lambda: communicator.combine(packed.rows[:1], idx, weights, packed.handle))
    bad = idx.clone()
    bad[0, 0] = 4 * world
    communicator.dispatch(x, bad)
    torch.cuda.synchronize()
    attempt(lambda: communicator.dispatch(x, idx))
    out = round_trip(communicator, x, idx, weights)
    messages.append(str(is_weighted_sum(out, x, idx, weights, [0])))
    return messages


def test_misuse_is_named_and_harmless() -> None:
    third, late, twice, dtype, tokens, rows, expert, works = run_ranks(1, _misuse)[0]
    assert third == late == "dispatches: at most 2 may be under way; call the hook of the one before last first"
    assert twice == "the hook of a dispatch was called twice"
    assert "x: expected torch.bfloat16 [any, 256]" in dtype
    assert "x: 16 tokens exceed phases.decode.max_tokens_per_rank (8)" in tokens
    assert "rows: expected torch.bfloat16 [4, 8, 256]" in rows
    assert expert == "topk_idx: expected experts in [0, 4) (moe.num_experts) or -1, got 4"
    assert works == "True"


def lose_a_rank(rank: int, world: int, early: bool, kind: str = "nvlink") -> tuple[str, int, float, list[bool]]:
    """The last rank stops after one exchange; the others mask it and go on."""
    communicator = build(rank, world, kind, timeout_s=1.0)
    x, idx, weights = inputs(rank, world)
    round_trip(communicator, x, idx, weights, early)
    torch.cuda.synchronize()
    dist.barrier()
    message, named, right, start = "", -1, [], time.monotonic()
    if rank < world - 1:
        try:
            for _ in range(2):  # the first launches, the second finds out
                round_trip(communicator, x, idx, weights, early)
                torch.cuda.synchronize()
        except PeerTimeoutError as error:
            message, named = str(error), error.rank
        waited = time.monotonic() - start
        communicator.mask_rank(named)
        right.append(communicator.masked.tolist() == [False] * (world - 1) + [True])
        for seed in range(12):
            x, idx, weights = inputs(rank, world, seed)
            out = round_trip(communicator, x, idx, weights, early)
            right.append(is_weighted_sum(out, x, idx, weights, list(range(world - 1))))
        torch.cuda.synchronize()
        communicator.check()
    else:
        waited = 0.0
    dist.barrier()
    return message, named, waited, right


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("ranks", gpu_ranks(2, 3))
def test_a_rank_that_stops_is_named_and_can_be_masked(ranks: int, early: bool) -> None:
    check_losses(run_ranks(ranks, lose_a_rank, early))


def check_losses(results: list[tuple[str, int, float, list[bool]]]) -> None:
    """That all but the last rank have named it and gone on."""
    *others, _ = results
    for rank, (message, named, waited, right) in enumerate(others):
        assert named == len(others) and waited < 10
        assert f"rank {rank} waited 1 s for rank {len(others)}" in message and "mask_rank" in message
        assert all(right), right


def _half_a_row(rank: int, world: int) -> tuple[str, int]:
    """Rank 1 sends its routing and half a row of its first token, as if it had died there."""
    communicator = build(rank, world, timeout_s=1.0)
    x, idx, _ = inputs(rank, world)
    communicator.dispatch(x, idx)
    torch.cuda.synchronize()
    dist.barrier()
    message, named = "", -1
    if rank == 0:
        assert communicator._landing is not None
        layout, shape, number = communicator._common.layout, communicator._common.shape, 2
        place = (number % 4 * world + 1) * TOKENS
        local = communicator._landing.memory.local
        routing = local[layout.routing :].view(torch.int16)[place * 8 : (place + TOKENS) * 8].view(TOKENS, 8)
        entries = torch.full((TOKENS, 8), 2047 | number << 11)
        entries[0, 0] = 1 | number << 11  # expert 1, of rank 0
        routing.copy_(entries.to(torch.int16))
        row = local[layout.rows + place * shape.row_bytes :][: shape.row_bytes]
        row[: shape.row_bytes // 2] = 1
        try:
            for _ in range(2):
                communicator.dispatch(x, idx)
                torch.cuda.synchronize()
        except PeerTimeoutError as error:
            message, named = str(error), error.rank
    dist.barrier()
    return message, named


def test_a_rank_that_dies_within_a_row_is_named() -> None:
    (message, named), _ = run_ranks(2, _half_a_row)
    assert named == 1 and "step: rows, round 2" in message
