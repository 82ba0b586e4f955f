"""Encoded texts that a disk changed or cut short: told, set aside, and encoded again to the same bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embed_pipeline.artifacts import PipelineStore
from embed_pipeline.models import blocks, ranks
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.ranks import Ranks
from embed_pipeline.settings import PipelineSettings
from embed_pipeline.stages import Pipeline, make_cleaned_pairs, make_hard_negatives, make_raw_pairs
from embed_pipeline.tables import HARD_NEGATIVES_FILE
from tests.conftest import one_thread
from tests.orchestration.conftest import settings_of, write_pipeline

Damage = Callable[[Path], object]


def flip_a_bit(file: Path) -> None:
    """The highest bit of an exponent, in the middle of the numbers."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 | 3] ^= 0x40
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def without_checksum(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 32)


DAMAGES = [flip_a_bit, cut_short, empty, without_checksum]


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short])
def test_mining_takes_the_same_negatives(
    damage: Damage, tmp_path: Path, tiny_bert_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = settings_of(tiny_bert_folder)
    write_pipeline(tmp_path / "defs", told)
    settings = PipelineSettings.model_validate(told)
    pipeline = Pipeline(settings, tmp_path / "defs" / "small", PipelineStore(tmp_path / "store", "small"))
    make_raw_pairs(pipeline)
    make_cleaned_pairs(pipeline)
    with one_thread():
        mined = make_hard_negatives(pipeline).artifact
        expected = (mined.path / HARD_NEGATIVES_FILE).read_bytes()
        pipeline.store.remove(mined)
        files = sorted(pipeline.store.embeddings_folder.rglob("*.npy"))
        assert len(files) >= 2
        for file in files:
            damage(file)
        again = make_hard_negatives(pipeline)
    assert not again.reused
    assert (again.artifact.path / HARD_NEGATIVES_FILE).read_bytes() == expected
    for file in files:
        assert f"{file} is not what was written" in caplog.text
        assert file.with_name(f"{file.name}.damaged").is_file()
    pipeline.store.remove(again.artifact)
    caplog.clear()
    make_hard_negatives(pipeline)  # what was encoded again is found
    assert "not what was written" not in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_encoded_again_with_those_that_are_missing(
    damage: Damage, tmp_path: Path, tiny_bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (blocks, ranks):
        monkeypatch.setattr(module, "BLOCK_SIZE", 16)
    texts = [f"the river {i} and the {'old ' * (i % 7)}garden" for i in range(80)]
    expected = Embedder(tiny_bert_folder).encode_passages(texts, progress=False)
    embedder, compute = Embedder(tiny_bert_folder, ranks=Ranks(tmp_path)), Embedder.compute
    encoded: list[int] = []

    def killed_after_three(self: Embedder, *given: object) -> np.ndarray:
        if len(encoded) == 3:
            raise KeyboardInterrupt
        encoded.append(1)
        return compute(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Embedder, "compute", killed_after_three)
    with pytest.raises(KeyboardInterrupt):
        embedder.encode_passages(texts, progress=False)
    [second] = tmp_path.rglob("1.npy")
    damage(second)
    encoded.clear()
    np.testing.assert_array_equal(embedder.encode_passages(texts, progress=False), expected)
    assert len(encoded) == 3  # of five: the two that are missing, and the damaged one


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_a_whole_file_is_seen(damage: Damage, tmp_path: Path, tiny_bert_folder: Path) -> None:
    texts = [f"the river {i}" for i in range(20)]
    embedder = Embedder(tiny_bert_folder, ranks=Ranks(tmp_path))
    expected = np.array(embedder.encode_queries(texts, progress=False))
    [file] = tmp_path.rglob("*.npy")
    damage(file)
    np.testing.assert_array_equal(embedder.encode_queries(texts, progress=False), expected)
