"""What a training is judged by while it runs: nDCG@10 on a part of dev that is small enough to be asked often."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import pyarrow.compute as pc

from embed_pipeline.evaluation.figure import Figure
from embed_pipeline.evaluation.metrics import ndcg_at_10
from embed_pipeline.evaluation.retrieval import ndcg_at_10_of
from embed_pipeline.models.blend import blend
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.tables import PASSAGES_FILE, QRELS_FILE, QUERIES_FILE
from embed_pipeline.training.job import EmbedderJob, RerankerJob, TrainingJob
from embed_pipeline.training.rows import read_passages, read_queries, read_table

Qrels = dict[str, dict[str, float]]
WEIGHTS = tuple(round(0.1 * i, 1) for i in range(11))  # of the embedder's score, tried from the smallest


@dataclass(frozen=True)
class EmbedderDevSet:
    """Dev queries over a small corpus: their positives among random passages."""

    queries: dict[str, str]
    passages: dict[str, str]
    qrels: Qrels

    @classmethod
    def read(cls, job: EmbedderJob) -> EmbedderDevSet | None:
        """At most `dev_queries` queries and `dev_passages` passages (more if the positives alone are more), seeded.

        None when the dev split has no judged query.
        """
        qrels = _dev_qrels(job, None)
        if not qrels:
            return None
        positives = {id for judged in qrels.values() for id in judged}
        others = read_table(job.cleaned_pairs / PASSAGES_FILE, ["passage_id"])["passage_id"].to_pylist()
        others = sorted(set(others) - positives)
        wanted = min(len(others), max(0, job.settings.dev_passages - len(positives)))
        drawn = np.random.default_rng([job.seed, 3]).permutation(len(others))[:wanted]
        passages = read_passages(job.cleaned_pairs, positives | {others[i] for i in drawn})
        # In the order of their ids: equal scores are then ranked alike on every machine.
        return cls(
            dict(sorted(read_queries(job.cleaned_pairs, set(qrels)).items())), dict(sorted(passages.items())), qrels
        )

    def ndcg_at_10(self, embedder: Embedder) -> Figure:
        """nDCG@10 of exact search, of each query and on average; NaN when an embedding is no number."""
        # On the CPU: a GPU's memory belongs to the training.
        return _mean(ndcg_at_10_of(embedder, self.queries, self.passages, self.qrels, device="cpu"))


@dataclass(frozen=True)
class RerankerDevSet:
    """Dev queries with the passages that the embedder retrieves for them, and its scores.

    All positives of a query count, so what the embedder did not retrieve counts against every ordering alike.
    """

    queries: dict[str, str]
    passages: dict[str, str]
    qrels: Qrels
    candidates: dict[str, list[str]]  # by query id, best first
    embedder_scores: dict[str, np.ndarray]  # (candidates of the query,) float32

    @classmethod
    def read(cls, job: RerankerJob) -> RerankerDevSet | None:
        """The candidates of at most `dev_queries` queries, seeded; None when there are none."""
        table = read_table(job.dev_candidates).sort_by([("query_id", "ascending"), ("rank", "ascending")])
        retrieved: dict[str, list[str]] = defaultdict(list)
        scores: dict[str, list[float]] = defaultdict(list)
        for row in table.select(["query_id", "passage_id", "score"]).to_pylist():
            retrieved[row["query_id"]].append(row["passage_id"])
            scores[row["query_id"]].append(row["score"])
        qrels = _dev_qrels(job, set(retrieved))
        if not qrels:
            return None
        candidates = {query: retrieved[query] for query in sorted(qrels)}
        return cls(
            read_queries(job.cleaned_pairs, set(qrels)),
            read_passages(job.cleaned_pairs, {id for ids in candidates.values() for id in ids}),
            qrels,
            candidates,
            {query: np.asarray(scores[query], dtype=np.float32) for query in candidates},
        )

    def ndcg_at_10(self, reranker: Reranker) -> Figure:
        """nDCG@10 of the reranker's own order, of each query and on average; NaN when a score is no number."""
        scores = self.score(reranker)
        if not all(np.isfinite(values).all() for values in scores.values()):
            return Figure(float("nan"))
        return self._ndcg(scores)

    def score(self, reranker: Reranker) -> dict[str, np.ndarray]:
        """The reranker's logits for each query's candidates, in their order."""
        pairs = [(self.queries[query], self.passages[id]) for query, ids in self.candidates.items() for id in ids]
        ends = np.cumsum([len(ids) for ids in self.candidates.values()])
        return dict(zip(self.candidates, np.split(reranker.score(pairs, progress=False), ends[:-1]), strict=True))

    def ndcg_at_10_by_weight(self, reranker: Reranker) -> dict[float, float]:
        """Mean nDCG@10 for each share of the embedder's score in the final one; see `models.blend`."""
        scores = self.score(reranker)
        return {
            weight: self._ndcg(
                {query: blend(self.embedder_scores[query], scores[query], weight) for query in scores}
            ).value
            for weight in WEIGHTS
        }

    def _ndcg(self, scores: dict[str, np.ndarray]) -> Figure:
        run = {
            query: {id: float(score) for id, score in zip(self.candidates[query], scores[query], strict=True)}
            for query in scores
        }
        return _mean(ndcg_at_10(self.qrels, run))


def _mean(by_query: Mapping[str, float]) -> Figure:
    """Of values by query; the items are in the order of the queries' ids, so those of two models can be paired."""
    items = np.array([by_query[query] for query in sorted(by_query)], dtype=np.float64)
    return Figure(fmean(items), items)


def _dev_qrels(job: TrainingJob, among: set[str] | None) -> Qrels:
    """Positives of a seeded sample of the dev queries (those in `among`), by query id."""
    table = read_table(job.cleaned_pairs / QUERIES_FILE, ["query_id", "split"])
    dev = set(table.filter(pc.equal(table["split"], "dev"))["query_id"].to_pylist())
    if among is not None:
        dev &= among
    qrels: Qrels = defaultdict(dict)
    for row in read_table(job.cleaned_pairs / QRELS_FILE).to_pylist():
        if row["query_id"] in dev and row["relevance"] > 0:
            qrels[row["query_id"]][row["passage_id"]] = row["relevance"]
    ids = sorted(qrels)
    if len(ids) > job.settings.dev_queries:
        chosen = np.random.default_rng([job.seed, 2]).choice(len(ids), size=job.settings.dev_queries, replace=False)
        ids = [ids[i] for i in np.sort(chosen)]
    return {id: qrels[id] for id in ids}
