"""Teacher scores beside positives and negatives: where they come from, and that no pair is scored twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import CrossEncoder
from torch.nn import Identity

from embed_pipeline.errors import ModelError
from embed_pipeline.mining.mine import mine
from embed_pipeline.mining.verify import verify
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.settings import CrossEncoderSettings, MiningSettings, ModelSource
from embed_pipeline.tables import HARD_NEGATIVES_FILE, QRELS, QRELS_FILE
from tests.cleaned_folder import GivenEmbedder, GivenReranker, unit_rows, write_cleaned

PASSAGES = 40
SOME_MODEL = ModelSource(path=Path("some"))


@pytest.fixture
def scene(tmp_path: Path) -> tuple[Path, GivenEmbedder, Path]:
    """Six queries; p0 to p5 answer them, p10 and p11 were judged not to, for each of the first three."""
    random = np.random.default_rng(5)
    embedder = GivenEmbedder(unit_rows(random.normal(size=(6, 8))), unit_rows(random.normal(size=(PASSAGES, 8))))
    cleaned = write_cleaned(
        tmp_path / "cleaned",
        [(f"id{q}", f"q{q}") for q in range(6)],
        [(f"id{p}", f"p{p}") for p in range(PASSAGES)],
        [
            *((f"id{q}", f"id{q}", 1.0) for q in range(6)),
            *((f"id{q}", f"id{p}", 0.0) for q in range(3) for p in (10, 11)),
        ],
    )
    (tmp_path / "out").mkdir()
    return cleaned, embedder, tmp_path / "out"


def score(query: str, passage: str) -> float:
    return float(query[1:]) - float(passage[1:]) / 7


def mined(out: Path) -> dict[str, dict[str, Any]]:
    return {row["query_id"]: row for row in pq.read_table(out / HARD_NEGATIVES_FILE).to_pylist()}


@pytest.mark.parametrize("ratio", [None, 0.5, 1.0])
def test_a_cross_encoder_scores_all_texts_once(scene: tuple[Path, GivenEmbedder, Path], ratio: float | None) -> None:
    cleaned, embedder, out = scene
    teacher = GivenReranker(score)
    told = CrossEncoderSettings(model=SOME_MODEL, max_score_ratio=ratio)
    settings = MiningSettings(num_negatives=5, top_k=12, max_score_ratio=None, cross_encoder=told)
    report = mine(cleaned, embedder, settings, 0, out, cross_encoder=teacher, progress=False)
    rows = mined(out)
    assert (report.refused["vetoed"] == 0) == (ratio is None)
    assert len(teacher.seen) == len(set(teacher.seen))
    for query_id, row in rows.items():
        for ids, scores in (("positive_ids", "positive_teacher_scores"), ("negative_ids", "negative_teacher_scores")):
            expected = [score(f"q{query_id[2:]}", f"p{passage[2:]}") for passage in row[ids]]
            np.testing.assert_allclose(row[scores], expected, rtol=1e-6)
    assert {origin for row in rows.values() for origin in row["negative_origins"]} >= {"given", "mined"}
    assert verify(out, cleaned, settings) == []


def test_a_cross_encoder_without_a_number_is_refused(scene: tuple[Path, GivenEmbedder, Path]) -> None:
    cleaned, embedder, out = scene
    settings = MiningSettings(cross_encoder=CrossEncoderSettings(model=SOME_MODEL))
    with pytest.raises(ModelError, match="scores that are not finite"):
        mine(cleaned, embedder, settings, 0, out, cross_encoder=GivenReranker(lambda *_: float("nan")), progress=False)


def test_what_rows_came_with_is_kept_where_every_text_has_it(scene: tuple[Path, GivenEmbedder, Path]) -> None:
    cleaned, embedder, out = scene
    qrels = pq.read_table(cleaned / QRELS_FILE).to_pylist()
    # id0 and id5 have all scores, id1 lacks one of a negative, id3 has a positive's only, the others none.
    scored = {("id0", "id0"): 3.0, ("id0", "id10"): -1.0, ("id0", "id11"): -2.0, ("id3", "id3"): 1.0}
    scored |= {("id1", "id1"): 3.0, ("id1", "id10"): -1.0}
    rows = [{**row, "teacher_score": scored.get((row["query_id"], row["passage_id"]))} for row in qrels]
    pq.write_table(pa.Table.from_pylist(rows, schema=QRELS), cleaned / QRELS_FILE)
    settings = MiningSettings(num_negatives=2, max_score_ratio=None)
    mine(cleaned, embedder, settings, 0, out, progress=False)
    found = mined(out)
    assert found["id0"]["positive_teacher_scores"] == [3.0]
    by_passage = dict(zip(found["id0"]["negative_ids"], found["id0"]["negative_teacher_scores"], strict=True))
    assert by_passage == {"id10": -1.0, "id11": -2.0}
    assert {q for q, row in found.items() if row["positive_teacher_scores"] is not None} == {"id0"}
    assert {q for q, row in found.items() if row["negative_teacher_scores"] is not None} == {"id0"}

    # More negatives would have no scores: they are taken, unless the scores are what is learnt.
    more = settings.model_copy(update={"num_negatives": 4})
    mine(cleaned, embedder, more, 0, out, progress=False)
    assert len(mined(out)["id0"]["negative_ids"]) == 4
    assert mined(out)["id0"]["negative_teacher_scores"] is None
    mine(cleaned, embedder, more, 0, out, keep_scored=True, progress=False)
    found = mined(out)
    assert found["id0"]["negative_origins"] == ["given", "given"]
    assert found["id0"]["positive_teacher_scores"] == [3.0]
    assert {len(row["negative_ids"]) for query_id, row in found.items() if query_id != "id0"} == {4}
    assert verify(out, cleaned, more) == []


def test_a_real_cross_encoder_teaches_and_vetoes(base_models: tuple[Path, Path], tmp_path: Path) -> None:
    """Loaded from its folder, over texts: the scores in the table are those that anybody gets who loads it."""
    words = ["river", "stone", "engine", "garden", "violin", "window"]
    texts = [f"the {a} and the {b} stand behind the old gate" for a in words for b in words]
    cleaned = write_cleaned(
        tmp_path / "cleaned",
        [(f"id{q}", f"where is the {word}") for q, word in enumerate(words)],
        [(f"id{p}", text) for p, text in enumerate(texts)],
        [(f"id{q}", f"id{q * 7}", 1.0) for q in range(len(words))],
    )
    folder, reranker = base_models
    anybody = CrossEncoder(str(reranker), device="cpu")
    found: dict[float | None, dict[str, dict[str, Any]]] = {}
    for ratio in (None, 1.0):
        out = tmp_path / str(ratio)
        out.mkdir()
        settings = MiningSettings(
            num_negatives=8,
            top_k=len(texts),
            max_score_ratio=None,
            cross_encoder=CrossEncoderSettings(model=ModelSource(path=reranker), max_score_ratio=ratio),
        )
        report = mine(
            cleaned,
            Embedder(folder, precision="float32", device="cpu"),
            settings,
            0,
            out,
            cross_encoder=Reranker(reranker, precision="float32", device="cpu"),
            progress=False,
        )
        assert (report.refused["vetoed"] > 0) == (ratio is not None)
        found[ratio] = mined(out)
        for query_id, row in found[ratio].items():
            query = f"where is the {words[int(query_id[2:])]}"
            for what in ("positive", "negative"):
                pairs = [(query, texts[int(passage[2:])]) for passage in row[f"{what}_ids"]]
                scores = anybody.predict(pairs, activation_fn=Identity())
                np.testing.assert_allclose(row[f"{what}_teacher_scores"], scores, atol=1e-5)
            mined_scores = [
                score
                for score, origin in zip(row["negative_teacher_scores"], row["negative_origins"], strict=True)
                if origin == "mined"
            ]
            if ratio is not None:  # no negative that it likes better than the positive
                assert max(mined_scores, default=-np.inf) <= max(row["positive_teacher_scores"]) + 1e-6
        assert verify(out, cleaned, settings) == []
    assert any(found[None][query]["negative_ids"] != row["negative_ids"] for query, row in found[1.0].items())
