"""The sections of a configuration that belong to the training example, not to the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ep_moe.config_fields import Section, key, require


@dataclass(frozen=True)
class TrainingConfig(Section):
    """The training loop of ``examples/train_moe.py``."""

    SECTION: ClassVar[str] = "training."

    device: Literal["auto", "cpu", "cuda"] = key("auto", "Where to train; auto takes the GPU where there is one.")
    precision: Literal["auto", "fp32", "bf16"] = key("auto", "Arithmetic; auto is bf16 on a GPU and fp32 on a CPU.")
    seed: int = key(1234, "Seed of weights and data order.", low=0)
    steps: int = key(100, "Optimizer steps.", low=1)
    global_batch_size: int = key(16, "Sequences per step over all processes.", low=1)
    micro_batch_size: int | None = key(
        None, "Sequences per forward pass and process; null for the whole share of the process.", low=1
    )
    learning_rate: float = key(1e-3, "Peak learning rate.", low=0.0)
    min_learning_rate: float = key(1e-4, "Learning rate at the end of the cosine decay.", low=0.0)
    warmup_steps: int = key(0, "Steps of linear warm-up.", low=0)
    weight_decay: float = key(0.1, "AdamW weight decay of matrices.", low=0.0)
    adam_beta1: float = key(0.9, "AdamW first-moment decay.", low=0.0, high=1.0)
    adam_beta2: float = key(0.95, "AdamW second-moment decay.", low=0.0, high=1.0)
    grad_clip: float = key(1.0, "Largest global gradient norm; 0 turns clipping off.", low=0.0)
    log_interval: int = key(10, "Steps between log lines.", low=1)
    eval_interval: int = key(100, "Steps between validations.", low=1)
    eval_sequences: int = key(64, "Validation sequences over all processes.", low=1)
    checkpoint_interval: int | None = key(0, "Steps between checkpoints; 0 saves only at the end, null never.", low=0)
    output_dir: str = key("runs/moe", "Folder for checkpoints, CSV, curves and traces.")
    timeout_s: float = key(300.0, "Seconds a process waits for another before it gives up.", low=1.0)

    def _check_rules(self) -> None:
        require(
            self.min_learning_rate <= self.learning_rate,
            "training.min_learning_rate",
            self.min_learning_rate,
            f"must be at most training.learning_rate ({self.learning_rate})",
        )
        require(
            self.warmup_steps <= self.steps,
            "training.warmup_steps",
            self.warmup_steps,
            f"must be at most training.steps ({self.steps})",
        )
        require(
            self.micro_batch_size is None or self.global_batch_size % self.micro_batch_size == 0,
            "training.micro_batch_size",
            self.micro_batch_size,
            f"must divide training.global_batch_size ({self.global_batch_size})",
        )
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(value < 1.0, f"training.{name}", value, "must be less than 1: nothing new would enter the average")


@dataclass(frozen=True)
class DataConfig(Section):
    """Training text, read as bytes."""

    SECTION: ClassVar[str] = "data."

    path: str | None = key(None, "Text file or folder; null for the Python standard library's own sources.")
    pattern: str = key("*.py", "Which files of a folder to read.")
    sequence_length: int = key(256, "Bytes per training sequence.", low=2)
    validation_fraction: float = key(0.05, "Share of the text held out for validation.", low=0.001, high=0.5)
