"""The cleaned pairs as models and searches read them: texts in lists, judgements as row numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embed_pipeline.errors import ArtifactError
from embed_pipeline.tables import PASSAGES_FILE, QRELS_FILE, QUERIES_FILE, WITHHELD_FILE, passage_text


@dataclass(frozen=True)
class Collection:
    """All passages, and the queries of some splits that have at least one positive, in the order of the tables.

    A judgement is (query row, passage row, relevance), ordered by query row, then relevance from the highest, then
    passage row.
    """

    passage_ids: np.ndarray  # (m,) object
    texts: list[str]  # (m,) title before text
    clusters: np.ndarray  # (m,) int64: near-duplicates share a number
    query_ids: np.ndarray  # (n,) object
    queries: list[str]  # (n,)
    judged_query: np.ndarray  # (j,) int64
    judged_passage: np.ndarray  # (j,) int64
    relevance: np.ndarray  # (j,) float64
    withheld: tuple[np.ndarray, np.ndarray]  # (query rows, passage rows) known as relevant, but not among the judged
    without_positive: int  # queries of these splits left out because no passage is judged relevant

    def positives(self) -> tuple[np.ndarray, np.ndarray]:
        """(query rows, passage rows) of what is judged relevant."""
        relevant = self.relevance > 0
        return self.judged_query[relevant], self.judged_passage[relevant]

    def negatives(self) -> tuple[np.ndarray, np.ndarray]:
        """(query rows, passage rows) of what is judged not relevant."""
        refused = self.relevance <= 0
        return self.judged_query[refused], self.judged_passage[refused]

    def qrels(self, rows: np.ndarray | None = None) -> dict[str, dict[str, float]]:
        """query_id -> passage_id -> relevance, of all queries or of the given rows."""
        qrels: dict[str, dict[str, float]] = {
            str(query_id): {} for query_id in (self.query_ids if rows is None else self.query_ids[rows])
        }
        for query, passage, relevance in zip(self.judged_query, self.judged_passage, self.relevance, strict=True):
            judged = qrels.get(self.query_ids[query])
            if judged is not None:
                judged[self.passage_ids[passage]] = float(relevance)
        return qrels


def load_collection(cleaned: Path, splits: Sequence[str]) -> Collection:
    """Read a `cleaned_pairs` folder.

    Raises ArtifactError when a file is missing, or a judgement names a passage that is not in the corpus.
    """
    passages = _read(cleaned / PASSAGES_FILE)
    queries = _read(cleaned / QUERIES_FILE)
    qrels = _read(cleaned / QRELS_FILE)
    queries = queries.filter(pc.is_in(queries["split"], pa.array(list(splits), pa.string())))
    qrels = qrels.filter(pc.is_in(qrels["query_id"], queries["query_id"]))
    passage_rows = pc.index_in(qrels["passage_id"], passages["passage_id"])
    if passage_rows.null_count:
        unknown = qrels["passage_id"].filter(pc.is_null(passage_rows))[0]
        raise ArtifactError(
            f"{cleaned / QRELS_FILE} judges passage '{unknown}', which {PASSAGES_FILE} does not hold: "
            "materialise cleaned_pairs again"
        )
    withheld = _read(cleaned / WITHHELD_FILE)
    withheld_query = pc.index_in(withheld["query_id"], queries["query_id"])
    withheld_passage = pc.index_in(withheld["passage_id"], passages["passage_id"])
    query_rows = pc.index_in(qrels["query_id"], queries["query_id"]).to_numpy().astype(np.int64)
    relevance = qrels["relevance"].to_numpy()
    answered = np.zeros(len(queries), dtype=bool)
    answered[query_rows[relevance > 0]] = True
    new_row = np.cumsum(answered) - 1
    judged = answered[query_rows]
    query_rows, relevance = new_row[query_rows[judged]], relevance[judged]
    passage_rows = passage_rows.to_numpy().astype(np.int64)[judged]
    order = np.lexsort((passage_rows, -relevance, query_rows))
    kept = queries.filter(pa.array(answered))
    known = pc.and_(pc.is_valid(withheld_query), pc.is_valid(withheld_passage))
    withheld_query, withheld_passage = (
        column.filter(known).to_numpy().astype(np.int64) for column in (withheld_query, withheld_passage)
    )
    asked = answered[withheld_query]
    titles, texts = passages["title"].to_pylist(), passages["text"].to_pylist()
    return Collection(
        passage_ids=passages["passage_id"].to_numpy(),
        texts=[passage_text(title, text) for title, text in zip(titles, texts, strict=True)],
        clusters=passages["cluster_id"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64),
        query_ids=kept["query_id"].to_numpy(),
        queries=kept["query"].to_pylist(),
        judged_query=query_rows[order],
        judged_passage=passage_rows[order],
        relevance=relevance[order],
        withheld=(new_row[withheld_query[asked]], withheld_passage[asked]),
        without_positive=int(len(queries) - answered.sum()),
    )


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise ArtifactError(
            f"no {path.name} in {path.parent}: expected the folder of a cleaned_pairs version. "
            "Materialise cleaned_pairs again"
        )
    return pq.read_table(path, partitioning=None)
