"""A plan as Markdown tables and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ep_moe.plan.phases import GpuPlan, PhasePlan


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with right-aligned columns behind the first."""
    ruler = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ruler, *rows))


def routing_table(plans: Sequence[GpuPlan]) -> str:
    """Where experts and tokens lie."""
    head = ("GPUs", "groups x ranks", "nodes of a group", "experts a rank", "ranks a token", "nodes a token", "at most")
    rows = []
    for plan in plans:
        ranks, experts = plan.topology.ranks, plan.phases[0].local_experts
        spread = plan.spread
        rows.append(
            (
                plan.gpus,
                f"{plan.groups} x {ranks}",
                plan.topology.nodes,
                experts,
                f"{spread.ranks:.2f}",
                f"{spread.nodes:.2f}",
                spread.most_nodes,
            )
        )
    return markdown_table(head, rows)


def phase_table(plans: Sequence[GpuPlan], number: int) -> str:
    """One phase over all numbers of GPUs; bytes, messages and queue pairs are of one rank and one exchange."""
    head = (
        "GPUs",
        "NVLink MB",
        "RDMA MB",
        "messages",
        "queue pairs",
        "SMs",
        "buffer MB",
        "dispatch us",
        "combine us",
        "experts us",
        "forward us",
        "backward us",
    )
    return markdown_table(head, [_phase_row(plan.gpus, plan.phases[number]) for plan in plans])


def _phase_row(gpus: int, phase: PhasePlan) -> tuple[object, ...]:
    exchanges = (phase.dispatch, phase.combine)
    return (
        gpus,
        " + ".join(_megabytes(x.nvlink_bytes) for x in exchanges),
        " + ".join(_megabytes(x.rdma_bytes) for x in exchanges),
        f"{phase.dispatch.messages:.0f}",
        max(x.queue_pairs for x in exchanges),
        " + ".join(str(x.sms) for x in exchanges),
        _megabytes(phase.buffer_bytes),
        f"{phase.dispatch.time:.0f} ({phase.dispatch.limit})",
        f"{phase.combine.time:.0f} ({phase.combine.limit})",
        f"{phase.experts:.0f}",
        f"{phase.forward:.0f}",
        f"{phase.backward:.0f}" if phase.backward else "-",
    )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.3g}" if count < 100e6 else f"{count / 1e6:.0f}"


def draw(plans: Sequence[GpuPlan], path: Path) -> None:
    """Write a picture: times of each phase, nodes a token visits, and buffers, over the number of GPUs.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gpus = [plan.gpus for plan in plans]
    figure, axes = pyplot.subplots(1, 5, figsize=(21, 4))
    for number, axis in enumerate(axes[:3]):
        phases = [plan.phases[number] for plan in plans]
        axis.plot(gpus, [p.dispatch.time for p in phases], "o-", label="dispatch")
        axis.plot(gpus, [p.combine.time for p in phases], "o-", label="combine")
        axis.plot(gpus, [p.experts for p in phases], "o-", label="experts, forward")
        axis.plot(gpus, [p.forward + p.backward for p in phases], "k-", label="layer, nothing overlapped")
        axis.set(title=f"{phases[0].phase}, {phases[0].tokens} tokens a rank", ylabel="us", yscale="log")
    axes[3].plot(gpus, [plan.spread.ranks for plan in plans], "o-", label="ranks a token")
    axes[3].plot(gpus, [plan.spread.nodes for plan in plans], "o-", label="nodes a token")
    axes[3].plot(gpus, [plan.topology.nodes for plan in plans], "k:", label="nodes of a group")
    axes[3].set(title="routing", yscale="log")
    for number in (0, 2):
        sizes = [plan.phases[number].buffer_bytes / 1e6 for plan in plans]
        axes[4].plot(gpus, sizes, "o-", label=plans[0].phases[number].phase)
    axes[4].set(title="symmetric buffers", ylabel="MB a rank", yscale="log")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("GPUs")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
