"""What a user can configure, as validated dataclasses.

Every key is declared once, by :func:`~ep_moe.config_fields.key`, with its default, its bounds and one line of
documentation; the loader (``config_loading.py``) and the reference page (``docs/configuration.md``) read these
declarations. Rules that join several keys live in the ``_check_rules`` of the smallest section that holds them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ep_moe.config_fields import ConfigError, Section, format_value, key, require
from ep_moe.config_training import DataConfig, TrainingConfig

__all__ = [
    "MAX_TIMEOUT_S",
    "PHASES",
    "Config",
    "ConfigError",
    "ExpertsConfig",
    "MoEConfig",
    "ModelConfig",
    "PhaseConfig",
    "PhasesConfig",
    "RouterConfig",
    "SharedExpertsConfig",
    "check_ep_size",
]

PHASES = ("train", "prefill", "decode")
MAX_TIMEOUT_S = 10**9  # kernels count nanoseconds in 64 bits


@dataclass(frozen=True)
class ModelConfig(Section):
    """The transformer around the MoE layers."""

    SECTION: ClassVar[str] = "model."

    num_layers: int = key(2, "Transformer layers.", low=1)
    num_dense_layers: int = key(0, "How many of the first layers keep a dense FFN instead of MoE.", low=0)
    hidden_size: int = key(128, "Width of the residual stream; rows of this many values are dispatched.", low=1)
    ffn_hidden_size: int = key(512, "Inner width of the dense FFN (dense layers only).", low=1)
    num_attention_heads: int = key(4, "Attention heads.", low=1)
    num_query_groups: int | None = key(
        None, "Key/value heads of grouped-query attention; null means one per attention head.", low=1
    )
    vocab_size: int = key(256, "Vocabulary entries; 256 for bytes.", low=2)
    init_std: float = key(0.02, "Standard deviation of the normal weight initialisation.", low=0.0)

    def _check_rules(self) -> None:
        require(
            self.hidden_size % self.num_attention_heads == 0,
            "model.hidden_size",
            self.hidden_size,
            f"must be divisible by model.num_attention_heads ({self.num_attention_heads})",
        )
        require(
            self.num_query_groups is None or self.num_attention_heads % self.num_query_groups == 0,
            "model.num_query_groups",
            self.num_query_groups,
            f"must divide model.num_attention_heads ({self.num_attention_heads})",
        )
        require(
            self.num_dense_layers <= self.num_layers,
            "model.num_dense_layers",
            self.num_dense_layers,
            f"must be at most model.num_layers ({self.num_layers})",
        )


@dataclass(frozen=True)
class RouterConfig(Section):
    """How tokens choose experts, and what keeps the choice balanced."""

    SECTION: ClassVar[str] = "moe.router."

    score_function: Literal["softmax", "sigmoid"] = key("softmax", "Turns logits into expert scores.")
    pre_softmax: bool = key(
        False, "Softmax over all experts before top-k (weights then sum to less than 1) instead of after it."
    )
    num_groups: int | None = key(
        None, "Equal groups the experts are divided into for group-limited routing; null for none.", low=1
    )
    group_topk: int | None = key(None, "Groups a token may choose experts from; null for no limit.", low=1)
    routed_scaling_factor: float = key(1.0, "Factor on the routing weights after normalisation.")
    expert_bias: bool = key(False, "Balance by a per-expert bias on the selection scores instead of a loss.")
    expert_bias_update_rate: float = key(1e-3, "Step by which the expert bias moves after each batch.", low=0.0)
    aux_loss_coeff: float = key(0.0, "Weight of the load-balancing loss per micro-batch.", low=0.0)
    seq_aux_loss_coeff: float = key(0.0, "Weight of the load-balancing loss per sequence.", low=0.0)
    global_aux_loss_coeff: float = key(0.0, "Weight of the load-balancing loss over the global batch.", low=0.0)
    z_loss_coeff: float = key(0.0, "Weight of the router z-loss, which keeps logits small.", low=0.0)
    input_jitter: float = key(0.0, "Multiplies router inputs by uniform noise in [1-x, 1+x] in training.", low=0.0)
    dtype: Literal["input", "fp32", "fp64"] = key("fp32", "Precision of the router logits; 'input': as the tokens.")
    capacity_factor: float | None = key(
        None,
        "Rows per expert and rank are limited to this factor times a fair share; the rest is dropped. null: no limit.",
        low=0.0,
    )
    drop_policy: Literal["probs", "position"] = key(
        "probs", "Beyond capacity keep the largest routing weights, or the earliest tokens."
    )
    force_balance: bool = key(False, "Route by random logits: an even load for benchmarks, useless for training.")


@dataclass(frozen=True)
class ExpertsConfig(Section):
    """The routed feed-forward networks."""

    SECTION: ClassVar[str] = "moe.experts."

    ffn_hidden_size: int = key(256, "Inner width of each expert.", low=1)
    activation: Literal["swiglu", "geglu", "gelu", "relu", "squared_relu"] = key(
        "swiglu", "Activation; swiglu and geglu are gated, with a first projection of twice the width."
    )
    backend: Literal["auto", "native", "grouped_mm", "loop", "te"] = key(
        "auto",
        "Grouped GEMM: our own (bf16 on Hopper), PyTorch's grouped_mm, a plain loop, or TransformerEngine. auto: the "
        "first of native, grouped_mm and loop that runs.",
    )
    precision: Literal["input", "fp8"] = key(
        "input",
        "Of the products of rows with weights, forward and backward: that of the rows, or e4m3 with block scales "
        "(native on Hopper, emulated on CPUs and by loop).",
    )
    wgrad_precision: Literal["input", "fp8"] = key(
        "input",
        "Of the gradients of weights: that of the rows, or, with precision: fp8 alone, e4m3 with a scale for each 128 "
        "tokens of a channel of gradients, and for all tokens of an expert in a channel of rows. Made for many rows an "
        "expert: rows and gradients are quantised anew for it, and every expert's are filled up to a multiple of 128.",
    )
    recompute_activation: bool = key(
        True,
        "Training keeps the outputs of the first projection only; backward computes the activations again, with their "
        "gradient, for a third less memory between the projections (half, if the activation is not gated).",
    )

    def _check_rules(self) -> None:
        require(
            self.wgrad_precision == "input" or self.precision == "fp8",
            "moe.experts.wgrad_precision",
            self.wgrad_precision,
            f"needs moe.experts.precision fp8, which is {self.precision}",
        )
        if self.precision == "fp8":
            require(
                self.backend in ("auto", "native", "loop"),
                "moe.experts.precision",
                self.precision,
                f"needs moe.experts.backend auto, native or loop, which is {self.backend}",
            )
            require(
                self.ffn_hidden_size % 128 == 0,
                "moe.experts.precision",
                self.precision,
                f"needs moe.experts.ffn_hidden_size ({self.ffn_hidden_size}) to be a multiple of 128, the scale block",
            )


@dataclass(frozen=True)
class SharedExpertsConfig(Section):
    """An FFN that every token passes, beside the routed experts."""

    SECTION: ClassVar[str] = "moe.shared_experts."

    ffn_hidden_size: int = key(0, "Inner width in all; 0 for no shared experts.", low=0)
    gate: bool = key(False, "Scale the shared output of each token by a learned sigmoid gate.")

    def _check_rules(self) -> None:
        require(
            not self.gate or self.ffn_hidden_size > 0,
            "moe.shared_experts.gate",
            self.gate,
            "needs shared experts: moe.shared_experts.ffn_hidden_size > 0",
        )


@dataclass(frozen=True)
class MoEConfig(Section):
    """One MoE layer."""

    SECTION: ClassVar[str] = "moe."

    num_experts: int = key(8, "Routed experts over all ranks.", low=1)
    top_k: int = key(2, "Experts each token is routed to.", low=1)
    ep_size: int | None = key(None, "Ranks the experts are spread over; null means all processes.", low=1)
    comm: Literal["auto", "portable", "nvlink"] = key(
        "auto",
        "Communicator: 'portable' is torch.distributed (gloo, NCCL); 'nvlink' our kernels between GPUs of one host, "
        "and between hosts moe.comm_between_nodes; 'auto' takes nvlink on one host where it runs, otherwise portable.",
    )
    comm_ranks_per_node: int | None = key(
        None,
        "Consecutive ranks that form a node; in normal mode rows then go between nodes in two hops "
        "(docs/cluster.md). null: the hosts are the nodes for nvlink, and portable goes in one hop.",
        low=1,
    )
    comm_between_nodes: Literal["portable", "loopback", "nvshmem"] = key(
        "portable",
        "What carries rows between nodes: torch.distributed; or, with our kernels on each node, NVSHMEM, or (loopback) "
        "stores between GPUs of one host that pose as nodes.",
    )
    comm_timeout_s: float = key(
        30.0, "Seconds an nvlink kernel waits for a peer before PeerTimeoutError.", low=0.1, high=MAX_TIMEOUT_S
    )
    capacity_rows: int | None = key(
        None,
        "Rows that normal mode makes room for on each rank, so that the host waits for nothing (CUDA graphs); more "
        "are an error. null makes exactly the room there must be.",
        low=1,
    )
    router: RouterConfig = key(RouterConfig, "Routing.")
    experts: ExpertsConfig = key(ExpertsConfig, "Routed experts.")
    shared_experts: SharedExpertsConfig = key(SharedExpertsConfig, "Shared experts.")

    def _check_rules(self) -> None:
        require(
            self.top_k <= self.num_experts,
            "moe.top_k",
            self.top_k,
            f"must be at most moe.num_experts ({self.num_experts})",
        )
        if self.ep_size is not None:
            check_ep_size(self.num_experts, self.ep_size)
        require(
            self.comm_between_nodes == "portable" or self.comm == "nvlink",
            "moe.comm_between_nodes",
            self.comm_between_nodes,
            f"needs moe.comm: nvlink (here {self.comm})",
        )
        self._check_router()

    def _check_router(self) -> None:
        router = self.router
        require(
            (router.num_groups is None) == (router.group_topk is None),
            "moe.router.group_topk",
            router.group_topk,
            f"must be given together with moe.router.num_groups (here {format_value(router.num_groups)})",
        )
        if router.num_groups is not None and router.group_topk is not None:
            require(
                self.num_experts % router.num_groups == 0,
                "moe.router.num_groups",
                router.num_groups,
                f"must divide moe.num_experts ({self.num_experts})",
            )
            require(
                router.group_topk <= router.num_groups,
                "moe.router.group_topk",
                router.group_topk,
                f"must be at most moe.router.num_groups ({router.num_groups})",
            )
            per_group = self.num_experts // router.num_groups
            require(
                self.top_k <= router.group_topk * per_group,
                "moe.top_k",
                self.top_k,
                f"must be at most the {router.group_topk * per_group} experts of moe.router.group_topk groups",
            )
            require(
                router.group_topk <= self.top_k,
                "moe.router.group_topk",
                router.group_topk,
                f"must be at most moe.top_k ({self.top_k})",
            )
        require(
            not router.expert_bias or router.score_function == "sigmoid",
            "moe.router.expert_bias",
            router.expert_bias,
            "needs moe.router.score_function: sigmoid",
        )
        require(
            self.top_k > 1 or router.score_function == "sigmoid" or router.pre_softmax,
            "moe.top_k",
            self.top_k,
            "needs moe.router.pre_softmax: true (a softmax over one chosen expert is always 1 and has no gradient)",
        )


@dataclass(frozen=True)
class PhaseConfig(Section):
    """How tokens travel in one phase."""

    SECTION: ClassVar[str] = "phases.*."

    mode: Literal["normal", "low_latency"] = key(
        "normal", "'normal' for training and prefill; 'low_latency' for decode (fixed shapes, no host sync)."
    )
    dispatch_dtype: Literal["input", "fp8"] = key(
        "input", "Rows travel as they are, or as e4m3 with one fp32 scale per 128 channels."
    )
    num_sms: int | None = key(
        None, "SMs on which rows are moved, besides up to 44 that push them; null: as many as pay.", low=1
    )
    overlap: tuple[Literal["shared_experts", "wgrad"], ...] = key(
        (),
        "Strategies that hide communication behind computation: 'shared_experts' run beside the routed ones; 'wgrad' "
        "(training) computes the weight gradient of the experts' first projection while the gradients of their rows "
        "travel.",
    )
    expert_chunks: int = key(
        1,
        "Strategy of normal mode: a rank's experts compute in so many groups, each while rows of others travel; 1 for "
        "all at once.",
        low=1,
    )
    max_tokens_per_rank: int | None = key(
        None, "Most tokens a rank may bring; required by low_latency. In eval mode it bounds the decode phase.", low=1
    )


def _default_decode() -> PhaseConfig:
    return PhaseConfig(max_tokens_per_rank=128)


@dataclass(frozen=True)
class PhasesConfig(Section):
    """Communication per phase."""

    SECTION: ClassVar[str] = "phases."

    train: PhaseConfig = key(PhaseConfig, "Training, forward and backward.")
    prefill: PhaseConfig = key(PhaseConfig, "Inference on prompts.")
    decode: PhaseConfig = key(_default_decode, "Inference token by token.")

    def _check_rules(self) -> None:
        require(
            self.train.mode == "normal",
            "phases.train.mode",
            self.train.mode,
            "must be normal: low_latency has no backward pass",
        )
        for name in PHASES:
            phase = getattr(self, name)
            require(
                phase.mode == "normal" or phase.max_tokens_per_rank is not None,
                f"phases.{name}.max_tokens_per_rank",
                phase.max_tokens_per_rank,
                "must be set for low_latency, whose buffers have a fixed size",
            )
            require(
                len(set(phase.overlap)) == len(phase.overlap),
                f"phases.{name}.overlap",
                phase.overlap,
                "must name each strategy once",
            )
            require(
                phase.mode == "normal" or phase.expert_chunks == 1,
                f"phases.{name}.expert_chunks",
                phase.expert_chunks,
                "must be 1 for low_latency",
            )
            require(
                name == "train" or "wgrad" not in phase.overlap,
                f"phases.{name}.overlap",
                phase.overlap,
                "wgrad is for phases.train: there are no weight gradients elsewhere",
            )


@dataclass(frozen=True)
class Config(Section):
    """Everything: model, MoE layer, phases, training, data."""

    model: ModelConfig = key(ModelConfig, "The transformer.")
    moe: MoEConfig = key(MoEConfig, "The MoE layer.")
    phases: PhasesConfig = key(PhasesConfig, "Communication per phase.")
    training: TrainingConfig = key(TrainingConfig, "The training loop.")
    data: DataConfig = key(DataConfig, "The training text.")

    def _check_rules(self) -> None:
        whole_blocks = self.model.hidden_size % 128 == 0
        allowed = f"needs model.hidden_size ({self.model.hidden_size}) to be a multiple of 128"
        precision = self.moe.experts.precision
        require(precision == "input" or whole_blocks, "moe.experts.precision", precision, f"{allowed}, the scale block")
        for name in PHASES:
            phase: PhaseConfig = getattr(self.phases, name)
            require(phase.mode == "normal" or whole_blocks, f"phases.{name}.mode", phase.mode, allowed)
            require(
                phase.dispatch_dtype == "input" or whole_blocks,
                f"phases.{name}.dispatch_dtype",
                phase.dispatch_dtype,
                f"{allowed}, the scale block",
            )
            require(
                precision == "input" or phase.expert_chunks == 1,
                f"phases.{name}.expert_chunks",
                phase.expert_chunks,
                f"must be 1 with moe.experts.precision: {precision}",
            )


def check_ep_size(num_experts: int, ep_size: int) -> None:
    """Raise :class:`ConfigError` unless ``num_experts`` spread evenly over ``ep_size`` ranks."""
    require(
        num_experts % ep_size == 0,
        "moe.num_experts",
        num_experts,
        f"must be divisible by the expert-parallel size ({ep_size}, key moe.ep_size)",
    )
