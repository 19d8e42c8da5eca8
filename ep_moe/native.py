"""The CUDA library: finding it, loading it, and saying what is missing.

Its entry points are plain C functions ``const char* ep_moe_xxx(const XxxArgs*, cudaStream_t)`` that return an error
text or null; ``docs/building.md`` says why. Neither finding nor loading the library calls CUDA.
"""

from __future__ import annotations

import ctypes
import functools
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from ep_moe.build_info import (
    LIBRARY_NAME,
    NVSHMEM_HOST_LIBRARY,
    NVSHMEM_LIBRARY_NAME,
    VERSION,
    find_nvcc,
    find_nvshmem,
    library_version,
)
from ep_moe.config_fields import ConfigError

__all__ = [
    "NativeLibraryError",
    "capability",
    "launch",
    "library_path",
    "load_entry_points",
    "load_library",
    "load_nvshmem_library",
    "nvshmem_library_path",
    "open_nvshmem_library",
    "pointer",
    "stream_handle",
]

_PACKAGE = Path(__file__).resolve().parent


class NativeLibraryError(ConfigError):
    """The CUDA library cannot be used. The message is one line: what is missing and how to get it."""


def library_path() -> Path:
    """Where the library is, if it has been built: beside this module."""
    return _PACKAGE / LIBRARY_NAME


@functools.cache
def load_library() -> ctypes.CDLL:
    """Load the library, once per process.

    Raises:
        NativeLibraryError: if it was not built, cannot be loaded, or was built from other sources.
    """
    path = library_path()
    if not path.exists():
        raise NativeLibraryError(
            f"the CUDA library is missing ({path}): ep_moe was installed without nvcc, or with EP_MOE_SKIP_CUDA set; "
            f"{_how_to_build()}"
        )
    return _open(path, "ep_moe_version")


def nvshmem_library_path() -> Path:
    """Where the library for several nodes is, if it has been built: beside this module."""
    return _PACKAGE / NVSHMEM_LIBRARY_NAME


@functools.cache
def open_nvshmem_library() -> ctypes.CDLL:
    """Load the library for several nodes, behind NVSHMEM itself; neither is initialised by that.

    Raises:
        NativeLibraryError: as :func:`load_library`, or if NVSHMEM is missing.
    """
    path, folder = nvshmem_library_path(), find_nvshmem()
    advice = "install nvidia-nvshmem-cu13 (or -cu12), or set NVSHMEM_DIR"
    if not path.exists():
        raise NativeLibraryError(
            f"the NVSHMEM library is missing ({path}): ep_moe was installed without nvcc or NVSHMEM; {advice}, then "
            f"{_how_to_build()}"
        )
    if folder is None:
        raise NativeLibraryError(f"NVSHMEM is missing, which {path.name} needs; {advice}")
    try:
        # By its path, so that the library below finds it loaded whatever LD_LIBRARY_PATH says.
        ctypes.CDLL(str(folder / "lib" / NVSHMEM_HOST_LIBRARY), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise NativeLibraryError(f"NVSHMEM cannot be loaded: {error}; {advice}") from error
    return _open(path, "ep_moe_nvshmem_version")


def load_nvshmem_library(entries: Mapping[str, type[ctypes.Structure]]) -> ctypes.CDLL:
    """The library for several nodes, as :func:`load_entry_points` gives the other one."""
    return _declare(open_nvshmem_library(), entries)


def load_entry_points(entries: Mapping[str, type[ctypes.Structure]]) -> ctypes.CDLL:
    """The library with the signatures of some entry points declared.

    Args:
        entries: names without ``ep_moe_``, each with the struct it takes. The library says how large it takes a struct
            ``XyzArgs`` to be, so one that changed on one side only is found here.

    Raises:
        NativeLibraryError: if there is no library, or its structs have other sizes than these.
    """
    return _declare(load_library(), entries)


def find_entry_points(entries: Mapping[str, type[ctypes.Structure]], without: str) -> ctypes.CDLL | None:
    """As :func:`load_entry_points`, for kernels that can be done without: ``None`` where there is no library.

    Warns of a library that is there and unusable, in words that begin with ``without``: nobody who built one expects
    the slower path.
    """
    try:
        return load_entry_points(entries)
    except NativeLibraryError as error:
        if library_path().exists():
            warnings.warn(f"{without}: {error}", stacklevel=2)
        return None


def _open(path: Path, version_entry: str) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        version = getattr(library, version_entry)
        version.restype = ctypes.c_char_p
        built = version().decode()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"the CUDA library cannot be loaded: {error}; {_how_to_build()}") from error
    csrc = _checkout_csrc()
    expected = library_version(csrc) if csrc else VERSION
    if (built if csrc else built.split("+")[0]) != expected:
        raise NativeLibraryError(
            f"the CUDA library {path} has version {built}, the package needs {expected}; {_how_to_build()}"
        )
    return library


def _declare(library: ctypes.CDLL, entries: Mapping[str, type[ctypes.Structure]]) -> ctypes.CDLL:
    for name, arguments in entries.items():
        struct = re.sub("(?<!^)(?=[A-Z])", "_", arguments.__name__).lower()
        size = getattr(library, f"ep_moe_{struct}_bytes")
        size.restype = ctypes.c_size_t
        if size() != ctypes.sizeof(arguments):
            raise NativeLibraryError(
                f"the CUDA library takes {size()} bytes of {arguments.__name__}, the package passes "
                f"{ctypes.sizeof(arguments)}: they are of different versions; build the library again"
            )
        entry = getattr(library, f"ep_moe_{name}")
        entry.restype = ctypes.c_char_p
        entry.argtypes = (ctypes.POINTER(arguments), ctypes.c_void_p)
    return library


def launch(library: ctypes.CDLL, name: str, arguments: ctypes.Structure, device: torch.device) -> None:
    """Call entry point ``ep_moe_<name>`` on the current stream of ``device``, which has an index.

    Raises:
        RuntimeError: what the entry point reports.
    """
    index = device.index
    if index != torch._C._cuda_getDevice():  # torch.cuda.current_device, without asking whether CUDA is initialised
        with torch.cuda.device(index):
            return launch(library, name, arguments, device)
    error = getattr(library, f"ep_moe_{name}")(ctypes.byref(arguments), stream_handle(index))
    if error is not None:
        raise RuntimeError(error.decode())


def stream_handle(device: int) -> int:
    """The current stream of a GPU.

    Triton asks for it in this way too: ``torch.cuda.current_stream`` builds an object around it, for 4 us a launch.
    """
    return torch._C._cuda_getCurrentRawStream(device)


def current_stream(device: int) -> torch.cuda.Stream:
    """The current stream of a GPU, by an object that is made once."""
    key = device, stream_handle(device)
    stream = _streams.get(key)
    if stream is None:
        stream = _streams[key] = torch.cuda.current_stream(device)
    return stream


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Address of a tensor's data, for a field of an argument struct."""
    return None if tensor is None else tensor.data_ptr()


_streams: dict[tuple[int, int], torch.cuda.Stream] = {}  # by GPU and handle


@functools.cache
def capability(device: int) -> tuple[int, int]:
    """Compute capability of a GPU, major and minor."""
    return torch.cuda.get_device_capability(device)


def has_code_for(device: int) -> bool:
    """Whether the library has code for a GPU: machine code for Hopper, and PTX for newer ones."""
    return capability(device) >= (9, 0)


def _how_to_build() -> str:
    first = "" if find_nvcc() else "install the CUDA toolkit (12.0 or newer), put nvcc on PATH or set CUDA_HOME, then "
    if _checkout_csrc():
        return f"{first}run: python {_PACKAGE.parent / 'csrc' / 'build.py'}"
    return f"{first}reinstall from the sources: pip install --force-reinstall --no-deps --no-cache-dir <ep_moe folder>"


def _checkout_csrc() -> Path | None:
    """The sources, where the package is used from its checkout."""
    csrc = _PACKAGE.parent / "csrc"
    return csrc if (csrc / "version.cu").exists() and (csrc / "build.py").exists() else None
