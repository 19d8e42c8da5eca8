"""Build and metadata of ep_moe."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="ep-moe",
    version="0.1.0",
    description="Expert-parallel Mixture-of-Experts layer for training and inference, a drop-in for Megatron-Core's",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["ep_moe", "ep_moe.*"]),
    package_data={"ep_moe": ["py.typed"]},
    install_requires=["torch>=2.10", "pyyaml>=6.0"],
    extras_require={
        "megatron": ["megatron-core>=0.16"],
        "te": ["transformer-engine[pytorch]>=2.0"],
        "examples": ["megatron-core>=0.16", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66"],
        "lint": ["ruff==0.17.6", "mypy==2.4.1", "types-PyYAML"],
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
