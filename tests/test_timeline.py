"""Pictures of traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from timeline import Span, draw_traces, hidden_share, kind_of, read_spans

KERNELS = {
    "void ep_moe::(anonymous namespace)::token_gemm_kernel<4>(ep_moe::TokenGemmArgs)": "GEMM",
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "GEMM",
    "ep_moe::(anonymous namespace)::dispatch_kernel(ep_moe::DispatchArgs)": "communication",
    "void ep_moe::(anonymous namespace)::combine_kernel<__nv_bfloat16>(ep_moe::CombineArgs)": "communication",
    "void ep_moe::node_exchange_kernel<ep_moe::(anonymous namespace)::Loopback>(ep_moe::NodeExchangeArgs)": (
        "communication"
    ),
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
    "void at::native::elementwise_kernel<128, 4>": "other",
    "Memset (Device)": "other",
}


@pytest.mark.parametrize(("kernel", "kind"), KERNELS.items())
def test_kernels_are_told_apart(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_time_is_counted_once() -> None:
    def of(kind: str, *times: tuple[float, float]) -> list[Span]:
        return [Span(7, start, length, kind) for start, length in times]

    moved = of("communication", (0, 10), (20, 10))
    assert hidden_share(moved) == 0
    assert hidden_share(of("GEMM", (0, 10))) == 0
    # Two that overlap hide 2 to 8, another 25 to 30 and what comes after.
    assert hidden_share(moved + of("GEMM", (2, 4), (25, 20)) + of("other", (4, 4))) == pytest.approx(11 / 20)


def test_a_trace_becomes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = list(KERNELS)[:3]
    events = [
        {"cat": "kernel", "name": name, "ts": 1000.0 + 10 * i, "dur": 5.0, "args": {"stream": 7 + i % 2}}
        for i, name in enumerate(names)
    ]
    delay = "at::cuda::(anonymous namespace)::spin_kernel(long)"
    before = [  # which is left out
        {"cat": "kernel", "name": name, "ts": ts, "dur": 100.0, "args": {"stream": 7}}
        for ts, name in ((600.0, delay), (700.0, names[0]), (850.0, delay))
    ]
    path = tmp_path / "layer.json"
    events_of_host = [{"cat": "cpu_op", "name": "x", "ts": 0.0}]
    path.write_text(json.dumps({"traceEvents": [*reversed(events), *before, *events_of_host]}))
    assert read_spans(path) == [
        Span(7, 0.0, 5.0, "GEMM"),
        Span(8, 10.0, 5.0, "GEMM"),
        Span(7, 20.0, 5.0, "communication"),
    ]
    draw_traces([path])
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_without_a_gpu_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"traceEvents": [{"cat": "cpu_op", "name": "x", "ts": 0.0}]}))
    with pytest.raises(ValueError, match=r"cpu\.json: no work on a GPU"):
        read_spans(path)
