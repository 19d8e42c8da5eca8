"""The parts of ``examples/train_moe.py``: a byte-level GPT with MoE layers, its text and its reports."""

import logging
import warnings

# Megatron warns, on import and later, of every optional package that it does without, of layers that are not its own,
# and of its GPTModel, which will get no new features.
warnings.filterwarnings("ignore", module=r"megatron\.")
for _name in ("transformer.transformer_layer", "models.gpt.gpt_model"):
    logging.getLogger(f"megatron.core.{_name}").setLevel(logging.ERROR)
