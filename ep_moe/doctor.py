"""``python -m ep_moe doctor``: what this machine can run, and what to do about each gap.

Every check is a function without arguments that returns a :class:`Check`; none needs a GPU, a driver or ``nvcc``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import get_args

import torch
import torch.distributed as dist

from ep_moe.build_info import VERSION, find_nvcc
from ep_moe.config import MoEConfig, PhaseConfig
from ep_moe.config_fields import field_types
from ep_moe.native import NativeLibraryError, library_path, load_library

__all__ = ["CHECKS", "Check", "main", "report", "run_checks"]

# What comm: nvlink and everything built on it needs, by name of the check, in the order to fix them.
_NVLINK_NEEDS = ("GPUs", "links", "peer access", "symmetric memory", "library")
_COMM_NEEDS = {"portable": ("torch.distributed",), "nvlink": _NVLINK_NEEDS}


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: what was checked.
        ok: whether it is as it should be.
        found: what is there, in a few words.
        advice: one sentence on what to do; empty if there is nothing to do.
        broken: the package itself is at fault, not what the machine offers.
    """

    name: str
    ok: bool
    found: str
    advice: str = ""
    broken: bool = False


def check_package() -> Check:
    """The release of ep_moe."""
    return Check("ep_moe", True, VERSION)


def check_python() -> Check:
    """The Python version."""
    return Check("Python", sys.version_info >= (3, 10), platform.python_version(), "Use Python 3.10 or newer.")


def check_torch() -> Check:
    """The PyTorch version."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return Check("torch", (major, minor) >= (2, 10), str(torch.__version__), "Install PyTorch 2.10 or newer.")


def check_torch_cuda() -> Check:
    """The CUDA version that PyTorch was built for."""
    if torch.version.cuda is None:
        advice = "To use GPUs, install a CUDA build of PyTorch (pytorch.org/get-started); CPUs need none."
        return Check("CUDA of torch", False, "none (CPU build)", advice)
    return Check("CUDA of torch", True, torch.version.cuda)


def check_driver() -> Check:
    """The NVIDIA driver, and whether PyTorch can use it."""
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    if not versions:
        return Check("driver", False, "none (nvidia-smi does not answer)", "To use GPUs, install the NVIDIA driver.")
    if torch.version.cuda is not None and not torch.cuda.is_available():
        advice = f"Update the driver, or install a PyTorch for an older CUDA than {torch.version.cuda}."
        return Check("driver", False, f"{versions[0]}, which PyTorch cannot use", advice)
    return Check("driver", True, versions[0])


def check_distributed() -> Check:
    """The back ends of ``torch.distributed``."""
    there = dist.is_available()
    backends = [
        name
        for name, available in (
            ("gloo", there and dist.is_gloo_available()),
            ("nccl", there and dist.is_nccl_available()),
        )
        if available
    ]
    advice = "Install a PyTorch built with torch.distributed."
    return Check("torch.distributed", bool(backends), ", ".join(backends) or "none", advice)


def check_gpus() -> Check:
    """The GPUs that PyTorch sees, and whether the kernels run on them."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    if not gpus:
        return Check(
            "GPUs", False, "none", "comm: nvlink needs NVIDIA GPUs; without any, comm: portable trains on CPUs."
        )
    kinds = [f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus]
    found = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    recent = all((gpu.major, gpu.minor) >= (9, 0) for gpu in gpus)
    return Check(
        "GPUs", recent, found, "The kernels need compute capability 9.0 (Hopper) or newer; use comm: portable."
    )


def check_links() -> Check:
    """What connects the GPUs."""
    rows = re.findall(r"^GPU\d+\s.*$", _output("nvidia-smi", "topo", "-m"), re.MULTILINE)
    if len(rows) < 2:
        found = "one GPU, nothing to connect" if rows else "no GPUs to connect"
        return Check("links", bool(rows), found, "comm: nvlink needs GPUs.")
    links = [row.split()[1 + column] for line, row in enumerate(rows) for column in range(len(rows)) if column != line]
    found = "between GPUs: " + ", ".join(
        f"{link} ({links.count(link)} of {len(links)})" for link in dict.fromkeys(links)
    )
    advice = "Not all GPUs are joined by NVLink; choose some that are with CUDA_VISIBLE_DEVICES, or use comm: portable."
    return Check("links", all(link.startswith("NV") for link in links), found, advice)


def check_peer_access() -> Check:
    """Whether every GPU can read and write the memory of every other."""
    pairs = list(permutations(range(torch.cuda.device_count()), 2))
    if not pairs:
        found = "one GPU, no other to reach" if torch.cuda.device_count() else "no GPUs"
        return Check("peer access", torch.cuda.device_count() == 1, found, "comm: nvlink needs GPUs.")
    closed = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if closed:
        found = f"missing for {len(closed)} of {len(pairs)} pairs, first GPU {closed[0][0]} to GPU {closed[0][1]}"
        advice = "Look for GPUs passed through to a virtual machine one by one, PCIe ACS or MIG; or use comm: portable."
        return Check("peer access", False, found, advice)
    return Check("peer access", True, f"all {len(pairs)} pairs")


def check_symmetric_memory() -> Check:
    """PyTorch's symmetric memory, and the variables that change it."""
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("TORCH_SYMM_MEM")]
    try:
        module = importlib.import_module("torch.distributed._symmetric_memory")
    except ImportError as error:
        advice = "Install PyTorch 2.10 or newer with torch.distributed."
        return Check("symmetric memory", False, f"cannot be imported: {error}", advice)
    missing = [name for name in ("empty", "rendezvous") if not hasattr(module, name)]
    if missing:
        return Check("symmetric memory", False, f"lacks {', '.join(missing)}", "Install PyTorch 2.10 or newer.")
    if not torch.cuda.is_available():
        found = ", ".join(["in PyTorch, but without a GPU there is nothing to map", *variables])
        return Check("symmetric memory", False, found, "It works once PyTorch sees GPUs.")
    return Check("symmetric memory", True, ", ".join(["in PyTorch", *variables]))


def check_nvcc() -> Check:
    """The CUDA compiler."""
    nvcc = find_nvcc()
    if nvcc is None:
        advice = "Install the CUDA toolkit 12.0 or newer and put nvcc on PATH or set CUDA_HOME, then reinstall ep_moe."
        if library_path().exists():
            advice = "Nothing to do: the library is there already."
        return Check("nvcc", False, "neither in CUDA_HOME/bin nor on PATH", advice)
    match = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if match is None:
        return Check(
            "nvcc", False, f"{nvcc} does not tell its version", f"Run {nvcc} --version and repair the toolkit."
        )
    recent = int(match[1]) >= 12
    return Check("nvcc", recent, f"{match[1]}.{match[2]} ({nvcc})", "Install the CUDA toolkit 12.0 or newer.")


def check_library() -> Check:
    """The CUDA library of this package."""
    try:
        version = load_library().ep_moe_version().decode()
    except NativeLibraryError as error:
        built = library_path().exists()
        found = "built, but unusable" if built else "not built"
        return Check("library", False, found, f"{error}.", broken=built)
    return Check("library", True, f"loads, version {version}")


def check_nvshmem() -> Check:
    """NVSHMEM, for several nodes."""
    folder = os.environ.get("NVSHMEM_DIR")
    if folder:
        there = os.path.isdir(os.path.join(folder, "lib"))
        found = f"NVSHMEM_DIR={folder}" + ("" if there else ", which has no folder lib")
        return Check("NVSHMEM", there, found, "Set NVSHMEM_DIR to the folder that holds NVSHMEM's include and lib.")
    for name in ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12"):
        version = _installed(name)
        if version:
            return Check("NVSHMEM", True, f"{version} ({name})")
    cuda = (torch.version.cuda or "13").split(".")[0]
    advice = f"One node does not need it; for several, pip install nvidia-nvshmem-cu{cuda} or set NVSHMEM_DIR."
    return Check("NVSHMEM", False, "none", advice)


def check_megatron() -> Check:
    """Megatron-Core, for the adapter."""
    advice = "Only ep_moe.megatron and the training example need it: pip install 'megatron-core>=0.16'."
    version = _installed("megatron-core")
    return Check("Megatron-Core", version is not None, version or "none", advice)


def check_transformer_engine() -> Check:
    """TransformerEngine, for one back end of the experts."""
    advice = "Only moe.experts.backend: te needs it: pip install 'transformer-engine[pytorch]'."
    version = _installed("transformer-engine")
    return Check("TransformerEngine", version is not None, version or "none", advice)


def check_deep_gemm() -> Check:
    """DeepGEMM, which is never a gap: no back end of the experts is built on it, and this says why."""
    why = "no back end uses it: it compiles at run time and wants rows padded to multiples of 128"
    if importlib.util.find_spec("deep_gemm") is None:
        return Check("DeepGEMM", True, f"none; {why}")
    try:
        version = getattr(importlib.import_module("deep_gemm"), "__version__", "of unknown version")
    except Exception as error:  # a wheel for another PyTorch fails in ways of its own
        return Check("DeepGEMM", True, f"cannot be imported here ({type(error).__name__}: {error}); {why}")
    return Check("DeepGEMM", True, f"{version}; {why}")


CHECKS: tuple[Callable[[], Check], ...] = (
    check_package,
    check_python,
    check_torch,
    check_torch_cuda,
    check_driver,
    check_distributed,
    check_gpus,
    check_links,
    check_peer_access,
    check_symmetric_memory,
    check_nvcc,
    check_library,
    check_nvshmem,
    check_megatron,
    check_transformer_engine,
    check_deep_gemm,
)


def run_checks(checks: Sequence[Callable[[], Check]] = CHECKS) -> list[Check]:
    """Run ``checks`` in order; one that raises is itself a gap, so that the others are still reported."""
    results = []
    for check in checks:
        try:
            results.append(check())
        except Exception as error:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            found = f"the check failed: {type(error).__name__}: {error}"
            results.append(Check(name, False, found, "Please report this.", broken=True))
    return results


def report(checks: Sequence[Check]) -> str:
    """The text that ``doctor`` prints for these outcomes."""
    width = max(len(check.name) for check in checks)
    lines = ["Found ('--' marks a gap):", ""]
    for check in checks:
        lines.append(f"  {'ok' if check.ok else '--'}  {check.name:<{width}}  {check.found}")
        if not check.ok:
            lines.append(f"      {'':<{width}}  -> {check.advice}")
    lines += ["", "This machine can run:", ""]
    lines += [f"  {name:<28}  {verdict}" for name, verdict in _verdicts(checks)]
    return "\n".join(lines)


def main() -> int:
    """Print the report; returns 1 if the package itself is broken, otherwise 0."""
    checks = run_checks()
    print(report(checks))
    return int(any(check.broken for check in checks))


def _verdicts(checks: Sequence[Check]) -> Iterator[tuple[str, str]]:
    """Every value of ``moe.comm`` and mode of a phase, and whether it runs here."""
    failed = {check.name for check in checks if not check.ok}
    known = get_args(field_types(MoEConfig)["comm"])
    fastest = "portable"
    for comm, needs in _COMM_NEEDS.items():
        verdict = _verdict(needs, failed, in_version=comm in known)
        fastest = comm if verdict == "yes" else fastest
        yield f"moe.comm: {comm}", verdict
    yield "moe.comm: auto", f"takes {fastest}"
    for mode in get_args(field_types(PhaseConfig)["mode"]):
        verdict = _verdict(_COMM_NEEDS[fastest], failed, in_version=True)
        yield f"phases.*.mode: {mode}", f"{verdict}, over {fastest}" if verdict == "yes" else verdict


def _verdict(needs: Sequence[str], failed: set[str], in_version: bool) -> str:
    missing = [name for name in needs if name in failed]
    reasons = [] if in_version else ["not in this version of ep_moe"]
    if missing:
        reasons.append("see " + ", ".join(missing))
    return "no: " + "; ".join(reasons) if reasons else "yes"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """What a command prints; nothing if it does not exist, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
