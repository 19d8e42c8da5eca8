"""The training text as bytes, split for validation, and windows of it chosen without any state.

A window depends only on the seed, the step and its place in the global batch. So any division of the batch over
processes sees the same data, and a resumed run needs no record of what was already read.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep_moe.config import ConfigError
from ep_moe.config_training import DataConfig

Segments = tuple[NDArray[np.uint8], ...]

# The unit of the split: large enough that few windows are lost at its edges, small enough that validation is
# drawn from all over the text.
BLOCK_BYTES = 64 * 1024
# Tests are half of the standard library and partly generated tables; the others are not the library's own sources.
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
# 2^64 divided by the golden ratio: multiples of it, modulo 2^64, are spread evenly however many are taken.
_GOLDEN_STEP = 0x9E3779B97F4A7C15
_WORD = 1 << 64


@dataclass(frozen=True)
class Corpus:
    """Text as bytes, in contiguous segments; a window never leaves its segment, hence never its split.

    Attributes:
        train: training segments, uint8 ``[bytes]`` each.
        validation: held-out segments, likewise.
        sequence_length: S, the tokens of a window; its targets reach one byte further.
        description: one line about the text, for logs.
        digest: hexadecimal prefix of the SHA-256 of the whole text; differs if the text changed between runs.
    """

    train: Segments
    validation: Segments
    sequence_length: int
    description: str
    digest: str

    def train_batch(self, step: int, sequences: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        """Random training windows, uniform over all places where a window fits.

        Args:
            step: optimizer step, 0 or more.
            sequences: places in the global batch of that step, 0 or more; ``range(B)`` is a batch of B.
            seed: of the data order, 0 or more.

        Returns:
            ``tokens`` and ``targets``, int64 ``[len(sequences), S]`` on the CPU; targets are the tokens one byte on.
        """
        # Philox is a function of (key, counter), so it is asked directly; its raw words, unlike the
        # distributions of np.random.Generator, are promised never to change between NumPy versions.
        draws = (int(np.random.Philox(key=seed, counter=[0, 0, index, step]).random_raw()) for index in sequences)
        return _read_windows(self.train, self.sequence_length, draws)

    def validation_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fixed validation windows: those of ``range(n)`` are spread evenly over the held-out text for every n.

        Args:
            indices: which windows, 0 or more.

        Returns:
            ``tokens`` and ``targets``, int64 ``[len(indices), S]`` on the CPU.
        """
        draws = ((index + 1) * _GOLDEN_STEP % _WORD for index in indices)
        return _read_windows(self.validation, self.sequence_length, draws)


def load_corpus(config: DataConfig) -> Corpus:
    """Read the text that ``config`` names and split it.

    Raises:
        ConfigError: naming ``data.path`` or ``data.pattern`` if there is no such text, it cannot be read, or it
            is too short for one validation window.
    """
    if config.path is None:
        name = f"Python {sys.version_info.major}.{sys.version_info.minor} standard library"
        files = _standard_library_files(config.pattern)
    else:
        name = config.path
        files = _user_files(config)
    try:
        text = np.frombuffer(b"\n".join(file.read_bytes() for file in files), dtype=np.uint8)
    except OSError as error:
        raise ConfigError(f"data.path = {config.path}: cannot read {error.filename}: {error.strerror}") from error
    train, validation = split_text(text, config)
    sizes = [sum(map(len, segments)) for segments in (train, validation)]
    return Corpus(
        train=train,
        validation=validation,
        sequence_length=config.sequence_length,
        description=f"{name}: {len(files)} file(s), {sizes[0]:,} bytes to train, {sizes[1]:,} to validate",
        digest=hashlib.sha256(text.data).hexdigest()[:16],
    )


def split_text(text: NDArray[np.uint8], config: DataConfig) -> tuple[Segments, Segments]:
    """Hold out blocks at even distances, ``config.validation_fraction`` of all.

    Args:
        text: uint8 ``[bytes]``.
        config: ``validation_fraction``, ``sequence_length``, and ``path`` for the error.

    Returns:
        Training and validation segments, views of ``text``; neighbouring blocks of one split are one segment.

    Raises:
        ConfigError: naming ``data.path`` if the text is too short for one validation window.
    """
    window = config.sequence_length + 1
    # So many blocks hold one validation block for certain.
    period = math.ceil(1 / config.validation_fraction)
    if len(text) < period * window:
        raise ConfigError(
            f"data.path = {config.path}: {len(text)} bytes of text, must be at least {period * window} for "
            f"data.sequence_length ({config.sequence_length}) and "
            f"data.validation_fraction ({config.validation_fraction})"
        )
    # Small texts get smaller blocks, so that the share is about right, but blocks of several windows where possible.
    block = max(min(BLOCK_BYTES, len(text) // (8 * period)), min(4 * window, len(text) // period))
    starts = range(0, len(text), block)
    # The held-out share of the first n blocks is floor(n * fraction): block n is held out where that steps up.
    held_out_before = np.floor(np.arange(len(starts) + 1) * config.validation_fraction + 1e-9)
    held_out = (np.diff(held_out_before) > 0).tolist()
    splits: dict[bool, list[NDArray[np.uint8]]] = {False: [], True: []}
    for is_validation, run in itertools.groupby(zip(held_out, starts, strict=True), key=lambda pair: pair[0]):
        run_starts = [start for _, start in run]
        splits[is_validation].append(text[run_starts[0] : run_starts[-1] + block])
    return tuple(splits[False]), tuple(splits[True])


def _read_windows(segments: Segments, length: int, draws: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Windows at the places ``draw / 2^64`` of all places where one fits: tokens and targets, ``[draws, length]``."""
    places = np.cumsum([max(0, len(segment) - length) for segment in segments])
    windows = []
    for draw in draws:
        place = draw * int(places[-1]) >> 64
        chosen = int(np.searchsorted(places, place, side="right"))
        start = place - (int(places[chosen - 1]) if chosen else 0)
        windows.append(segments[chosen][start : start + length + 1])
    stacked = np.stack(windows) if windows else np.empty((0, length + 1), dtype=np.uint8)
    both = torch.from_numpy(stacked.astype(np.int64))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _standard_library_files(pattern: str) -> list[Path]:
    """Sources of the standard library, the same for every build of one Python version."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        file
        for file in _find_files(root, pattern, path=None)
        if SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts)
        # These two are written by the build, with the paths of the machine it ran on.
        and not file.name.startswith("_sysconfigdata")
        and not file.relative_to(root).parts[0].startswith("config-")
    ]


def _user_files(config: DataConfig) -> list[Path]:
    assert config.path is not None
    root = Path(config.path).expanduser()
    if not root.exists():
        raise ConfigError(f"data.path = {config.path}: no such file or folder")
    return [root] if root.is_file() else _find_files(root, config.pattern, config.path)


def _find_files(root: Path, pattern: str, path: str | None) -> list[Path]:
    """Files below ``root`` sorted by relative path; ``path`` is the value of ``data.path`` for errors."""
    try:
        files = [file for file in root.rglob(pattern) if file.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"data.pattern = {pattern!r}: not a pattern of relative file names ({error})") from error
    if not files:
        raise ConfigError(f"data.path = {path}: no file matches data.pattern ({pattern!r}) in {root}")
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())
