"""The training text: what is read, how it is split, and which windows are drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from ep_moe.config import ConfigError
from ep_moe.config_training import DataConfig
from moe_gpt import corpus as corpus_module
from moe_gpt.corpus import Corpus, load_corpus, split_text

S = 16


def write_text(folder: Path, size: int = 40_000) -> Path:
    path = folder / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes())
    return path


def make_corpus(folder: Path, **changes: object) -> Corpus:
    config = DataConfig(path=str(write_text(folder)), sequence_length=S)
    return load_corpus(dataclasses.replace(config, **changes))


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.4, 0.5])
@pytest.mark.parametrize("size", [5_000, 100_001, 3_000_000])
def test_split_is_a_partition_with_the_asked_share(size: int, fraction: float) -> None:
    text = np.arange(size, dtype=np.uint32)  # not bytes: every value shows where it was
    train, validation = split_text(text, DataConfig(sequence_length=S, validation_fraction=fraction))
    assert np.array_equal(np.sort(np.concatenate(train + validation)), text)
    for segment in train + validation:
        assert np.array_equal(segment, np.arange(segment[0], segment[0] + len(segment)))
    assert sum(map(len, validation)) / size == pytest.approx(fraction, rel=0.2)  # blocks are coarse
    starts = {"train": {int(s[0]) for s in train}, "validation": {int(s[0]) for s in validation}}
    ends = {"train": {int(s[-1]) + 1 for s in train}, "validation": {int(s[-1]) + 1 for s in validation}}
    assert not starts["train"] & ends["train"] and not starts["validation"] & ends["validation"]


def test_split_at_the_shortest_text_holds_a_window_of_each_kind() -> None:
    config = DataConfig(sequence_length=S, validation_fraction=0.05)
    shortest = 20 * (S + 1)
    train, validation = split_text(np.zeros(shortest, dtype=np.uint8), config)
    assert max(map(len, train)) > S and max(map(len, validation)) > S
    with pytest.raises(ConfigError, match=rf"^data\.path = None: {shortest - 1} bytes of text, must be .* {shortest} "):
        split_text(np.zeros(shortest - 1, dtype=np.uint8), config)


def test_sequences_longer_than_the_usual_block_get_larger_blocks() -> None:
    config = DataConfig(sequence_length=corpus_module.BLOCK_BYTES + 5)
    _, validation = split_text(np.zeros(4_000_000, dtype=np.uint8), config)
    assert all(len(segment) > config.sequence_length for segment in validation)


def test_windows_stay_in_their_split_and_targets_are_one_byte_on(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    for segments, (tokens, targets) in (
        (corpus.train, corpus.train_batch(0, range(300), seed=1)),
        (corpus.validation, corpus.validation_batch(range(300))),
    ):
        assert tokens.shape == targets.shape == (300, S)
        assert tokens.dtype == targets.dtype == torch.int64
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        texts = [segment.tobytes() for segment in segments]
        for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
            window = bytes([*row, target[-1]])
            assert any(window in text for text in texts)


def test_a_sequence_depends_only_on_seed_step_and_place(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    tokens, _ = corpus.train_batch(7, range(8), seed=3)
    parts = [corpus.train_batch(7, places, seed=3)[0] for places in ([0, 1, 2], range(3, 8))]
    assert torch.equal(torch.cat(parts), tokens)
    assert torch.equal(make_corpus(tmp_path).train_batch(7, [5], seed=3)[0], tokens[5:6])
    for other in (corpus.train_batch(8, range(8), seed=3), corpus.train_batch(7, range(8), seed=4)):
        assert not (other[0] == tokens).all(1).any()
    assert len(tokens.unique(dim=0)) == 8
    assert corpus.train_batch(0, [], seed=3)[0].shape == (0, S)


def test_every_place_is_drawn_equally_often() -> None:
    # Windows start at bytes 0..3 of the first segment, nowhere in the second, at 10..11 of the third.
    segments = tuple(np.arange(a, a + n, dtype=np.uint8) for a, n in ((0, 6), (50, 2), (10, 4)))
    corpus = Corpus(train=segments, validation=segments, sequence_length=2, description="", digest="")
    for tokens, tolerance in (
        (corpus.train_batch(0, range(6000), 0)[0], 130),
        (corpus.validation_batch(range(6000))[0], 5),
    ):
        starts, counts = tokens[:, 0].unique(return_counts=True)
        assert starts.tolist() == [0, 1, 2, 3, 10, 11]
        assert (counts - 1000).abs().max() < tolerance


def test_validation_windows_are_fixed_distinct_and_spread(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, validation_fraction=0.3)
    tokens, _ = corpus.validation_batch(range(40))
    assert torch.equal(corpus.validation_batch([30, 2])[0], tokens[[30, 2]])
    joined = b"".join(segment.tobytes() for segment in corpus.validation)
    places = sorted(joined.index(bytes(row)) for row in tokens.tolist())
    gaps = np.diff(places)
    assert gaps.min() > S and gaps.max() < 4 * len(joined) / 40


def test_standard_library_is_the_default() -> None:
    corpus, again = load_corpus(DataConfig()), load_corpus(DataConfig())
    assert corpus.digest == again.digest and "standard library" in corpus.description
    assert sum(map(len, corpus.train)) > 5_000_000
    tokens, _ = corpus.train_batch(0, range(64), seed=0)
    assert (tokens < 128).float().mean() > 0.95


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, letter in (("b/x.txt", b"b"), ("a.txt", b"a"), ("c.txt", b"c"), ("a.md", b"!")):
        (tmp_path / name).write_bytes(letter * 1000)
    corpus = load_corpus(DataConfig(path=str(tmp_path), pattern="*.txt", sequence_length=S, validation_fraction=0.5))
    seen = {bytes([value]) for segment in corpus.train + corpus.validation for value in np.unique(segment).tolist()}
    assert seen == {b"a", b"b", b"c", b"\n"}
    assert corpus.train[0][0] == ord("a") and "3 file(s)" in corpus.description
    (tmp_path / "c.txt").write_bytes(b"d" * 1000)
    assert load_corpus(DataConfig(path=str(tmp_path), pattern="*.txt", sequence_length=S)).digest != corpus.digest


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("nothing", "*", "data.path = .*: no such file or folder"),
        ("", "*.rs", "data.path = .*: no file matches data.pattern .'.*rs'"),
        ("empty.txt", "*", "data.path = .*: 0 bytes of text, must be at least"),
        ("", "/etc/*", "data.pattern = '/etc/.': not a pattern"),
    ],
)
def test_errors_name_the_key_in_one_line(tmp_path: Path, name: str, pattern: str, message: str) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        load_corpus(DataConfig(path=str(tmp_path / name), pattern=pattern))
    assert "\n" not in str(caught.value)
