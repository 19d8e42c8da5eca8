"""The CUDA library: how it is built, loaded and missed. None of this needs a GPU; what needs nvcc says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ep_moe import native
from ep_moe.build_info import NVSHMEM_HOST_LIBRARY, VERSION, cuda_files, find_nvcc, find_nvshmem, library_version
from ep_moe.config import ConfigError
from ep_moe.native import (
    NativeLibraryError,
    library_path,
    load_library,
    nvshmem_library_path,
    open_nvshmem_library,
)

ROOT = Path(__file__).resolve().parent.parent
needs_library = pytest.mark.skipif(not library_path().exists(), reason="the CUDA library is not built here")
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not here")


@pytest.fixture(autouse=True)
def _forget_the_loaded_library() -> Iterator[None]:
    load_library.cache_clear()
    yield
    load_library.cache_clear()


def make_checkout(folder: Path, sources: dict[str, str]) -> Path:
    """A copy of what the build needs, with ``sources`` beside version.cu."""
    (folder / "csrc" / "include").mkdir(parents=True)
    (folder / "ep_moe").mkdir()
    for name in ("csrc/build.py", "csrc/version.cu", "ep_moe/build_info.py"):
        shutil.copy(ROOT / name, folder / name)
    for name, text in sources.items():
        (folder / "csrc" / name).write_text(text)
    return folder


def run_build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "csrc" / "build.py")]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@needs_library
def test_library_loads_without_a_gpu_and_tells_its_version() -> None:
    library = load_library()
    assert library.ep_moe_version().decode() == library_version(ROOT / "csrc")
    assert load_library() is library


@needs_library
def test_library_links_neither_torch_nor_python_nor_the_cuda_runtime() -> None:
    needed = subprocess.run(["ldd", str(library_path())], capture_output=True, text=True, check=True).stdout
    assert not any(name in needed for name in ("torch", "python", "cudart", "c10")), needed


def test_a_missing_library_is_explained_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_PACKAGE", tmp_path / "ep_moe")
    monkeypatch.setattr(native, "find_nvcc", lambda: None)
    with pytest.raises(ConfigError) as raised:
        load_library()
    message = str(raised.value)
    assert "\n" not in message
    assert "without nvcc" in message and "install the CUDA toolkit" in message and "pip install" in message


def test_a_checkout_is_told_to_build_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkout(tmp_path, {})
    monkeypatch.setattr(native, "_PACKAGE", tmp_path / "ep_moe")
    monkeypatch.setattr(native, "find_nvcc", lambda: "/usr/bin/nvcc")
    with pytest.raises(NativeLibraryError, match=r"; run: python .*build.py$"):
        load_library()


def test_a_library_that_cannot_be_loaded_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    library_path().write_text("not a library")
    with pytest.raises(NativeLibraryError, match=r"cannot be loaded: .*(invalid ELF header|too short)"):
        load_library()


@needs_nvcc
def test_a_library_of_other_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkout(tmp_path, {})
    assert run_build(tmp_path).returncode == 0
    monkeypatch.setattr(native, "_PACKAGE", tmp_path / "ep_moe")
    assert load_library().ep_moe_version().decode().startswith(f"{VERSION}+")
    load_library.cache_clear()
    (tmp_path / "csrc" / "include" / "args.cuh").write_text("struct Args {};\n")
    with pytest.raises(NativeLibraryError, match=r"the package needs .*; run: python"):
        load_library()


@needs_nvcc
def test_only_what_changed_is_compiled_again(tmp_path: Path) -> None:
    source = 'extern "C" __attribute__((visibility("default"))) int ep_moe_one() { return 1; }\n'
    folder = make_checkout(tmp_path, {"one.cu": '#include "one.cuh"\n' + source})
    header = folder / "csrc" / "include" / "one.cuh"
    header.write_text("")
    first = run_build(folder)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "one.o" in first.stdout
    assert "nvcc" not in run_build(folder).stdout
    (folder / "csrc" / "two.cu").write_text(source.replace("one", "two"))
    second = run_build(folder).stdout
    assert "two.o" in second and "one.o" not in second
    header.write_text("struct One {};\n")
    third = run_build(folder).stdout
    assert "one.o" in third and "two.o" not in third
    (folder / "csrc" / "two.cu").unlink()
    assert "libep_moe_cuda.so" in run_build(folder).stdout


@needs_nvcc
def test_a_failing_compile_shows_the_compiler_output(tmp_path: Path) -> None:
    done = run_build(make_checkout(tmp_path, {"bad.cu": "int f() { return undeclared; }\n"}))
    assert done.returncode != 0
    assert 'identifier "undeclared" is undefined' in done.stderr
    assert not list((tmp_path / "ep_moe").glob("*.so"))


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"EP_MOE_SKIP_CUDA": "1"}, "EP_MOE_SKIP_CUDA is set"), ({"PATH": "", "CUDA_HOME": ""}, "nvcc was found neither")],
)
def test_build_without_compiler_succeeds_and_says_why(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    done = run_build(make_checkout(tmp_path, {}), **environment)
    assert done.returncode == 0
    assert reason in done.stdout


def test_build_of_no_sources_succeeds(tmp_path: Path) -> None:
    folder = make_checkout(tmp_path, {})
    (folder / "csrc" / "version.cu").unlink()
    done = run_build(folder)
    assert done.returncode == 0
    assert "holds no .cu file" in done.stdout


def test_cuda_home_precedes_path(tmp_path: Path) -> None:
    for name in ("home/bin", "path"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "nvcc").touch(mode=0o755)
    on_path = {"PATH": str(tmp_path / "path")}
    assert find_nvcc(on_path) == str(tmp_path / "path" / "nvcc")
    assert find_nvcc({**on_path, "CUDA_HOME": str(tmp_path / "home")}) == str(tmp_path / "home/bin/nvcc")
    assert find_nvcc({**on_path, "CUDA_HOME": str(tmp_path / "nowhere")}) == str(tmp_path / "path" / "nvcc")


def test_the_version_depends_on_names_and_contents(tmp_path: Path) -> None:
    csrc = make_checkout(tmp_path, {}) / "csrc"
    versions = {library_version(csrc)}
    (csrc / "a.cu").write_text("1")
    versions.add(library_version(csrc))
    (csrc / "a.cu").write_text("2")
    versions.add(library_version(csrc))
    (csrc / "a.cu").rename(csrc / "b.cu")
    versions.add(library_version(csrc))
    assert len(versions) == 4
    assert [path.name for path in cuda_files(csrc, ".cu")] == ["b.cu", "version.cu"]


def make_nvshmem(folder: Path) -> Path:
    """A folder that looks like NVSHMEM's."""
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / NVSHMEM_HOST_LIBRARY).touch()
    return folder


def test_nvshmem_dir_precedes_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_nvshmem(tmp_path / "site" / "nvidia" / "nvshmem")
    given = make_nvshmem(tmp_path / "given")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert find_nvshmem({}) == wheel
    assert find_nvshmem({"NVSHMEM_DIR": str(given)}) == given
    assert find_nvshmem({"NVSHMEM_DIR": str(tmp_path / "nowhere")}) is None


def test_a_missing_nvshmem_library_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_nvshmem_library.cache_clear()
    monkeypatch.setattr(native, "_PACKAGE", tmp_path / "ep_moe")
    with pytest.raises(NativeLibraryError, match=r"the NVSHMEM library is missing .*set NVSHMEM_DIR"):
        open_nvshmem_library()


@pytest.mark.skipif(
    not nvshmem_library_path().exists() or find_nvshmem() is None, reason="the library for NVSHMEM is not built here"
)
def test_nvshmem_library_loads_without_a_gpu() -> None:
    open_nvshmem_library.cache_clear()
    assert open_nvshmem_library().ep_moe_nvshmem_version().decode() == library_version(ROOT / "csrc")


def test_the_package_does_not_touch_nvshmem_by_itself() -> None:
    program = "import sys, ep_moe, ep_moe.comm; assert not [name for name in sys.modules if 'nvshmem' in name]"
    subprocess.run([sys.executable, "-c", program], check=True)
