"""Routing, activations and grouped GEMMs on small shapes, for compute-sanitizer; ``tests/run_sanitizer.sh`` runs it.

Every result is compared with the ``loop`` back end in fp32, with garbage behind the last segment, so that a run under a
tool that slows kernels down also shows whether their pipelines hold.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from ep_moe.comm import ExpertSegments, PackedSegments
from ep_moe.config import ExpertsConfig, RouterConfig
from ep_moe.experts import GroupedExperts
from ep_moe.router.scoring import route

HIDDEN, FFN = 256, 128
COUNTS = (3, 0, 130, 17, 1)
EXTRA = 5  # rows behind the last segment
# Of the largest value: of bf16 through a few roundings, and of e4m3.
TOLERANCE = {"input": 0.03, "fp8": 0.15}


def make_experts(
    precision: str, activation: str, wgrad_precision: str = "input"
) -> tuple[GroupedExperts, GroupedExperts]:
    """Experts on the kernels, and the same in fp32 on the oracle."""

    def init_method(weight: Tensor) -> None:
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    kind = {"init_method": init_method, "output_init_method": init_method}
    config = ExpertsConfig(FFN, activation=activation, precision=precision, wgrad_precision=wgrad_precision)
    experts = GroupedExperts(HIDDEN, len(COUNTS), config, device="cuda", dtype=torch.bfloat16, **kind)
    config = ExpertsConfig(FFN, activation=activation, backend="loop")
    oracle = GroupedExperts(HIDDEN, len(COUNTS), config, device="cuda", dtype=torch.float32, **kind)
    oracle.load_state_dict(experts.state_dict())
    return experts, oracle


def far(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether any element is further off than ``tolerance`` times the largest one."""
    return not bool((actual.float() - expected).abs().max() <= tolerance * expected.abs().max())


def check_training(precision: str, wgrad_precision: str, activation: str, into_main_grad: bool) -> list[str]:
    """Names of the results of forward and backward that are wrong."""
    experts, oracle = make_experts(precision, activation, wgrad_precision)
    real = sum(COUNTS)
    counts = torch.tensor(COUNTS, device="cuda")
    ends = counts.cumsum(0).int()
    rows = torch.randn(real + EXTRA, HIDDEN, device="cuda").bfloat16()
    weights, grad = torch.rand(real + EXTRA, device="cuda"), torch.randn_like(rows)
    for behind in (rows, weights, grad):
        behind[real:] = torch.nan
    if into_main_grad:
        for parameter in experts.parameters():
            parameter.main_grad = torch.ones(parameter.shape, device="cuda")  # type: ignore[attr-defined]
            parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    mine = [x.clone().requires_grad_() for x in (rows, weights)]
    theirs = [x[:real].float().requires_grad_() for x in (rows, weights)]
    out = experts(*mine, ExpertSegments(counts, ends, None, real + EXTRA))
    expected = oracle(*theirs, ExpertSegments(counts, ends, COUNTS))
    out.backward(grad)
    expected.backward(grad[:real].float())
    pairs = {"out": (out[:real], expected)}
    for name, got, want in zip(("rows", "row weights"), mine, theirs, strict=True):
        assert got.grad is not None and want.grad is not None
        pairs[f"gradient of {name}"] = got.grad[:real], want.grad
    for (name, got_weight), want_weight in zip(experts.named_parameters(), oracle.parameters(), strict=True):
        assert want_weight.grad is not None
        got_grad = got_weight.main_grad - 1 if into_main_grad else got_weight.grad
        pairs[f"gradient of {name}"] = got_grad, want_weight.grad
    return [name for name, (got, want) in pairs.items() if far(got.detach(), want.detach(), TOLERANCE[precision])]


@torch.no_grad()
def check_packed(precision: str) -> list[str]:
    """``["packed rows"]`` if packed experts give another result than the oracle."""
    experts, oracle = make_experts(precision, "swiglu")
    room, counts = max(COUNTS) + 3, torch.tensor(COUNTS, dtype=torch.int32, device="cuda")
    rows = torch.full((len(COUNTS), room, HIDDEN), torch.nan, device="cuda").bfloat16()
    for expert, count in enumerate(COUNTS):
        rows[expert, :count] = torch.randn(count, HIDDEN, device="cuda")
    real = torch.cat([rows[expert, :count] for expert, count in enumerate(COUNTS)]).float()
    expected = oracle(real, None, ExpertSegments(counts, counts.cumsum(0).int(), COUNTS))
    out = experts(rows, None, PackedSegments(counts, torch.full_like(rows, torch.nan)))
    got = torch.cat([out[expert, :count] for expert, count in enumerate(COUNTS)])
    return ["packed rows"] if far(got, expected, TOLERANCE[precision]) else []


def check_routing() -> list[str]:
    """Names of what the routing kernels choose or differentiate otherwise than fp64 operations."""
    config = RouterConfig(score_function="sigmoid", num_groups=4, group_topk=2)
    logits = torch.stack([torch.randperm(64, device="cuda") for _ in range(37)]).float() / 16
    mine, exact = logits.requires_grad_(), logits.detach().double().requires_grad_()
    (topk_idx, weights), (want_idx, want) = route(mine, 6, config), route(exact, 6, config)
    grad = torch.randn_like(weights)
    weights.backward(grad)
    want.backward(grad.double())
    assert mine.grad is not None and exact.grad is not None
    same = {
        "choice": torch.equal(topk_idx, want_idx),
        "weights": torch.allclose(weights.double(), want, rtol=1e-5),
        "gradient of logits": torch.allclose(mine.grad.double(), exact.grad, rtol=1e-4, atol=1e-6),
    }
    return [name for name, right in same.items() if not right]


def main() -> None:
    """All of them; exit status 1 if a result is wrong."""
    wrong = {
        f"{activation}, precision {precision}, of weights' gradients {wgrad}, main_grad {main_grad}": check_training(
            precision, wgrad, activation, main_grad
        )
        for precision, wgrad in (("input", "input"), ("fp8", "input"), ("fp8", "fp8"))
        for activation in ("swiglu", "geglu", "squared_relu")
        for main_grad in (False, True)
    }
    wrong |= {f"packed, precision {precision}": check_packed(precision) for precision in ("input", "fp8")}
    wrong |= {"routing": check_routing()}
    torch.cuda.synchronize()
    for what, names in wrong.items():
        print(f"{what}: wrong {names or 'nothing'}", flush=True)
    sys.exit(any(wrong.values()))


if __name__ == "__main__":
    main()
