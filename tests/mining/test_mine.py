"""Mining from a cleaned_pairs folder to the written tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cleaned_folder import GivenEmbedder, GivenReranker, unit_rows, write_cleaned

from embed_pipeline.errors import ArtifactError, ModelError
from embed_pipeline.mining.mine import mine
from embed_pipeline.mining.plot import score_histogram
from embed_pipeline.mining.report import MiningReport
from embed_pipeline.mining.retrieve import retrieve
from embed_pipeline.mining.verify import verify
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.ranks import Ranks
from embed_pipeline.settings import CrossEncoderSettings, MiningSettings, ModelSource
from embed_pipeline.tables import CANDIDATES, HARD_NEGATIVES, HARD_NEGATIVES_FILE, REFUSED, REFUSED_FILE

# Cosines to the one query: the positive p0 scores 0.8, its threshold at 95 % is 0.76.
COSINES = [0.8, 0.79, 0.77, 0.7, 0.6, 0.5, 0.4, 0.3]


@pytest.fixture
def scene(tmp_path: Path) -> tuple[Path, GivenEmbedder, Path]:
    """p0 positive, p3 a near-duplicate of it, p5 judged as not relevant."""
    passages = unit_rows([[c, np.sqrt(1 - c * c)] for c in COSINES])
    embedder = GivenEmbedder(unit_rows([[1.0, 0.0]]), passages)
    names = [(f"id{i}", f"p{i}") for i in range(len(COSINES))]
    cleaned = write_cleaned(
        tmp_path / "cleaned",
        [("a", "q0")],
        names,
        [("a", "id0", 1.0), ("a", "id5", 0.0)],
        clusters=[0, 1, 2, 0, 4, 5, 6, 7],
    )
    (tmp_path / "out").mkdir()
    return cleaned, embedder, tmp_path / "out"


def test_one_query_in_full(scene: tuple[Path, GivenEmbedder, Path]) -> None:
    cleaned, embedder, out = scene
    settings = MiningSettings(num_negatives=3)
    report = mine(cleaned, embedder, settings, 0, out, progress=False)
    table = pq.read_table(out / HARD_NEGATIVES_FILE)
    assert table.schema.equals(HARD_NEGATIVES)
    [row] = table.to_pylist()
    assert row["positive_ids"] == ["id0"]
    assert row["negative_ids"] == ["id5", "id4", "id6"]
    assert row["negative_origins"] == ["given", "mined", "mined"]
    np.testing.assert_allclose(row["negative_scores"], [0.5, 0.6, 0.4], atol=1e-6)
    refused = pq.read_table(out / REFUSED_FILE)
    assert refused.schema.equals(REFUSED)
    assert [(r["passage_id"], r["rank"], r["reason"]) for r in refused.to_pylist()] == [
        ("id0", 0, "known_positive"),
        ("id1", 1, "above_threshold"),
        ("id2", 2, "above_threshold"),
        ("id3", 3, "near_duplicate_of_positive"),
    ]
    assert report.taken == {"given": 1, "mined": 2, "random": 0}
    assert report.refused["above_threshold"] == 2
    assert (report.queries, report.queries_with_fewer) == (1, 0)
    assert MiningReport.model_validate(json.loads(report.model_dump_json())) == report
    assert verify(out, cleaned, settings) == []
    assert [passage.why for passage in report.examples[0].negatives] == ["given", "mined", "mined"]
    assert "<svg" in score_histogram(report.scores)


def test_withheld_pairs_are_no_negatives_and_no_positives(
    scene: tuple[Path, GivenEmbedder, Path], tmp_path: Path
) -> None:
    _, embedder, out = scene
    # id4 is withheld, id6 a near-duplicate of it; the other query has no positive, so nothing is mined for it.
    cleaned = write_cleaned(
        tmp_path / "withheld",
        [("b", "q0"), ("a", "q0")],
        [(f"id{i}", f"p{i}") for i in range(len(COSINES))],
        [("a", "id0", 1.0), ("b", "id5", 0.0)],
        clusters=[0, 1, 2, 0, 4, 5, 4, 7],
        withheld=[("b", "id1"), ("a", "id4"), ("of another split", "id7")],
    )
    settings = MiningSettings(num_negatives=8)
    mine(cleaned, embedder, settings, 0, out, progress=False)
    [row] = pq.read_table(out / HARD_NEGATIVES_FILE).to_pylist()
    assert (row["positive_ids"], row["negative_ids"]) == (["id0"], ["id5", "id7"])
    reasons = {r["passage_id"]: r["reason"] for r in pq.read_table(out / REFUSED_FILE).to_pylist()}
    assert (reasons["id4"], reasons["id6"]) == ("known_positive", "near_duplicate_of_positive")
    assert verify(out, cleaned, settings) == []
    row |= {"negative_ids": ["id4", "id6"], "negative_scores": [0.6, 0.4], "negative_origins": ["mined", "random"]}
    pq.write_table(pa.Table.from_pylist([row], schema=HARD_NEGATIVES), out / HARD_NEGATIVES_FILE)
    assert [violation.split(":")[0] for violation in verify(out, cleaned, settings)] == [
        "negative is a known positive of its query",
        "negative is a near-duplicate of a positive of its query",
    ]


def test_veto_replaces_what_it_refuses(scene: tuple[Path, GivenEmbedder, Path]) -> None:
    cleaned, embedder, out = scene
    reranker = GivenReranker(lambda _, passage: {"p0": 1.0, "p4": 1.1, "p6": 0.5}.get(passage, -9.0))
    settings = MiningSettings(num_negatives=2, cross_encoder=CrossEncoderSettings(model=ModelSource(path=Path("veto"))))
    report = mine(cleaned, embedder, settings, 0, out, cross_encoder=reranker, progress=False)
    [row] = pq.read_table(out / HARD_NEGATIVES_FILE).to_pylist()
    # p4 is refused, p6 (sigmoid .62 against .73) is not; the judged p5 is not asked about, only scored in the end.
    assert row["negative_ids"] == ["id5", "id6"]
    assert reranker.seen == [("q0", "p0"), ("q0", "p4"), ("q0", "p6"), ("q0", "p5")]
    assert (row["positive_teacher_scores"], row["negative_teacher_scores"]) == ([1.0], [-9.0, 0.5])
    assert verify(out, cleaned, settings) == []
    assert report.refused["vetoed"] == 1
    with pytest.raises(ValueError, match="go together"):
        mine(cleaned, embedder, settings, 0, out)


def test_verify_sees_each_broken_promise(scene: tuple[Path, GivenEmbedder, Path]) -> None:
    cleaned, embedder, out = scene
    mine(cleaned, embedder, MiningSettings(num_negatives=3), 0, out, progress=False)
    row = {
        "query_id": "a",
        "positive_ids": ["id0", "id4"],
        "negative_ids": ["id0", "id3", "id6", "id6", "nowhere", "id1", "id7"],
        "positive_scores": [0.8, 0.8],
        "negative_scores": [0.8, 0.7, 0.4, 0.4, 0.1, 0.79, 0.3],
        "negative_origins": ["random"] * 5 + ["mined", "given"],
        "positive_teacher_scores": [1.0, 2.0],
        "negative_teacher_scores": [0.0],
    }
    rows = [row, {name: "b" if name == "query_id" else [] for name in HARD_NEGATIVES.names}]
    pq.write_table(pa.Table.from_pylist(rows, schema=HARD_NEGATIVES), out / HARD_NEGATIVES_FILE)
    found = "\n".join(verify(out, cleaned, MiningSettings()))
    for what, example in [
        ("negative is a known positive of its query", "id0"),
        ("negative is a near-duplicate of a positive of its query", "id3"),
        ("negative stands twice in one row", "id6"),
        ("negative is not in the corpus", "nowhere"),
        ("mined negative scores above the threshold", "id1"),
        ("given negative was not judged as not relevant", "id7"),
        ("listed positive is not a known positive", "id4"),
    ]:
        assert f"{what}: 1 times, for example query 'a', passage '{example}'" in found
    assert "query is not in the cleaned pairs: 1 times, for example query 'b'" in found


def test_bad_inputs(scene: tuple[Path, GivenEmbedder, Path], tmp_path: Path) -> None:
    cleaned, embedder, out = scene
    with pytest.raises(ArtifactError, match="no query of split dev with a relevant passage"):
        mine(cleaned, embedder, MiningSettings(), 0, out, splits=("dev",), progress=False)
    assert retrieve(cleaned, embedder, "test", 5, None, 0, progress=False) == CANDIDATES.empty_table()
    with pytest.raises(ArtifactError, match=r"no passages.parquet in .*: expected the folder of a cleaned_pairs"):
        mine(tmp_path / "nothing", embedder, MiningSettings(), 0, out)
    embedder.passages[2] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        mine(cleaned, embedder, MiningSettings(), 0, out, progress=False)
    stray = write_cleaned(tmp_path / "stray", [("a", "q0")], [("x", "p0")], [("a", "gone", 1.0)])
    with pytest.raises(ArtifactError, match=r"judges passage 'gone', which passages\.parquet does not hold"):
        mine(stray, embedder, MiningSettings(), 0, out)


def test_queries_without_positive_are_counted(tmp_path: Path) -> None:
    embedder = GivenEmbedder(unit_rows(np.eye(2)), unit_rows(np.eye(2)))
    qrels = [("a", "x", 1.0), ("b", "x", 0.0)]
    cleaned = write_cleaned(tmp_path / "c", [("b", "q1"), ("a", "q0")], [("x", "p0"), ("y", "p1")], qrels)
    report = mine(cleaned, embedder, MiningSettings(), 0, tmp_path, progress=False)
    assert (report.queries, report.queries_without_positive, report.queries_with_fewer) == (1, 1, 1)
    assert pq.read_table(tmp_path / HARD_NEGATIVES_FILE)["query_id"].to_pylist() == ["a"]


QUESTIONS = [
    ("How do I reverse a list in place?", "Reverses the elements of the list in place and returns None."),
    ("remove duplicates from a data frame", "Return a DataFrame with duplicate rows removed."),
    ("read a csv file", "Read a comma-separated values file into a table."),
    ("sort numbers from large to small", "Sorts the values in descending order."),
    ("compute the inverse of a matrix", "Compute the multiplicative inverse of a square matrix."),
    ("shortest path between two nodes", "Returns the shortest path between source and target in a graph."),
]
OTHERS = [
    "Return a reversed copy of the sequence.",
    "Write the table to a comma-separated values file.",
    "Sort a table by its index labels.",
    "Compute the determinant of an array.",
    "Find the pseudo-inverse of a matrix.",
    "All shortest paths in a weighted graph, by Dijkstra's method.",
    "Draw a random sample of rows.",
    "A cake needs flour, sugar and eggs.",
]


def test_real_model_finds_hard_negatives(tmp_path: Path, minilm_folder: Path) -> None:
    texts = [answer for _, answer in QUESTIONS] + OTHERS
    cleaned = write_cleaned(
        tmp_path / "cleaned",
        [(f"q{i}", question) for i, (question, _) in enumerate(QUESTIONS)],
        [(f"p{i}", text) for i, text in enumerate(texts)],
        [(f"q{i}", f"p{i}", 1.0) for i in range(len(QUESTIONS))],
    )
    embedder = Embedder(minilm_folder, ranks=Ranks(tmp_path / "cache"))
    settings = MiningSettings(top_k=10, num_negatives=2)
    report = mine(cleaned, embedder, settings, 7, tmp_path, progress=False)
    rows = pq.read_table(tmp_path / HARD_NEGATIVES_FILE).to_pylist()
    hardest = {row["query_id"]: texts[int(row["negative_ids"][0][1:])] for row in rows}
    # The pseudo-inverse scores too near to the inverse to be taken for a wrong answer.
    assert hardest["q4"] == "Compute the determinant of an array."
    refused = pq.read_table(tmp_path / REFUSED_FILE).to_pylist()
    assert {"above_threshold"} == {r["reason"] for r in refused if r["query_id"] == "q4" and r["passage_id"] == "p10"}
    assert hardest["q5"].startswith("All shortest paths")
    assert report.taken["mined"] == 12
    assert verify(tmp_path, cleaned, settings) == []
    again = tmp_path / "again"
    again.mkdir()
    mine(cleaned, embedder, settings, 7, again, progress=False)
    for name in (HARD_NEGATIVES_FILE, REFUSED_FILE):
        assert (tmp_path / name).read_bytes() == (again / name).read_bytes()


def test_retrieve_gives_a_seeded_sample(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    embedder = GivenEmbedder(unit_rows(draw.normal(size=(20, 8))), unit_rows(draw.normal(size=(30, 8))))
    cleaned = write_cleaned(
        tmp_path / "c",
        [(f"q{i}", f"q{i}") for i in range(20)],
        [(f"p{i}", f"p{i}") for i in range(30)],
        [(f"q{i}", f"p{i}", 1.0) for i in range(20)],
        split="dev",
    )
    table = retrieve(cleaned, embedder, "dev", 4, 5, 3, progress=False)
    assert table.schema.equals(CANDIDATES)
    assert len(table) == 20
    assert table["rank"].to_pylist() == [0, 1, 2, 3] * 5
    assert table.equals(retrieve(cleaned, embedder, "dev", 4, 5, 3, progress=False))
    assert not table.equals(retrieve(cleaned, embedder, "dev", 4, 5, 4, progress=False))
    best = embedder.passages @ embedder.queries[int(table["query_id"][0].as_py()[1:])]
    assert table["passage_id"][0].as_py() == f"p{best.argmax()}"
