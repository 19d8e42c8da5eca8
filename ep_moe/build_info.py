"""What the build and the running package must agree on.

``setup.py`` and ``csrc/build.py`` run this file by its path, where torch may not be installed: it imports the
standard library only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

__all__ = [
    "LIBRARY_NAME",
    "NVSHMEM_HOST_LIBRARY",
    "NVSHMEM_LIBRARY_NAME",
    "SKIP_VARIABLE",
    "VERSION",
    "cuda_files",
    "find_nvcc",
    "find_nvshmem",
    "library_version",
]

VERSION = "0.1.0"
LIBRARY_NAME = "libep_moe_cuda.so"
NVSHMEM_LIBRARY_NAME = "libep_moe_nvshmem.so"  # the second one, for several nodes
NVSHMEM_HOST_LIBRARY = "libnvshmem_host.so.3"
SKIP_VARIABLE = "EP_MOE_SKIP_CUDA"


def find_nvcc(environ: Mapping[str, str] = os.environ) -> str | None:
    """The CUDA compiler: that of ``CUDA_HOME`` if it is set and has one, else the first on ``PATH``."""
    folders = [os.path.join(environ["CUDA_HOME"], "bin")] if environ.get("CUDA_HOME") else []
    return shutil.which("nvcc", path=os.pathsep.join([*folders, environ.get("PATH", "")]))


def find_nvshmem(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder with NVSHMEM's ``include`` and ``lib``: ``NVSHMEM_DIR`` if it is set, else that of the pip wheel.

    Also where an isolated build hides the wheels of the environment that it builds for.
    """
    if environ.get("NVSHMEM_DIR"):
        candidates = [Path(environ["NVSHMEM_DIR"])]
    else:
        places = dict.fromkeys([*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        candidates = [Path(place, "nvidia", "nvshmem") for place in places if place]
    return next((folder for folder in candidates if (folder / "lib" / NVSHMEM_HOST_LIBRARY).exists()), None)


def cuda_files(csrc: Path, *suffixes: str) -> list[Path]:
    """The files below ``csrc`` with one of ``suffixes`` (sources and headers if none is given), sorted."""
    return sorted(path for path in csrc.rglob("*") if path.suffix in (suffixes or (".cu", ".cuh")))


def library_version(csrc: Path) -> str:
    """What a library built from ``csrc`` answers to ``ep_moe_version``: the release and a digest of the sources.

    Python and C share argument structs, so a library built from other sources could read the wrong memory. File
    times do not tell: they change with every checkout.
    """
    digest = hashlib.sha256()
    for path in cuda_files(csrc):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{VERSION}+{digest.hexdigest()[:12]}"
