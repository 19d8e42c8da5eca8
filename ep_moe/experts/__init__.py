"""Experts: the feed-forward networks that tokens are routed to, and the shared ones that every token passes."""

from ep_moe.experts.activation import apply_activation, fc1_width, is_gated
from ep_moe.experts.grouped import GroupedExperts
from ep_moe.experts.init import initialize_experts
from ep_moe.experts.shared import SharedExperts

__all__ = ["GroupedExperts", "SharedExperts", "apply_activation", "fc1_width", "initialize_experts", "is_gated"]
