"""What one call into a compiled library costs from Python: ctypes with an argument struct, and apache-tvm-ffi.

``python benchmarks/call_cost.py`` compiles a function that does nothing behind both bindings (with ``c++``; no GPU) and
times them. ``pip install apache-tvm-ffi`` first to have both.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import statistics
import subprocess
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

import torch

CALLS, REPEATS = 200_000, 7
POINTERS = [f"pointer{i}" for i in range(6)]
INTEGERS = [f"integer{i}" for i in range(14)]

PLAIN_SOURCE = """
#include <cstdint>
struct Args { void* pointers[6]; int64_t integers[14]; };
extern "C" const char* call(const Args* args, void*) { return args->integers[0] < 0 ? "negative" : nullptr; }
"""

TVM_FFI_SOURCE = """
#include <tvm/ffi/tvm_ffi.h>
using tvm::ffi::TensorView;
void Call(TensorView, TensorView, TensorView, TensorView, TensorView, TensorView, int64_t first, int64_t, int64_t,
          int64_t, int64_t, int64_t) {
  if (first < 0) TVM_FFI_THROW(ValueError) << "negative";
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(call, Call);
"""


class Args(ctypes.Structure):
    """The arguments of an entry point, as ``ep_moe`` passes them."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int64) for name in INTEGERS]


def compile_library(folder: Path, name: str, source: str, *flags: str) -> str:
    """Compile ``source`` into a shared library; returns its path."""
    path, library = folder / f"{name}.cc", folder / f"{name}.so"
    path.write_text(source)
    subprocess.run(["c++", "-O3", "-std=c++17", "-fPIC", "-shared", str(path), "-o", str(library), *flags], check=True)
    return str(library)


def measure(what: str, call: Callable[[], None]) -> None:
    """Print the time of one call: median, least and most of several runs."""
    call()
    times = [seconds / CALLS * 1e6 for seconds in timeit.repeat(call, number=CALLS, repeat=REPEATS)]
    print(f"{what:<58} {statistics.median(times):5.2f} us ({min(times):.2f} to {max(times):.2f})")


def measure_ctypes(folder: Path, tensors: list[torch.Tensor]) -> None:
    """Time ctypes: with the struct filled anew for each call, and with one that is kept."""
    function = ctypes.CDLL(compile_library(folder, "plain", PLAIN_SOURCE)).call
    function.argtypes, function.restype = [ctypes.POINTER(Args), ctypes.c_void_p], ctypes.c_char_p
    byref = ctypes.byref
    a, b, c, d, e, f = tensors
    kept = Args(*(tensor.data_ptr() for tensor in tensors), *range(14))

    def fill_and_call() -> None:
        args = Args(
            a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), e.data_ptr(), f.data_ptr(),
            0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,
        )  # fmt: skip
        error = function(byref(args), 0)
        if error:
            raise RuntimeError(error)

    def call_only() -> None:
        error = function(byref(kept), 0)
        if error:
            raise RuntimeError(error)

    measure("ctypes, struct of 6 data_ptr() and 14 integers, filled anew", fill_and_call)
    measure("ctypes, the same struct kept between calls", call_only)


def measure_tvm_ffi(folder: Path, tensors: list[torch.Tensor]) -> None:
    """Time apache-tvm-ffi with the tensors and 6 integers."""
    import tvm_ffi

    home = Path(tvm_ffi.__file__).parent
    flags = [f"-I{home}/include", f"-L{home}/lib", "-ltvm_ffi"]
    function = tvm_ffi.load_module(compile_library(folder, "ffi", TVM_FFI_SOURCE, *flags)).call
    a, b, c, d, e, f = tensors
    measure(
        f"apache-tvm-ffi {tvm_ffi.__version__}, 6 tensors and 6 integers",
        lambda: function(a, b, c, d, e, f, 0, 1, 2, 3, 4, 5),
    )


def main() -> None:
    """Time what is installed."""
    print(
        f"Python {platform.python_version()}, PyTorch {torch.__version__}; median of {REPEATS} runs of {CALLS:,} calls"
    )
    tensors = [torch.zeros(8) for _ in range(6)]
    with tempfile.TemporaryDirectory() as name:
        measure_ctypes(Path(name), tensors)
        if importlib.util.find_spec("tvm_ffi"):
            measure_tvm_ffi(Path(name), tensors)
        else:
            print("apache-tvm-ffi is not installed: pip install apache-tvm-ffi")


if __name__ == "__main__":
    main()
