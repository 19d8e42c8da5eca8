"""The calls that serving engines make, in their order and with their keywords, on CPUs and GPUs."""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from communicators import DEEP_EP_DEVICES, use_deep_ep
from ranks import run_ranks
from routing_cases import Case, make_inputs
from torch import Tensor

from ep_moe.compat import deep_ep

CASE = Case(tokens=(9, 14), num_experts=8, top_k=3, hidden=256, dtype=torch.bfloat16, pattern="some_unrouted")
MAX_TOKENS = 16


def experts(rows: Tensor, topk_idx: Tensor, topk_weights: Tensor, first: int) -> Tensor:
    """Expert ``e`` multiplies by ``e + 1``; weighted sum of a row's local experts, in fp32."""
    factors = torch.where(topk_idx >= 0, (topk_idx + first + 1).float() * topk_weights, 0.0).sum(1)
    return (rows.float() * factors[:, None]).to(rows.dtype)


def packed_experts(rows: Tensor, rank: int) -> Tensor:
    """The same of rows ``[local_experts, rows, hidden]``, without weights."""
    local = torch.arange(rows.shape[0], device=rows.device)
    return (rows.float() * (rank * rows.shape[0] + local + 1)[:, None, None]).to(torch.bfloat16)


def close_to_layer(out: Tensor, case: Case, rank: int, tolerance: float) -> bool:
    """Whether ``out`` is what all experts together give, within a part of the magnitudes that were added."""
    x, idx, weights = make_inputs(case, rank)
    factors = torch.where(idx >= 0, (idx + 1).double() * weights.double(), 0.0).sum(1)
    exact = x.double() * factors[:, None]
    return bool(((out.cpu().double() - exact).abs() <= tolerance * exact.abs() + 1e-6).all())


def _vllm_high_throughput(rank: int, world: int, device: str) -> list[str]:
    on, wrong = use_deep_ep(device, rank), []
    group = dist.new_group(backend="gloo")
    buffer = deep_ep.Buffer(
        group=group,
        num_nvl_bytes=1 << 28,
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=1,
        explicitly_destroy=True,
    )
    buffer.set_num_sms(20)
    # Two micro-batches take turns; each computes on one stream and communicates on another that is current then.
    cases = [replace(CASE, seed=seed) for seed in (1, 2)]
    streams = [contextlib.nullcontext(), contextlib.nullcontext()]
    if device == "cuda":
        streams = [torch.cuda.stream(torch.cuda.Stream(on)) for _ in range(2)]  # type: ignore[misc]
    for case in cases:
        with streams[0]:
            x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
            ready = buffer.capture()
        with streams[1]:
            per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
                topk_idx=idx,
                num_experts=case.num_experts,
                previous_event=ready,
                async_finish=False,
                allocate_on_comm_stream=False,
            )
            rows, got_idx, got_weights, counts, handle, event = buffer.dispatch(
                x=x,
                handle=None,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=idx,
                topk_weights=weights,
                expert_alignment=1,
                config=deep_ep.Buffer.get_dispatch_config(world),
                previous_event=ready,
                async_finish=False,
                allocate_on_comm_stream=False,
            )
            if event.event is not None:
                event.current_stream_wait()
            wrong += [] if counts == [(got_idx == expert).sum() for expert in range(4)] else ["counts"]
            y = experts(rows, got_idx, got_weights, rank * 4)
            out, no_weights, event = buffer.combine(
                x=y,
                handle=handle,
                topk_weights=None,
                config=deep_ep.Buffer.get_combine_config(world),
                previous_event=buffer.capture(),
                async_finish=True,
                allocate_on_comm_stream=False,
            )
            if event.event is not None:
                event.current_stream_wait()
            wrong += [] if close_to_layer(out, case, rank, 2**-6) and no_weights is None else ["out"]
    buffer.destroy()
    dist.destroy_process_group(group)
    return wrong


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_vllm_high_throughput(device: str) -> None:
    assert run_ranks(2, _vllm_high_throughput, device) == [[], []]


def _vllm_low_latency(rank: int, world: int, device: str) -> list[str]:
    on, wrong = use_deep_ep(device, rank), []
    num_rdma_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=MAX_TOKENS, hidden=CASE.hidden, num_ranks=world, num_experts=CASE.num_experts
    )
    buffer = deep_ep.Buffer(
        group=dist.group.WORLD,
        num_nvl_bytes=1 << 20,
        num_rdma_bytes=num_rdma_bytes,
        low_latency_mode=True,
        num_qps_per_rank=CASE.num_experts // world,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
    )
    cases = [replace(CASE, seed=seed) for seed in (3, 4)]
    inputs = [[t.to(on) for t in make_inputs(case, rank)] for case in cases]
    outputs = [torch.full_like(x, float("nan")) for x, _, _ in inputs]
    turn, failures = [threading.Semaphore(1), threading.Semaphore(0)], []

    def batch(number: int) -> None:
        """One micro-batch; it yields to the other between sending and receiving."""

        def yield_to_other() -> None:
            turn[1 - number].release()
            turn[number].acquire()

        try:
            x, idx, weights = inputs[number]
            use_deep_ep(device, rank)  # threads begin with the first GPU
            turn[number].acquire()
            (rows, scales), _, handle, _, hook = buffer.low_latency_dispatch(
                x, idx, MAX_TOKENS, 8, use_fp8=True, round_scale=False, use_ue8m0=False,
                async_finish=False, return_recv_hook=True,
            )  # fmt: skip
            yield_to_other()
            hook()
            values = rows.float().view(*rows.shape[:2], -1, 128) * scales[..., None]
            y = packed_experts(values.flatten(2), rank)
            _, _, hook = buffer.low_latency_combine(
                y, idx, weights, handle, async_finish=False, zero_copy=False, return_recv_hook=True, out=outputs[number]
            )
            yield_to_other()
            hook()
        except BaseException as error:
            failures.append(repr(error))
        finally:
            turn[1 - number].release()

    threads = [threading.Thread(target=batch, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for case, out in zip(cases, outputs, strict=True):
        wrong += [] if close_to_layer(out, case, rank, 0.15) else ["out"]  # e4m3 has 3 bits
    return wrong + failures


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_vllm_low_latency(device: str) -> None:
    assert run_ranks(2, _vllm_low_latency, device) == [[], []]


def _sglang(rank: int, world: int, device: str) -> list[str]:
    on, wrong = use_deep_ep(device, rank), []
    tuned = json.loads(
        '{"num_sms": 24, "num_max_nvl_chunked_send_tokens": 16, "num_max_nvl_chunked_recv_tokens": 480,'
        ' "num_max_rdma_chunked_send_tokens": 16, "num_max_rdma_chunked_recv_tokens": 128}'
    )
    config = deep_ep.Config(**tuned)
    num_nvl_bytes = config.get_nvl_buffer_size_hint(CASE.hidden * 2, world)
    num_rdma_bytes = max(
        config.get_rdma_buffer_size_hint(CASE.hidden * 2, world),
        deep_ep.Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, CASE.hidden, world, CASE.num_experts),
    )
    buffer = deep_ep.Buffer(
        dist.group.WORLD, num_nvl_bytes, num_rdma_bytes, low_latency_mode=True, num_qps_per_rank=4, allow_mnnvl=True
    )
    cases = [replace(CASE, seed=seed) for seed in (5, 6)]
    inputs = [[t.to(on) for t in make_inputs(case, rank)] for case in cases]

    def prefill_dispatch(x: Any, idx: Tensor, weights: Tensor, previous: Any) -> Any:
        layout = buffer.get_dispatch_layout(
            idx, 8, previous_event=previous, async_finish=True, allocate_on_comm_stream=previous is not None
        )
        per_rank, per_rdma_rank, per_expert, in_rank, previous = layout
        return buffer.dispatch(
            x,
            topk_idx=idx,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=previous,
            async_finish=True,
            allocate_on_comm_stream=(previous is not None),
            expert_alignment=128,
            config=config,
        )

    def prefill() -> None:
        # Halves of two batches interleave: dispatch both, compute and send back both, then wait.
        before = [buffer.capture() for _ in inputs]
        sent = [prefill_dispatch(*tensors, event) for tensors, event in zip(inputs, before, strict=True)]
        combined = []
        for rows, idx, weights, counts, handle, event in sent:
            event.current_stream_wait()
            padded = [-(-int((idx == expert).sum()) // 128) * 128 for expert in range(4)]
            wrong.extend([] if counts == padded else ["counts"])
            y = experts(rows, idx, weights, rank * 4)
            combined.append(
                buffer.combine(
                    y,
                    handle,
                    async_finish=True,
                    previous_event=deep_ep.Buffer.capture(),
                    allocate_on_comm_stream=True,
                    config=config,
                )
            )
        for case, (out, _, event) in zip(cases, combined, strict=True):
            event.current_stream_wait()
            wrong.extend([] if close_to_layer(out, case, rank, 2**-6) else ["prefill"])

    def decode(return_recv_hook: bool) -> None:
        kwargs = {"async_finish": not return_recv_hook, "return_recv_hook": return_recv_hook}
        for case, (x, idx, weights) in zip(cases, inputs, strict=True):
            rows, _, handle, event, hook = buffer.low_latency_dispatch(x, idx, MAX_TOKENS, 8, use_fp8=False, **kwargs)
            hook() if return_recv_hook else event.current_stream_wait()
            y = packed_experts(rows, rank)
            out, event, hook = buffer.low_latency_combine(y, idx, weights, handle, **kwargs)
            hook() if return_recv_hook else event.current_stream_wait()
            wrong.extend([] if close_to_layer(out, case, rank, 2**-6) else ["decode"])

    for return_recv_hook in (True, False):
        prefill()
        buffer.clean_low_latency_buffer(MAX_TOKENS, CASE.hidden, CASE.num_experts)
        decode(return_recv_hook)
    return wrong


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_sglang_uses_both_modes_of_one_buffer(device: str) -> None:
    assert run_ranks(2, _sglang, device) == [[], []]


def _fp8_prefill(rank: int, world: int, device: str) -> bool:
    """Rows quantised before dispatch, as SGLang and vLLM send them."""
    on = use_deep_ep(device, rank)
    x, idx, weights = (t.to(on) for t in make_inputs(CASE, rank))
    blocks = x.float().view(x.shape[0], -1, 128)
    scales = blocks.abs().amax(2).clamp(min=1e-4) / 448
    values = (blocks / scales[..., None]).to(torch.float8_e4m3fn).view(x.shape)
    buffer = deep_ep.Buffer(dist.group.WORLD)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 8)
    (rows, row_scales), got_idx, got_weights, _, handle, _ = buffer.dispatch(
        (values, scales),
        topk_idx=idx,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
    )
    arrived = (rows.float().view(rows.shape[0], -1, 128) * row_scales[..., None]).view(rows.shape).bfloat16()
    out, _, _ = buffer.combine(experts(arrived, got_idx, got_weights, rank * 4), handle)
    return close_to_layer(out, CASE, rank, 0.15)


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_rows_quantised_before_dispatch(device: str) -> None:
    assert run_ranks(2, _fp8_prefill, device) == [True, True]
