"""The Megatron-Core adapter: models, schedules' steps, losses, settings it must refuse."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("megatron.core")

import torch
from communicators import rank_device
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron_models import (
    EXPERTS,
    HIDDEN,
    batch,
    expert_parallel,
    gpt_model,
    module_of,
    submodules_of,
    take_logged_losses,
    transformer_config,
)
from ranks import run_ranks

from ep_moe.config import ConfigError, PhaseConfig, PhasesConfig
from ep_moe.megatron import MegatronEPMoELayer, use_ep_moe
from ep_moe.megatron.releases import replace_moe_layer
from ep_moe.megatron.router import MegatronRouter
from ep_moe.megatron.translate import moe_config


def _train_step(rank: int, world: int, ep: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient sums on the same four sequences, however the ranks share them and the experts."""
    with expert_parallel(ep):
        torch.manual_seed(3)
        # The balance loss is not linear in the tokens of a rank, so it would depend on the split.
        model = gpt_model(transformer_config(moe_aux_loss_coeff=0.0, moe_shared_expert_intermediate_size=16))
        share = 4 // world
        tokens, positions = (t[rank * share : (rank + 1) * share] for t in batch(0, 4))
        loss = model(tokens, positions, None, labels=tokens).sum()
        loss.backward()
        return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _whole_gradients(results: list[tuple[float, dict[str, torch.Tensor]]], ep: int) -> dict[str, torch.Tensor]:
    out = {}
    for name in results[0][1]:
        values = [gradients[name] for _, gradients in results]
        if ".mlp.experts." in name:
            by_place = [sum(values[place::ep]) for place in range(ep)]
            out[name] = torch.cat(by_place)  # type: ignore[arg-type]
        else:
            out[name] = sum(values)  # type: ignore[assignment]
    return out


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 4), (4, 2), (4, 1)])
def test_gpt_model_computes_the_same_for_every_split(world: int, ep: int) -> None:
    alone = run_ranks(1, _train_step, 1)
    split = run_ranks(world, _train_step, ep)
    assert sum(loss for loss, _ in split) == pytest.approx(alone[0][0], rel=1e-5)
    want, got = _whole_gradients(alone, 1), _whole_gradients(split, ep)
    assert want.keys() == got.keys() and any(".mlp.experts.fc1_weight" in name for name in want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


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


def _steps(rank: int, world: int, changes: dict[str, Any]) -> list[float]:
    with expert_parallel(world):
        torch.manual_seed(3)
        layer = gpt_model(transformer_config(**changes)).decoder.layers[0].mlp
        assert isinstance(layer, MoELayer)
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(16, 2, HIDDEN, generator=generator).to(layer.experts.fc1_weight.dtype).requires_grad_()
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x.dtype)
        expected, bias = layer(x)
        assert bias is None
        expected.backward(upstream)
        assert (layer.experts.fc1_weight.grad is None) == layer.experts.delay_wgrad
        layer.backward_dw()
        want = gradients_of(layer, x)
        assert torch.equal(run_steps(layer, x, upstream, frees=bool(changes)), expected)
        return [float((a - b).abs().max()) for a, b in zip(want, gradients_of(layer, x), strict=True)]


@pytest.mark.parametrize(
    "changes", [{}, OVERLAPPED, {**OVERLAPPED, "delay_wgrad_compute": True}], ids=["plain", "overlapped", "delayed"]
)
def test_steps_of_the_overlapped_schedule_equal_forward(changes: dict[str, Any]) -> None:
    for differences in run_ranks(2, _steps, changes):
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
        phases = PhasesConfig(train=PhaseConfig(overlap=overlap))
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
@pytest.mark.parametrize("way", ["plain", "wgrad", "steps", "delayed"])
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


def _beside(rank: int, world: int, device: str, overlap: tuple[Any, ...], changes: dict[str, Any]) -> dict[str, Any]:
    """Output and gradients of a layer with shared experts in two passes, and their order of computation."""
    with expert_parallel(world):
        torch.manual_seed(3)
        config = transformer_config(moe_shared_expert_intermediate_size=16, moe_shared_expert_gate=True)
        for name, value in changes.items():
            setattr(config, name, value)  # not every release has every setting
        phases = PhasesConfig(train=PhaseConfig(overlap=overlap))
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


def _attributes(rank: int, world: int) -> dict[str, Any]:
    with expert_parallel(world):
        layer = gpt_model(transformer_config()).decoder.layers[1].mlp
        return {
            "allreduce": {name: getattr(p, "allreduce", True) for name, p in layer.named_parameters()},
            "sequence_parallel": layer.router.weight.sequence_parallel,
            "layer_number": (layer.layer_number, layer.router.layer_number),
            "local": layer.local_expert_indices,
            "flags": (layer.use_shared_expert, layer.shared_expert_overlap),
        }


def test_attributes_that_megatron_reads() -> None:
    for rank, found in enumerate(run_ranks(2, _attributes)):
        assert found["allreduce"] == {
            "router.weight": True,
            "experts.fc1_weight": False,
            "experts.fc2_weight": False,
        }
        assert found["sequence_parallel"] is False and found["layer_number"] == (2, 2)
        assert found["local"] == list(range(rank * 4, rank * 4 + 4)) and found["flags"] == (False, False)


ALL_LOSSES: dict[str, Any] = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [1e-2, 1e-2, 1e-2],
    "moe_z_loss_coeff": 1e-3,
}


def _losses(rank: int, world: int) -> dict[str, Any]:
    with expert_parallel(world):
        torch.manual_seed(3)
        config = transformer_config(**ALL_LOSSES)
        model = gpt_model(config)
        tokens, positions = batch(rank)
        take_logged_losses()  # of earlier tests
        model(tokens, positions, None, labels=tokens).mean().backward()
        return take_logged_losses()


def test_losses_reach_megatrons_log() -> None:
    for found in run_ranks(2, _losses):
        assert set(found) == {
            "load_balancing_loss",
            "seq_load_balancing_loss",
            "global_load_balancing_loss",
            "z_loss",
        }
        # Each balance loss is 1 under even load; two layers are logged.
        assert all(
            len(values) == 2 and all(0.4 < v < 3 for v in values) for n, values in found.items() if n != "z_loss"
        )


def _expert_bias(rank: int, world: int) -> tuple[list[float], list[float], list[float]]:
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias, reset_model_temporary_tensors

    with expert_parallel(world):
        torch.manual_seed(3)
        config = transformer_config(
            moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.125
        )
        model = gpt_model(config)
        tokens, positions = batch(rank)
        model(tokens, positions, None, labels=tokens).mean().backward()
        router = model.decoder.layers[0].mlp.router
        counts = router.local_tokens_per_expert.clone()
        _update_router_expert_bias([model], config)
        reset_model_temporary_tensors(config, [model])
        return counts.tolist(), router.expert_bias.tolist(), router.local_tokens_per_expert.tolist()


def test_megatron_updates_the_expert_bias() -> None:
    results = run_ranks(2, _expert_bias)
    counts = torch.tensor([counts for counts, _, _ in results]).sum(0)
    assert counts.sum() == 2 * 2 * 16 * 2  # ranks, sequences, tokens, top-k
    for _, bias, left in results:
        assert bias == (0.125 * torch.sign(counts.mean() - counts)).tolist()
        assert not any(left)


def test_a_block_spec_keeps_its_dense_layers() -> None:
    dense, moe = (get_gpt_layer_local_spec(num_experts=n) for n in (None, EXPERTS))
    block = TransformerBlockSubmodules(layer_specs=[dense, moe, moe])
    replaced = use_ep_moe(block)
    kinds = [module_of(layer.submodules.mlp) for layer in replaced.layer_specs]
    assert kinds == [module_of(dense.submodules.mlp), MegatronEPMoELayer, MegatronEPMoELayer]
    assert module_of(moe.submodules.mlp) is MoELayer  # the original is left as it is


def test_a_hybrid_stack_keeps_its_other_layers() -> None:
    attention, moe = (get_gpt_layer_local_spec(num_experts=n) for n in (None, EXPERTS))
    stack = ModuleSpec(torch.nn.Module, submodules=SimpleNamespace(attention_layer=attention, moe_layer=moe))
    replaced = use_ep_moe(stack)
    assert replaced.submodules.attention_layer is attention and stack.submodules.moe_layer is moe
    assert module_of(replaced.submodules.moe_layer.submodules.mlp) is MegatronEPMoELayer


def test_a_spec_without_moe_is_an_error() -> None:
    with pytest.raises(ValueError, match="pass num_experts"):
        use_ep_moe(get_gpt_layer_local_spec(num_experts=None))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"add_bias_linear": True}, "add_bias_linear = True"),
        ({"moe_pad_expert_input_to_capacity": True}, "moe_pad_expert_input_to_capacity = True"),
        ({"moe_latent_size": 16}, "moe_latent_size = 16"),
        ({"expert_tensor_parallel_size": 2}, "expert_tensor_parallel_size = 2"),
        ({"expert_gtp_weight_remat_size": 2}, "expert_gtp_weight_remat_size = 2"),
        ({"moe_expert_rank_capacity_factor": 1.5}, "moe_expert_rank_capacity_factor = 1.5"),
        ({"moe_router_score_function": "sqrtsoftplus"}, "moe_router_score_function = sqrtsoftplus"),
        ({"moe_router_force_biased": 0.5}, "moe_router_force_biased = 0.5"),
        ({"moe_mlp_glu_interleave_size": 32}, "moe_mlp_glu_interleave_size = 32"),
        ({"transformer_impl": "inference_optimized"}, "transformer_impl = inference_optimized"),
        ({"cuda_graph_impl": "full_iteration"}, "cuda_graph_impl = full_iteration"),
        ({"activation_func": torch.tanh}, "activation_func = tanh"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "moe_router_load_balancing_type = sinkhorn"),
        ({"moe_router_load_balancing_type": "quantile_balancing"}, "load_balancing_type = quantile_balancing"),
        ({"tensor_model_parallel_size": 2}, "sequence_parallel = False"),
    ],
)
def test_settings_that_would_not_be_honoured_are_refused(changes: dict[str, Any], named: str) -> None:
    config = transformer_config()
    for name, value in changes.items():
        # Afterwards: not every release has every setting, and some refuse by themselves what others may accept.
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=r"^TransformerConfig\.") as caught:
        moe_config(config, comm="auto", backend="auto")
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_translation() -> None:
    config = transformer_config(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_topk_scaling_factor=2.5,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=1e-4,
        moe_z_loss_coeff=1e-3,
        moe_expert_capacity_factor=1.5,
        moe_token_drop_policy="position",
        moe_router_dtype=None,
    )
    moe = moe_config(config, comm="portable", backend="loop")
    assert (moe.num_experts, moe.top_k, moe.comm) == (EXPERTS, 2, "portable")
    router = moe.router
    assert (router.score_function, router.expert_bias, router.dtype) == ("sigmoid", True, "input")
    assert (router.num_groups, router.group_topk, router.routed_scaling_factor) == (4, 2, 2.5)
    assert (router.aux_loss_coeff, router.seq_aux_loss_coeff, router.z_loss_coeff) == (0.0, 1e-4, 1e-3)
    assert (router.capacity_factor, router.drop_policy) == (1.5, "position")
    assert (moe.experts.activation, moe.experts.backend, moe.experts.ffn_hidden_size) == ("swiglu", "loop", 24)


def _default_groups(rank: int, world: int) -> tuple[bool, dict[str, Any]]:
    built: dict[str, Any] = {}

    def shared_experts(**arguments: Any) -> torch.nn.Module:
        built.update(arguments)
        return torch.nn.Identity()

    with expert_parallel(world):
        config = transformer_config(moe_shared_expert_intermediate_size=16)
        spec = use_ep_moe(get_gpt_layer_local_spec(num_experts=EXPERTS)).submodules.mlp
        submodules = copy.copy(submodules_of(spec))
        submodules.shared_experts = shared_experts
        layer = MegatronEPMoELayer(config, submodules, layer_number=1, name="decoder.layers.0.mlp", newer=True)
        default = layer.ep_group is parallel_state.get_expert_model_parallel_group()
        return default, {"name": built["name"], "gate": built["gate"], "arguments": sorted(built)}


def test_default_process_groups_names_and_unknown_keywords() -> None:
    expected = {
        "name": "decoder.layers.0.mlp.shared_experts",
        "gate": False,
        "arguments": ["config", "gate", "name", "pg_collection"],
    }
    assert run_ranks(2, _default_groups) == [(True, expected)] * 2


@pytest.mark.parametrize("kind", [functools.partial, ModuleSpec])
def test_both_kinds_of_specs_are_replaced(kind: Any) -> None:
    """Releases of Megatron differ in the kind they make; they build from both."""
    native = kind(MoELayer, submodules="submodules of a MoELayer")
    ours = replace_moe_layer(native, MegatronEPMoELayer, {"comm": "portable"})
    assert type(ours) is type(native) and module_of(ours) is MegatronEPMoELayer and module_of(native) is MoELayer
    params, old_params = ((s.keywords if kind is functools.partial else s.params) for s in (ours, native))
    assert params["comm"] == "portable" and "comm" not in old_params
    assert submodules_of(ours) == "submodules of a MoELayer"
    assert replace_moe_layer(kind(dict), MegatronEPMoELayer, {}) is None
    assert replace_moe_layer(None, MegatronEPMoELayer, {}) is None


def _router_gradient(rank: int, world: int) -> torch.Tensor:
    """Of all losses on the same tokens, summed as Megatron does, which divides by their number afterwards."""
    parallel_state.initialize_model_parallel(context_parallel_size=world)
    try:
        torch.manual_seed(3)
        config = transformer_config(calculate_per_token_loss=True, context_parallel_size=world, **ALL_LOSSES)
        moe = moe_config(config, comm="auto", backend="auto")
        router = MegatronRouter(config, moe, get_default_pg_collection())
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))
        x = torch.randn(16, 2, HIDDEN, generator=torch.Generator().manual_seed(0)).chunk(world)[rank]
        (router(x).topk_weights * 0.0).sum().backward()
        return router.weight.grad
    finally:
        parallel_state.destroy_model_parallel()


def test_per_token_losses_do_not_depend_on_the_split_of_a_micro_batch() -> None:
    (alone,) = run_ranks(1, _router_gradient)
    assert alone.abs().max() > 0.01
    torch.testing.assert_close(sum(run_ranks(2, _router_gradient)), alone)


def _prediction_losses(rank: int, world: int, repeated: bool) -> dict[str, Any]:
    """What a layer of multi-token prediction logs, and its router's gradients by loss."""
    with expert_parallel(world):
        found: dict[str, Any] = {}
        for loss, changes in {
            "load_balancing_loss": {},
            "z_loss": {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 1e-3},
        }.items():
            torch.manual_seed(3)
            config = transformer_config(mtp_num_layers=2, **changes)
            config.mtp_use_repeated_layer = repeated  # not a setting of every release
            spec = use_ep_moe(get_gpt_layer_local_spec(num_experts=EXPERTS)).submodules.mlp
            layer = MegatronEPMoELayer(config, submodules_of(spec), is_mtp_layer=True)
            layer.set_layer_number(2)
            take_logged_losses()
            MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))
            x = torch.randn(16, 2, HIDDEN, generator=torch.Generator().manual_seed(rank))
            (layer(x)[0] * 0.0).sum().backward()
            found[loss] = torch.tensor(take_logged_losses()[loss])
            found[f"gradient of {loss}"] = layer.router.weight.grad
        return found


def test_losses_of_multi_token_prediction() -> None:
    """Two decoder layers and two more; one of those applied twice adds each balance loss half."""
    for once, twice in zip(*(run_ranks(2, _prediction_losses, repeated) for repeated in (False, True)), strict=True):
        for loss, share in (("load_balancing_loss", 0.5), ("z_loss", 1.0)):
            assert once[loss].nonzero().flatten().tolist() == [3]
            torch.testing.assert_close(twice[loss], once[loss] * 0.5)
            assert once[f"gradient of {loss}"].any()
            torch.testing.assert_close(twice[f"gradient of {loss}"], once[f"gradient of {loss}"] * share)


def _repeated_without_a_word(rank: int, world: int) -> str:
    with expert_parallel(world):
        config = transformer_config(mtp_num_layers=2)
        config.mtp_use_repeated_layer = True
        try:
            MegatronEPMoELayer(config)
        except ConfigError as error:
            return str(error)
        return ""


def test_repetition_that_megatron_does_not_tell_of_is_refused() -> None:
    for message in run_ranks(2, _repeated_without_a_word):
        assert message.startswith("TransformerConfig.mtp_use_repeated_layer = True: ")


def _prediction_in_a_model(rank: int, world: int) -> dict[str, list[float]]:
    # Megatron puts the losses of the predicted tokens on the current GPU.
    with expert_parallel(world), mock.patch("torch.cuda.current_device", lambda: torch.device("cpu")):
        torch.manual_seed(3)
        model = gpt_model(transformer_config(mtp_num_layers=2))
        tokens, positions = batch(rank)
        take_logged_losses()
        loss = model(tokens, positions, None, labels=tokens, loss_mask=torch.ones_like(tokens))
        loss.mean().backward()
        assert all(parameter.grad is not None for parameter in model.mtp.parameters())
        return take_logged_losses()


def test_a_model_with_multi_token_prediction_logs_all_layers() -> None:
    for found in run_ranks(2, _prediction_in_a_model):
        assert len(found["load_balancing_loss"]) == 4 and all(0.4 < v < 3 for v in found["load_balancing_loss"])
