"""Real sets with real leaks: what a good cleaner must find by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from embed_pipeline.cleaning.clean import CleaningReport, clean
from embed_pipeline.cleaning.verify import verify
from embed_pipeline.settings import CleaningSettings, SourceSettings
from embed_pipeline.sources.read import read_sources
from embed_pipeline.tables import PASSAGES_FILE, QRELS_FILE, QUERIES_FILE, RAW_FILE

BEIR = {"kind": "beir", "corpus": "corpus.parquet", "queries": "queries.parquet", "qrels": "qrels.parquet"}
RUN, MOST = 13, 0.2


def clean_folder(folder: Path, out: Path) -> CleaningReport:
    read_sources(SourceSettings.model_validate(BEIR), folder, out)
    report = clean(out / RAW_FILE, CleaningSettings(), 42, out)
    assert verify(out, out / RAW_FILE) == []
    return report


def worst_overlap(out: Path) -> float:
    """Largest share of a dev or test positive's 13-word runs that one train passage holds, in plain Python."""
    found = duckdb.execute(
        f"""SELECT DISTINCT split = 'train', passage_id, text FROM read_parquet('{out / QRELS_FILE}') AS r
            JOIN read_parquet('{out / QUERIES_FILE}') AS q USING (query_id)
            JOIN read_parquet('{out / PASSAGES_FILE}') AS p USING (passage_id) WHERE relevance > 0"""
    ).fetchall()
    holders: dict[tuple[str, ...], set[str]] = {}
    for is_train, passage_id, text in found:
        for run in runs(text) if is_train else ():
            holders.setdefault(run, set()).add(passage_id)
    worst = 0.0
    for is_train, _, text in found:
        own = set() if is_train else runs(text)
        shared: dict[str, int] = {}
        for run in own:
            for holder in holders.get(run, ()):
                shared[holder] = shared.get(holder, 0) + 1
        worst = max(worst, max(shared.values(), default=0) / max(1, len(own)))
    return worst


def runs(text: str) -> set[tuple[str, ...]]:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def test_leaking_queries_put_back_are_found(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    source = shared_data("medquad_mini")
    put_back = f"read_parquet('{source / 'excluded_neardup.parquet'}')"
    columns = {"queries": "query_id, text", "qrels": "query_id, passage_id, score, split"}
    for name, kept in columns.items():
        duckdb.execute(
            f"""COPY (SELECT {kept} FROM read_parquet('{source / name}.parquet') UNION
                SELECT {kept} FROM {put_back} ORDER BY ALL) TO '{tmp_path / name}.parquet'"""
        )
    (tmp_path / "corpus.parquet").symlink_to(source / "corpus.parquet")
    report = clean_folder(tmp_path, tmp_path)
    assert report.split_leaks + report.overlap_leaks > 100
    assert report.queries_by_split["test"] > 500
    assert worst_overlap(tmp_path) <= MOST


def test_scifact_shares_documents_between_its_official_splits(
    tmp_path: Path, shared_data: Callable[[str], Path]
) -> None:
    report = clean_folder(shared_data("scifact"), tmp_path)
    assert report.queries_by_split["test"] == 300
    assert report.split_leaks > 182
    assert worst_overlap(tmp_path) <= MOST


@pytest.mark.parametrize("name", ["tldr_zh"])
def test_chinese(tmp_path: Path, shared_data: Callable[[str], Path], name: str) -> None:
    report = clean_folder(shared_data(name), tmp_path)
    assert report.kept_rows > 0.98 * report.raw_rows
    assert report.queries_by_split["test"] > 400
