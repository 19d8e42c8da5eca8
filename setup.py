"""Build and metadata of ep_moe. The CUDA library is compiled by ``csrc/build.py`` (docs/building.md)."""

import runpy
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
INFO = runpy.run_path(str(ROOT / "ep_moe" / "build_info.py"))
CUDA = runpy.run_path(str(ROOT / "csrc" / "build.py"))


class CudaDistribution(Distribution):
    """Has setuptools run :class:`BuildCuda` although there are no extension modules in its sense."""

    def has_ext_modules(self) -> bool:
        """True, always."""
        return True


class BuildCuda(build_ext):
    """Compiles the CUDA libraries beside their package, where an editable install finds them, and fills wheels."""

    def run(self) -> None:
        """Compile; a machine without ``nvcc`` gets a message and a package without the library."""
        super().run()
        libraries = {INFO["LIBRARY_NAME"]: CUDA["build"](), INFO["NVSHMEM_LIBRARY_NAME"]: CUDA["build_nvshmem"]()}
        if self.editable_mode or self.inplace:
            return
        for name, library in libraries.items():
            packed = Path(self.build_lib) / "ep_moe" / name
            packed.unlink(missing_ok=True)  # of an earlier build with nvcc, or with NVSHMEM
            if library:
                self.mkpath(str(packed.parent))
                self.copy_file(str(library), str(packed))


class Wheel(bdist_wheel):
    """Tags the wheel: the library depends on the platform, not on Python."""

    def finalize_options(self) -> None:
        """Without the library the wheel is pure Python."""
        super().finalize_options()
        self.root_is_pure = CUDA["why_not"]() is not None

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>`` with the library, ``py3-none-any`` without."""
        return "py3", "none", super().get_tag()[2]


setup(
    name="ep-moe",
    version=INFO["VERSION"],
    description="Expert-parallel Mixture-of-Experts layer for training and inference, a drop-in for Megatron-Core's",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["ep_moe", "ep_moe.*"]),
    package_data={"ep_moe": ["py.typed"]},
    distclass=CudaDistribution,
    cmdclass={"build_ext": BuildCuda, "bdist_wheel": Wheel},
    install_requires=["torch>=2.10", "pyyaml>=6.0"],
    extras_require={
        "megatron": ["megatron-core>=0.16"],
        "nvshmem": ["nvidia-nvshmem-cu13>=3.4"],
        "te": ["transformer-engine[pytorch]>=2.0"],
        "examples": ["megatron-core>=0.16", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66"],
        "lint": ["clang-format==23.1.5", "ruff==0.17.6", "mypy==2.4.1", "types-PyYAML"],
        "test": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "megatron-core>=0.16",
            "numpy>=1.26",
            "matplotlib>=3.8",
            "tqdm>=4.66",
            "psutil>=5.9",  # Megatron's checkpoint writer asks for it
        ],
    },
)
