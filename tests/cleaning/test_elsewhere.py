"""Several sources for one model: what one holds out for dev and test, no other trains on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embed_pipeline.cleaning.sources import (
    Reports,
    clean_sources,
    read_reports,
    told,
    verify_sources,
    verify_sources_apart,
)
from embed_pipeline.errors import ArtifactError
from embed_pipeline.settings import CleaningSettings, ExtraSourceSettings, ModelSource, SourceSettings
from embed_pipeline.tables import (
    EXAMPLES_FILE,
    QUERIES_FILE,
    RAW,
    RAW_EXAMPLES,
    RAW_EXAMPLES_FILE,
    RAW_FILE,
    REJECTED_EXAMPLES_FILE,
    REJECTED_FILE,
    extra_folder,
    source_folder,
    write,
)

Rows = Iterable[Mapping[str, Any]]
CLEANING = CleaningSettings()


def source(kind: str, name: str | None = None) -> SourceSettings:
    if name is None:
        return SourceSettings(kind=kind, path="a")  # type: ignore[arg-type]
    learnt = {"teacher": ModelSource(package="some")} if kind == "parallel" else {}
    return ExtraSourceSettings(name=name, kind=kind, path="a", **learnt)  # type: ignore[arg-type]


def cleaned(folder: Path, *sources: tuple[SourceSettings, Rows]) -> Reports:
    """Clean `folder`/raw into `folder`/cleaned; what is found there keeps its promises."""
    raw, out = folder / "raw", folder / "cleaned"
    for one, rows in sources:
        schema, name = (RAW, RAW_FILE) if one.is_retrieval else (RAW_EXAMPLES, RAW_EXAMPLES_FILE)
        common = {**dict.fromkeys(schema.names), "source": "a", **({"kind": "pair"} if schema is RAW else {})}
        full = [{**common, "row_number": number, **row} for number, row in enumerate(rows)]
        source_folder(raw, one.extra_name).mkdir(parents=True)
        write(pa.Table.from_pylist(full, schema=schema), schema, source_folder(raw, one.extra_name) / name)
    settings = [one for one, _ in sources]
    reports = clean_sources(raw, settings, CLEANING, 42, out)
    assert verify_sources(raw, out, settings, reports) == []
    assert verify_sources_apart(out, settings, reports) == []
    return reports


def rejected(folder: Path, name: str, file: str = REJECTED_FILE) -> dict[int, tuple[str, str]]:
    rows = pq.read_table(extra_folder(folder / "cleaned", name) / file).to_pylist()
    return {row["row_number"]: (row["reason"], row["detail"]) for row in rows}


def questions(name: str, count: int = 4) -> list[dict[str, Any]]:
    """So many pairs of each split; answers are all in letters of their own."""
    return [
        {"query": f"what is {name} {split} {i}", "passage": f"{name} {split} {i * 7919} it is", "split": split}
        for split in ("train", "dev", "test")
        for i in range(count)
    ]


OWN = questions("own")
TEST_QUERY, TEST_ANSWER = OWN[-1]["query"], OWN[-1]["passage"]
TRAIN_QUERY, TRAIN_ANSWER = OWN[0]["query"], OWN[0]["passage"]
LONG = "an answer of many words that others tell as well, in nearly the same words as it was told at first"


def test_a_retrieval_source_gives_way(tmp_path: Path) -> None:
    own = [*OWN, {"query": "and that", "passage": LONG, "split": "test"}]
    leaks = [
        {"query": f"{TEST_QUERY.upper()} ?", "passage": "another answer", "split": "train"},
        {"query": "another question", "passage": TEST_ANSWER.replace(" it", ", it"), "split": "train"},
        {"query": "a third question", "passage": LONG, "title": "With a title", "split": "train"},
        {"query": TRAIN_QUERY, "passage": "yet another answer", "split": "test"},
        {"query": TRAIN_QUERY + " now", "passage": TRAIN_ANSWER, "split": "dev"},
        {"query": TEST_QUERY + " indeed", "passage": TEST_ANSWER, "split": "test"},
        {"query": TRAIN_QUERY + " again", "passage": TRAIN_ANSWER + " so", "split": "train"},
    ]
    reports = cleaned(tmp_path, (source("pairs"), own), (source("pairs", "more"), [*leaks, *questions("more")]))
    found = rejected(tmp_path, "more")
    assert {row: reason for row, (reason, _) in found.items()} == {
        **dict.fromkeys((0, 1, 2), "held_out_elsewhere"),
        **dict.fromkeys((3, 4), "trained_on_elsewhere"),
    }
    assert found[0][1] == f'test of the own source: "{TEST_QUERY}"'
    assert reports["more"].elsewhere_leaks == 5
    assert reports[None].rejected_rows == 0


def test_examples_give_way_and_so_does_the_train_of_one_extra_source_for_the_test_of_another(tmp_path: Path) -> None:
    scored = [
        {"sentence1": TEST_QUERY.replace(" ", "  "), "sentence2": "something", "score": 0.1, "split": "train"},
        {"sentence1": "some thing", "sentence2": TEST_ANSWER, "score": 0.1, "split": "train"},
        {"sentence1": TRAIN_QUERY, "sentence2": "no thing", "score": 0.1, "split": "test"},
        {"sentence1": "held out by scored", "sentence2": "it is", "score": 0.1, "split": "test"},
        *({"sentence1": f"s {i}", "sentence2": f"t {i}", "score": 0.1, "split": "train"} for i in range(9)),
        {"sentence1": "dev of scored", "sentence2": "dev it is", "score": 0.1, "split": "dev"},
    ]
    labelled = [
        {"sentence1": "Held out: by scored!", "label": "a", "split": "train"},
        {"sentence1": "s 1", "label": "a", "split": "test"},
        {"sentence1": "held by labelled", "label": "b", "split": "test"},
        *({"sentence1": f"l {i}", "label": "ab"[i % 2], "split": "train"} for i in range(9)),
        {"sentence1": "dev of labelled", "label": "a", "split": "dev"},
    ]
    cleaned(
        tmp_path,
        (source("pairs"), OWN),
        (source("scored", "scored"), scored),
        (source("labelled", "labelled"), labelled),
    )
    found = rejected(tmp_path, "scored", REJECTED_EXAMPLES_FILE)
    assert {row: reason for row, (reason, _) in found.items()} == {
        0: "held_out_elsewhere",
        1: "held_out_elsewhere",
        2: "trained_on_elsewhere",
    }
    found = rejected(tmp_path, "labelled", REJECTED_EXAMPLES_FILE)
    assert {row: reason for row, (reason, _) in found.items()} == {0: "held_out_elsewhere", 1: "trained_on_elsewhere"}
    assert found[0][1] == 'test of scored: "held out by scored"'


def test_where_an_own_source_keeps_pairs_apart_so_do_the_others(tmp_path: Path) -> None:
    numbers = [(i, j) for i in range(12) for j in range(12) if i < j]
    own = [{"sentence1": f"number {i}", "sentence2": f"number {j}", "score": 0.5} for i, j in numbers]
    extra = [{"sentence1": f"number {j}", "sentence2": f"number {i}", "label": "xy"[(i + j) % 2]} for i, j in numbers]
    own_source, extra_source = source("scored"), source("labelled", "classes")
    # Cut with a seed of its own, so that the two disagree of what test is.
    reports = cleaned(
        tmp_path, (own_source, own), (extra_source, [{**r, "document_id": r["sentence2"]} for r in extra])
    )
    assert reports[None].apart == "pairs"  # type: ignore[union-attr]
    rows = {
        name: pq.read_table(source_folder(tmp_path / "cleaned", name) / EXAMPLES_FILE).to_pylist() for name in reports
    }
    pairs = {
        name: {
            split: {frozenset((r["sentence1"], r["sentence2"])) for r in found if r["split"] == split}
            for split in ("train", "test")
        }
        for name, found in rows.items()
    }
    assert pairs[None]["test"]
    assert not pairs[None]["test"] & pairs["classes"]["train"]
    assert not pairs[None]["train"] & pairs["classes"]["test"]
    assert reports["classes"].elsewhere_leaks > 0


def test_a_leak_between_sources_is_seen(tmp_path: Path) -> None:
    sources = [source("pairs"), source("pairs", "more")]
    reports = cleaned(tmp_path, (sources[0], OWN), (sources[1], questions("more")))
    path = extra_folder(tmp_path / "cleaned", "more") / QUERIES_FILE
    rows = pq.read_table(path)
    train = rows["split"].to_pylist().index("train")
    changed = [{**row, "query": TEST_QUERY} if i == train else row for i, row in enumerate(rows.to_pylist())]
    pq.write_table(pa.Table.from_pylist(changed, schema=rows.schema), path)
    (sentence,) = verify_sources_apart(tmp_path / "cleaned", sources, reports)
    assert sentence == f'more trains on what the own source holds out: 1 time(s), e.g. "{TEST_QUERY}"'


def test_reports_are_kept_by_source(tmp_path: Path) -> None:
    sources = [source("pairs"), source("parallel", "zh")]
    reports = cleaned(
        tmp_path,
        (sources[0], OWN),
        (sources[1], [{"sentence1": f"text {i}", "sentence2": f"第{i}句"} for i in range(30)]),
    )
    assert read_reports(told(reports), sources) == reports
    with pytest.raises(ArtifactError, match="with the extra sources zh, but the YAML names none"):
        read_reports(told(reports), sources[:1])
