"""Compile ``csrc/*.cu`` into the package's one CUDA library: ``python csrc/build.py``.

``setup.py`` does the same at install. One object a source, in parallel; an object is compiled again when its source,
a header that it includes or this file is newer. Without ``nvcc`` nothing is compiled and the exit code is 0.
"""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "csrc"
# By path, because `import ep_moe` needs torch, which an isolated build does not have.
INFO = runpy.run_path(str(ROOT / "ep_moe" / "build_info.py"))
LIBRARY: Path = ROOT / "ep_moe" / INFO["LIBRARY_NAME"]
# The second library, of the sources in this folder, is compiled where NVSHMEM is found.
NVSHMEM_SOURCES = CSRC / "nvshmem"
NVSHMEM_LIBRARY: Path = ROOT / "ep_moe" / INFO["NVSHMEM_LIBRARY_NAME"]

# Machine code for Hopper; PTX, which the driver compiles at first use, for what came after.
TARGETS = ["-gencode", "arch=compute_90,code=sm_90", "-gencode", "arch=compute_90,code=compute_90"]
# Of sources whose instructions exist on Hopper alone, which PTX for newer GPUs cannot hold.
HOPPER_TARGETS = ["-gencode", "arch=compute_90a,code=sm_90a"]
HOPPER_SOURCES = "grouped_gemm_*.cu"
NVSHMEM_TARGET = ["-gencode", "arch=compute_90,code=sm_90"]  # its device code is linked, which PTX cannot be
COMPILE = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# The CUDA runtime goes into the library and stays invisible, so that it never meets the one torch brings.
LINK = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL"]


class CompileError(RuntimeError):
    """``nvcc`` failed; the message is its command and its output."""


def why_not() -> str | None:
    """Why nothing would be compiled here, or ``None`` if the library would be."""
    if os.environ.get(INFO["SKIP_VARIABLE"], "0") not in ("", "0"):
        return f"{INFO['SKIP_VARIABLE']} is set"
    if not INFO["cuda_files"](CSRC, ".cu"):
        return f"{CSRC} holds no .cu file"
    if INFO["find_nvcc"]() is None:
        return "nvcc was found neither in CUDA_HOME/bin nor on PATH"
    return None


def build() -> Path | None:
    """Compile what changed and link; returns the library, or ``None`` if :func:`why_not` has a reason.

    Raises:
        CompileError: if ``nvcc`` fails.
    """
    reason = why_not()
    if reason:
        print(f"ep_moe: CUDA library not compiled: {reason}", flush=True)
        return None
    version = INFO["library_version"](CSRC)
    sources = [source for source in INFO["cuda_files"](CSRC, ".cu") if source.parent != NVSHMEM_SOURCES]
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_jobs()) as pool:
        objects = list(pool.map(lambda source: _compile(source, version), sources))
    if _older(LIBRARY, objects):
        _nvcc(*TARGETS, *LINK, *map(str, objects), output=LIBRARY)
    print(f"ep_moe: {LIBRARY} is up to date, version {version}", flush=True)
    return LIBRARY


def build_nvshmem() -> Path | None:
    """Compile the library for several nodes; returns it, or ``None`` without ``nvcc`` or NVSHMEM.

    Raises:
        CompileError: if ``nvcc`` fails.
    """
    folder, reason = INFO["find_nvshmem"](), why_not()
    if folder is None:
        reason = reason or "NVSHMEM was found neither in NVSHMEM_DIR nor as a wheel"
    sources = INFO["cuda_files"](NVSHMEM_SOURCES, ".cu")
    if not sources:
        reason = reason or f"{NVSHMEM_SOURCES} holds no .cu file"
    if reason:
        print(f"ep_moe: NVSHMEM library not compiled: {reason}", flush=True)
        return None
    version = INFO["library_version"](CSRC)
    OBJECTS.mkdir(parents=True, exist_ok=True)
    # Of one version: any change of a source makes others.
    targets = {source: OBJECTS / f"nvshmem_{source.stem}-{version}.o" for source in sources}
    for former in OBJECTS.glob("nvshmem*.o"):
        if former not in targets.values():
            former.unlink()
    includes = [f"-I{CSRC / 'include'}", f"-I{folder / 'include'}", f'-DEP_MOE_VERSION="{version}"']

    def compile_source(source: Path) -> None:
        if _older(targets[source], [Path(__file__)]):
            _nvcc(*NVSHMEM_TARGET, *COMPILE, "-rdc=true", *includes, "-c", str(source), output=targets[source])

    with ThreadPoolExecutor(_jobs()) as pool:
        list(pool.map(compile_source, sources))
    if _older(NVSHMEM_LIBRARY, list(targets.values())):
        libraries = [f"-L{folder / 'lib'}", "-lnvshmem_device", f"-l:{INFO['NVSHMEM_HOST_LIBRARY']}"]
        _nvcc(*NVSHMEM_TARGET, *LINK, *map(str, targets.values()), *libraries, output=NVSHMEM_LIBRARY)
    print(f"ep_moe: {NVSHMEM_LIBRARY} is up to date, version {version}", flush=True)
    return NVSHMEM_LIBRARY


def _jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def _compile(source: Path, version: str) -> Path:
    name = "_".join(source.relative_to(CSRC).with_suffix("").parts)
    targets = HOPPER_TARGETS if source.match(HOPPER_SOURCES) else TARGETS
    flags = [*targets, *COMPILE, f"-I{CSRC / 'include'}"]
    if name == "version":
        # Another version is another object, so that a change of any source, a removed one too, links anew.
        name, flags = f"version-{version}", [*flags, f'-DEP_MOE_VERSION="{version}"']
        for former in OBJECTS.glob("version-*.o"):
            if former.name != f"{name}.o":
                former.unlink()
    target = OBJECTS / f"{name}.o"
    includes = target.with_suffix(".d")
    if _older(target, [Path(__file__), *_prerequisites(includes)]):
        _nvcc(*flags, "-MMD", "-MF", str(includes), "-c", str(source), output=target)
    return target


def _prerequisites(includes: Path) -> list[Path]:
    """What the object was compiled from, by the list that ``nvcc`` wrote beside it; that list, if there is none."""
    if not includes.exists():
        return [includes]
    names = shlex.split(includes.read_text().replace("\\\n", " ").partition(":")[2])
    return [Path(name) for name in names]


def _older(target: Path, inputs: list[Path]) -> bool:
    """Whether ``target`` has to be made: it or an input is missing, or an input is newer."""
    if not target.exists() or not all(path.exists() for path in inputs):
        return True
    return target.stat().st_mtime < max(path.stat().st_mtime for path in inputs)


def _nvcc(*arguments: str, output: Path) -> None:
    # Renamed when complete: neither an interrupted compile nor a process that has the library loaded sees half a file.
    partial = output.with_name(f".{os.getpid()}.{output.name}")
    command = [INFO["find_nvcc"](), *arguments, "-o", str(partial)]
    started = time.time()
    print(f"ep_moe: nvcc {output.relative_to(ROOT)}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        partial.unlink(missing_ok=True)
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}")
    if done.stdout.strip():
        print(done.stdout, flush=True)
    # As old as the sources that nvcc read: one that was edited meanwhile is newer and compiled again.
    os.utime(partial, (started, started))
    partial.replace(output)


if __name__ == "__main__":
    try:
        build()
        build_nvshmem()
    except CompileError as error:
        sys.exit(f"ep_moe: nvcc failed\n{error}")
