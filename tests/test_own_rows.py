"""Which of a rank's rows a dispatch has sent, and which it takes from where they are."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from node_doubles import any_device

from ep_moe.comm import nvlink_rows
from ep_moe.comm.communicator import RowLayout
from ep_moe.comm.nvlink_args import BFLOAT16, CommunicatorArgs
from ep_moe.comm.nvlink_dispatch import dispatch_quantizes, send_rows
from ep_moe.comm.nvlink_rows import LocalRows, Sending


class Core:
    """Keeps what is launched."""

    max_tokens = 64

    def __init__(self, size: int) -> None:
        self.size, self.launched = size, SimpleNamespace()

    def arguments(self, num_sms: int) -> CommunicatorArgs:
        return CommunicatorArgs(blocks=num_sms)

    def launch(self, name: str, arguments: ctypes.Structure) -> None:
        assert name == "push"
        self.launched = arguments


def send(size: int, *, quantizes: bool, **rows: Any) -> tuple[Sending, Any]:
    """Send 5 tokens to ``size`` ranks: what a dispatch learns of it, and what is launched."""
    topk_idx = torch.arange(5 * 2).view(5, 2) % (4 * size)
    core, source = Core(size), LocalRows(topk_idx=topk_idx, num_experts=4 * size, **rows)
    return source.send(core, early=True, quantizes=quantizes), core.launched  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _rows_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvlink_rows, "wire_format", any_device)


@pytest.mark.parametrize("quantizes", [False, True])
@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("kind", ["bf16", "quantised on the way", "quantised before"])
def test_own_rows_are_sent_or_taken_where_they_are(kind: str, size: int, quantizes: bool) -> None:
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    scales = torch.ones(5, 2) if kind == "quantised before" else None
    given = x if scales is None else x.to(torch.float8_e4m3fn)
    (own, sms), push = send(size, quantizes=quantizes, x=given, scales=scales, fp8=kind == "quantised on the way")
    assert push.own == (own is None)
    assert push.quantize == (kind == "quantised on the way")
    assert push.comm.blocks == sms >= 1
    assert push.tokens == (5 if size > 1 or own is None else 0)  # a rank has nobody else to send to
    if kind == "bf16":
        assert own is not None and (own.address, own.row_bytes, own.element) == (x.data_ptr(), 512, None)
    elif kind == "quantised on the way" and quantizes:
        assert own is not None and (own.address, own.row_bytes, own.element) == (x.data_ptr(), 512, BFLOAT16)
        assert own.stage_bytes >= 512 + 2 * 4  # the row, and its scales behind it
    else:
        assert own is None


def test_rows_that_shared_memory_holds_but_once_are_sent() -> None:
    x = torch.randn(5, 28 * 1024)  # fp32: 112 KB a row
    (own, _), push = send(2, quantizes=True, x=x, fp8=True)
    assert own is None and push.own == 1


@pytest.mark.parametrize(
    ("layout", "sms", "quantizes"),
    [("expert_major", 47, False), ("expert_major", 48, True), ("rows", 48, False), ("rows", 128, False)],
)
def test_dispatch_quantizes_where_it_waits_for_memory(layout: RowLayout, sms: int, quantizes: bool) -> None:
    assert dispatch_quantizes(sms, layout) == quantizes


@pytest.mark.parametrize(
    ("multiprocessors", "sms", "left"), [(132, 104, 104), (132, 128, 108), (78, 128, 54), (16, 64, 8)]
)
def test_a_dispatch_leaves_sms_to_those_that_send(multiprocessors: int, sms: int, left: int) -> None:
    source: Any = SimpleNamespace(send=lambda core, early, quantizes: Sending(None, 24))
    core: Any = SimpleNamespace(multiprocessors=multiprocessors)
    places: Any = SimpleNamespace()
    assert send_rows(core, source, places, "expert_major", sms, early=True).sms == left
