"""Retrieval metrics: their names, their formulas, and how ties, grades and missing queries count.

Computed by trec_eval's own code (pytrec_eval) through ir_measures, so the figures are those of the literature.
Relevance is trec_eval's and BEIR's: above 0 a passage is relevant, 0 judged as not relevant, unjudged counts as not
relevant. nDCG has linear gain (the grade itself, not 2^grade - 1) and a discount of log2(rank + 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import ir_measures
from ir_measures import AP, RR, R, Success, nDCG

Qrels = Mapping[str, Mapping[str, float]]
"""query_id -> passage_id -> relevance"""
Run = Mapping[str, Mapping[str, float]]
"""query_id -> passage_id -> score, higher is better"""

# pytrec_eval knows the reciprocal rank without a cutoff only: `_cut` ends it at 10.
_MEASURES = {
    "ndcg_at_10": nDCG @ 10,
    "mrr_at_10": RR,
    "recall_at_1": R @ 1,
    "recall_at_5": R @ 5,
    "recall_at_10": R @ 10,
    "recall_at_100": R @ 100,
    "hit_rate_at_1": Success @ 1,
    "hit_rate_at_5": Success @ 5,
    "hit_rate_at_10": Success @ 10,
    "map_at_100": AP @ 100,
}
METRICS = tuple(_MEASURES)

# trec_eval keeps an array as long as the highest grade, so grades are not scaled beyond this.
_HIGHEST_GRADE = 10_000


def per_query(qrels: Qrels, run: Run, metrics: Iterable[str] = METRICS) -> dict[str, dict[str, float]]:
    """Each metric of each query: metric -> query_id -> value in 0..1.

    The queries are those of `qrels` with at least one relevant passage (no metric is defined for the others). One
    that `run` lacks, or ranks nothing for, scores 0: finding nothing is a result. Queries of `run` without a judgement
    are left out.

    Equal scores are ordered by passage id, ascending, so that a value depends neither on the order in which a run was
    built nor on trec_eval's own tie rule. Grades may be fractions (see `_whole_grades`).

    Raises ValueError for an unknown metric, a NaN score, a grade that is no number, and qrels in which no query has a
    relevant passage: a metric that cannot be computed is not 0.
    """
    wanted = list(metrics)
    unknown = [name for name in wanted if name not in _MEASURES]
    if unknown:
        raise ValueError(f"unknown metric '{unknown[0]}'; known are {', '.join(METRICS)}")
    grades = {query_id: _whole_grades(query_id, judged) for query_id, judged in qrels.items()}
    grades = {query_id: judged for query_id, judged in grades.items() if any(judged.values())}
    if not grades:
        raise ValueError(f"no metric can be computed: none of the {len(qrels)} judged queries has a relevant passage")
    ranked = {query_id: _scores_of_ranks(query_id, run[query_id]) for query_id in grades if run.get(query_id)}
    values = {name: dict.fromkeys(grades, 0.0) for name in wanted}
    name_of = {_MEASURES[name]: name for name in wanted}
    for result in ir_measures.pytrec_eval.evaluator(list(name_of), grades).iter_calc(ranked):
        values[name_of[result.measure]][result.query_id] = _cut(name_of[result.measure], float(result.value))
    return values


def ndcg_at_10(qrels: Qrels, run: Run) -> dict[str, float]:
    """nDCG@10 of each query with a relevant passage; see `per_query` for ties, grades and missing queries."""
    return per_query(qrels, run, ["ndcg_at_10"])["ndcg_at_10"]


def _scores_of_ranks(query_id: str, scores: Mapping[str, float]) -> dict[str, float]:
    for passage_id, score in scores.items():
        if math.isnan(score):
            raise ValueError(f"the score of passage '{passage_id}' for query '{query_id}' is NaN; a run needs numbers")
    order = sorted(scores, key=lambda passage_id: (-scores[passage_id], passage_id))
    return {passage_id: float(len(order) - rank) for rank, passage_id in enumerate(order)}


def _whole_grades(query_id: str, judged: Mapping[str, float]) -> dict[str, int]:
    """Grades as the integers that trec_eval takes.

    nDCG with linear gain does not change when all grades of a query are multiplied by one number, and the other
    metrics only ask whether a grade is above 0. So fractions are scaled until the query's highest grade is 10,000
    (which rounds nDCG by less than 1e-4) and a positive grade never becomes 0. Grades below 0 count as 0.
    """
    for passage_id, grade in judged.items():
        if not math.isfinite(grade):
            raise ValueError(f"the relevance of passage '{passage_id}' to query '{query_id}' is {grade}, not a number")
    highest = max(judged.values(), default=0.0)
    if highest <= _HIGHEST_GRADE and all(float(grade).is_integer() for grade in judged.values()):
        return {passage_id: max(0, int(grade)) for passage_id, grade in judged.items()}
    if highest <= 0:
        return dict.fromkeys(judged, 0)
    # Divided first: the highest grade may be so small that its reciprocal is infinite.
    return {
        passage_id: max(1, round(grade / highest * _HIGHEST_GRADE)) if grade > 0 else 0
        for passage_id, grade in judged.items()
    }


def _cut(metric: str, value: float) -> float:
    # 1/10 and 1/11 are the reciprocal ranks on either side of the cutoff.
    return value if metric != "mrr_at_10" or value > 1 / 10.5 else 0.0
