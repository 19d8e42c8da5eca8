"""Normal mode of the DeepEP interface against an oracle that knows every rank's inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from communicators import DEEP_EP_DEVICES, use_deep_ep
from ranks import run_ranks
from routing_cases import PATTERNS, Case, make_inputs
from torch import Tensor

from ep_moe.comm import CapacityError
from ep_moe.compat.deep_ep import Buffer, Config, EventHandle, EventOverlap

BASE = Case(tokens=(7, 12), num_experts=8, top_k=3, hidden=64, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Expected:
    """What a rank receives, and what its tokens get back if every rank returns what it received."""

    sources: list[tuple[int, int]]  # (rank, token) of each row
    rows: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    per_expert: list[int]
    copies: Tensor  # [tokens], ranks that each token goes to


def expected(case: Case, rank: int, alignment: int = 1) -> Expected:
    inputs = [make_inputs(case, source) for source in range(case.ranks)]
    first, last = rank * case.local_experts, (rank + 1) * case.local_experts
    sources, rows, indices, weights = [], [], [], []
    counts = [0] * case.local_experts
    for source, (x, idx, w) in enumerate(inputs):
        for token, experts in enumerate(idx.tolist()):
            if any(first <= expert < last for expert in experts):
                sources.append((source, token))
                rows.append(x[token])
                indices.append([e - first if first <= e < last else -1 for e in experts])
                weights.append(
                    [v if first <= e < last else 0.0 for e, v in zip(experts, w[token].tolist(), strict=True)]
                )
                for expert in experts:
                    if first <= expert < last:
                        counts[expert - first] += 1
    owners = [{e // case.local_experts for e in experts if e >= 0} for experts in inputs[rank][1].tolist()]
    return Expected(
        sources,
        torch.stack(rows) if rows else torch.empty(0, case.hidden, dtype=case.dtype),
        torch.tensor(indices, dtype=torch.int64).view(-1, case.top_k),
        torch.tensor(weights, dtype=torch.float32).view(-1, case.top_k),
        [-(-count // alignment) * alignment for count in counts],
        torch.tensor([len(ranks) for ranks in owners]),
    )


def make_buffer() -> Buffer:
    return Buffer(dist.group.WORLD, 1 << 20, 0)


def full_dispatch(buffer: Buffer, x: Any, idx: Tensor, weights: Tensor | None, experts: int, **options: Any) -> Any:
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, experts)
    return buffer.dispatch(
        x,
        topk_idx=idx,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        **options,
    )


def _exchange(rank: int, world: int, device: str, case: Case, alignment: int) -> list[str]:
    on, buffer = use_deep_ep(device, rank), make_buffer()
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    want = expected(case, rank, alignment)
    rows, got_idx, got_weights, per_expert, handle, event = full_dispatch(
        buffer, x, idx, weights, case.num_experts, expert_alignment=alignment
    )
    again = buffer.dispatch(x, handle=handle)
    y = rows * 2 + 1
    out, summed, _ = buffer.combine(y, handle, topk_weights=got_weights)
    # Each rank returns a token's row doubled, plus one, in bf16; sums in fp32.
    exact = want.copies[:, None] * (make_inputs(case, rank)[0] * 2 + 1).float()
    prefix = [sum(source <= other for source, _ in want.sources) for other in range(world)]
    checks = {
        "rows": torch.equal(rows.cpu(), want.rows),
        "topk_idx": got_idx.dtype == torch.int64 and torch.equal(got_idx.cpu(), want.topk_idx),
        "topk_weights": torch.equal(got_weights.cpu(), want.topk_weights),
        "tokens per expert": per_expert == want.per_expert,
        "prefix": handle[0].dtype == torch.int32
        and list(handle[0].shape) == [world, world]
        and handle[0][:, rank].tolist() == prefix,
        "event": event.event is None,
        "cached": torch.equal(again[0], rows) and again[1:4] == (None, None, None) and again[4] is handle,
        "combine": torch.equal(out.cpu(), exact.to(case.dtype)),
        "combined weights": torch.equal(summed.cpu(), torch.where(idx.cpu() >= 0, weights.cpu(), 0)),
    }
    return [name for name, good in checks.items() if not good]


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_arrive_in_order_and_return(device: str, pattern: str) -> None:
    case = replace(BASE, pattern=pattern)
    assert run_ranks(2, _exchange, device, case, 1) == [[], []]


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
@pytest.mark.parametrize(
    ("case", "alignment"),
    [
        (Case(tokens=(0, 5, 9), num_experts=6, top_k=2, hidden=32, dtype=torch.float32), 1),
        (Case(tokens=(33, 1, 20), num_experts=12, top_k=6, hidden=256, dtype=torch.bfloat16), 128),
        (Case(tokens=(0, 0, 0), num_experts=3, top_k=1, hidden=16, dtype=torch.float16), 4),
    ],
)
def test_uneven_ranks_and_alignment(device: str, case: Case, alignment: int) -> None:
    assert run_ranks(3, _exchange, device, case, alignment) == [[], [], []]


def _layout(rank: int, world: int, device: str, case: Case) -> list[str]:
    on, buffer = use_deep_ep(device, rank), make_buffer()
    idx = make_inputs(case, rank)[1]
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(idx.to(on), case.num_experts)
    owners = [{e // case.local_experts for e in experts if e >= 0} for experts in idx.tolist()]
    table = [[other in ranks for other in range(world)] for ranks in owners]
    checks = {
        "dtypes": (per_rank.dtype, per_expert.dtype, in_rank.dtype) == (torch.int32, torch.int32, torch.bool),
        "in rank": in_rank.tolist() == table,
        "per rank": per_rank.tolist() == [sum(line[other] for line in table) for other in range(world)],
        "per expert": per_expert.tolist() == [int((idx == expert).sum()) for expert in range(case.num_experts)],
        "per node": per_node is None,
        "event": event.event is None,
    }
    return [name for name, good in checks.items() if not good]


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
@pytest.mark.parametrize("pattern", ["random", "some_unrouted", "unrouted"])
def test_layout(device: str, pattern: str) -> None:
    assert run_ranks(2, _layout, device, replace(BASE, pattern=pattern)) == [[], []]


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_layout_of_no_tokens(device: str) -> None:
    assert run_ranks(2, _layout, device, replace(BASE, tokens=(0, 5))) == [[], []]


def _layout_in_used_memory(rank: int, world: int) -> list[int]:
    """Calls whose results get the memory of other results, and one in a CUDA graph that is replayed."""
    on, buffer = use_deep_ep("cuda", rank), make_buffer()
    idx = make_inputs(BASE, rank)[1].to(on)

    def counts() -> Tensor:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, BASE.num_experts)
        return torch.cat([per_rank, per_expert, in_rank.flatten().int()])

    want, wrong = counts(), 0
    for _ in range(20):
        used = [torch.full((size,), -1, dtype=torch.int32, device=on) for size in (2, 8, 10, 32, 128) for _ in range(9)]
        del used
        wrong += int(not torch.equal(counts(), want))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = counts()
    for _ in range(3):
        graph.replay()
        wrong += int(not torch.equal(captured, want))
    moved = torch.stack([torch.zeros_like(idx), idx], 2)[..., 1]  # not contiguous
    per_expert = buffer.get_dispatch_layout(moved, BASE.num_experts)[2]
    return [wrong, int(not torch.equal(per_expert, want[world : world + BASE.num_experts]))]


@pytest.mark.gpu
def test_layout_in_used_memory() -> None:
    assert run_ranks(2, _layout_in_used_memory) == [[0, 0], [0, 0]]


def _scaled(rank: int, world: int, device: str, column_major: bool) -> list[str]:
    """Rows of e4m3 with scales; they tell their source."""
    on, buffer, case = use_deep_ep(device, rank), make_buffer(), replace(BASE, hidden=256)
    want = expected(case, rank)

    def inputs(source: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(50 + source)
        values = torch.randn(case.tokens[source], 256, generator=generator).to(torch.float8_e4m3fn)
        return values, torch.rand(case.tokens[source], 2, generator=generator)

    values, scales = (t.to(on) for t in inputs(rank))
    if column_major:
        scales = scales.t().contiguous().t()
    _, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    (rows, row_scales), got_idx, _, _, handle, _ = full_dispatch(
        buffer, (values, scales), idx, weights, case.num_experts
    )
    (again, again_scales), *_ = buffer.dispatch((values, scales), handle=handle)
    packed = scales.contiguous().view(torch.int32)[:, 0]
    (_, packed_scales), *_ = buffer.dispatch((values, packed), handle=handle)
    sent = [inputs(source) for source in range(world)]
    exact = torch.stack([sent[source][0][token].view(torch.uint8) for source, token in want.sources])
    exact_scales = torch.stack([sent[source][1][token] for source, token in want.sources])
    checks = {
        "dtype": rows.dtype == torch.float8_e4m3fn and row_scales.dtype == torch.float32,
        "rows": torch.equal(rows.view(torch.uint8).cpu(), exact),
        "scales": torch.equal(row_scales.cpu(), exact_scales),
        "topk_idx": torch.equal(got_idx.cpu(), want.topk_idx),
        "cached": torch.equal(again.view(torch.uint8).cpu(), exact) and torch.equal(again_scales.cpu(), exact_scales),
        "packed": torch.equal(packed_scales.cpu(), exact_scales.view(torch.int32)[:, 0]),
    }
    return [name for name, good in checks.items() if not good]


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
@pytest.mark.parametrize("column_major", [False, True])
def test_rows_with_scales(device: str, column_major: bool) -> None:
    assert run_ranks(2, _scaled, device, column_major) == [[], []]


def _bias(rank: int, world: int, device: str) -> list[str]:
    on, buffer = use_deep_ep(device, rank), make_buffer()
    x, idx, _ = (t.to(on) for t in make_inputs(BASE, rank))
    rows, got_idx, none, *_, handle, _ = full_dispatch(buffer, x, idx, None, BASE.num_experts)
    plain, no_weights, _ = buffer.combine(rows, handle)
    one, two = torch.randn_like(plain), torch.randn_like(plain)
    with_one, _, _ = buffer.combine(rows, handle, bias=one)
    with_two, _, _ = buffer.combine(rows, handle, bias=(one, two))
    checks = {
        "no weights": none is None and no_weights is None,
        "topk_idx": torch.equal(got_idx.cpu(), expected(BASE, rank).topk_idx),
        "one": torch.equal(with_one, (plain.float() + one.float()).to(x.dtype)),
        "two": torch.equal(with_two, (plain.float() + one.float() + two.float()).to(x.dtype)),
    }
    return [name for name, good in checks.items() if not good]


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_bias_and_no_weights(device: str) -> None:
    assert run_ranks(2, _bias, device) == [[], []]


def _worst(rank: int, world: int, device: str, pattern: str) -> list[str]:
    on, case = use_deep_ep(device, rank), replace(BASE, pattern=pattern)
    buffer, worst = make_buffer(), 40
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    want = expected(case, rank)
    exact_rows, *_, exact_handle, _ = full_dispatch(buffer, x, idx, weights, case.num_experts)
    rows, got_idx, got_weights, per_expert, handle, _ = full_dispatch(
        buffer, x, idx, weights, case.num_experts, num_worst_tokens=worst, expert_alignment=4
    )
    count = len(want.sources)
    again, *_ = buffer.dispatch(x, handle=handle)
    out, summed, _ = buffer.combine(rows, handle, topk_weights=got_weights)
    exact_out, _, _ = buffer.combine(exact_rows, exact_handle)
    checks = {
        "shapes": [len(t) for t in (rows, got_idx, got_weights, again)] == [worst] * 4,
        "rows": torch.equal(rows[:count].cpu(), want.rows) and torch.equal(again[:count].cpu(), want.rows),
        "topk_idx": torch.equal(got_idx[:count].cpu(), want.topk_idx) and bool((got_idx[count:] == -1).all()),
        "topk_weights": torch.equal(got_weights[:count].cpu(), want.topk_weights),
        "list": per_expert == [],
        "prefix": torch.equal(handle[0], exact_handle[0]),
        "combine": torch.equal(out, exact_out),
        "combined weights": torch.equal(summed, torch.where(idx >= 0, weights, 0)),
    }
    return [name for name, good in checks.items() if not good]


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
@pytest.mark.parametrize("pattern", ["random", "unrouted", "repeated", "one_rank"])
def test_worst_case_shapes(device: str, pattern: str) -> None:
    assert run_ranks(2, _worst, device, pattern) == [[], []]


def _too_many(rank: int, world: int, device: str) -> str:
    on, case = use_deep_ep(device, rank), replace(BASE, tokens=(8, 8), pattern="one_expert")
    buffer = make_buffer()
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    try:  # one expert of the last rank gets all 16 tokens
        full_dispatch(buffer, x, idx, weights, case.num_experts, num_worst_tokens=12)
        if device == "cuda" and rank == 1:  # the next call tells, before it sends
            torch.cuda.synchronize()
            full_dispatch(buffer, x, idx, weights, case.num_experts)
    except CapacityError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_too_many_rows_are_found_out(device: str) -> None:
    first, second = run_ranks(2, _too_many, device)
    assert first == "" and "max_rows = 12 (moe.capacity_rows): 16 rows arrived" in second


def _events(rank: int, world: int, device: str) -> list[str]:
    on, buffer = use_deep_ep(device, rank), make_buffer()
    x, idx, weights = (t.to(on) for t in make_inputs(BASE, rank))
    plain = full_dispatch(buffer, x, idx, weights, BASE.num_experts)
    kwargs: dict[str, Any] = {"async_finish": True, "allocate_on_comm_stream": True}
    *layout, event = buffer.get_dispatch_layout(
        idx, BASE.num_experts, previous_event=EventOverlap(EventHandle()), **kwargs
    )
    rows, got_idx, _, per_expert, handle, done = buffer.dispatch(
        x,
        topk_idx=idx,
        topk_weights=weights,
        num_tokens_per_rank=layout[0],
        num_tokens_per_rdma_rank=layout[1],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
        previous_event=event,
        config=Config(24, 8, 256, 8, 128),
        **kwargs,
    )
    with done:  # waits at the end
        pass
    out, _, finished = buffer.combine(rows, handle, previous_event=buffer.capture(), **kwargs)
    finished.current_stream_wait()
    out_again, _, _ = buffer.combine(plain[0], plain[4])
    checks = {
        "events": all(e.event is not None for e in (event, done, finished)),
        "rows": torch.equal(rows, plain[0]) and torch.equal(got_idx, plain[1]) and per_expert == plain[3],
        "out": torch.equal(out, out_again),
    }
    return [name for name, good in checks.items() if not good]


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_events(device: str) -> None:
    assert run_ranks(2, _events, device) == [[], []]


def _by_rank(rank: int, world: int, device: str) -> list[str]:
    """Without experts: rows, the list and the way back."""
    on, buffer, case = use_deep_ep(device, rank), make_buffer(), replace(BASE, pattern="some_unrouted")
    x, idx, _ = (t.to(on) for t in make_inputs(case, rank))
    want = expected(case, rank, alignment=4)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, case.num_experts)
    rows, no_idx, no_weights, counts, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        expert_alignment=4,
    )
    out, _, _ = buffer.combine(rows, handle)
    exact = want.copies[:, None] * make_inputs(case, rank)[0].float()
    checks = {
        "rows": torch.equal(rows.cpu(), want.rows),
        "none": no_idx is None and no_weights is None,
        "list": counts == want.per_expert,
        "out": torch.equal(out.cpu(), exact.to(case.dtype)),
    }
    return [name for name, good in checks.items() if not good]


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_tokens_of_known_ranks(device: str) -> None:
    assert run_ranks(2, _by_rank, device) == [[], []]


def _refusals(rank: int, world: int) -> list[str]:
    use_deep_ep("cpu", rank)
    buffer = make_buffer()
    x, idx, weights = make_inputs(BASE, rank)
    rows, _, got_weights, _, handle, _ = full_dispatch(buffer, x, idx, weights, BASE.num_experts)
    _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, BASE.num_experts)
    by_rank = {"is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    attempts = [
        lambda: buffer.get_dispatch_layout(idx.int(), 8),
        lambda: buffer.get_dispatch_layout(idx, 7),
        lambda: buffer.dispatch(x, topk_idx=idx, topk_weights=weights),
        lambda: buffer.dispatch(x, handle=handle, topk_idx=idx),
        lambda: buffer.dispatch(x, handle=(1, 2)),  # type: ignore[arg-type]
        lambda: buffer.dispatch(x, topk_idx=idx, topk_weights=weights.double(), num_tokens_per_expert=per_expert),
        lambda: buffer.dispatch(x, num_tokens_per_expert=per_expert),
        lambda: buffer.dispatch(x, **by_rank, topk_weights=weights),
        lambda: buffer.dispatch(x, **by_rank, expert_alignment=0),
        lambda: buffer.dispatch(x, **by_rank | {"num_tokens_per_expert": per_expert[1:]}),
        lambda: buffer.dispatch((x, weights), topk_idx=idx, num_tokens_per_expert=per_expert),
        lambda: buffer.combine(rows[1:], handle),
        lambda: buffer.combine(rows, handle, topk_weights=got_weights[1:]),
        lambda: buffer.combine(rows, handle, bias=(x, x[1:])),
        lambda: Config(0),
        lambda: Buffer.set_num_sms(0),
    ]
    messages = []
    for attempt in attempts:
        try:
            attempt()
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_bad_arguments_are_named() -> None:
    odd = BASE.num_experts - 1
    expected_messages = [
        "topk_idx: expected int64 [tokens, top_k], got torch.int32",
        "num_experts: expected a multiple of the 2 ranks",
        "num_tokens_per_expert: needed without handle",
        "topk_idx, topk_weights: must be None with handle",
        "handle: expected what dispatch returned, got tuple",
        "topk_weights: expected torch.float32",
        "is_token_in_rank: expected torch.bool",
        "topk_weights: must be None without topk_idx",
        "alignment: expected at least 1, got 0",
        f"num_tokens_per_expert: expected [num_experts], a multiple of the 2 ranks of the group, got [{odd}]",
        "x: expected rows of one byte an element and scales",
        "x: expected [",
        "topk_weights: expected torch.float32",
        "in place 1, got [",
        "num_sms: expected at least 1, got 0",
        "new_num_sms: expected at least 1, got 0",
    ]
    for answers in run_ranks(2, _refusals):
        for answer, want in zip(answers, expected_messages, strict=True):
            assert want in answer
