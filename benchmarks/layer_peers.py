"""What else people use for an MoE layer, on our layer's weights: beside it in the table of ``benchmarks/layer.py``.

``megatron``    Megatron-Core's own ``MoELayer`` with its all-to-all dispatcher. With TransformerEngine its grouped
                experts and fused permutations; else ``GroupedMLP`` where the package ``grouped_gemm`` is, else one MLP
                after the other (``SequentialMLP``). Its label says which. Router in fp32, as ours.
``all_to_all``  plain PyTorch: slots sorted by expert, ``all_to_all_single`` of counts, for which the host waits, and of
                rows, which are sorted by expert again where they arrive; and all of it back.
``all_gather``  plain PyTorch: every rank gets all tokens, computes those slots that are of its experts, and the sums of
                all ranks are added by a reduce-scatter.

The plain ones compute experts with ``torch.nn.functional.grouped_mm`` and run eagerly; they send no row twice that the
algorithm does not, and pad nothing. Their router's product is in the dtype of the tokens, which takes less time than
fp32. None of the three makes activations again in backward, as ours does by default: their memory is what it costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_moe import EPMoELayer


@dataclass(frozen=True)
class Weights:
    """Of one rank, as :class:`~ep_moe.EPMoELayer` has them.

    Attributes:
        router: ``[experts, hidden]``, the same on all ranks.
        fc1: ``[local_experts, 2 * ffn, hidden]``, gate before linear half.
        fc2: ``[local_experts, hidden, ffn]``.
    """

    router: Tensor
    fc1: Tensor
    fc2: Tensor


@dataclass(frozen=True)
class Peer:
    """A layer to measure.

    Attributes:
        experts: what computes them, for the table.
        run: ``[tokens, hidden]`` to the same, differentiable; collective, with as many tokens on each rank.
        parameters: that take gradients.
    """

    experts: str
    run: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]


class PeerMissing(RuntimeError):
    """What a peer needs is not installed; the message says what."""


def weights_of(layer: EPMoELayer) -> Weights:
    """The parameters of a layer with SwiGLU and without shared experts; not copies."""
    return Weights(layer.router.weight, layer.experts.fc1_weight, layer.experts.fc2_weight)


def megatron(weights: Weights, top_k: int, group: dist.ProcessGroup) -> Peer:
    """Megatron-Core's layer with copies of ``weights``; ``group`` must be all ranks.

    Raises:
        PeerMissing: without megatron-core.
    """
    try:
        from megatron.core import parallel_state
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
        from megatron.core.transformer.moe import moe_utils
        from megatron.core.transformer.spec_utils import build_module
        from megatron.core.transformer.transformer_config import TransformerConfig

        from ep_moe.megatron import from_native
    except ImportError as error:
        raise PeerMissing(f"megatron-core is not installed ({error})") from error
    num_experts, hidden = weights.router.shape
    on_gpu = weights.router.is_cuda
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=group.size())
        if on_gpu:
            model_parallel_cuda_manual_seed(1)
    if not hasattr(moe_utils, "te_general_gemm"):
        # Without TransformerEngine the router of 0.16 asks whether it is None, though it was never imported.
        moe_utils.te_general_gemm = None
    kind, layout = _megatrons_experts()
    grouped = layout != "sequential"
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=1,
        ffn_hidden_size=weights.fc2.shape[2],
        moe_ffn_hidden_size=weights.fc2.shape[2],
        num_moe_experts=num_experts,
        moe_router_topk=top_k,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=grouped,
        moe_permute_fusion=getattr(moe_utils, "fused_permute", None) is not None,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=on_gpu,  # as its training program has it; torch.compile makes the kernel
        expert_model_parallel_size=group.size(),
        params_dtype=weights.fc1.dtype,
        bf16=weights.fc1.dtype == torch.bfloat16,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
    )
    spec = get_moe_module_spec(use_te=layout == "te_grouped", num_experts=num_experts, moe_grouped_gemm=grouped)
    # Newer releases make a function where 0.16 makes a ModuleSpec.
    layer = spec(config=config) if isinstance(spec, functools.partial) else build_module(spec, config=config)
    layer.to(device=weights.router.device, dtype=weights.router.dtype)
    ours = {"router.weight": weights.router, "experts.fc1_weight": weights.fc1, "experts.fc2_weight": weights.fc2}
    state = from_native({name: weight.detach() for name, weight in ours.items()}, layout)
    missing, unexpected = layer.load_state_dict(state, strict=False)
    lacking = [name for name in missing if "_extra_state" not in name]
    assert not lacking and not unexpected, (lacking, unexpected)  # what was measured would have other weights

    def run(x: Tensor) -> Tensor:
        out, _ = layer(x.unsqueeze(1))  # [sequence, batch, hidden]
        return out.squeeze(1)

    return Peer(kind, run, tuple(layer.parameters()))


def _megatrons_experts() -> tuple[str, Any]:
    """The best of Megatron's experts that this machine has, and how :func:`from_native` names their weights."""
    from megatron.core.transformer.moe import experts

    if getattr(experts, "HAVE_TE", False):
        return "TEGroupedMLP", "te_grouped"
    legacy = getattr(experts, "gg", None)  # newer releases have none
    if hasattr(experts, "GroupedMLP") and legacy is not None and legacy.grouped_gemm_is_available():
        return "GroupedMLP", "grouped"
    return "SequentialMLP", "sequential"


def all_to_all(weights: Weights, top_k: int, group: dist.ProcessGroup) -> Peer:
    """The plain layer over ``all_to_all_single``."""
    ranks, num_experts, local_experts = group.size(), weights.router.shape[0], weights.fc1.shape[0]
    device = weights.router.device
    expert_of_block = torch.arange(local_experts, device=device).repeat(ranks)

    def run(x: Tensor) -> Tensor:
        tokens, hidden = x.shape
        topk_idx, topk_weights = _route(x, weights.router, top_k)
        order, place = _sorted(topk_idx.flatten())
        sent = _count(topk_idx.flatten(), num_experts)
        arrived = torch.empty_like(sent)  # [ranks * local_experts], by source
        dist.all_to_all_single(arrived, sent, group=group)
        # The host waits here for the sizes of what it is to exchange.
        send_sizes, receive_sizes = torch.stack((sent, arrived)).view(2, ranks, local_experts).sum(2).tolist()
        rows = _move(_Gather.apply(x, order // top_k, place, top_k), receive_sizes, send_sizes, group)
        by_expert, by_source = _sorted(expert_of_block.repeat_interleave(arrived, output_size=sum(receive_sizes)))
        ends = arrived.view(ranks, local_experts).sum(0).cumsum(0).int()
        rows = _experts(_Gather.apply(rows, by_expert, by_source, 1), ends, weights)
        rows = _move(_Gather.apply(rows, by_source, by_expert, 1), send_sizes, receive_sizes, group)
        slots = _Gather.apply(rows, place, order, 1).view(tokens, top_k, hidden)
        return (topk_weights.to(x.dtype).unsqueeze(1) @ slots).squeeze(1)

    return Peer("grouped_mm", run, (weights.router, weights.fc1, weights.fc2))


def all_gather(weights: Weights, top_k: int, group: dist.ProcessGroup) -> Peer:
    """The plain layer over all-gather and reduce-scatter."""
    local_experts = weights.fc1.shape[0]
    first = group.rank() * local_experts
    gather = functools.partial(_all_gather, group=group)
    scatter = functools.partial(_reduce_scatter, group=group)

    def run(x: Tensor) -> Tensor:
        topk_idx, topk_weights = _route(x, weights.router, top_k)
        everyone, slot_weights = (_Exchange.apply(t, gather, scatter) for t in (x, topk_weights))
        local_idx = gather(topk_idx).flatten() - first
        elsewhere = (local_idx < 0) | (local_idx >= local_experts)
        local_idx.masked_fill_(elsewhere, local_experts)  # sorted behind all others
        counts = _count(local_idx, local_experts + 1)[:-1]
        slots = local_idx.argsort(stable=True)[: int(counts.sum())]  # the host waits here for how many
        token = slots // top_k
        rows = _experts(everyone.index_select(0, token), counts.cumsum(0).int(), weights)
        rows = rows * slot_weights.flatten().index_select(0, slots).to(x.dtype).unsqueeze(1)
        return _Exchange.apply(torch.zeros_like(everyone).index_add(0, token, rows), scatter, gather)

    return Peer("grouped_mm", run, (weights.router, weights.fc1, weights.fc2))


PEERS: dict[str, Callable[[Weights, int, dist.ProcessGroup], Peer]] = {
    "megatron": megatron,
    "all_to_all": all_to_all,
    "all_gather": all_gather,
}


def _route(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Experts int64 ``[tokens, top_k]``, and their weights in fp32: a softmax over those chosen."""
    logits, topk_idx = F.linear(x, router).float().topk(top_k, dim=-1)
    return topk_idx, logits.softmax(-1)


def _experts(rows: Tensor, ends: Tensor, weights: Weights) -> Tensor:
    """SwiGLU experts on rows sorted by expert; ``ends`` int32 ``[local_experts]``."""
    gate, linear = F.grouped_mm(rows, weights.fc1.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * linear, weights.fc2.transpose(1, 2), offs=ends)


def _sorted(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Which key comes at each place of the sorted order, and the place of each key."""
    order = keys.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return order, place


def _count(values: Tensor, most: int) -> Tensor:
    """How often each of ``most`` values comes, int64; unlike ``bincount`` without a wait of the host."""
    return values.new_zeros(most).scatter_add_(0, values, torch.ones_like(values))


class _Gather(torch.autograd.Function):
    """``x[index]``, where each row of ``x`` is taken ``copies`` times.

    ``place`` says where the copies are: the backward pass gathers and sums them, where that of ``index_select`` would
    add to memory with atomics.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, place: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.copies = copies
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        grad = grad.index_select(0, place)
        return grad if ctx.copies == 1 else grad.view(-1, ctx.copies, grad.shape[1]).sum(1), None, None, None


class _Exchange(torch.autograd.Function):
    """``there(x)``, whose gradient comes ``back``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grad.contiguous()), None, None


def _move(rows: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows to and from each rank, as many as the lists say; gradients go the other way."""
    there = functools.partial(_all_to_all, receive=receive, send=send, group=group)
    back = functools.partial(_all_to_all, receive=send, send=receive, group=group)
    moved: Tensor = _Exchange.apply(rows, there, back)
    return moved


def _all_to_all(rows: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(out, rows, receive, send, group=group)
    return out


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x, group=group)
    return out


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x, group=group)
    return out
