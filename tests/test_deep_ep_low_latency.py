"""Low-latency mode of the DeepEP interface against an oracle that knows every rank's inputs."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from communicators import DEEP_EP_DEVICES, use_deep_ep
from low_latency_cases import LowLatencyCase, expected_payload, expected_rows, expected_sums, make_inputs, same
from ranks import run_ranks
from torch import Tensor

from ep_moe.compat.deep_ep import Buffer

BASE = LowLatencyCase(tokens=(5, 8), max_tokens=8, hidden=640, local_experts=3, top_k=2)
# use_fp8, round_scale, use_ue8m0 -> the format of the oracle
FORMATS = {
    (False, False, False): "none",
    (True, False, False): "fp32",
    (True, True, False): "ue8m0",
    (True, True, True): "ue8m0",
}


def make_buffer() -> Buffer:
    size = Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=8, hidden=640, num_ranks=2, num_experts=6
    )
    return Buffer(dist.group.WORLD, 0, size, low_latency_mode=True, num_qps_per_rank=3)


def powers(packed: Tensor, blocks: int) -> Tensor:
    """UE8M0 bytes as numbers."""
    return torch.exp2(packed.contiguous().view(torch.uint8)[..., :blocks].double() - 127).float()


def wrong_rows(case: LowLatencyCase, rank: int, rows: Any, counts: Tensor, handle: Any, unpacked: bool) -> list[str]:
    """What is wrong with the result of a dispatch."""
    wrong, places = [], case.ranks * case.max_tokens
    src_info, layout_range, max_tokens, hidden, num_experts = handle
    if (max_tokens, hidden, num_experts) != (case.max_tokens, case.hidden, case.num_experts):
        wrong.append("handle")
    arrived = [rows] if case.scale_format == "none" else list(rows)
    if list(arrived[0].shape) != [case.local_experts, places, case.hidden] or counts.dtype != torch.int32:
        wrong.append("shapes")
    for expert, want in enumerate(expected_rows(case, rank)):
        count = len(want)
        by_rank = [sum(source == other for source, _ in want) for other in range(case.ranks)]
        ranges = [sum(by_rank[:other]) << 32 | by_rank[other] for other in range(case.ranks)]
        if int(counts[expert]) != count or layout_range[expert].tolist() != ranges:
            wrong.append(f"counts of expert {expert}")
        elif src_info[expert, :count].tolist() != [token for _, token in want]:
            wrong.append(f"tokens of expert {expert}")
        elif want:
            exact = expected_payload(case, want)
            if unpacked:
                exact[1] = powers(exact[1], case.hidden // 128)
            for got, values in zip(arrived, exact, strict=True):
                if not same(got[expert, :count].cpu(), values):
                    wrong.append(f"rows or scales of expert {expert}")
    return wrong


def _exchange(rank: int, world: int, device: str, case: LowLatencyCase, flags: tuple[bool, ...], how: str) -> list[str]:
    on, buffer = use_deep_ep(device, rank), make_buffer()
    case = replace(case, scale_format=FORMATS[flags])
    use_fp8, round_scale, use_ue8m0 = flags
    mine = make_inputs(case, rank)
    x, idx, weights, out = (t.to(on) for t in (mine.x, mine.topk_idx, mine.topk_weights, mine.experts_out))
    received = torch.zeros(case.local_experts, dtype=torch.int32, device=on)
    waited = torch.zeros(world, dtype=torch.int64, device=on)
    finish = {"async_finish": how == "async", "return_recv_hook": how == "hook"}
    rows, counts, handle, event, hook = buffer.low_latency_dispatch(
        x,
        idx,
        case.max_tokens,
        case.num_experts,
        cumulative_local_expert_recv_stats=received,
        dispatch_wait_recv_cost_stats=waited,
        use_fp8=use_fp8,
        round_scale=round_scale,
        use_ue8m0=use_ue8m0,
        **finish,
    )
    wrong = [] if (hook is not None) == (how == "hook") else ["hook"]
    wrong += [] if (event.event is not None) == (how == "async") else ["event"]
    hook() if hook is not None else event.current_stream_wait()
    wrong += wrong_rows(case, rank, rows, counts, handle, flags == (True, True, False))
    wrong += [] if torch.equal(received, counts) else ["received"]
    for _ in range(2):  # a handle may be combined several times
        target = torch.empty_like(x)
        summed, event, hook = buffer.low_latency_combine(
            out, idx, weights, handle, out=target, combine_wait_recv_cost_stats=waited, **finish
        )
        hook() if hook is not None else event.current_stream_wait()
        wrong += [] if summed is target and same(summed.cpu(), expected_sums(case, rank)) else ["combine"]
    buffer.get_next_low_latency_combine_buffer(handle)[:] = out
    summed, *_ = buffer.low_latency_combine(torch.empty_like(out), idx, weights, handle, zero_copy=True)
    wrong += [] if same(summed.cpu(), expected_sums(case, rank)) else ["zero copy"]
    return wrong


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
@pytest.mark.parametrize("how", ["plain", "async", "hook"])
@pytest.mark.parametrize("flags", list(FORMATS))
def test_rows_arrive_and_return(device: str, how: str, flags: tuple[bool, ...]) -> None:
    assert run_ranks(2, _exchange, device, BASE, flags, how) == [[], []]


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_no_tokens_and_strange_values(device: str) -> None:
    case = LowLatencyCase(tokens=(0, 8), max_tokens=8, hidden=128, local_experts=2, top_k=4, special=True)
    assert run_ranks(2, _exchange, device, case, (True, False, False), "hook") == [[], []]


def _two_batches(rank: int, world: int, device: str) -> list[str]:
    """Two handles alive, hooks called by another thread, dispatches ahead of combines."""
    on, buffer, wrong = use_deep_ep(device, rank), make_buffer(), []
    cases = [replace(BASE, seed=seed) for seed in (1, 2)]
    inputs = [make_inputs(case, rank) for case in cases]
    tensors = [[t.to(on) for t in (i.x, i.topk_idx, i.topk_weights, i.experts_out)] for i in inputs]
    sent = [buffer.low_latency_dispatch(t[0], t[1], 8, 6, use_fp8=False, return_recv_hook=True) for t in tensors]

    def call(*hooks: Any) -> None:
        thread = threading.Thread(target=lambda: [hook() for hook in hooks])
        thread.start()
        thread.join()
        if device == "cuda":
            torch.cuda.synchronize()

    call(*(s[4] for s in sent))
    for case, (rows, counts, handle, _, _) in zip(cases, sent, strict=True):
        wrong += wrong_rows(case, rank, rows, counts, handle, False)
    sums = [
        buffer.low_latency_combine(t[3], t[1], t[2], s[2], return_recv_hook=True)
        for t, s in zip(reversed(tensors), reversed(sent), strict=True)
    ]
    call(*(s[2] for s in sums))
    for case, (summed, _, _) in zip(reversed(cases), sums, strict=True):
        wrong += [] if same(summed.cpu(), expected_sums(case, rank)) else ["combine"]
    return wrong


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_two_batches_in_flight(device: str) -> None:
    assert run_ranks(2, _two_batches, device) == [[], []]


def _masks(rank: int, world: int, device: str) -> list[str]:
    on, buffer, case = use_deep_ep(device, rank), make_buffer(), replace(BASE, tokens=(8, 8))
    mine, status = make_inputs(case, rank), torch.full((2,), 7, dtype=torch.int32, device=on)
    x, idx = mine.x.to(on), mine.topk_idx.to(on)
    wrong = []

    def own_rows(counts: Tensor) -> bool:
        rows = [sum(source == rank for source, _ in want) for want in expected_rows(case, rank)]
        return counts.tolist() == rows

    buffer.low_latency_update_mask_buffer(1 - rank, True)
    buffer.low_latency_query_mask_buffer(status)
    wrong += [] if status.tolist() == [rank, 1 - rank] else ["query"]
    for max_tokens in (8, 16):  # also one made after the call
        _, counts, *_ = buffer.low_latency_dispatch(x, idx, max_tokens, 6, use_fp8=False)
        wrong += [] if own_rows(counts) else [f"masked {max_tokens}"]
    dist.barrier()
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    dist.barrier()
    wrong += [] if status.tolist() == [0, 0] else ["clean"]
    rows, counts, handle, *_ = buffer.low_latency_dispatch(x, idx, 8, 6, use_fp8=False)
    return wrong + wrong_rows(case, rank, rows, counts, handle, False)


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_masks(device: str) -> None:
    assert run_ranks(2, _masks, device) == [[], []]


def _refusals(rank: int, world: int) -> list[str]:
    use_deep_ep("cpu", rank)
    buffer, mine = make_buffer(), make_inputs(replace(BASE, tokens=(8, 8)), rank)
    x, idx, weights, out = mine.x, mine.topk_idx, mine.topk_weights, mine.experts_out
    *_, handle, _, _ = buffer.low_latency_dispatch(x, idx, 8, 6)
    attempts = [
        lambda: buffer.low_latency_dispatch(x, idx, 8, 6, use_ue8m0=True),
        lambda: buffer.low_latency_dispatch(x, idx, 8, 6, async_finish=True, return_recv_hook=True),
        lambda: buffer.low_latency_dispatch(x, idx, 4, 6),
        lambda: buffer.low_latency_dispatch(x, idx, 8, 5),
        lambda: buffer.low_latency_dispatch(x.float(), idx, 8, 6),
        lambda: buffer.low_latency_combine(out, idx, weights, handle, use_logfmt=True),
        lambda: buffer.low_latency_combine(out, idx, weights, tuple(handle)),  # type: ignore[arg-type]
        lambda: buffer.low_latency_combine(out, idx, weights, handle, zero_copy=True),
        lambda: buffer.low_latency_update_mask_buffer(rank, True),
        lambda: buffer.low_latency_query_mask_buffer(torch.zeros(3, dtype=torch.int32)),
    ]
    messages = []
    for attempt in attempts:
        try:
            attempt()
            messages.append("no error")
        except (ValueError, NotImplementedError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_bad_arguments_are_named() -> None:
    expected = [
        "ValueError: use_ue8m0: needs round_scale=True",
        "ValueError: async_finish, return_recv_hook: at most one",
        "ValueError: x: 8 tokens exceed",
        "ValueError: num_experts: expected a multiple of the 2 ranks",
        "ValueError: x: expected torch.bfloat16",
        "NotImplementedError: use_logfmt",
        "ValueError: handle: expected what low_latency_dispatch returned, got tuple",
        "ValueError: zero_copy: call get_next_low_latency_combine_buffer(handle) first",
        "ValueError: rank_to_mask: expected another rank of 2",
        "ValueError: mask_status: expected [2]",
    ]
    for answers in run_ranks(2, _refusals):
        for answer, want in zip(answers, expected, strict=True):
            assert want in answer


def test_size_hint_grows() -> None:
    least = Buffer.get_low_latency_rdma_size_hint(8, 128, 2, 4)
    assert 0 < least < Buffer.get_low_latency_rdma_size_hint(8, 7168, 2, 4)
    assert least < Buffer.get_low_latency_rdma_size_hint(128, 128, 2, 4)
    assert least < Buffer.get_low_latency_rdma_size_hint(8, 128, 8, 4)


def _captured(rank: int, world: int) -> list[str]:
    """A decode step in a CUDA graph, replayed with other inputs."""
    on, buffer, case = use_deep_ep("cuda", rank), make_buffer(), replace(BASE, tokens=(8, 8))
    cases, wrong = [replace(case, seed=seed) for seed in (3, 4, 5)], []
    static = [t.to(on) for t in vars(make_inputs(cases[0], rank)).values()]

    def step() -> tuple[Any, Tensor, Any, Tensor]:
        x, idx, weights, out = static
        rows, counts, handle, _, hook = buffer.low_latency_dispatch(x, idx, 8, 6, use_fp8=False, return_recv_hook=True)
        assert hook is not None
        hook()
        summed, _, receive = buffer.low_latency_combine(out, idx, weights, handle, return_recv_hook=True)
        assert receive is not None
        receive()
        return rows, counts, handle, summed

    step()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    refused = ""
    with torch.cuda.graph(graph):
        try:
            Buffer(dist.group.WORLD)
        except RuntimeError as error:
            refused = str(error)
        try:
            buffer.destroy()
        except RuntimeError as error:
            refused += str(error)
        rows, counts, handle, summed = step()
    if "a Buffer is created" not in refused or "a Buffer is destroyed" not in refused:
        wrong.append("capture was not refused")
    for other in cases:
        for tensor, values in zip(static, vars(make_inputs(other, rank)).values(), strict=True):
            tensor.copy_(values)
        dist.barrier()
        graph.replay()
        torch.cuda.synchronize()
        wrong += wrong_rows(other, rank, rows, counts, handle, False)
        wrong += [] if same(summed.cpu(), expected_sums(other, rank)) else ["combine"]
    return wrong


@pytest.mark.gpu
def test_decode_step_in_a_graph() -> None:
    assert run_ranks(2, _captured) == [[], []]
