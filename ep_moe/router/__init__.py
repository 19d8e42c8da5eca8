"""Routing: how tokens choose experts, and what keeps the choice balanced."""

from ep_moe.router.losses import AuxLoss, LossAttacher, attach_loss, set_loss_scale
from ep_moe.router.replay import RecordedRouting, record_routing, replay_routing
from ep_moe.router.router import Routing, TopKRouter
from ep_moe.router.scoring import SelectExperts, select_experts
from ep_moe.router.statistics import RouterStatistics, RoutingSummary

__all__ = [
    "AuxLoss",
    "LossAttacher",
    "RecordedRouting",
    "RouterStatistics",
    "Routing",
    "RoutingSummary",
    "SelectExperts",
    "TopKRouter",
    "attach_loss",
    "record_routing",
    "replay_routing",
    "select_experts",
    "set_loss_scale",
]
