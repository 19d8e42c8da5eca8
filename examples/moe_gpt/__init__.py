"""The parts of ``examples/train_moe.py``: a byte-level GPT with MoE layers, its text and its reports."""
