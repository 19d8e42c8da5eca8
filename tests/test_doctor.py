"""`python -m ep_moe doctor`: complete on any machine, honest about gaps."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from ep_moe import doctor
from ep_moe.__main__ import main
from ep_moe.doctor import Check
from ep_moe.native import NativeLibraryError

NAMES = (
    "ep_moe",
    "Python",
    "torch",
    "CUDA of torch",
    "driver",
    "torch.distributed",
    "GPUs",
    "links",
    "peer access",
    "symmetric memory",
    "nvcc",
    "library",
    "NVSHMEM",
    "Megatron-Core",
    "TransformerEngine",
    "DeepGEMM",
)
# Configuration keys of a version that has everything.
FIELD_TYPES = {
    "MoEConfig": {"comm": Literal["auto", "portable", "nvlink"]},
    "PhaseConfig": {"mode": Literal["normal", "low_latency"]},
}
TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \t{link}\tPXB\t0-15
GPU1\t{link}\t X \tSYS\t0-15
NIC0\tPXB\tSYS\t X

Legend:
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def test_every_check_reports_here_and_every_gap_has_advice() -> None:
    checks = doctor.run_checks()
    assert tuple(check.name for check in checks) == NAMES
    for check in checks:
        assert check.found
        assert check.ok or check.advice.endswith("."), check
        assert "the check failed" not in check.found, check


def test_command_prints_the_report() -> None:
    done = subprocess.run([sys.executable, "-m", "ep_moe", "doctor"], capture_output=True, text=True)
    broken = any(check.broken for check in doctor.run_checks())
    assert done.returncode == int(broken), done.stderr
    for name in NAMES:
        assert f"  {name} " in done.stdout
    assert "moe.comm: portable            yes" in done.stdout
    fastest = "nvlink" if "moe.comm: auto                takes nvlink" in done.stdout else "portable"
    assert f"phases.*.mode: normal         yes, over {fastest}" in done.stdout
    assert f"phases.*.mode: low_latency    yes, over {fastest}" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_gaps_are_named() -> None:
    text = doctor.report(doctor.run_checks())
    assert "comm: portable trains on CPUs" in text
    assert "moe.comm: auto                takes portable" in text
    nvlink = next(line for line in text.splitlines() if "moe.comm: nvlink" in line)
    assert " no: " in nvlink and "GPUs, links, peer access, symmetric memory" in nvlink


def test_without_gaps_everything_in_this_version_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "field_types", lambda section: FIELD_TYPES[section.__name__])
    text = doctor.report([Check(name, True, "fine") for name in NAMES])
    assert "->" not in text and " no: " not in text
    assert "moe.comm: auto                takes nvlink" in text


def test_a_gap_appears_with_its_advice_and_in_the_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "field_types", lambda section: FIELD_TYPES[section.__name__])
    checks = [Check(name, name != "library", "some", "Build it.") for name in NAMES]
    lines = doctor.report(checks).splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("  --  library"))
    assert lines[place + 1].strip() == "-> Build it."
    assert "  moe.comm: nvlink              no: see library" in lines


def test_a_check_that_raises_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_the_weather() -> Check:
        raise OSError("rain")

    checks = doctor.run_checks([check_the_weather, doctor.check_python])
    assert [check.name for check in checks] == ["the weather", "Python"]
    assert checks[0].found == "the check failed: OSError: rain"
    monkeypatch.setattr(doctor, "run_checks", lambda: checks)
    assert main(["doctor"]) == 1
    assert "rain" in capsys.readouterr().out


@pytest.mark.parametrize(("exists", "found"), [(False, "not built"), (True, "built, but unusable")])
def test_library_missing_is_a_gap_but_unusable_is_broken(
    monkeypatch: pytest.MonkeyPatch, exists: bool, found: str
) -> None:
    def fail() -> None:
        raise NativeLibraryError("the reason")

    class Somewhere:
        def exists(self) -> bool:
            return exists

    monkeypatch.setattr(doctor, "load_library", fail)
    monkeypatch.setattr(doctor, "library_path", Somewhere)
    assert doctor.check_library() == Check("library", False, found, "the reason.", broken=exists)


@pytest.mark.parametrize(("link", "ok"), [("NV18", True), ("SYS", False)])
def test_links_are_read_from_the_topology(monkeypatch: pytest.MonkeyPatch, link: str, ok: bool) -> None:
    monkeypatch.setattr(doctor, "_output", lambda *command: TOPOLOGY.format(link=link))
    check = doctor.check_links()
    assert (check.ok, check.found) == (ok, f"between GPUs: {link} (2 of 2)")


def test_nvcc_version_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_nvcc", lambda: "/opt/nvcc")
    monkeypatch.setattr(doctor, "_output", lambda *command: "Cuda compilation tools, release 11.8, V11.8.89")
    assert not doctor.check_nvcc().ok and doctor.check_nvcc().found == "11.8 (/opt/nvcc)"
    monkeypatch.setattr(doctor, "_output", lambda *command: "Cuda compilation tools, release 13.0, V13.0.88")
    assert doctor.check_nvcc().ok


def test_peer_access_names_the_first_closed_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: (device, peer) != (1, 2))
    assert doctor.check_peer_access().found == "missing for 1 of 6 pairs, first GPU 1 to GPU 2"
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: True)
    assert doctor.check_peer_access() == Check("peer access", True, "all 6 pairs")


@pytest.mark.parametrize(("gpus", "ok"), [(0, False), (1, True)])
def test_one_gpu_needs_no_links(monkeypatch: pytest.MonkeyPatch, gpus: int, ok: bool) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(doctor, "_output", lambda *command: "GPU0\t X \t0-15\n" * gpus)
    assert (doctor.check_links().ok, doctor.check_peer_access().ok) == (ok, ok)


def test_deep_gemm_is_probed_and_never_a_gap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    assert doctor.check_deep_gemm().found.startswith("none; ")
    importlib.invalidate_caches()
    (tmp_path / "deep_gemm.py").write_text("raise ImportError('undefined symbol')")
    assert doctor.check_deep_gemm().found.startswith("cannot be imported here (ImportError: undefined symbol); ")
    (tmp_path / "deep_gemm.py").write_text("__version__ = '1.2.3'")
    assert doctor.check_deep_gemm().found.startswith("1.2.3; ") and doctor.check_deep_gemm().ok
    sys.modules.pop("deep_gemm")
