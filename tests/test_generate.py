"""The generation example: a checkpoint of the training example, prefill and decode, in either mode."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from programs import Ended, Program
from test_train_moe import TINY, torchrun
from test_train_moe import run as train

pytest.importorskip("megatron.core")

SCRIPT = ROOT / "examples" / "generate.py"
# Low-latency mode wants whole blocks of 128 channels.
WIDE = ("model.hidden_size=128", "moe.top_k=2")
PROMPTS = ("def main(", "import torch\n")


def arguments(output: Path, *overrides: str, flags: tuple[str, ...] = ()) -> list[str]:
    """The command line; of a flag given twice the last counts."""
    settings = [*TINY, *WIDE, f"training.output_dir={output}", "training.device=cpu", *overrides]
    words = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--steps", "12", "--temperature", "0"]
    words += [word for setting in settings for word in ("--set", setting)]
    words += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return [*words, *flags]


def generate(output: Path, processes: int, *overrides: str, flags: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """The continued prompts, and the line of rates."""
    program = Program(SCRIPT, arguments(output, *overrides, flags=flags), processes, output)
    return read(program.wait(timeout_s=120))


def read(done: Ended | subprocess.CompletedProcess[str]) -> tuple[list[str], str]:
    assert done.returncode == 0, done.stderr
    *texts, rates = done.stdout.split("\n---\n")
    return texts, rates


def test_modes_and_splits_agree(tmp_path: Path) -> None:
    train(tmp_path, 2, *WIDE)
    command = torchrun(2, SCRIPT, arguments(tmp_path))
    texts, rates = read(subprocess.run(command, capture_output=True, text=True, timeout=120))
    assert [text[:9] for text in texts] == [prompt[:9] for prompt in PROMPTS]
    assert re.search(r"prefill \d+ tokens/s, decode \(low_latency\) \d+ tokens/s", rates)
    alone, _ = generate(tmp_path, 1)
    normal, rates = generate(tmp_path, 2, "phases.decode.mode=normal")
    assert "decode (normal)" in rates
    assert texts == alone == normal


def test_too_long_a_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError,
        match=r"Process 0 failed: --steps = 12: prompt and text have 21 bytes, "
        r"the model takes 16 \(data.sequence_length\)\.\n",
    ):
        generate(tmp_path, 1, "data.sequence_length=16")


def test_a_graph_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"--graph: needs a GPU a process, bf16"):
        generate(tmp_path, 1, flags=("--graph",))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--steps", "0", "--steps = 0: must be at least 1"),
        ("--temperature", "-1", "--temperature = -1: must be a finite number of at least 0"),
        ("--checkpoint", "nowhere", "--checkpoint = nowhere: not a folder that train_moe.py has written"),
    ],
)
def test_bad_arguments_end_with_one_line(flag: str, value: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        generate(tmp_path, 1, flags=(flag, value))
    assert f"Process 0 failed: {message}.\n" in str(caught.value)


# The kernels' multiples, and the precision that they compute in.
ON_GPU = (
    "training.device=cuda",
    "training.precision=bf16",
    "moe.experts.backend=auto",
    "moe.experts.ffn_hidden_size=64",
    "moe.comm=nvlink",
)


@pytest.mark.gpu
def test_a_captured_decode_step_gives_the_same_text(tmp_path: Path) -> None:
    train(tmp_path, 1, *WIDE, *ON_GPU)
    texts, rates = generate(tmp_path, 1, *ON_GPU, flags=("--graph",))
    assert "decode (low_latency, CUDA graph)" in rates
    step_by_step, rates = generate(tmp_path, 1, *ON_GPU)
    assert "decode (low_latency)" in rates
    normal, rates = generate(tmp_path, 1, *ON_GPU, "phases.decode.mode=normal")
    assert "decode (normal)" in rates
    assert texts == step_by_step == normal
