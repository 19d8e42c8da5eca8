"""Gradients of a model whose experts are sharded: summed over the right ranks, and clipped by their common norm.

The marking of parameters is that of Megatron-Core (``core/distributed/distributed_data_parallel.py``, checked with
0.16 and 0.19): a parameter with ``allreduce = False`` belongs to one expert-parallel rank, any other is the same
everywhere. :class:`~ep_moe.layer.EPMoELayer` marks its experts so. Megatron users keep Megatron's own data parallelism;
these functions serve a plain training loop, with any ``torch.distributed`` backend. PyTorch's
``DistributedDataParallel`` does not know the mark: it would broadcast the experts of rank 0 to all ranks.

Expected groups, of the D ranks that hold the model: the *data-parallel group* is all D ranks, each with its own
tokens; an *expert-parallel group* is E of them that hold all experts together; an *expert-data-parallel group* is
the D / E ranks that hold the same experts. ``None`` stands for the group of this rank alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

DEFAULT_BUCKET_BYTES = 25 * 1024**2  # as DistributedDataParallel of PyTorch


def is_expert_parameter(parameter: nn.Parameter) -> bool:
    """Whether ``parameter`` belongs to one expert-parallel rank: Megatron-Core's mark ``allreduce = False``."""
    return not getattr(parameter, "allreduce", True)


@torch.no_grad()
def sync_gradients(
    parameters: Iterable[nn.Parameter],
    data_parallel_group: dist.ProcessGroup | None,
    expert_data_parallel_group: dist.ProcessGroup | None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> None:
    """Replace every gradient by that of the mean over all ranks of the ranks' losses.

    The backward pass of a rank must have started from a loss averaged over its own tokens. A shared parameter
    then lacks the tokens of all other ranks: it is summed over ``data_parallel_group``. An expert parameter has
    already received the gradients of the tokens of its whole expert-parallel group, through the dispatcher: it is
    summed over ``expert_data_parallel_group``. Both are divided by the size of ``data_parallel_group``.
    Megatron-Core does the same: there, experts are averaged over the expert-data-parallel ranks and scaled by
    ``edp_size / dp_size``.

    A parameter without gradient counts as zero and receives one, because another rank may have used it. So the
    ranks always agree on what is exchanged. Afterwards the ranks of each group hold the same bits.

    Collective over both groups.

    Args:
        parameters: in the same order on every rank; those that need no gradient are passed over.
        data_parallel_group: all ranks that train the model.
        expert_data_parallel_group: the ranks that hold the same experts as this one.
        bucket_bytes: gradients are exchanged in flat buffers of about this size; a larger one travels alone.
    """
    sizes = {False: _group_size(data_parallel_group), True: _group_size(expert_data_parallel_group)}
    groups = {False: data_parallel_group, True: expert_data_parallel_group}
    exchanges = []
    for bucket in _make_buckets(parameters, bucket_bytes):
        for parameter in bucket.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if sizes[False] == 1:
            continue
        gradients = [parameter.grad for parameter in bucket.parameters if parameter.grad is not None]
        # A large gradient alone in its bucket is exchanged in place where it can be viewed flat.
        flat = gradients[0].reshape(-1) if len(gradients) == 1 else torch.cat([g.reshape(-1) for g in gradients])
        # Scaled before the sum, as Megatron-Core does, so that the sum cannot overflow a narrow type.
        flat.div_(sizes[False])
        work = None
        if sizes[bucket.is_expert] > 1:
            work = dist.all_reduce(flat, group=groups[bucket.is_expert], async_op=True)
        exchanges.append((work, flat, gradients))
    for work, flat, gradients in exchanges:
        if work is not None:
            work.wait()
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    expert_parallel_group: dist.ProcessGroup | None,
) -> Tensor:
    """Measure the 2-norm of the whole model's gradient and scale the gradients down to ``max_norm``.

    To be called after :func:`sync_gradients`. Every distinct parameter counts once: shared ones are the same on
    all ranks, expert shards are added over ``expert_parallel_group``. All ranks get the same bits, also in
    different expert-parallel groups, because each adds the same gathered numbers in the same order. Nothing waits
    for the device. Collective over ``expert_parallel_group``.

    Args:
        parameters: all parameters of this rank, at least one; missing gradients count as zero.
        max_norm: largest norm to leave; 0 measures only.
        expert_parallel_group: ranks that together hold every expert once.

    Returns:
        The norm before scaling, fp32 0-dimensional, on the device of the parameters. If it is not finite, the
        gradients are not finite afterwards either.

    Raises:
        ValueError: without parameters.
    """
    parameters = list(parameters)
    if not parameters:
        raise ValueError("parameters: expected at least one, got none")
    device = parameters[0].device
    shared = _sum_of_squares([p.grad for p in parameters if not is_expert_parameter(p)], device)
    experts = _sum_of_squares([p.grad for p in parameters if is_expert_parameter(p)], device)
    size = _group_size(expert_parallel_group)
    if size > 1:
        # Gathered, not all-reduced: the order of an all-reduce's additions is the backend's own affair.
        shards = experts.new_empty(size)
        dist.all_gather(list(shards.split(1)), experts.reshape(1), group=expert_parallel_group)
        experts = shards.sum()
    norm = (shared + experts).sqrt().float()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@dataclass
class _Bucket:
    """Parameters whose gradients travel in one buffer: of one dtype, device and group."""

    is_expert: bool
    parameters: list[nn.Parameter] = field(default_factory=list)
    num_bytes: int = 0


def _make_buckets(parameters: Iterable[nn.Parameter], bucket_bytes: int) -> list[_Bucket]:
    """Fill buckets in the order of ``parameters``, by what all ranks agree on: never by which gradients exist."""
    buckets: list[_Bucket] = []
    filling: dict[tuple[bool, torch.dtype, torch.device], _Bucket] = {}
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        num_bytes = parameter.numel() * parameter.element_size()
        kind = (is_expert_parameter(parameter), parameter.dtype, parameter.device)
        bucket = filling.get(kind)
        if bucket is None or bucket.num_bytes + num_bytes > bucket_bytes:
            bucket = filling[kind] = _Bucket(is_expert=kind[0])
            buckets.append(bucket)
        bucket.parameters.append(parameter)
        bucket.num_bytes += num_bytes
    return buckets


def _sum_of_squares(gradients: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Squared 2-norm of all gradients together, fp64 0-dimensional: fp32 could overflow in squaring."""
    norms = [
        # In fp32 at least; a bf16 norm would be rounded to 8 bits.
        torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)).to(device)
        for gradient in gradients
        if gradient is not None
    ]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([norm.double() for norm in norms]).square().sum()


def _group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)
