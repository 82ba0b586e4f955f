"""The written reference says what the code says."""

from __future__ import annotations

from pathlib import Path

from embed_pipeline.losses import EMBEDDER_LOSSES, NOT_OFFERED, RERANKER_LOSSES, WRAPPERS
from embed_pipeline.reference import losses_reference, write_reference
from tests.conftest import REPOSITORY


def test_the_reference_in_docs_is_what_the_code_gives(tmp_path: Path) -> None:
    for path in write_reference(tmp_path):
        assert (REPOSITORY / "docs" / path.name).read_text() == path.read_text(), "run `make docs` and commit"


def test_every_key_has_a_word_on_what_it_is_for() -> None:
    tables = (REPOSITORY / "docs" / "settings.md").read_text().splitlines()
    silent = [line for line in tables if line.startswith("| `") and line.endswith("|  |")]
    assert not silent, silent


def test_every_loss_stands_in_the_table() -> None:
    text = losses_reference()
    for name in (*EMBEDDER_LOSSES, *RERANKER_LOSSES, *WRAPPERS, *NOT_OFFERED):
        assert name in text
