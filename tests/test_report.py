"""What a run leaves behind: the CSV over starts and resumes, the curves, the summary."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest

from moe_gpt.report import COLUMNS, RunReport, StepMetrics, read_metrics

LOAD = [[0.5, 1.5, 1.0, 1.0], [0.25, 1.75, 1.0, 1.0]]


def metrics(step: int, validation: float | None = None, **changes: object) -> StepMetrics:
    values: dict[str, object] = {"dropped_fraction": 0.125, "expert_load": LOAD, "routing_entropy": 1.25} | changes
    return StepMetrics(step, 5.0 / step, 1e-3, 0.5, 1000.0 * step, validation, **values)  # type: ignore[arg-type]


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    report = RunReport(tmp_path / "new" / "run", True, total_steps=20)
    report.log(metrics(10))
    report.log(metrics(20, validation=2.0))
    first, second = read(tmp_path / "new" / "run")
    assert tuple(first) == COLUMNS
    assert (first["step"], first["train_loss"], first["validation_loss"]) == ("10", "0.5", "")
    assert (second["step"], second["train_loss"], second["validation_loss"]) == ("20", "0.25", "2")
    assert (first["load_min"], first["load_max"], first["dropped_fraction"]) == ("0.25", "1.75", "0.125")
    assert 0 <= float(first["elapsed_s"]) <= float(second["elapsed_s"])


def test_resume_removes_later_and_broken_rows(tmp_path: Path) -> None:
    report = RunReport(tmp_path, True, total_steps=50)
    for step in (10, 20, 30):
        report.log(metrics(step))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4")  # a row cut off by a kill
    elapsed = float(read(tmp_path)[1]["elapsed_s"])
    resumed = RunReport(tmp_path, True, total_steps=50, resumed_step=20)
    assert [row["step"] for row in read(tmp_path)] == ["10", "20"]
    resumed.log(metrics(30))
    assert [row["step"] for row in read(tmp_path)] == ["10", "20", "30"]
    assert float(read(tmp_path)[2]["elapsed_s"]) >= elapsed
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv", 1000)] == [10, 20, 30]


def test_fresh_start_begins_a_new_file_and_resume_needs_none(tmp_path: Path) -> None:
    RunReport(tmp_path, True, total_steps=5).log(metrics(1))
    RunReport(tmp_path, True, total_steps=5)
    assert read(tmp_path) == []
    RunReport(tmp_path / "other", True, total_steps=5, resumed_step=3).log(metrics(4))
    assert [row["step"] for row in read(tmp_path / "other")] == ["4"]


def test_disabled_does_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = RunReport(tmp_path / "run", False, total_steps=5)
    report.advance()
    report.log(metrics(1, validation=1.0))
    report.message("text")
    report.finish()
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_lines_without_a_terminal_and_summary(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = RunReport(tmp_path, True, total_steps=20, bigram_loss=2.5)
    for step in range(1, 21):
        report.advance()
        if step % 10 == 0:
            report.log(metrics(step, validation=3.0 - step / 20))
    report.message("checkpoint saved")
    report.finish()
    out, err = capfd.readouterr()
    assert err.splitlines()[0].startswith("step 10/20: loss 0.5000, validation 2.5000, ")
    assert len(err.splitlines()) == 3 and err.splitlines()[2] == "checkpoint saved"
    assert re.search(r"^validation loss, best +2\.0000 nats per byte \(2\.8854 bits\)$", out, re.MULTILINE)
    assert re.search(r"^bigram model +2\.5000 nats per byte", out, re.MULTILINE)
    assert str(tmp_path / "curves.png") in out


def test_progress_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    report = RunReport(tmp_path, True, total_steps=4, resumed_step=2)
    report.advance()
    report.log(metrics(3))
    report.advance()
    report.finish()
    assert "4/4" in terminal.getvalue() and "loss 1.6667" in terminal.getvalue()


@pytest.mark.parametrize("expert_load", [(), LOAD, [[1.0] * 64] * 12, [[0.0, 8.0]]])
def test_curves_are_drawn_for_any_shape_of_load(tmp_path: Path, expert_load: list[list[float]]) -> None:
    report = RunReport(tmp_path, True, total_steps=20, bigram_loss=None)
    changes = {} if expert_load else {"dropped_fraction": None, "routing_entropy": None}
    report.log(metrics(10, expert_load=expert_load, **changes))
    assert not (tmp_path / "curves.png").exists()
    report.log(metrics(20, validation=2.0, expert_load=expert_load, **changes))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    report.finish()


def test_finish_before_any_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    RunReport(tmp_path, True, total_steps=5).finish()
    assert "No step was logged." in capfd.readouterr().out
