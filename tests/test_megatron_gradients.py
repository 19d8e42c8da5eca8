"""The adapter's backward pass: steps of Megatron's schedules, main_grad, Megatron's DDP, strategies."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

pytest.importorskip("megatron.core")

import torch
from communicators import rank_device
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron_models import (
    HIDDEN,
    expert_parallel,
    gpt_model,
    transformer_config,
)
from ranks import run_ranks

from ep_moe.config import ConfigError, PhaseConfig, PhasesConfig
from ep_moe.megatron import MegatronEPMoELayer
from ep_moe.megatron.translate import honour_overlap

OVERLAPPED = {"overlap_moe_expert_parallel_comm": True, "bf16": True, "params_dtype": torch.bfloat16}


def forget(*tensors: torch.Tensor | None) -> None:
    """Free what a step was given, as Megatron's overlapped schedule does once the step has run."""
    for tensor in tensors:
        if tensor is not None:
            tensor.untyped_storage().resize_(0)


def run_steps(layer: MegatronEPMoELayer, x: torch.Tensor, upstream: torch.Tensor, frees: bool) -> torch.Tensor:
    """One pass as Megatron's overlapped schedule does it: steps cut from each other, gradients passed by hand."""
    probs, routing_map = layer.route(x)
    tokens, probs = layer.preprocess(x, probs, routing_map)
    cut = [t.detach().requires_grad_() for t in (tokens, probs)]
    rows, row_probs = layer.dispatch(*cut)
    forget(*cut if frees else ())
    cut_rows = [t.detach().requires_grad_() for t in (rows, row_probs)]
    output, _ = layer.routed_experts_compute(*cut_rows)
    forget(cut_rows[0] if frees else None)
    cut_output = output.detach().requires_grad_()
    out = layer.postprocess(layer.combine(cut_output), None)
    forget(cut_output if frees else None)
    out.backward(upstream)
    output.backward(cut_output.grad)
    layer.backward_dw()
    torch.autograd.backward([rows, row_probs], [t.grad for t in cut_rows])
    torch.autograd.backward([tokens, probs], [t.grad for t in cut])
    return out


def gradients_of(layer: MegatronEPMoELayer, x: torch.Tensor) -> list[torch.Tensor]:
    """Of the tokens and of all parameters; forgotten by the layer."""
    found = [t.grad.clone() for t in (x, *layer.parameters())]
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    return found


def _steps(rank: int, world: int, changes: dict[str, Any], fp8: bool) -> list[float]:
    options: dict[str, Any] = {}
    if fp8:  # rows reach the experts as they travelled
        changes = {**changes, "hidden_size": 128, "moe_ffn_hidden_size": 128}
        options = {"precision": "fp8", "phases": PhasesConfig(train=PhaseConfig(dispatch_dtype="fp8"))}
    with expert_parallel(world):
        torch.manual_seed(3)
        layer = gpt_model(transformer_config(**changes), **options).decoder.layers[0].mlp
        assert isinstance(layer, MoELayer)
        generator = torch.Generator().manual_seed(rank)
        shape = (16, 2, changes.get("hidden_size", HIDDEN))
        x = torch.randn(shape, generator=generator).to(layer.experts.fc1_weight.dtype).requires_grad_()
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x.dtype)
        expected, bias = layer(x)
        assert bias is None
        expected.backward(upstream)
        assert (layer.experts.fc1_weight.grad is None) == layer.experts.delay_wgrad
        layer.backward_dw()
        want = gradients_of(layer, x)
        assert torch.equal(run_steps(layer, x, upstream, frees="bf16" in changes), expected)
        return [float((a - b).abs().max()) for a, b in zip(want, gradients_of(layer, x), strict=True)]


@pytest.mark.parametrize(
    "changes", [{}, OVERLAPPED, {**OVERLAPPED, "delay_wgrad_compute": True}], ids=["plain", "overlapped", "delayed"]
)
@pytest.mark.parametrize("fp8", [False, True], ids=["input", "fp8"])
def test_steps_of_the_overlapped_schedule_equal_forward(changes: dict[str, Any], fp8: bool) -> None:
    for differences in run_ranks(2, _steps, changes, fp8):
        assert max(differences) == 0.0


def attach_main_gradients(layer: MegatronEPMoELayer, delayed: bool, calls: list[str]) -> None:
    """What Megatron's DDP does to expert parameters (it needs a GPU itself): a buffer, a mark and a hook each."""
    for name, parameter in layer.experts.named_parameters():
        parameter.main_grad = torch.zeros(parameter.shape, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False

        def hook(name: str = name, parameter: torch.nn.Parameter = parameter) -> None:
            calls.append(name)
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape
            if not parameter.grad_added_to_main_grad:
                parameter.main_grad.add_(parameter.grad)
            parameter.grad = None

        if delayed and parameter.skip_backward_post_hook:
            layer.experts.register_wgrad_accumulation_and_reduce_hooks(hook)
        else:
            parameter.register_post_accumulate_grad_hook(lambda _, hook=hook: hook())


def _main_gradients(rank: int, world: int, way: str, backend: str) -> dict[str, torch.Tensor]:
    """``main_grad`` of the experts after three micro-batches."""
    with expert_parallel(world):
        torch.manual_seed(3)
        changes = {**OVERLAPPED, "delay_wgrad_compute": way == "delayed"} if way in ("steps", "delayed") else {}
        overlap = ("wgrad",) if way == "wgrad" else ()
        config = transformer_config(**{"bf16": True, "params_dtype": torch.bfloat16, **changes})
        phases = PhasesConfig(train=PhaseConfig(overlap=overlap, expert_chunks=2 if way == "chunks" else 1))
        layer = gpt_model(config, phases=phases, backend=backend).decoder.layers[0].mlp
        calls: list[str] = []
        if way != "unfused":
            attach_main_gradients(layer, way == "delayed", calls)
        sums = {name: torch.zeros(p.shape) for name, p in layer.experts.named_parameters()}
        for seed in range(3):
            generator = torch.Generator().manual_seed(10 * seed + rank)
            x, upstream = torch.randn(2, 16, 2, HIDDEN, generator=generator).bfloat16()
            x.requires_grad_()
            if way in ("steps", "delayed"):
                run_steps(layer, x, upstream, frees=True)
            else:
                layer(x)[0].backward(upstream)
            for name, parameter in layer.experts.named_parameters():
                if way == "unfused":
                    sums[name] += parameter.grad
                else:
                    assert parameter.grad_added_to_main_grad
                parameter.grad = None
        if way == "unfused":
            return sums
        assert sorted(calls) == sorted(3 * list(sums))
        return {name: parameter.main_grad for name, parameter in layer.experts.named_parameters()}


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("way", ["plain", "wgrad", "chunks", "steps", "delayed"])
def test_gradients_go_straight_into_main_grad(way: str, backend: str) -> None:
    unfused, fused = (run_ranks(2, _main_gradients, name, backend) for name in ("unfused", way))
    for want, got in zip(unfused, fused, strict=True):
        for name, value in want.items():
            assert value.any() and got[name].dtype == torch.float32 and torch.equal(got[name], value), name


def _with_megatron_ddp(
    rank: int, world: int, changes: dict[str, Any], overlap: tuple[Any, ...], overlap_grad_reduce: bool
) -> list[str]:
    """Parameters whose ``main_grad`` after two micro-batches under Megatron's DDP is not the sum of their gradients."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    on = torch.device("cpu")
    with expert_parallel(world), mock.patch("torch.cuda.current_device", lambda: on):
        torch.manual_seed(3)
        config = transformer_config(**{"bf16": True, "params_dtype": torch.bfloat16, **changes})
        phases = PhasesConfig(train=PhaseConfig(overlap=overlap))
        layer = gpt_model(config, phases=phases, comm="portable").decoder.layers[0].mlp.to(on)

        def micro_batch(seed: int) -> None:
            generator = torch.Generator().manual_seed(10 * seed + rank)
            x, upstream = torch.randn(2, 16, 2, HIDDEN, generator=generator).to(on, torch.bfloat16)
            if changes:
                run_steps(layer, x.requires_grad_(), upstream, frees=True)
            else:
                layer(x.requires_grad_())[0].backward(upstream)

        sums = {name: torch.zeros(p.shape, device=on) for name, p in layer.named_parameters()}
        for seed in range(2):
            micro_batch(seed)
            for name, parameter in layer.named_parameters():
                sums[name] += parameter.grad
                parameter.grad = None
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap_grad_reduce,
            use_distributed_optimizer=False,
            delay_wgrad_compute=bool(changes.get("delay_wgrad_compute")),
        )
        wrapped = DistributedDataParallel(config, settings, layer)
        wrapped.zero_grad_buffer()
        with wrapped.no_sync():
            micro_batch(0)
        micro_batch(1)
        fused = {name for name, parameter in layer.named_parameters() if parameter.grad_added_to_main_grad}
        assert fused == {"experts.fc1_weight", "experts.fc2_weight"}
        assert all(parameter.grad is None for parameter in layer.parameters())
        return [name for name, p in layer.named_parameters() if not torch.equal(p.main_grad, sums[name])]


@pytest.mark.parametrize("overlap_grad_reduce", [False, True])
@pytest.mark.parametrize(
    ("changes", "overlap"),
    [({}, ()), ({}, ("wgrad",)), (OVERLAPPED, ()), ({**OVERLAPPED, "delay_wgrad_compute": True}, ())],
    ids=["plain", "wgrad", "overlapped", "delayed"],
)
def test_main_grad_under_megatrons_ddp(
    changes: dict[str, Any], overlap: tuple[Any, ...], overlap_grad_reduce: bool
) -> None:
    """On CPUs: gloo, which ranks that share a GPU need, does not reduce as Megatron asks there."""
    assert run_ranks(2, _with_megatron_ddp, changes, overlap, overlap_grad_reduce) == [[], []]


def _beside(
    rank: int, world: int, device: str, overlap: tuple[Any, ...], changes: dict[str, Any], chunks: int = 1
) -> dict[str, Any]:
    """Output and gradients of a layer with shared experts in two passes, and their order of computation."""
    with expert_parallel(world):
        torch.manual_seed(3)
        config = transformer_config(moe_shared_expert_intermediate_size=16, moe_shared_expert_gate=True)
        for name, value in changes.items():
            setattr(config, name, value)  # not every release has every setting
        phases = PhasesConfig(train=PhaseConfig(overlap=overlap, expert_chunks=chunks))
        on = rank_device(device, rank)
        layer = gpt_model(config, phases=phases, comm="portable").decoder.layers[0].mlp.to(on)
        calls: list[str] = []
        layer.shared_experts.register_forward_hook(lambda *_: calls.append("shared"))
        layer.router.register_forward_hook(lambda *_: calls.append("route"))
        found = {}
        for seed in range(2):
            generator = torch.Generator().manual_seed(10 * seed + rank)
            x, upstream = torch.randn(2, 16, 2, HIDDEN, generator=generator).to(on)
            out, _ = layer(x.requires_grad_())
            out.backward(upstream)
            found[f"out {seed}"], found[f"x {seed}"] = out.detach().cpu(), x.grad.cpu()
        found |= {name: parameter.grad.cpu() for name, parameter in layer.named_parameters()}
        return {"tensors": found, "calls": calls, "strategies": layer._phases._phases.train.overlap}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_strategies_change_no_bit(device: str) -> None:
    plain = run_ranks(2, _beside, device, (), {})
    asked = [
        (("shared_experts",), {}, ("shared_experts",)),
        (("wgrad",), {"moe_shared_expert_overlap": True}, ("wgrad", "shared_experts")),
        ((), {"overlap_dispatch_backward_with_experts_wgrad": True}, ("wgrad",)),
    ]
    for overlap, changes, strategies in asked:
        for want, got in zip(plain, run_ranks(2, _beside, device, overlap, changes), strict=True):
            assert got["strategies"] == strategies and got["calls"] == want["calls"] == 2 * ["shared", "route"]
            assert all(torch.equal(value, got["tensors"][name]) for name, value in want["tensors"].items())
    for want, got in zip(plain, run_ranks(2, _beside, device, ("shared_experts",), {}, 2), strict=True):
        assert all(torch.equal(value, got["tensors"][name]) for name, value in want["tensors"].items())


def _strategy_under_the_overlapped_schedule(rank: int, world: int) -> str:
    with expert_parallel(world):
        try:
            gpt_model(transformer_config(**OVERLAPPED), phases=PhasesConfig(train=PhaseConfig(overlap=("wgrad",))))
        except ConfigError as error:
            return str(error)
        return ""


def test_the_overlapped_schedule_excludes_strategies() -> None:
    for message in run_ranks(2, _strategy_under_the_overlapped_schedule):
        assert message.startswith("phases.train.overlap = [wgrad]: under overlap_moe_expert_parallel_comm")


@pytest.mark.parametrize("setting", ["overlap_moe_expert_parallel_comm", "delay_wgrad_compute"])
def test_megatrons_schedule_excludes_experts_in_chunks(setting: str) -> None:
    config = transformer_config()
    setattr(config, setting, True)
    with pytest.raises(ConfigError, match=f"phases.train.expert_chunks = 2: must be 1 under {setting}"):
        honour_overlap(config, PhasesConfig(train=PhaseConfig(expert_chunks=2)))
