"""Losses of the router in Megatron's log and its gradients, the expert bias, multi-token prediction."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

pytest.importorskip("megatron.core")

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from megatron_models import (
    EXPERTS,
    HIDDEN,
    batch,
    expert_parallel,
    gpt_model,
    submodules_of,
    take_logged_losses,
    transformer_config,
)
from ranks import run_ranks

from ep_moe.config import ConfigError
from ep_moe.megatron import MegatronEPMoELayer, use_ep_moe
from ep_moe.megatron.router import MegatronRouter
from ep_moe.megatron.translate import moe_config

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
