"""Installing the DeepEP interface, and the life of its buffers."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from communicators import DEEP_EP_DEVICES, use_deep_ep
from ranks import RankPool, run_ranks
from routing_cases import Case, make_inputs
from torch import Tensor

from ep_moe import ConfigError
from ep_moe.compat import install
from ep_moe.compat.deep_ep import Buffer, Config, EventHandle, EventOverlap

CASE = Case(tokens=(6, 9), num_experts=4, top_k=2, hidden=128, dtype=torch.bfloat16)


@pytest.fixture
def without_deep_ep(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("deep_ep", "deep_ep.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # so that it is put back
        del sys.modules[name]


@pytest.mark.usefixtures("without_deep_ep")
def test_installed_module_is_found_by_programs() -> None:
    install()
    install()
    names: dict[str, Any] = {}
    exec(
        "import deep_ep\n"
        "from deep_ep import Buffer, Config, EventOverlap, topk_idx_t\n"
        "from deep_ep.utils import EventHandle, EventOverlap as SameOverlap",
        names,
    )
    assert names["Buffer"] is Buffer and names["Config"] is Config and names["topk_idx_t"] is torch.int64
    assert names["EventOverlap"] is names["SameOverlap"] is EventOverlap and names["EventHandle"] is EventHandle
    for absent in ("ElasticBuffer", "HybridEPBuffer"):  # engines would use other interfaces
        assert not hasattr(names["deep_ep"], absent)


@pytest.mark.usefixtures("without_deep_ep")
def test_another_deep_ep_is_not_replaced() -> None:
    other = sys.modules["deep_ep"] = types.ModuleType("deep_ep")
    with pytest.raises(RuntimeError, match="deep_ep: already imported from elsewhere"):
        install()
    assert sys.modules["deep_ep"] is other and "deep_ep.utils" not in sys.modules


def test_settings() -> None:
    with pytest.raises(ConfigError, match=r"needs torch\.distributed"):
        Buffer(types.SimpleNamespace(), 0, 0)  # type: ignore[arg-type]
    assert Buffer.is_sm90_compiled() and Buffer.num_sms == 20
    Buffer.set_num_sms(24)
    try:
        assert Buffer.get_dispatch_config(8).num_sms == Buffer.get_combine_config(8).num_sms == 24
    finally:
        Buffer.set_num_sms(20)
    small, large = (Config(24, 8, 256, 16, 128).get_nvl_buffer_size_hint(size, 8) for size in (2048, 4096))
    assert 0 < small < large
    assert Config(24, 8, 256, 16, 128).get_rdma_buffer_size_hint(2048, 8) == 0
    assert Config(24, 8, 256, 16, 128).get_rdma_buffer_size_hint(2048, 16) > 0


def exchange(buffer: Buffer, on: torch.device, rank: int, inputs: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Everything that comes out of both modes, on the CPU; ``inputs`` are those of the case if ``None``."""
    x, idx, weights = (t.to(on) for t in inputs or make_inputs(CASE, rank))
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 4)
    results = [per_rank, per_expert, in_rank]
    arguments = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
    for worst in (0, 32):
        rows, got_idx, got_weights, _, handle, _ = buffer.dispatch(
            x, topk_idx=idx, topk_weights=weights, num_worst_tokens=worst, expert_alignment=4, **arguments
        )
        count = int((got_idx >= 0).any(1).sum())
        out, summed, _ = buffer.combine(rows, handle, topk_weights=got_weights, bias=x)
        results += [rows[:count], got_idx, got_weights, handle[0], out, summed]
    for round_scale in (False, True):
        (rows, scales), counts, low_handle, *_ = buffer.low_latency_dispatch(x, idx, 16, 4, round_scale=round_scale)
        for expert, count in enumerate(counts.tolist()):
            results += [rows[expert, :count].view(torch.uint8), scales[expert, :count], low_handle[0][expert, :count]]
        results += [counts, low_handle[1]]
        y = torch.ones(rows.shape, dtype=torch.bfloat16, device=on)
        results.append(buffer.low_latency_combine(y, idx, weights, low_handle)[0])
    return [t.cpu() for t in results]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


def _defaults(rank: int, world: int, device: str) -> bool:
    on = use_deep_ep(device, rank)
    inputs = make_inputs(CASE, rank)  # before the defaults change, which random numbers depend on
    want = exchange(Buffer(dist.group.WORLD), on, rank, inputs)
    # On CPUs: "meta", so that any tensor made without a device has no values.
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda" if device == "cuda" else "meta")
    try:
        got = exchange(Buffer(dist.group.WORLD), on, rank, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    return same(got, want)


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_defaults_of_the_caller_change_nothing(device: str) -> None:
    assert run_ranks(2, _defaults, device) == [True, True]


def _destroyed(rank: int, world: int, device: str) -> list[str]:
    on, messages = use_deep_ep(device, rank), []
    buffer = Buffer(dist.group.WORLD, 64, explicitly_destroy=True)
    want = exchange(buffer, on, rank)
    buffer.destroy()
    buffer.destroy()
    attempts = [
        lambda: exchange(buffer, on, rank),
        lambda: buffer.clean_low_latency_buffer(16, 128, 4),
        lambda: buffer.get_local_buffer_tensor(torch.uint8),
    ]
    for attempt in attempts:
        try:
            attempt()
        except RuntimeError as error:
            messages.append(str(error))
    messages.append(str(same(exchange(Buffer(dist.group.WORLD), on, rank), want)))
    return messages


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_destroyed_buffers_say_so(device: str) -> None:
    for answers in run_ranks(2, _destroyed, device):
        assert answers == ["this Buffer has been destroyed"] * 3 + ["True"]


def _phases(rank: int, world: int, device: str, folder: str) -> list[bool]:
    """Groups come and go, under the same names; buffers are destroyed before, after, or never."""
    on, results, kept = use_deep_ep(device, rank), [], []
    want = exchange(Buffer(dist.group.WORLD), on, rank)
    for phase, destroy in enumerate(("before", "after", "never", "before")):
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{folder}/{phase}", rank=rank, world_size=world)
        group = dist.new_group()
        buffer = Buffer(group)
        results.append(same(exchange(buffer, on, rank), want))
        if destroy == "before":
            buffer.destroy()
        dist.destroy_process_group(group)
        if destroy == "after":
            buffer.destroy()
        kept.append(buffer)
    return results


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_groups_are_made_anew(device: str, tmp_path: Any) -> None:
    with contextlib.closing(RankPool(2)) as pool:
        assert pool.run(_phases, device, str(tmp_path)) == [[True] * 4] * 2


def _dropped(rank: int, world: int, device: str) -> bool:
    """Rank 0 drops its buffer while rank 1 is elsewhere; both go on with another."""
    on = use_deep_ep(device, rank)
    buffer: Buffer | None = Buffer(dist.group.WORLD)
    want = exchange(buffer, on, rank)  # type: ignore[arg-type]
    if rank == 0:
        buffer = None
        gc.collect()
    dist.barrier()
    buffer = None
    gc.collect()
    return same(exchange(Buffer(dist.group.WORLD), on, rank), want)


@pytest.mark.parametrize("device", DEEP_EP_DEVICES)
def test_destructors_talk_to_nobody(device: str) -> None:
    assert run_ranks(2, _dropped, device) == [True, True]


GROUP_ENDS = "dist.destroy_process_group()"


@pytest.mark.parametrize("end", [GROUP_ENDS, f"buffer.destroy(); {GROUP_ENDS}", f"{GROUP_ENDS}; buffer.destroy()"])
def test_interpreter_ends(end: str, tmp_path: Any) -> None:
    program = (
        "import threading, torch, torch.distributed as dist\n"
        "from ep_moe.compat.deep_ep import Buffer\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=0, world_size=1)\n"
        "buffer = Buffer(dist.group.WORLD)\n"
        "x, idx = torch.zeros(4, 128, dtype=torch.bfloat16), torch.zeros(4, 1, dtype=torch.int64)\n"
        "buffer.dispatch(x, topk_idx=idx, num_tokens_per_expert=buffer.get_dispatch_layout(idx, 2)[2])\n"
        "buffer.low_latency_dispatch(x, idx, 4, 2)\n"
        "assert 'libep_moe' not in open('/proc/self/maps').read() and threading.active_count() == 1\n"
        f"{end}\n"
    )
    environment = {**os.environ, "EP_MOE_COMM": "portable"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    # On a loaded machine a process that had a gloo group now and then ends by this abort, which is that of a C++ thread
    # object destroyed while it runs; one that uses PyTorch alone, and leaves the group, does too. This library has no
    # part in it: the program asserts that none of its machine code is loaded and that Python has no second thread, and
    # what else runs are the loops of gloo (gloo_tcp_loop, pt_gloo_runloop).
    aborted = done.returncode == -signal.SIGABRT and "terminate called without an active exception" in done.stderr
    assert "Traceback" not in done.stderr and (done.returncode == 0 or aborted), done.stderr


def _patched(rank: int, world: int) -> list[object]:
    use_deep_ep("cpu", rank)
    original, seen = Buffer.__init__, []

    def patched(self: Buffer, *args: Any, **kwargs: Any) -> None:
        seen.append(kwargs.pop("num_qps_per_rank"))
        original(self, *args, **kwargs)

    Buffer.__init__ = patched  # type: ignore[method-assign]
    try:
        buffer = Buffer(dist.group.WORLD, 256, 1024, num_qps_per_rank=7, use_fabric=True, enable_shrink=True)
    finally:
        Buffer.__init__ = original  # type: ignore[method-assign]
    scratch = buffer.get_local_buffer_tensor(torch.float32, torch.Size([4, 8]), offset=128)
    scratch.fill_(1)
    whole = buffer.get_local_buffer_tensor(torch.uint8)
    other = buffer.get_local_buffer_tensor(torch.int64, use_rdma_buffer=True)
    refused = []
    for attempt in (
        lambda: buffer.get_local_buffer_tensor(torch.int64, torch.Size([33])),
        lambda: Buffer(None, comm=object()),
    ):
        try:
            attempt()
        except (ValueError, NotImplementedError) as error:
            refused.append(type(error).__name__)
    sizes = (buffer.group is dist.group.WORLD, buffer.rank, buffer.group_size, buffer.num_nvl_bytes)
    more = (buffer.num_rdma_bytes, buffer.low_latency_mode)
    return [seen, *sizes, *more, int(whole[:128].sum()), len(whole), len(other), int(other.sum()), refused]


def test_patched_constructor_attributes_and_scratch() -> None:
    refused = ["ValueError", "NotImplementedError"]
    for rank, answers in enumerate(run_ranks(2, _patched)):
        assert answers == [[7], True, rank, 2, 256, 1024, False, 0, 256, 128, 0, refused]


def _with_variable(rank: int, world: int, name: str, value: str) -> str:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        Buffer(dist.group.WORLD)
    except ValueError as error:
        return str(error)
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
    return ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("EP_MOE_COMM", "nccl"),
        *(("EP_MOE_COMM_TIMEOUT_S", value) for value in ("soon", "0", "-1", "nan", "inf", "1e300")),
    ],
)
def test_variables_without_meaning_are_named(name: str, value: str) -> None:
    message = run_ranks(1, _with_variable, name, value)[0]
    assert message.startswith(f"{name}: expected ") and message.endswith(f"got {value!r}")
