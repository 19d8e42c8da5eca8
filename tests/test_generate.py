"""The generation example: a checkpoint of the training example, prefill and decode, in either mode."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_train_moe import TINY, environment
from test_train_moe import run as train

pytest.importorskip("megatron.core")

# Low-latency mode wants whole blocks of 128 channels.
WIDE = ("model.hidden_size=128", "moe.top_k=2")
PROMPTS = ("def main(", "import torch\n")


def generate(output: Path, processes: int, *overrides: str) -> tuple[list[str], str]:
    """The continued prompts, and the line of rates."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    script = [str(ROOT / "examples" / "generate.py"), "--config", str(ROOT / "configs" / "quickstart.yaml")]
    settings = [*TINY, *WIDE, f"training.output_dir={output}", "training.device=cpu", *overrides]
    words = [word for setting in settings for word in ("--set", setting)]
    words += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    done = subprocess.run(
        [*launcher, *script, *words, "--steps", "12", "--temperature", "0"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    *texts, rates = done.stdout.split("\n---\n")
    return texts, rates


def test_modes_and_splits_agree(tmp_path: Path) -> None:
    train(tmp_path, 2, *WIDE)
    texts, rates = generate(tmp_path, 2)
    assert [text[:9] for text in texts] == [prompt[:9] for prompt in PROMPTS]
    assert re.search(r"prefill \d+ tokens/s, decode \(low_latency\) \d+ tokens/s", rates)
    alone, _ = generate(tmp_path, 1)
    normal, rates = generate(tmp_path, 2, "phases.decode.mode=normal")
    assert "decode (normal)" in rates
    assert texts == alone == normal


def test_too_long_a_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"prompt and text have 21 bytes, the model takes 16"):
        generate(tmp_path, 1, "data.sequence_length=16")
