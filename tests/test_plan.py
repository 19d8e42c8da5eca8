"""The plan of a layer: its traffic against tokens sent one by one, its buffers against the library's, its times against
what was measured."""

from __future__ import annotations

import ctypes
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ep_moe.__main__ import main
from ep_moe.comm.communicator import RowLayout
from ep_moe.comm.fp8 import quantize_e4m3
from ep_moe.comm.sm_budget import HEADROOM, combine_sms, dispatch_sms, push_sms
from ep_moe.config import Config, ConfigError
from ep_moe.config_loading import load_config
from ep_moe.native import library_path
from ep_moe.plan.buffers import low_latency_buffer, normal_buffer
from ep_moe.plan.phases import plan_gpus
from ep_moe.plan.rates import Rates, microseconds, rates_with
from ep_moe.plan.routing import Topology, simulate_routing, spread_of, topology_of
from ep_moe.plan.times import low_latency_combine, low_latency_dispatch, normal_combine, normal_dispatch
from ep_moe.plan.traffic import Traffic, row_bytes, traffic_of

ROOT = Path(__file__).resolve().parent.parent
V3 = ROOT / "configs" / "deepseek_v3.yaml"
UNGROUPED = ("moe.router.num_groups=null", "moe.router.group_topk=null")


@pytest.mark.parametrize(("ranks", "per_node"), [(1, 1), (4, 4), (4, 1), (8, 2), (16, 4)])
def test_traffic_is_that_of_tokens_sent_one_by_one(ranks: int, per_node: int) -> None:
    """Every token from every rank, hop by hop: which GPUs receive it over which link."""
    experts, top_k, tokens = 16, 3, 40
    topk_idx = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    received = over_nvlink = over_rdma = 0
    for source, token in itertools.product(range(ranks), topk_idx.tolist()):
        held = {source}  # GPUs that have the row before the second hop
        targets = {expert * ranks // experts for expert in token}
        for node in {target // per_node for target in targets}:
            landing = node * per_node + source % per_node
            over_rdma += landing != source
            held.add(landing)
        received += len(targets)
        over_nvlink += len(targets - held)
    topology = Topology(ranks, per_node)
    traffic = traffic_of(tokens, 256, top_k, spread_of(topk_idx, experts, topology), topology)
    assert traffic.rows * ranks == pytest.approx(received)
    assert traffic.nvlink_rows * ranks == pytest.approx(over_nvlink)
    assert traffic.rdma_rows * ranks == pytest.approx(over_rdma)
    assert traffic.slots * ranks == tokens * top_k * ranks


@pytest.mark.parametrize(("ranks", "per_node"), [(1, 1), (4, 4), (4, 1), (8, 2), (16, 4)])
def test_low_latency_traffic_takes_one_hop(ranks: int, per_node: int) -> None:
    experts, top_k, tokens = 16, 3, 40
    topk_idx = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    near = far = 0
    for source, token in itertools.product(range(ranks), topk_idx.tolist()):
        targets = {expert * ranks // experts for expert in token} - {source}
        near += sum(target // per_node == source // per_node for target in targets)
        far += sum(target // per_node != source // per_node for target in targets)
    topology = Topology(ranks, per_node)
    traffic = traffic_of(tokens, 256, top_k, spread_of(topk_idx, experts, topology), topology)
    combine = low_latency_combine(traffic, Rates())
    assert combine.nvlink_bytes * ranks == pytest.approx(near * 512)
    assert combine.rdma_bytes * ranks == pytest.approx(far * 512)


def test_random_routing_spreads_as_drawing_without_replacement() -> None:
    moe = load_config(V3, UNGROUPED).moe
    for ranks in (2, 8, 64):
        spread = spread_of(simulate_routing(moe), 256, topology_of(moe, ranks, ranks))
        missed = math.comb(256 - 256 // ranks, 8) / math.comb(256, 8)  # no expert of a given rank
        assert spread.ranks == pytest.approx(ranks * (1 - missed), rel=0.01)


def test_group_limited_gating_bounds_the_nodes() -> None:
    moe = load_config(V3).moe
    topk_idx = simulate_routing(moe)
    for gpus, most in ((16, 2), (64, 4), (128, 8), (2048, 8)):  # of 8 groups 4; a group is half a node to 4 nodes
        topology = topology_of(moe, gpus, 8)
        spread = spread_of(topk_idx, 256, topology)
        assert 1 <= spread.nodes <= spread.most_nodes == most
        assert spread.remote_nodes(topology) < spread.nodes <= spread.ranks


def test_rows_have_the_bytes_that_travel() -> None:
    x = torch.randn(1, 1024, dtype=torch.bfloat16)
    assert row_bytes(1024, fp8=False) == x.nbytes
    assert row_bytes(1024, fp8=True) == sum(part.nbytes for part in quantize_e4m3(x))


@pytest.mark.skipif(not library_path().exists(), reason="the CUDA library is not built here")
@pytest.mark.parametrize(("ranks", "tokens"), [(2, 128), (8, 128), (8, 4096)])
def test_buffers_are_those_of_the_library(ranks: int, tokens: int) -> None:
    from ep_moe.comm import nvlink_args, nvlink_low_latency_args

    hidden, top_k, topology = 7168, 8, Topology(ranks, ranks)
    for fp8 in (False, True):
        size = row_bytes(hidden, fp8) + 4 * top_k
        shape = nvlink_low_latency_args.LowLatencyShape(ranks, tokens, top_k, 256, hidden, 256 // ranks, size)
        layout = nvlink_low_latency_args.LowLatencyLayout()
        library = nvlink_low_latency_args.load_entry_points()
        library.ep_moe_low_latency_layout(ctypes.byref(shape), ctypes.byref(layout))
        assert low_latency_buffer(topology, tokens, hidden, top_k, fp8) == pytest.approx(layout.total, rel=1e-3)
        staging = nvlink_low_latency_args.LowLatencyStaging()
        library.ep_moe_low_latency_staging(ctypes.byref(shape), ctypes.byref(staging))
        nodes = Topology(ranks, ranks // 2)
        assert low_latency_buffer(nodes, tokens, hidden, top_k, fp8) == pytest.approx(staging.total, rel=1e-3)
    normal_shape = nvlink_args.BufferShape(
        ranks=ranks,
        max_tokens=tokens,
        max_top_k=top_k,
        row_places=ranks,
        max_row_bytes=row_bytes(hidden, fp8=False),
    )
    normal_layout = nvlink_args.BufferLayout()
    nvlink_args.load_entry_points().ep_moe_buffer_layout(ctypes.byref(normal_shape), ctypes.byref(normal_layout))
    assert normal_buffer(topology, tokens, hidden) == pytest.approx(normal_layout.total, rel=1e-2)


def two_gpus(tokens: int) -> Traffic:
    """Of the shape that was measured: hidden 7168, top-8 of 256 without groups."""
    moe = load_config(V3, UNGROUPED).moe
    topology = topology_of(moe, 2, 8)
    return traffic_of(tokens, 7168, 8, spread_of(simulate_routing(moe), 256, topology), topology)


@pytest.mark.parametrize(
    ("fp8", "layout", "sms", "measured"),
    [
        (True, "rows", 16, 116),
        (True, "rows", 24, 113),
        (True, "expert_major", 16, 294),
        (True, "expert_major", 104, 122),
        (False, "rows", 16, 198),
        (False, "rows", 64, 196),
        (False, "expert_major", 16, 540),
        (False, "expert_major", 64, 200),
    ],
)
def test_dispatch_on_two_gpus_is_near_what_was_measured(
    fp8: bool, layout: RowLayout, sms: int, measured: float
) -> None:
    predicted = normal_dispatch(two_gpus(4096), Rates(), fp8=fp8, layout=layout, sms=sms)
    assert predicted.time == pytest.approx(measured, rel=0.11)


@pytest.mark.parametrize(("sms", "measured"), [(16, 604), (64, 270), (128, 268)])
def test_combine_on_two_gpus_is_near_what_was_measured(sms: int, measured: float) -> None:
    h100 = Rates(memory=2760)
    assert normal_combine(two_gpus(4096), h100, sms=sms).time == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("tokens", "dispatch", "combine"), [(128, 10.8, 12.8), (64, 9.7, 10.2), (8, 8.8, 8.3), (1, 7.9, 7.4)]
)
def test_low_latency_on_two_gpus_is_near_what_was_measured(tokens: int, dispatch: float, combine: float) -> None:
    traffic = two_gpus(tokens)
    assert low_latency_dispatch(traffic, Rates(), fp8=True).time == pytest.approx(dispatch, rel=0.1)
    assert low_latency_combine(traffic, Rates()).time == pytest.approx(combine, rel=0.1)


def test_the_busiest_stage_sets_the_time() -> None:
    moe = load_config(V3).moe
    topology = topology_of(moe, 64, 8)
    traffic = traffic_of(4096, 7168, 8, spread_of(simulate_routing(moe), 256, topology), topology)
    slow_card, slow_links = Rates(rdma=5.0), Rates(rdma=500.0)
    for rates, limit, rate in ((slow_card, "RDMA", 5.0), (slow_links, "NVLink", 333.0)):
        exchange = normal_dispatch(traffic, rates, fp8=True)
        moved = exchange.rdma_bytes if limit == "RDMA" else exchange.nvlink_bytes
        assert exchange.limit == limit
        assert exchange.time >= microseconds(moved, rate)
    assert normal_dispatch(traffic, Rates(), fp8=False, sms=1).limit == "SMs"


def test_chosen_sms_do_not_slow_the_exchange_and_fewer_would() -> None:
    traffic = two_gpus(4096)
    chosen = normal_dispatch(traffic, Rates(), fp8=False)
    assert chosen.time == normal_dispatch(traffic, Rates(), fp8=False, sms=128).time
    keeping_up = math.floor(chosen.sms / HEADROOM)
    assert chosen.time < normal_dispatch(traffic, Rates(), fp8=False, sms=keeping_up - 8).time


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_kernels_get_the_sms_that_the_plan_says(ranks: int) -> None:
    moe = load_config(V3, UNGROUPED).moe
    topology = topology_of(moe, ranks, 8)
    traffic = traffic_of(4096, 7168, 8, spread_of(simulate_routing(moe), 256, topology), topology)
    for layout in ("expert_major", "rows"):
        assert normal_dispatch(traffic, Rates(), fp8=False, layout=layout).sms == dispatch_sms(
            ranks, 256 // ranks, 8, layout
        )
    assert normal_combine(traffic, Rates()).sms == combine_sms(ranks, 256 // ranks, 8, "expert_major")


def test_more_ranks_leave_more_sms_to_gemms() -> None:
    for layout, budget in itertools.product(("expert_major", "rows"), (dispatch_sms, combine_sms)):
        budgets = [budget(ranks, 32, 8, layout) for ranks in range(1, 9)]
        assert budgets == sorted(budgets, reverse=True)
        assert all(8 <= sms <= 128 and sms % 8 == 0 for sms in budgets)
    assert dispatch_sms(2, 1, 8, "rows") == dispatch_sms(2, 1, 2, "rows")  # more entries than experts: some are -1


def test_few_sms_push_and_more_where_they_quantise() -> None:
    for ranks in (2, 4, 8):
        as_they_are = push_sms(ranks, 256 // ranks, 8, own=False, quantize=False)
        with_own = push_sms(ranks, 256 // ranks, 8, own=True, quantize=False)
        quantised = push_sms(ranks, 256 // ranks, 8, own=True, quantize=True)
        assert 0 < as_they_are <= with_own <= quantised <= 44
        assert as_they_are * 57.0 >= 349.0  # the link is busy
    # With more ranks a row that is quantised once is pushed more often.
    assert push_sms(8, 32, 8, own=True, quantize=True) < push_sms(2, 128, 8, own=True, quantize=True)


def test_queue_pairs_suffice_for_the_messages() -> None:
    moe = load_config(V3).moe
    for gpus in (8, 16, 64, 256):
        topology = topology_of(moe, gpus, 8)
        traffic = traffic_of(4096, 7168, 8, spread_of(simulate_routing(moe), 256, topology), topology)
        exchange = normal_dispatch(traffic, Rates(), fp8=True)
        assert exchange.queue_pairs % max(topology.nodes - 1, 1) == 0
        assert exchange.queue_pairs * Rates().messages_per_qp * exchange.time >= exchange.messages


def test_phases_add_up() -> None:
    config = load_config(V3)
    eight, many = plan_gpus(config, [8, 2048], ranks_per_node=8, rates=Rates())
    assert (many.groups, many.topology) == (8, Topology(256, 8))
    train, prefill, decode = eight.phases
    assert [phase.phase for phase in eight.phases] == ["train", "prefill", "decode"]
    assert train.forward == pytest.approx(train.dispatch.time + train.experts + train.combine.time)
    assert (prefill.forward, prefill.backward, decode.backward) == (train.forward, 0.0, 0.0)
    assert train.backward > 2 * train.experts
    # Operations of the three matrices of each token's experts, at the rate of GEMMs.
    assert train.experts == pytest.approx(4096 * 8 * 3 * 2 * 7168 * 2048 / (Rates().gemm * 1e6))
    # Decoding reads every weight: 32 experts of three bf16 matrices.
    assert decode.experts == pytest.approx(microseconds(32 * 3 * 7168 * 2048 * 2, Rates().memory))
    fewer = plan_gpus(config, [8], ranks_per_node=8, rates=Rates(), tokens=1024)[0]
    assert (fewer.phases[0].tokens, fewer.phases[2].tokens) == (1024, 128)


def test_an_sm_budget_of_the_configuration_is_kept() -> None:
    config: Config = load_config(V3, ["phases.train.num_sms=20"])
    train = plan_gpus(config, [8], ranks_per_node=8, rates=Rates())[0].phases[0]
    assert (train.dispatch.sms, train.combine.sms) == (20, 20)


def test_bad_rates_are_named() -> None:
    assert rates_with(["rdma=22.5", "place=1"]) == replace(Rates(), rdma=22.5, place=1.0)
    for change in ("speed=1", "rdma=fast", "rdma=0", "rdma", "rdma=nan"):
        with pytest.raises(ConfigError, match=r"expected NAME=NUMBER above 0, NAME one of nvlink_pull, "):
            rates_with([change])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    assert main(["plan", "--gpus", "32", "--config", str(V3), "--tokens", "512", "--out", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    for start in ("| 8 | 1 x 8 | 1 | 32 |", "| 16 | 1 x 16 | 2 | 16 |", "| 32 | 1 x 32 | 4 | 8 |", "train (normal"):
        assert start in printed
    assert "512 tokens a rank" in printed
    assert main(["plan", "--gpus", "4", "--config", str(V3), "--benchmarks"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n| 2 |") == printed.count("\n| 4 |") == 5 + 6


def test_smaller_numbers_over_which_experts_do_not_spread_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    # Nodes of 72 GPUs: 64 do not divide 288 experts, and 128 are not whole nodes.
    fixed = ["plan", "--config", str(V3), "--set", "moe.num_experts=288", "--set", "moe.router.num_groups=null"]
    fixed += ["--set", "moe.router.group_topk=null"]
    assert main([*fixed, "--gpus", "144", "--ranks-per-node", "72"]) == 0
    printed = capsys.readouterr().out
    assert "| 32 | 1 x 32 |" in printed and "| 144 | 1 x 144 |" in printed
    assert "| 64 |" not in printed and "| 128 |" not in printed
    assert main([*fixed, "--gpus", "72", "--benchmarks"]) == 0
    assert "| 64 | 1 |" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nowhere/plan.png", "plan.nothing"])
def test_a_picture_that_cannot_be_written_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    assert main(["plan", "--gpus", "8", "--config", str(V3), "--out", str(path)]) == 1
    assert f"--out {path}: cannot be written (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "24"], "--gpus 24: must be a multiple or a divisor of moe.num_experts (256)"),
        (["--gpus", "16", "--ranks-per-node", "3"], "--ranks-per-node (3)"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpus", "8", "--tokens", "0"], "--tokens 0: must be at least 1"),
        (["--gpus", "8", "--rate", "x=1"], "--rate x=1"),
        (["--gpus", "8", "--set", "moe.top=1"], "moe.top"),
        (["--gpus", "12", "--benchmarks"], "--gpus 12"),
        (["--gpus", "8", "--benchmarks", "--out", "x.png"], "--out x.png: not with --benchmarks"),
        (["--gpus", "8", "--benchmarks", "--ranks-per-node", "8"], "--ranks-per-node 8: not with --benchmarks"),
    ],
)
def test_command_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(V3), *arguments]) == 2
    assert message in capsys.readouterr().err
