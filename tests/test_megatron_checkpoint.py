"""Checkpoints: Megatron's own layouts load into our experts and can be written from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("megatron.core")

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts as moe_experts
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron_models import EXPERTS, FFN, HIDDEN, batch, expert_parallel, gpt_model, transformer_config
from ranks import run_ranks
from torch import Tensor, nn

from ep_moe.comm import ExpertSegments
from ep_moe.megatron import from_native, to_native
from ep_moe.megatron.experts import MegatronExperts
from ep_moe.megatron.translate import moe_config

# Newer releases of Megatron have no GroupedMLP any more; its checkpoints remain (test_grouped_layout_...).
MEGATRONS_OWN = ["sequential", *(["grouped"] if hasattr(moe_experts, "GroupedMLP") else [])]


def our_experts(seed: int) -> MegatronExperts:
    groups = get_default_pg_collection()
    config = transformer_config()
    torch.manual_seed(seed)
    local = EXPERTS // groups.ep.size()
    return MegatronExperts(
        HIDDEN,
        local,
        moe_config(config, comm="auto", backend="loop").experts,
        first_expert=groups.ep.rank() * local,
        init_method=config.init_method,
        output_init_method=config.output_layer_init_method,
        ep_rank=groups.ep.rank(),
        ep_size=groups.ep.size(),
        expert_data_parallel_rank=groups.expt_dp.rank(),
    )


def megatron_experts(kind: str) -> nn.Module:
    groups: ProcessGroupCollection = get_default_pg_collection()
    local = EXPERTS // groups.ep.size()
    if kind == "sequential":
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return moe_experts.SequentialMLP(local, transformer_config(), submodules, pg_collection=groups)
    # Only the constructor and the checkpoint code are used; the GEMM library they ask for is not.
    with mock.patch("megatron.core.transformer.moe.grouped_gemm_util.assert_grouped_gemm_is_available"):
        return moe_experts.GroupedMLP(local, transformer_config(), pg_collection=groups)


@contextlib.contextmanager
def cuda_calls_allowed() -> Iterator[None]:
    """Megatron's writer synchronises a GPU and puts a flag on it, whether there is one or not."""
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch("torch.cuda.synchronize"))
            stack.enter_context(mock.patch("torch.cuda.current_device", return_value="cpu"))
        yield


def _sequential_output(rank: int, world: int) -> float:
    with expert_parallel(world):
        ours, theirs = our_experts(5), megatron_experts("sequential")
        exported = from_native({f"m.{name}": value for name, value in ours.state_dict().items()}, "sequential")
        stripped = {name.removeprefix("m."): value for name, value in exported.items()}
        missing, unexpected = theirs.load_state_dict(stripped, strict=False)
        assert not unexpected and all("_extra_state" in name for name in missing), (missing, unexpected)
        counts = torch.tensor([5, 0, 3, 8][: EXPERTS // world])
        segments = ExpertSegments(counts, counts.cumsum(0).to(torch.int32), tuple(counts.tolist()))
        rows, weights = torch.randn(segments.num_rows, HIDDEN), torch.rand(segments.num_rows)
        want, _ = theirs(rows, counts, weights)
        return float((ours(rows, weights, segments) - want).abs().max() / want.abs().max())


def test_weights_mean_the_same_in_megatrons_sequential_mlp() -> None:
    assert max(run_ranks(2, _sequential_output)) < 1e-5


def _model_round_trip(rank: int, world: int, layout: str) -> tuple[bool, bool]:
    with expert_parallel(world):
        torch.manual_seed(1)
        source = gpt_model(transformer_config(moe_shared_expert_intermediate_size=16))
        torch.manual_seed(2)
        target = gpt_model(transformer_config(moe_shared_expert_intermediate_size=16))
        tokens, positions = batch(0)
        before = target(tokens, positions, None, labels=tokens)
        state = from_native(source.state_dict(), layout)
        assert layout == "native" or not any("fc1_weight" in name for name in state)
        target.load_state_dict(state)
        want, got = (m(tokens, positions, None, labels=tokens) for m in (source, target))
        return bool(torch.equal(want, got)), bool(torch.equal(before, want))


@pytest.mark.parametrize("layout", ["native", "sequential", "grouped", "te_grouped"])
def test_model_state_dict_round_trip(layout: str) -> None:
    for same_after, same_before in run_ranks(2, _model_round_trip, layout):
        assert same_after and not same_before


def test_grouped_layout_is_megatrons_view() -> None:
    fc1, fc2 = torch.randn(3, 2 * FFN, HIDDEN), torch.randn(3, HIDDEN, FFN)
    grouped = from_native({"fc1_weight": fc1, "fc2_weight": fc2}, "grouped")
    x = torch.randn(7, HIDDEN)
    by_expert = grouped["weight1"].view(3, HIDDEN, -1), grouped["weight2"].view(3, -1, HIDDEN)
    for expert in range(3):
        torch.testing.assert_close(x @ by_expert[0][expert], x @ fc1[expert].T)
        torch.testing.assert_close(x[:, :FFN] @ by_expert[1][expert], x[:, :FFN] @ fc2[expert].T)
    back = to_native(grouped, "", 3)
    assert torch.equal(back["fc1_weight"], fc1) and torch.equal(back["fc2_weight"], fc2)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "side by side"])
def test_a_single_parameter_for_all_experts_loads(stacked: bool) -> None:
    """As ``TEGroupedMLP`` stores with ``moe_single_grouped_weight``."""
    native = {"e.fc1_weight": torch.randn(3, 2 * FFN, HIDDEN), "e.fc2_weight": torch.randn(3, HIDDEN, FFN)}
    names = {"e.fc1_weight": "e.linear_fc1.weight", "e.fc2_weight": "e.linear_fc2.weight"}
    state = {names[name]: weight if stacked else weight.flatten(0, 1) for name, weight in native.items()}
    loaded = to_native(state, "e.", 3)
    assert loaded.keys() == native.keys() and all(torch.equal(loaded[name], native[name]) for name in native)


def test_unknown_layout_is_an_error() -> None:
    with pytest.raises(ValueError, match="layout: expected one of native, sequential, grouped, te_grouped, got 'x'"):
        from_native({}, "x")  # type: ignore[arg-type]


def _save(rank: int, world: int, kind: str, folder: str, singleton: bool) -> dict[str, Tensor]:
    with expert_parallel(world):
        experts = our_experts(5) if kind == "ours" else megatron_experts(kind)
        metadata: dict[str, Any] = {
            "singleton_local_shards": singleton,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        if rank == 0:
            Path(folder).mkdir()
        dist.barrier()
        with cuda_calls_allowed():
            dist_checkpointing.save(experts.sharded_state_dict("mlp.experts.", (), metadata), folder)
        return {name: value.clone() for name, value in experts.state_dict().items() if isinstance(value, Tensor)}


def _load(rank: int, world: int, kind: str, folder: str, singleton: bool) -> dict[str, Tensor]:
    with expert_parallel(world):
        experts = our_experts(6) if kind == "ours" else megatron_experts(kind)
        metadata: dict[str, Any] = {
            "singleton_local_shards": singleton,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        template = experts.sharded_state_dict("mlp.experts.", (), metadata)
        template = {name: value for name, value in template.items() if "_extra_state" not in name}
        state = dist_checkpointing.load(template, folder)
        experts.load_state_dict({name.removeprefix("mlp.experts."): v for name, v in state.items()}, strict=False)
        return {name: value.clone() for name, value in experts.state_dict().items() if isinstance(value, Tensor)}


def whole_native(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All experts of all ranks in our layout."""
    native = [to_native(state, "", EXPERTS // len(states)) for state in states]
    return {name: torch.cat([state[name] for state in native]) for name in ("fc1_weight", "fc2_weight")}


@pytest.mark.parametrize("singleton", [False, True], ids=["stacked", "singleton"])
@pytest.mark.parametrize(
    ("source", "target"),
    [("ours", "ours"), *((kind, "ours") for kind in MEGATRONS_OWN), *(("ours", kind) for kind in MEGATRONS_OWN)],
)
def test_distributed_checkpoints_are_interchangeable(tmp_path: Path, source: str, target: str, singleton: bool) -> None:
    folder = str(tmp_path / "checkpoint")
    saved = whole_native(run_ranks(4, _save, source, folder, singleton))
    loaded = whole_native(run_ranks(2, _load, target, folder, singleton))
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
