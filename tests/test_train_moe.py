"""The example end to end: every split of the processes, resume, and ending together."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from programs import Program

pytest.importorskip("megatron.core")

SCRIPT = ROOT / "examples" / "train_moe.py"
TINY = [
    "model.num_layers=2",
    "model.num_dense_layers=1",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.ffn_hidden_size=48",
    "moe.num_experts=4",
    "moe.experts.ffn_hidden_size=32",
    "moe.experts.backend=loop",
    "training.steps=6",
    "training.warmup_steps=0",
    "training.global_batch_size=8",
    "training.learning_rate=1e-2",
    "training.log_interval=1",
    "training.eval_interval=3",
    "training.eval_sequences=8",
    "training.timeout_s=60",
    "data.sequence_length=32",
]


def arguments(output: Path, *overrides: str, flags: tuple[str, ...] = ()) -> list[str]:
    """The command line of a tiny run."""
    settings = [
        *TINY,
        f"data.path={ROOT / 'ep_moe'}",
        f"training.output_dir={output}",
        "training.device=cpu",
        *overrides,
    ]
    config = ["--config", str(ROOT / "configs" / "quickstart.yaml")]
    return [*config, *flags, *(word for setting in settings for word in ("--set", setting))]


def run(output: Path, processes: int, *overrides: str, flags: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """Train and return the rows of ``metrics.csv``."""
    done = train(output, processes, *overrides, flags=flags).wait(timeout_s=240)
    assert done.returncode == 0, done.stderr
    return metrics(output)


def train(output: Path, processes: int, *overrides: str, flags: tuple[str, ...] = ()) -> Program:
    return Program(SCRIPT, arguments(output, *overrides, flags=flags), processes, output)


def metrics(output: Path) -> list[dict[str, str]]:
    with (output / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def torchrun(processes: int, script: Path, words: list[str]) -> list[str]:
    """The command that starts a program as users do."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return [*launcher, str(script), *words]


def losses(rows: list[dict[str, str]]) -> list[float]:
    """Training losses of all steps, then the validation losses."""
    return [float(row["train_loss"]) for row in rows] + [
        float(row["validation_loss"]) for row in rows if row["validation_loss"]
    ]


def test_every_split_of_four_processes_gives_one_loss_curve(tmp_path: Path) -> None:
    no_checkpoint = "training.checkpoint_interval=null"
    curves = {ep: losses(run(tmp_path / f"ep{ep}", 4, f"moe.ep_size={ep}", no_checkpoint)) for ep in (4, 2, 1)}
    assert not list(tmp_path.glob("*/step_*"))
    assert len(curves[4]) == 6 + 2
    assert curves[4][0] > curves[4][5]  # it learns
    assert curves[2] == pytest.approx(curves[4], rel=1e-5)
    assert curves[1] == pytest.approx(curves[4], rel=1e-5)


def test_resume_repeats_the_losses_of_an_uninterrupted_run(tmp_path: Path) -> None:
    bias = ("moe.router.score_function=sigmoid", "moe.router.expert_bias=true", "moe.router.input_jitter=0.01")
    whole = run(tmp_path / "whole", 2, *bias)
    part = tmp_path / "part"
    # The schedule is that of six steps; the run is ended after the checkpoint of step 3.
    stop = train(part, 2, *bias, "training.checkpoint_interval=3", "training.steps=6")
    wait_for(part / "step_00000003" / "shared.pt")
    stop.kill()
    for folder in part.glob("step_00000006"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = run(part, 2, *bias, flags=("--resume",))
    assert losses(resumed) == losses(whole)
    assert [row["step"] for row in resumed] == [str(step) for step in range(1, 7)]


def test_a_checkpoint_resumes_with_another_split(tmp_path: Path) -> None:
    whole = run(tmp_path / "run", 2, "training.checkpoint_interval=3")
    for folder in (tmp_path / "run").glob("step_00000006"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = run(tmp_path / "run", 2, "moe.ep_size=1", flags=("--resume",))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)


def test_a_checkpoint_resumes_with_other_keys_of_how_it_is_run(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 2)
    run(tmp_path / "run", 2, "training.checkpoint_interval=3")
    for file in (tmp_path / "run" / "step_00000006").iterdir():
        file.unlink()
    other = ("moe.experts.recompute_activation=true", "moe.experts.backend=grouped_mm", "moe.capacity_rows=2000")
    resumed = run(tmp_path / "run", 2, *other, flags=("--resume",))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run(tmp_path, 1, "training.steps=1", "training.eval_interval=1")
    done = train(tmp_path, 1, "moe.top_k=3", flags=("--resume",)).wait(timeout_s=120)
    assert done.returncode != 0
    assert "Process 0 failed: moe.top_k = 3: the checkpoint" in done.stderr and "Traceback" not in done.stderr


def test_profile_writes_a_trace_that_a_browser_opens(tmp_path: Path) -> None:
    command = torchrun(2, SCRIPT, arguments(tmp_path, flags=("--profile",)))
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path)) == 6
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    for stage in ("route", "dispatch", "experts", "combine"):
        # the first layer is dense
        assert {f"decoder.layers.1.mlp {stage}", f"decoder.layers.1.mlp {stage} backward"} <= names
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_too_short_to_profile_is_refused(tmp_path: Path) -> None:
    short = train(tmp_path, 1, "training.steps=3", "training.eval_interval=1", flags=("--profile",))
    done = short.wait(timeout_s=120)
    assert done.returncode != 0
    assert "training.steps = 3: --profile records from the 4th step of a run on, this one would take 3" in done.stderr


def test_a_profile_that_fails_is_not_said_to_be_written(tmp_path: Path) -> None:
    place, script = tmp_path / "trace.json", tmp_path / "program.py"
    script.write_text(
        "import sys; from pathlib import Path; from torch import nn; from train_moe import PROFILED_STEPS, profiler\n"
        "with profiler(Path(sys.argv[1]), nn.Linear(1, 1), enabled=True) as on_step:\n"
        "    on_step(PROFILED_STEPS.start); raise SystemExit(3)\n"
    )
    done = Program(script, [str(place)], 1, tmp_path).wait(timeout_s=60)
    assert done.returncode == 3 and "Trace:" not in done.stderr and not place.exists(), done.stderr


def test_a_bad_key_ends_all_processes_with_one_line(tmp_path: Path) -> None:
    command = torchrun(2, SCRIPT, arguments(tmp_path, "moe.topk=4"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "moe.topk = 4: unknown key; did you mean moe.top_k?" in done.stderr
    assert "Traceback (most recent call last):\n  File" in done.stderr  # torchrun's own


def test_when_one_process_dies_all_end(tmp_path: Path) -> None:
    process, workers = start(tmp_path)
    os.kill(workers[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGKILL" in error or "exitcode  : -9" in error
    assert_gone(workers)


def test_ctrl_c_ends_all_processes_with_a_message(tmp_path: Path) -> None:
    process, workers = start(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r"Interrupted\. Steps done: \d+\. Last checkpoint: ", error)
    assert_gone(workers)


def start(output: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A long run on two processes, once it has trained a few steps, and the process ids of its ranks."""
    process = subprocess.Popen(
        torchrun(2, SCRIPT, arguments(output, "training.steps=100000", "training.checkpoint_interval=2")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(output / "step_00000002" / "shared.pt")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if "train_moe.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 2
    return process, workers


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived the run"
        time.sleep(0.1)
