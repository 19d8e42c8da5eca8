"""Groups of local experts, in which an exchange of expert-major rows can be cut."""

from __future__ import annotations

import itertools


def expert_groups(local_experts: int, groups: int) -> list[tuple[int, int]]:
    """``groups`` ranges of consecutive local experts, first and end of each; their sizes differ by at most one.

    Raises:
        ValueError: unless every group has an expert.
    """
    if not 1 <= groups <= local_experts:
        raise ValueError(f"groups: expected 1 to {local_experts} (the local experts), got {groups}")
    bounds = [local_experts * group // groups for group in range(groups + 1)]
    return list(itertools.pairwise(bounds))
