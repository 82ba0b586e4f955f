"""Guard sets: read in every layout, refused with the reason, cut in halves that share nothing, judged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from embed_pipeline.errors import ConfigurationError, SourceError
from embed_pipeline.evaluation.correlation import bootstrap_difference, spearman
from embed_pipeline.evaluation.gate import GateReport
from embed_pipeline.evaluation.guard_files import check_guards, guard_digest
from embed_pipeline.evaluation.guard_sets import (
    GuardResult,
    GuardScore,
    RetrievalGuard,
    ScoredGuard,
    judge_guard,
    load_guard,
)
from embed_pipeline.settings import (
    EvaluationSettings,
    ForgettingSettings,
    GuardSettings,
    PipelineSettings,
    smoke_test_of,
)
from tests.guard_files import (
    WordEmbedder,
    small_pairs,
    small_retrieval,
    write_beir,
    write_beir_original,
    write_pairs,
)

EVALUATION = EvaluationSettings(bootstrap_samples=500)


def beir(path: str = "set", **more: Any) -> GuardSettings:
    return GuardSettings(name="general", kind="beir", path=path, **more)


def scored(path: str = "pairs.parquet", **more: Any) -> GuardSettings:
    return GuardSettings(name="alike", kind="scored", path=path, **more)


def retrieval(guard: GuardSettings, folder: Path, seed: int = 1) -> RetrievalGuard:
    loaded = load_guard(guard, folder, seed)
    assert isinstance(loaded, RetrievalGuard)
    return loaded


def judged(base: GuardScore, candidate: GuardScore, guard: GuardSettings | None = None) -> GuardResult:
    return judge_guard(guard or beir(), base, candidate, None, evaluation=EVALUATION, seed=3)


# ------------------------------------------------------------------------------------------------ reading


def test_parquet_and_beirs_own_layout_are_the_same_set(tmp_path: Path) -> None:
    rows = small_retrieval()
    rows["corpus"][4] |= {"title": None, "text": "word4 with a line\u2028separator"}
    write_beir(tmp_path / "set", **rows)
    write_beir_original(tmp_path / "original", **rows)
    ours, theirs = retrieval(beir(), tmp_path), retrieval(beir("original"), tmp_path)
    assert ours.files == theirs.files
    assert list(ours.files.queries) == ["q0", "q10", "q2", "q4", "q6", "q8"]  # of the test split
    assert ours.files.passages["p4"] == "word4 with a line\u2028separator"
    assert ours.measure(WordEmbedder(), "all").value == theirs.measure(WordEmbedder(), "all").value


def test_the_value_is_mean_ndcg_at_10_over_the_whole_corpus_title_before_text(tmp_path: Path) -> None:
    write_beir(tmp_path / "set", **small_retrieval())
    guard = retrieval(beir(), tmp_path)
    assert guard.files.passages["p3"] == "about word3 it is here"
    score = guard.measure(WordEmbedder(), "all")
    assert (score.value, score.items) == (1.0, 6)
    # A passage that answers, but stands second for q0 and nowhere for the others.
    forgetful = guard.measure(WordEmbedder(deaf_to=["word0"]), "all")
    assert forgetful.per_item.tolist() == pytest.approx([forgetful.per_item[0], 1, 1, 1, 1, 1])
    assert forgetful.per_item[0] < 1
    assert forgetful.value == pytest.approx(forgetful.per_item.mean())


def test_graded_judgements_and_queries_without_an_answer(tmp_path: Path) -> None:
    rows = small_retrieval(16)
    rows["qrels"] += [
        {"query_id": "q0", "passage_id": "p2", "score": 2, "split": "test"},
        {"query_id": "q1", "passage_id": "p1", "score": 0, "split": "test"},
    ]
    guard = retrieval(beir(), write_beir(tmp_path / "set", **rows).parent)
    assert guard.files.qrels["q0"] == {"p0": 1.0, "p2": 2.0}
    assert "q1" not in guard.files.queries
    assert guard.measure(WordEmbedder(), "all").per_item[0] < 1  # p2, which is asked for more, comes second at best


@pytest.mark.parametrize("layout", [write_beir, write_beir_original])
def test_which_split_is_measured(tmp_path: Path, layout: Callable[..., Path]) -> None:
    layout(tmp_path / "set", **small_retrieval())
    assert list(retrieval(beir(split="train"), tmp_path).files.queries) == ["q1", "q11", "q3", "q5", "q7", "q9"]
    assert len(retrieval(beir(split=None), tmp_path).files.queries) == 12


def test_a_split_is_ignored_where_there_is_none(tmp_path: Path) -> None:
    rows = small_retrieval()
    rows["qrels"] = [{key: row[key] for key in ("query_id", "passage_id", "score")} for row in rows["qrels"]]
    write_beir(tmp_path / "set", **rows)
    assert len(retrieval(beir(), tmp_path).files.queries) == 12


def without(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != column} for row in rows]


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("corpus", lambda rows: without(rows, "text"), r"corpus\.parquet: no column 'text'; found: passage_id, title"),
        ("queries", lambda rows: without(rows, "query_id"), "no column 'query_id' or '_id'; found: text"),
        ("qrels", lambda rows: without(rows, "score"), "no column 'score'"),
        ("corpus", lambda rows: rows + rows[:1], r"corpus\.parquet: the id 'p0' stands 2 times"),
        ("queries", lambda rows: rows + rows[:1], "the id 'q0' stands 2 times"),
        ("corpus", lambda rows: [{**rows[0], "text": None}, *rows[1:]], "row 0 .*`text` is None, expected text"),
        (
            "corpus",
            lambda rows: rows[1:],
            r"qrels\.parquet: 1 of 6 judgements name an id that corpus\.parquet does not",
        ),
        ("queries", lambda rows: rows[1:], r"1 of 6 judgements name an id that queries\.parquet does not .*'q0'"),
        ("qrels", lambda rows: [{**row, "score": 0} for row in rows], "no query of split 'test' has a passage with"),
        ("qrels", lambda rows: [{**row, "split": "dev"} for row in rows], "no row of split 'test'; splits found: dev"),
        ("qrels", lambda rows: [{**rows[0], "score": None}, *rows[1:]], "row 0 .*`score` is None, expected a number"),
        ("qrels", lambda rows: rows[:5], "3 queries to measure on are too few: expected at least 4"),
        ("corpus", lambda rows: [], r"corpus\.parquet: no rows"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_file_and_reason(
    tmp_path: Path, part: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], said: str
) -> None:
    rows = small_retrieval()
    write_beir(tmp_path / "set", **{**rows, part: change(rows[part])})
    with pytest.raises(SourceError, match=said):
        load_guard(beir(), tmp_path, 1)


def test_damaged_files_of_beirs_layout_are_named_with_the_line(tmp_path: Path) -> None:
    folder = write_beir_original(tmp_path / "set", **small_retrieval())
    corpus, test = folder / "corpus.jsonl", folder / "qrels" / "test.tsv"
    whole = corpus.read_text()
    for broken in ("{broken", "[" * 100_000):
        corpus.write_text(f"{whole}{broken}\n")
        with pytest.raises(SourceError, match=r"corpus\.jsonl, line 13: not JSON"):
            load_guard(beir(), tmp_path, 1)
    corpus.write_text(whole)
    test.write_text(f"{test.read_text()}q0\tp0\n")
    with pytest.raises(SourceError, match=r"test\.tsv, line 8: 2 fields, expected 3 \(query-id, corpus-id, score\)"):
        load_guard(beir(), tmp_path, 1)
    test.write_text("q0\tp0\t1\nq2\tp2\t1\n")
    with pytest.raises(SourceError, match=r"test\.tsv: no column 'query_id' or 'query-id'; found: q0, p0, 1"):
        load_guard(beir(), tmp_path, 1)
    (tmp_path / "no.parquet").write_text("sentence1,sentence2")
    with pytest.raises(SourceError, match=r"no\.parquet: cannot be read as parquet"):
        load_guard(scored("no.parquet"), tmp_path, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: without(rows, "sentence2"), "no column 'sentence2'; found: sentence1, score, split"),
        (lambda rows: [{**row, "score": 3.0} for row in rows], "every pair of split 'test' has the score 3"),
        (lambda rows: [{**rows[1], "score": math.nan}, *rows[2:]], "row 0 of the split .*`score` is nan"),
        (lambda rows: [{**rows[1], "sentence1": None}, *rows[2:]], "`sentence1` is None, expected text"),
        (lambda rows: rows[:4], "3 pairs to measure on are too few"),
        (
            lambda rows: [{**row, "score": float(i == 1)} for i, row in enumerate(rows)],
            "one half of the 30 pairs has one score only",
        ),
    ],
)
def test_pairs_that_cannot_be_measured_are_refused(
    tmp_path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], said: str
) -> None:
    write_pairs(tmp_path / "pairs.parquet", change(small_pairs()))
    with pytest.raises(SourceError, match=said):
        load_guard(scored(), tmp_path, 1)


def test_a_path_that_is_not_there_is_refused_before_any_work_naming_the_key(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.parquet", small_pairs())
    write_beir_original(tmp_path / "set", **small_retrieval())
    check_guards(ForgettingSettings(guards=(scored(), beir())), tmp_path)
    cases = [
        (beir("nowhere"), "no folder at .*nowhere"),
        (beir("pairs.parquet"), "no folder at"),
        (beir(split="validation"), r"no validation\.tsv in .*, only test\.tsv, train\.tsv"),
        (scored("set").model_copy(update={"name": "general"}), "no parquet file at .*sentence1, sentence2 and score"),
    ]
    for broken, said in cases:
        with pytest.raises(ConfigurationError, match=rf"forgetting\.guards\[1\]\.path \(general\): {said}"):
            check_guards(ForgettingSettings(guards=(scored(), broken)), tmp_path)
    (tmp_path / "set" / "queries.jsonl").unlink()
    with pytest.raises(ConfigurationError, match=r"holds neither queries\.parquet nor queries\.jsonl"):
        check_guards(ForgettingSettings(guards=(beir(),)), tmp_path)


def test_the_digest_is_that_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    write_beir_original(tmp_path / "set", **small_retrieval())
    shutil.copytree(tmp_path / "set", tmp_path / "elsewhere" / "set")
    first = guard_digest(beir(), tmp_path)
    assert guard_digest(beir(), tmp_path / "elsewhere") == first
    assert guard_digest(beir(split="train"), tmp_path) != first  # other judgements
    corpus = tmp_path / "set" / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("word3", "word33"))
    assert guard_digest(beir(), tmp_path) != first


# ---------------------------------------------------------------------------------------- halves and samples


@hypothesis_settings(max_examples=40, deadline=None)
@given(count=st.integers(4, 60), most=st.one_of(st.none(), st.integers(4, 70)), seed=st.integers(0, 2**31 - 1))
def test_the_halves_share_nothing_and_make_up_the_whole(
    tmp_path_factory: pytest.TempPathFactory, count: int, most: int | None, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("halves")
    rows = small_retrieval(count)
    rows["qrels"] = without(rows["qrels"], "split")
    write_beir(folder / "set", **rows)
    guard = retrieval(beir(max_queries=most), folder, seed)
    halves = {part: set(rows.tolist()) for part, rows in guard.halves.items()}
    assert len(halves["all"]) == min(count, most or count)
    assert halves["choosing"] | halves["judging"] == halves["all"]
    assert not halves["choosing"] & halves["judging"]
    assert 0 <= len(halves["choosing"]) - len(halves["judging"]) <= 1
    again = retrieval(beir(max_queries=most), folder, seed)
    assert all((again.halves[part] == rows).all() for part, rows in guard.halves.items())


def test_the_halves_depend_on_the_seed_and_not_on_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = small_retrieval(40)
    write_beir(tmp_path / "set", **rows)
    write_beir(tmp_path / "turned", **{part: of_part[::-1] for part, of_part in rows.items()})
    ours, turned = retrieval(beir(), tmp_path), retrieval(beir("turned"), tmp_path)
    assert ours.files == turned.files
    assert (ours.halves["choosing"] == turned.halves["choosing"]).all()
    assert (ours.halves["choosing"] != retrieval(beir(), tmp_path, seed=2).halves["choosing"]).any()


def test_a_half_is_measured_on_its_own_queries_over_the_same_corpus(tmp_path: Path) -> None:
    write_beir(tmp_path / "set", **small_retrieval(40))
    guard, embedder = retrieval(beir(), tmp_path), WordEmbedder(deaf_to=[f"word{i}" for i in range(15)])
    everything = guard.measure(embedder, "all")
    halves = {part: guard.measure(embedder, part) for part in ("choosing", "judging")}
    assert sum(half.items for half in halves.values()) == everything.items == 20
    for part, half in halves.items():
        assert half.per_item.tolist() == everything.per_item[guard.halves[part]].tolist()


def test_a_sample_of_the_passages_holds_all_that_is_judged(tmp_path: Path) -> None:
    rows = small_retrieval(40)
    rows["corpus"] += [{"passage_id": f"x{i}", "title": None, "text": f"other {i}"} for i in range(100)]
    write_beir(tmp_path / "set", **rows)
    guard = retrieval(beir(max_queries=10, max_passages=30), tmp_path)
    asked = {list(guard.files.queries)[row] for row in guard.halves["all"]}
    assert {passage for query in asked for passage in guard.files.qrels[query]} <= set(guard.files.passages)
    assert (len(asked), len(guard.files.passages)) == (10, 30)
    assert any(passage.startswith("x") for passage in guard.files.passages)
    assert guard.measure(WordEmbedder(), "judging").items == 5


def test_a_smoke_test_measures_a_few(tmp_path: Path) -> None:
    model = {"base_model": {"path": "model"}}
    guards = (scored(max_queries=20), beir(max_passages=1_000))
    pipeline = PipelineSettings.model_validate(
        {
            "name": "small",
            "source": {"path": "raw"},
            "embedder": model,
            "reranker": model,
            "forgetting": ForgettingSettings(guards=guards, merging="auto").model_dump(),
        }
    )
    small = smoke_test_of(pipeline).forgetting
    assert [(guard.max_queries, guard.max_passages) for guard in small.guards] == [(20, None), (50, 200)]
    assert small.merging == "auto"


# ------------------------------------------------------------------------------------------------- scored


def test_scored_pairs_are_measured_by_spearman_over_cosines(tmp_path: Path) -> None:
    rows = small_pairs(60)
    write_pairs(tmp_path / "pairs.parquet", rows)
    guard, embedder = load_guard(scored(), tmp_path, 1), WordEmbedder()
    assert isinstance(guard, ScoredGuard)
    score = guard.measure(embedder, "all")
    test = [row for row in rows if row["split"] == "test"]
    left, right = (embedder.encode_passages([row[f"sentence{i}"] for row in test]) for i in (1, 2))
    cosines = np.round((left.astype(float) * right).sum(axis=1), 6)
    expected = scipy.stats.spearmanr(cosines, [row["score"] for row in test]).statistic
    assert score.items == len(test) == 45
    assert score.value == pytest.approx(expected)
    assert score.value > 0.9


class Collapsed(WordEmbedder):
    """Every text is the same to it."""

    def _encode(self, text: str) -> np.ndarray:
        return np.eye(64, dtype=np.float32)[0]


class Broken(WordEmbedder):
    def _encode(self, text: str) -> np.ndarray:
        return np.full(64, np.nan, dtype=np.float32)


@pytest.mark.parametrize("embedder", [Collapsed(), Broken()])
def test_what_cannot_be_computed_never_passes(tmp_path: Path, embedder: WordEmbedder) -> None:
    write_pairs(tmp_path / "pairs.parquet", small_pairs())
    guard = load_guard(scored(max_loss=1.0), tmp_path, 1)
    result = judged(guard.measure(WordEmbedder(), "all"), guard.measure(embedder, "all"), guard.settings)
    assert math.isnan(result.candidate)
    assert not result.passed
    assert result.interval_low is None
    assert result.sentence.endswith("→ not a number, so what was lost cannot be told")
    assert not judged(guard.measure(embedder, "all"), guard.measure(WordEmbedder(), "all"), guard.settings).passed


def test_broken_embeddings_are_no_number_on_a_retrieval_set_either(tmp_path: Path) -> None:
    write_beir(tmp_path / "set", **small_retrieval())
    guard = load_guard(beir(max_loss=1.0), tmp_path, 1)
    assert not judged(guard.measure(WordEmbedder(), "all"), guard.measure(Broken(), "all"), guard.settings).passed


VALUES = st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=3, max_size=40)


@hypothesis_settings(max_examples=150, deadline=None)
@given(values=VALUES)
def test_spearman_is_scipys_with_ties_too(values: list[tuple[int, int, int]]) -> None:
    x, y, _ = (np.array(column, dtype=float) for column in zip(*values, strict=True))
    expected = scipy.stats.spearmanr(x, y).statistic if len(set(x)) > 1 and len(set(y)) > 1 else math.nan
    assert spearman(x, y) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@hypothesis_settings(max_examples=25, deadline=None)
@given(values=VALUES, seed=st.integers(0, 1000))
def test_the_bootstrap_ranks_every_resample_anew(values: list[tuple[int, int, int]], seed: int) -> None:
    base, candidate, expected = (np.array(column, dtype=float) for column in zip(*values, strict=True))
    found = bootstrap_difference(base, candidate, expected, samples=40, confidence=0.9, seed=seed)
    differences = []
    for rows in np.random.default_rng(seed).integers(0, len(values), size=(40, len(values))):
        if all(len(set(column[rows])) > 1 for column in (base, candidate, expected)):
            rho = [scipy.stats.spearmanr(column[rows], expected[rows]).statistic for column in (base, candidate)]
            differences.append(rho[1] - rho[0])
    if not differences:
        assert found is None
    else:
        assert found == pytest.approx(np.quantile(differences, [0.05, 0.95]), abs=1e-12)


# ------------------------------------------------------------------------------------------------- judging


def score_of(*values: float) -> GuardScore:
    per_item = np.array(values)
    return GuardScore(float(per_item.mean()), per_item, len(per_item))


def test_what_may_be_lost_may_be_lost_and_no_more() -> None:
    base = score_of(*np.linspace(0.4, 0.9, 50))
    within = judged(base, score_of(*np.linspace(0.4, 0.9, 50) - 0.019))
    assert within.passed
    assert within.change == pytest.approx(-0.019)
    assert within.interval_low == pytest.approx(-0.019)
    assert within.interval_high == pytest.approx(-0.019)
    assert within.sentence == (
        "general: nDCG@10 0.650 → 0.631, \N{MINUS SIGN}0.019 [\N{MINUS SIGN}0.019, \N{MINUS SIGN}0.019], "
        "within the 0.020 it may lose"
    )
    assert judged(base, score_of(*np.linspace(0.4, 0.9, 50) - 0.02)).passed  # exactly
    beyond = judged(base, score_of(*np.linspace(0.4, 0.9, 50) - 0.021))
    assert not beyond.passed
    assert beyond.sentence.endswith(", more than the 0.020 it may lose")
    gained = judged(base, score_of(*np.linspace(0.4, 0.9, 50) + 0.05))
    assert gained.passed
    assert gained.sentence.endswith(", nothing lost")


def test_the_interval_of_pairs_lies_around_the_change(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.parquet", small_pairs(200))
    guard = load_guard(scored(), tmp_path, 1)
    forgetful = guard.measure(WordEmbedder(deaf_to=[f"w{i}" for i in range(100)]), "all")
    result = judge_guard(
        guard.settings, guard.measure(WordEmbedder(), "all"), forgetful, forgetful, evaluation=EVALUATION, seed=3
    )
    assert result.interval_low is not None
    assert result.interval_high is not None
    assert result.interval_low < result.change < result.interval_high < 0
    assert (result.metric, result.champion, result.passed) == ("Spearman", forgetful.value, False)


def test_a_result_that_is_no_number_survives_its_json() -> None:
    result = judged(score_of(0.5, 0.6), score_of(math.nan, 0.6))
    report = GateReport(outcome="refuse", sentence="", reasons=[], judgements=[], guards=[result], min_queries=1)
    for text in (report.model_dump_json(), json.dumps(report.model_dump(mode="json"), allow_nan=False)):
        read = GateReport.model_validate_json(text).guards[0]
        assert math.isnan(read.candidate)
        assert (read.sentence, read.passed) == (result.sentence, False)


# ------------------------------------------------------------------------------------------------ real data


def test_minilm_on_real_sentence_pairs(shared_data: Callable[[str], Path], minilm_folder: Path) -> None:
    """Published for all-MiniLM-L6-v2 on the whole of SICK: .776."""
    from embed_pipeline.models.embedder import Embedder

    guard = load_guard(scored("pairs.parquet", max_queries=300), shared_data("sick"), 1)
    score = guard.measure(Embedder(minilm_folder, precision="float32"), "all")
    assert score.items == 300
    assert 0.72 < score.value < 0.83


@pytest.mark.slow
def test_minilm_on_a_real_retrieval_set(shared_data: Callable[[str], Path], minilm_folder: Path) -> None:
    """5,183 abstracts: the figure of the literature, .645 to .650."""
    from embed_pipeline.models.embedder import Embedder

    guard = load_guard(beir("."), shared_data("scifact"), 1)
    score = guard.measure(Embedder(minilm_folder), "all")
    assert score.items == 300
    assert score.value == pytest.approx(0.650, abs=0.006)
