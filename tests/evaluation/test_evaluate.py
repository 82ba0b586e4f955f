"""Evaluation end to end: a tiny random BERT as the base, the real MiniLM as the fine-tuned embedder."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cleaned_folder import write_cleaned
from collapsed_models import collapse
from rich.console import Console
from safetensors.numpy import load_file, save_file

from embed_pipeline.errors import ArtifactError, ModelError
from embed_pipeline.evaluation.compared import ChampionModels, ComparedModels
from embed_pipeline.evaluation.comparison import Comparison
from embed_pipeline.evaluation.evaluate import evaluate
from embed_pipeline.evaluation.history import Served
from embed_pipeline.evaluation.metrics import METRICS
from embed_pipeline.evaluation.plots import gains_plot
from embed_pipeline.evaluation.report import read_report, terminal_table, write_report
from embed_pipeline.evaluation.results import EvaluationReport
from embed_pipeline.evaluation.systems import Ranking, reordered
from embed_pipeline.evaluation.verdict import headline, signed, verdicts
from embed_pipeline.models.folder import has_trained_head
from embed_pipeline.models.ranks import Ranks
from embed_pipeline.settings import EncodingSettings, EvaluationSettings, GateSettings
from embed_pipeline.tables import PER_QUERY, PER_QUERY_FILE, RANKINGS, RANKINGS_FILE

COUNTRIES = [
    "France", "Germany", "Japan", "Brazil", "Kenya", "Canada", "Norway", "Egypt", "India", "Peru",
    "Spain", "Greece", "Turkey", "Chile", "Cuba", "Iran", "Iraq", "Nepal", "Ghana", "Mali",
    "Poland", "Sweden", "Finland", "Ireland", "Iceland", "Austria", "Hungary", "Portugal", "Morocco", "Vietnam",
]  # fmt: skip
HOSTILE = "<script>alert('query')</script> & \"quotes\" of France"
SETTINGS = EvaluationSettings(rerank_top_k=10, rerank_queries=12, bootstrap_samples=500, examples=6)


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty questions; one of them hostile, one more without a relevant passage."""
    queries = [(f"q{i}", f"Which currency is used in {country}?") for i, country in enumerate(COUNTRIES)]
    queries[0] = ("q0", HOSTILE)
    passages = [
        (f"p{i}", f"Coins and banknotes used in {country} <b>today</b>.") for i, country in enumerate(COUNTRIES)
    ]
    passages += [
        (f"o{i}", f"Rivers, lakes, valleys and the highest mountains anywhere in {country}.")
        for i, country in enumerate(COUNTRIES)
    ]
    qrels = [(f"q{i}", f"p{i}", 1.0 + i % 2) for i in range(len(COUNTRIES))] + [("nothing", "p0", 0.0)]
    folder = tmp_path_factory.mktemp("evaluation") / "cleaned"
    return write_cleaned(folder, [*queries, ("nothing", "What about it?")], passages, qrels, split="test")


@pytest.fixture(scope="module")
def models(tiny_bert_folder: Path, minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ComparedModels:
    import torch
    from sentence_transformers import CrossEncoder

    folder = tmp_path_factory.mktemp("reranker")
    torch.manual_seed(0)
    CrossEncoder(str(tiny_bert_folder), num_labels=1, max_length=64).save_pretrained(str(folder / "model"))
    (folder / "serving.json").write_text(json.dumps({"embedder_weight": 0.8}))
    return ComparedModels(
        base_embedder=tiny_bert_folder,
        base_encoding=EncodingSettings(passage_max_length=32),
        embedder=minilm_folder,
        base_reranker=tiny_bert_folder,
        base_reranker_max_length=512,
        reranker=folder,
    )


@pytest.fixture(scope="module")
def evaluated(
    cleaned: Path, models: ComparedModels, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, EvaluationReport]:
    out = tmp_path_factory.mktemp("out")
    versions = {"embedder": "abc<123>"}
    cache = out.parent / "cache"
    report = evaluate(
        cleaned, models, SETTINGS, 7, out, ranks=Ranks(cache), title="a & b", versions=versions, progress=False
    )
    return out, report


def test_summary(evaluated: tuple[Path, EvaluationReport]) -> None:
    out, report = evaluated
    rows = json.loads((out / "summary.json").read_text())
    keys = {"system", "metric", "value", "gain", "interval_low", "interval_high", "p_value", "num_queries"}
    assert all(set(row) == keys for row in rows)
    systems = ["bm25", "base_embedder", "embedder", "base_reranker", "reranker"]
    assert [(row["system"], row["metric"]) for row in rows] == [(s, m) for s in systems for m in METRICS]
    at = {(row["system"], row["metric"]): row for row in rows}
    assert at["base_embedder", "ndcg_at_10"]["gain"] == 0
    assert at["base_embedder", "ndcg_at_10"]["interval_low"] == at["base_embedder", "ndcg_at_10"]["interval_high"] == 0
    assert at["embedder", "ndcg_at_10"]["value"] > 0.9
    assert at["embedder", "ndcg_at_10"]["interval_low"] > 0
    assert at["bm25", "hit_rate_at_1"]["value"] > 0.9
    assert {row["num_queries"] for row in rows if row["system"].endswith("reranker")} == {12}
    assert {row["num_queries"] for row in rows if not row["system"].endswith("reranker")} == {30}
    for row in rows:
        assert 0 <= row["value"] <= 1
        assert row["interval_low"] <= row["gain"] + 1e-9
        assert row["gain"] <= row["interval_high"] + 1e-9
    assert read_report(out) == report


def test_tables_bear_out_the_summary(evaluated: tuple[Path, EvaluationReport]) -> None:
    out, report = evaluated
    per_query, rankings = pq.read_table(out / PER_QUERY_FILE), pq.read_table(out / RANKINGS_FILE)
    assert per_query.schema.equals(PER_QUERY)
    assert rankings.schema.equals(RANKINGS)
    values: dict[tuple[str, str], dict[str, float]] = {}
    for row in per_query.to_pylist():
        values.setdefault((row["system"], row["metric"]), {})[row["query_id"]] = row["value"]
    for row in report.summary:
        of_system, base = values[row.system, row.metric], values["base_embedder", row.metric]
        assert row.value == pytest.approx(np.mean(list(of_system.values())))
        assert row.gain == pytest.approx(np.mean([of_system[query] - base[query] for query in of_system]))
    assert "reranker_alone" in {system for system, _ in values}
    lists: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for row in rankings.to_pylist():
        lists.setdefault((row["system"], row["query_id"]), []).append((row["passage_id"], row["score"]))
    for (system, query), found in lists.items():
        assert len({passage for passage, _ in found}) == len(found) <= 100
        scores = [score for _, score in found]
        assert scores == sorted(scores, reverse=True), system
        if "reranker" in system:
            of_embedder = [passage for passage, _ in lists["embedder", query]]
            assert {passage for passage, _ in found[:10]} == set(of_embedder[:10])
            assert [passage for passage, _ in found[10:]] == of_embedder[10:]


def test_details_are_honest(evaluated: tuple[Path, EvaluationReport]) -> None:
    details = evaluated[1].details
    assert details.queries_without_positive == 1
    assert "untrained head" in details.verdicts["base_reranker"]
    assert "untrained head" in details.systems["base_reranker"]
    assert details.embedder_weight == 0.8
    assert any("sample of 12 of the 30" in note for note in details.notes)
    assert any("1 test queries have no relevant passage" in note for note in details.notes)
    assert {row.system for row in details.over_embedder} == {"bm25", "base_reranker", "reranker", "reranker_alone"}
    assert {row.system for row in details.over_base_reranker} == {"reranker_alone"}
    assert "over the base reranker" in details.verdicts["reranker"]
    assert set(details.milliseconds_per_query) == {"bm25", "base_embedder", "embedder", "base_reranker", "reranker"}
    assert len(details.better) == 6
    assert all(change.change > 0 for change in details.better)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]


def test_page_is_self_contained_and_escapes(evaluated: tuple[Path, EvaluationReport]) -> None:
    html = (evaluated[0] / "report.html").read_text()
    page = Page()
    page.feed(html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "image"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert "@import" not in html
    assert not re.findall(r"url\((?!#)", html)
    assert "<!DOCTYPE svg" not in html
    assert len(set(page.ids)) == len(page.ids)
    assert "<script>" not in html
    assert "<b>today</b>" not in html
    assert "&lt;b&gt;today&lt;/b&gt;" in html
    assert "a &amp; b" in html
    assert "abc&lt;123&gt;" in html
    assert html.count("<svg") == 6
    assert "prefers-color-scheme: dark" in html


def test_terminal_table(evaluated: tuple[Path, EvaluationReport]) -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(terminal_table(evaluated[0]))
    text = console.export_text()
    for wanted in ("Fine-tuned embedder", "Keyword search (BM25)", "nDCG@10", "95\N{NO-BREAK SPACE}% interval"):
        assert wanted in text


def test_the_champion_is_measured_on_the_same_questions(
    cleaned: Path, models: ComparedModels, evaluated: tuple[Path, EvaluationReport], tmp_path: Path
) -> None:
    """The candidate is MiniLM, the champion the tiny random model; five questions it was trained on do not count."""
    assert models.reranker is not None
    seen = frozenset(f"q{i}" for i in range(5))
    champion = ChampionModels("the old pair", models.base_embedder, models.reranker, seen)
    cache = evaluated[0].parent / "cache"
    report = evaluate(
        cleaned,
        replace(models, champion=champion),
        SETTINGS,
        7,
        tmp_path,
        gate=GateSettings(min_queries=5),
        ranks=Ranks(cache),
        progress=False,
    )
    over = {(row.system, row.metric): row for row in report.details.over_champion}
    assert over["embedder", "ndcg_at_10"].num_queries == 25
    assert over["embedder", "ndcg_at_10"].interval_low > 0
    assert 0 < over["reranker", "ndcg_at_10"].num_queries <= 12
    against = {judged.against for judged in report.details.gate.judgements}
    assert against == {"champion_pair", "champion_embedder", "base_embedder", "embedder"}
    assert report.details.gate.passed, report.details.gate.reasons
    assert "over the champion" in report.details.gate.sentence
    systems = {row.system for row in report.summary}
    assert {"champion_embedder", "champion_pair"} <= systems
    html = (tmp_path / "report.html").read_text()
    assert "Passed the gate" in html
    assert "on the 25 test questions that it was not trained on" in html
    told = report.details.milliseconds_per_query
    assert told["champion_pair"] > told["champion_embedder"] > 0


def test_a_champion_that_no_longer_loads_stops_the_comparison(
    cleaned: Path, models: ComparedModels, evaluated: tuple[Path, EvaluationReport], tmp_path: Path
) -> None:
    assert models.reranker is not None
    broken = tmp_path / "broken"
    shutil.copytree(models.base_embedder, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    champion = ChampionModels("embedder 0123", broken, models.reranker, frozenset())
    with pytest.raises(ModelError, match=r"the champion \(embedder 0123\) can no longer be measured: .*rollback"):
        evaluate(cleaned, replace(models, champion=champion), SETTINGS, 7, tmp_path, progress=False)


def test_the_report_is_drawn_again_with_what_became_of_the_candidate(
    evaluated: tuple[Path, EvaluationReport], tmp_path: Path
) -> None:
    out, report = evaluated
    (this,) = report.details.history
    assert this.values["embedder"] == pytest.approx(
        next(r.value for r in report.summary if (r.system, r.metric) == ("embedder", "ndcg_at_10"))
    )
    earlier = this.model_copy(update={"version": "0000aaaa", "at": "2026-01-01T00:00:00+00:00", "test_set": "other"})
    served = [Served(since="2026-02-03T04:05:06+00:00", until=None)]
    later = this.model_copy(update={"version": "1111bbbb", "served": served})
    page = write_report(out, tmp_path / "now.html", [earlier, later]).read_text()
    assert "2026-02-03 04:05 until now" in page
    assert page.index("1111bbbb") < page.index("0000aaaa"), "the newest comes first"
    assert "until now" not in (out / "report.html").read_text()


def test_same_seed_same_figures(
    cleaned: Path, models: ComparedModels, evaluated: tuple[Path, EvaluationReport], tmp_path: Path
) -> None:
    out, first = evaluated
    again = evaluate(cleaned, models, SETTINGS, 7, tmp_path, ranks=Ranks(out.parent / "cache"), progress=False)
    assert again.summary == first.summary
    for name in (PER_QUERY_FILE, RANKINGS_FILE):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_without_rerankers(
    cleaned: Path, models: ComparedModels, evaluated: tuple[Path, EvaluationReport], tmp_path: Path
) -> None:
    alone = replace(models, base_reranker=None, reranker=None)
    report = evaluate(cleaned, alone, SETTINGS, 7, tmp_path, ranks=Ranks(evaluated[0].parent / "cache"), progress=False)
    assert {row.system for row in report.summary} == {"bm25", "base_embedder", "embedder"}
    assert report.details.over_base_reranker == []
    assert (tmp_path / "report.html").read_text().count("<svg") == 5


def test_bad_inputs(cleaned: Path, models: ComparedModels, tmp_path: Path) -> None:
    other = write_cleaned(tmp_path / "train_only", [("q", "x")], [("p", "y")], [("q", "p", 1.0)], split="train")
    with pytest.raises(ArtifactError, match=r"no query of split test with a relevant passage.*Raise `cleaning\.split"):
        evaluate(other, models, SETTINGS, 0, tmp_path)
    zero = write_cleaned(tmp_path / "zero", [("q", "x")], [("p", "y")], [("q", "p", 0.0)], split="test")
    with pytest.raises(ArtifactError, match=r"1 test queries have no relevant passage"):
        evaluate(zero, models, SETTINGS, 0, tmp_path)
    with pytest.raises(ModelError, match=r"the fine-tuned embedder is not at .*nowhere"):
        evaluate(cleaned, replace(models, embedder=tmp_path / "nowhere"), SETTINGS, 0, tmp_path)
    assert models.reranker is not None
    bare = tmp_path / "bare"
    shutil.copytree(models.reranker / "model", bare / "model")
    with pytest.raises(ArtifactError, match=r"no serving\.json in"):
        evaluate(cleaned, replace(models, reranker=bare), SETTINGS, 0, tmp_path)
    (bare / "serving.json").write_text('{"embedder_weight": 3}')
    with pytest.raises(ArtifactError, match="expected `embedder_weight` from 0 to 1, found 3"):
        evaluate(cleaned, replace(models, reranker=bare), SETTINGS, 0, tmp_path)
    with pytest.raises(ArtifactError, match=r"no summary\.json in"):
        write_report(tmp_path)


def test_nan_is_an_error(
    cleaned: Path, models: ComparedModels, evaluated: tuple[Path, EvaluationReport], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models.base_embedder, broken)
    weights = load_file(broken / "model.safetensors")
    save_file({name: np.full_like(values, np.nan) for name, values in weights.items()}, broken / "model.safetensors")
    cache = evaluated[0].parent / "cache"
    for wrong, said in (
        (replace(models, base_embedder=broken), "embeddings of queries are not finite numbers"),
        (replace(models, base_reranker=broken), "scores of the reranker are NaN"),
    ):
        with pytest.raises(ModelError, match=said):
            evaluate(cleaned, wrong, SETTINGS, 0, tmp_path, ranks=Ranks(cache), progress=False)


def test_reordering_keeps_what_lies_below() -> None:
    ranking = Ranking(np.array([0]), np.array([[7, 3, 9, 4, 1]]), np.array([[0.9, 0.8, 0.7, 0.6, 0.5]], np.float32))
    logits = np.array([[1.0, 3.0, 2.0]], np.float32)
    assert reordered(ranking, logits, 0.0).passages.tolist() == [[3, 9, 7, 4, 1]]
    assert reordered(ranking, logits, 1.0).passages.tolist() == [[7, 3, 9, 4, 1]]
    flat = reordered(ranking, np.zeros((1, 3), np.float32), 0.0)
    assert flat.passages.tolist() == [[7, 3, 9, 4, 1]]
    assert (np.diff(flat.scores[0]) <= 0).all()


def test_trained_heads_are_recognised(models: ComparedModels, tiny_bert_folder: Path) -> None:
    assert models.reranker is not None
    assert has_trained_head(models.reranker / "model")
    assert not has_trained_head(tiny_bert_folder)


def row(system: str, metric: str, gain: float, low: float, high: float) -> Comparison:
    return Comparison(
        system=system,
        metric=metric,
        value=0.62,
        gain=gain,
        interval_low=low,
        interval_high=high,
        p_value=0.01,
        num_queries=843,
    )


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((0.072, 0.055, 0.089), "The fine-tuned embedder finds a right passage first for 62"),
        ((0.003, -0.01, 0.016), "Fine-tuning made no difference that the test can tell"),
        ((-0.03, -0.05, -0.01), "Fine-tuning made the embedder worse"),
    ],
)
def test_headline_says_what_the_interval_says(interval: tuple[float, float, float], said: str) -> None:
    summary = [row("embedder", "ndcg_at_10", *interval), row("embedder", "hit_rate_at_1", 0.11, 0.08, 0.14)]
    claim, figures = headline(summary, 0.95)
    assert said in claim
    assert "of 843 test questions, before 51\N{NO-BREAK SPACE}%" in claim
    assert figures.startswith(f"nDCG@10 {signed(interval[0])} (95\N{NO-BREAK SPACE}% interval")


def test_verdicts_do_not_flatter() -> None:
    undecided = [row("reranker", "ndcg_at_10", 0.01, -0.01, 0.03), row("bm25", "ndcg_at_10", 0.04, 0.02, 0.06)]
    told = verdicts(undecided, [row("reranker", "ndcg_at_10", 0.2, 0.1, 0.3)], 0.95, untrained_head=False)
    assert told["reranker"].endswith(
        "0.620, +0.200 (95\N{NO-BREAK SPACE}% interval +0.100 to +0.300) over the base reranker."
    )
    assert "remains undecided" in told["reranker"]
    assert "ranks better than the fine-tuned embedder" in told["bm25"]
    worse = [row("reranker", "ndcg_at_10", -0.05, -0.07, -0.03), row("bm25", "ndcg_at_10", -0.4, -0.5, -0.3)]
    told = verdicts(worse, [], 0.95, untrained_head=False)
    assert "makes the ranking worse, so leave it out" in told["reranker"]
    assert "bm25" not in told


def test_a_plot_shown_by_itself_has_colours() -> None:
    """As in the Dagster UI: every colour of the page has a value for where there is no page."""
    svg = gains_plot([row("embedder", metric, 0.1, 0.05, 0.15) for metric in METRICS], "alone")
    assert "#00000" not in svg
    assert not re.findall(r"var\(--\w+\)", svg)
    assert "var(--better, #17805a)" in svg


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_a_collapsed_model_is_refused_and_told(
    cleaned: Path, models: ComparedModels, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """All its answers are one number, and its ties keep the order of an embedder that is better than its base."""
    assert models.reranker is not None
    source = models.embedder if kind == "embedder" else models.reranker
    folder = tmp_path / kind
    shutil.copytree(source, folder)
    collapse(folder if kind == "embedder" else folder / "model")
    if kind == "reranker":
        (folder / "serving.json").write_text(json.dumps({"embedder_weight": 0.0}))
    changed = replace(models, **{kind: folder})
    settings = SETTINGS.model_copy(update={"bootstrap_samples": 200})
    gate = GateSettings(min_queries=1, max_loss={})
    (tmp_path / "out").mkdir()
    report = evaluate(cleaned, changed, settings, 7, tmp_path / "out", gate=gate, progress=False)
    told = f"the fine-tuned {kind} has collapsed: it gives the passages of a question all the same score"
    assert report.details.gate.outcome == "refuse"
    assert told in report.details.gate.reasons[0]
    assert told in report.details.gate.sentence
    assert told in caplog.text
