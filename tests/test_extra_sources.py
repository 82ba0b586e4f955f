"""A pipeline of several data sets, from its files to hard negatives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from embed_pipeline.artifacts import PipelineStore
from embed_pipeline.command_line import main
from embed_pipeline.errors import ConfigurationError
from embed_pipeline.evaluation.results import EVALUATORS_FILE
from embed_pipeline.orchestration.checks import (
    answers_are_in_the_corpus,
    no_positive_among_negatives,
    sources_do_not_leak_into_each_other,
    splits_do_not_leak_and_rows_add_up,
)
from embed_pipeline.retraining import raw_rows_read, retraining_due
from embed_pipeline.settings import PipelineSettings
from embed_pipeline.sources.check import check_all
from embed_pipeline.sources.fingerprint import look
from embed_pipeline.stages import (
    Pipeline,
    make_cleaned_pairs,
    make_embedder,
    make_evaluation,
    make_hard_negatives,
    make_raw_pairs,
    make_reranker,
)
from embed_pipeline.tables import EXAMPLES_FILE, HARD_NEGATIVES_FILE, QUERIES_FILE
from embed_pipeline.tracking.server import tracking_uri

RETRIEVAL = ("tuples", "bge", "judged")
EXAMPLES = ("alike", "classes", "zh")


def write(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_files(folder: Path) -> None:
    numbers = range(30)
    squares = [f"{i * i} is the square, says table {i}" for i in range(60)]
    write(folder / "own.parquet", query=[f"what is {i} squared" for i in numbers], passage=squares[:30])
    write(
        folder / "tuples.parquet",
        anchor=[f"square of {i}" for i in range(30, 60)],
        positive=squares[30:],
        negative_1=[f"not {i} at all" for i in numbers],
        negative_2=[f"no more is {i} here" for i in numbers],
    )
    lines = [
        {
            "query": f"cube {i}",
            "pos": [f"{i**3} cubic"],
            "neg": [f"{i + 7} feet"],
            "pos_scores": [2],
            "neg_scores": [-2],
        }
        for i in numbers
    ]
    (folder / "bge.jsonl").write_text("\n".join(json.dumps({**line, "prompt": "ask: "}) for line in lines))
    write(folder / "c.parquet", passage_id=[*numbers], text=[f"root number {i} text" for i in numbers])
    write(folder / "q.parquet", query_id=[*numbers], text=[f"root of {i * i}" for i in numbers])
    write(folder / "r.parquet", query_id=[*numbers], passage_id=[*numbers], score=[1] * 30)
    sentences = {"sentence1": [f"left {i}" for i in numbers], "sentence2": [f"right hand {i}" for i in numbers]}
    write(folder / "alike.parquet", **sentences, score=[i / 6 for i in numbers])
    write(folder / "classes.parquet", sentence1=[f"word {i}" for i in numbers], label=[i % 3 for i in numbers])
    write(folder / "zh.parquet", **{name: [f"zh {text}" for text in texts] for name, texts in sentences.items()})


def pipeline(folder: Path, model: Path, smoke_test: bool = False, **changed: Any) -> Pipeline:
    told: dict[str, Any] = {
        "name": "support",
        "source": {"kind": "pairs", "path": "own.parquet"},
        "extra_sources": [
            {"name": "tuples", "kind": "triplets", "path": "tuples.parquet"},
            {"name": "bge", "kind": "flag-embedding", "path": "*.jsonl"},
            {"name": "judged", "kind": "beir", "corpus": "c.parquet", "queries": "q.parquet", "qrels": "r.parquet"},
            {"name": "alike", "kind": "scored", "path": "alike.parquet", "score_range": [0, 5]},
            {"name": "classes", "kind": "labelled", "path": "classes.parquet", "loss": "BatchAllTripletLoss"},
            {"name": "zh", "kind": "parallel", "path": "zh.parquet", "teacher": {"path": str(model)}},
        ],
        "mining": {"num_negatives": 4, "top_k": 10},
        "embedder": {"base_model": {"path": str(model)}, "encoding": {"query_prompt": "ask: "}},
        **changed,
    }
    store = PipelineStore(folder / "store", "support")
    return Pipeline(PipelineSettings.model_validate(told), folder, store, smoke_test=smoke_test)


def made(pipeline: Pipeline) -> list[str]:
    """The stages that had something to do."""
    stages = (make_raw_pairs, make_cleaned_pairs, make_hard_negatives)
    return [produced.artifact.manifest.asset for stage in stages if not (produced := stage(pipeline)).reused]


@pytest.fixture
def support(tmp_path: Path, tiny_bert_folder: Path) -> Callable[..., Pipeline]:
    write_files(tmp_path)
    return lambda **changed: pipeline(tmp_path, tiny_bert_folder, **changed)


def test_every_kind_goes_through_all_stages_and_nothing_is_made_twice(support: Callable[..., Pipeline]) -> None:
    one = support()
    check_all(one.settings.sources, one.folder)
    assert made(one) == ["raw_pairs", "cleaned_pairs", "hard_negatives"]
    cleaned, negatives = (one.store.current(asset) for asset in ("cleaned_pairs", "hard_negatives"))
    for name in ("", *(f"extra/{name}/" for name in RETRIEVAL)):
        assert pq.read_metadata(cleaned.path / f"{name}{QUERIES_FILE}").num_rows == 30
        assert 10 < pq.read_metadata(negatives.path / f"{name}{HARD_NEGATIVES_FILE}").num_rows < 30
    for name in EXAMPLES:
        assert pq.read_metadata(cleaned.path / "extra" / name / EXAMPLES_FILE).num_rows == 30
        assert not (negatives.path / "extra" / name).exists()
    for check in (
        splits_do_not_leak_and_rows_add_up,
        sources_do_not_leak_into_each_other,
        answers_are_in_the_corpus,
        no_positive_among_negatives,
    ):
        assert check(one) == []
    assert raw_rows_read(one) is not None
    assert retraining_due(one).reason == "embedder was never made"
    assert len(look(one.settings.sources, one.folder)) == 9
    assert made(support()) == []

    done = CliRunner().invoke(
        main,
        [
            "export-negatives",
            "support",
            "--format",
            "flag-embedding",
            "--output",
            str(one.folder / "o.jsonl"),
            "--source",
            "bge",
        ],
        env={"EMBED_PIPELINE_STORE": str(one.folder / "store")},
    )
    assert done.exit_code == 0, done.output
    exported = [json.loads(line) for line in (one.folder / "o.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in exported} == {"ask: "}
    assert all(line["query"].startswith("cube") and len(line["neg"]) == 4 for line in exported)


def test_all_are_learnt_and_measured_by_both_models(
    support: Callable[..., Pipeline], tiny_bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(support().folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    training = {"base_model": {"path": str(tiny_bert_folder)}, "batch_size": 4, "evaluations": 1, "epochs": 1}
    told = [extra.model_dump(exclude_unset=True) for extra in support().settings.extra_sources]
    for extra in told:
        if extra["name"] in ("judged", "alike"):
            extra["reranker_loss"] = "BinaryCrossEntropyLoss"
    one = support(
        extra_sources=told,
        encode_precision="float32",
        embedder={**training, "encoding": {"query_prompt": "ask: "}, "precision": "float32"},
        reranker={
            **training,
            "batch_size": 2,
            "precision": "float32",
            "query_max_length": 16,
            "passage_max_length": 16,
        },
        tracking={"system_metrics": False, "log_model": False},
    )
    made(one)
    embedder, reranker = make_embedder(one).artifact, make_reranker(one).artifact
    assert set(embedder.report["rows"]) == {"support", *RETRIEVAL, *EXAMPLES}
    assert set(reranker.report["rows"]) == {"support", "judged", "alike"}

    evaluation = make_evaluation(one).artifact

    rows = json.loads((evaluation.path / EVALUATORS_FILE).read_text())
    main = {(row["model"], f"{row['source']}/{row['metric']}"): row for row in rows if row["main"]}
    assert set(main) == {
        ("embedder", "tuples/ndcg_at_10"),
        ("embedder", "tuples/triplet_accuracy"),
        ("embedder", "tuples/reranking_ndcg_at_10"),
        ("embedder", "bge/ndcg_at_10"),
        ("embedder", "bge/triplet_accuracy"),
        ("embedder", "bge/reranking_ndcg_at_10"),
        ("embedder", "judged/ndcg_at_10"),
        ("embedder", "alike/spearman"),
        ("embedder", "classes/triplet_accuracy"),
        ("embedder", "zh/translation_accuracy"),
        ("embedder", "zh/negative_mse"),
        ("reranker", "judged/ndcg_at_10"),
        ("reranker", "alike/spearman"),
    }
    for (model, name), row in main.items():
        assert row["change"] == pytest.approx(row["trained"] - row["base"])
        assert evaluation.report["evaluators"][f"{model}/{name}"] == row["trained"]
        assert evaluation.report["evaluators"][f"base_{model}/{name}"] == row["base"]
    run = mlflow.MlflowClient(tracking_uri()).get_run(evaluation.manifest.runs.mlflow)
    assert run.data.metrics["reranker/alike/spearman"] == main["reranker", "alike/spearman"]["trained"]
    page = (evaluation.path / "report.html").read_text()
    assert "<th>reranker: alike/spearman</th>" in page
    assert "<th>zh/negative_mse</th>" in page


def test_what_changes_is_made_anew(support: Callable[..., Pipeline]) -> None:
    told = [extra.model_dump(exclude_unset=True) for extra in support().settings.extra_sources[-3:]]
    made(support(extra_sources=told))
    # A licence, a loss or another row count change no table.
    told[0] |= {"license": "cc-by-4.0", "train_rows": 5, "loss": "AnglELoss"}
    assert made(support(extra_sources=told)) == []
    told[0] |= {"score_range": [0, 10]}
    assert made(support(extra_sources=told)) == ["cleaned_pairs", "hard_negatives"]
    one = support(extra_sources=told)
    before = raw_rows_read(one)
    write(one.folder / "zh.parquet", sentence1=[f"a {i}" for i in range(9)], sentence2=[f"b {i}" for i in range(9)])
    assert before is not None
    assert retraining_due(one).reason == f"the raw files are not those that raw_pairs {before.version} was read from"
    assert made(one) == ["raw_pairs", "cleaned_pairs", "hard_negatives"]
    assert made(support(extra_sources=told[:1])) == ["raw_pairs", "cleaned_pairs", "hard_negatives"]


def test_a_smoke_test_has_a_sample_of_each(support: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embed_pipeline.stages.SMOKE_TEST_QUERIES", 20)
    one = support(smoke_test=True)
    make_raw_pairs(one)
    report = one.store.current("raw_pairs").report
    assert {name: found["rows"] for name, found in report["extra_sources"].items()} == {
        "tuples": 40,
        "bge": 40,
        "judged": 70,
        "alike": 20,
        "classes": 20,
        "zh": 20,
    }
    make_cleaned_pairs(one)


def test_a_prompt_that_the_model_does_not_have_is_told_again_and_again(support: Callable[..., Pipeline]) -> None:
    model = support().settings.embedder.base_model.model_dump()
    other = support(embedder={"base_model": model})
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"query_instruction_for_retrieval: found nothing, .*bge\.jsonl"):
            make_raw_pairs(other)
        make_raw_pairs(support())


def test_scores_that_are_learnt_are_not_diluted(support: Callable[..., Pipeline]) -> None:
    base = support().settings.embedder.base_model.model_dump()
    one = support(
        source={"kind": "flag-embedding", "path": "*.jsonl"},
        extra_sources=[],
        embedder={"base_model": base, "encoding": {"query_prompt": "ask: "}, "loss": "DistillKLDivLoss"},
    )
    made(one)
    rows = pq.read_table(one.store.current("hard_negatives").path / HARD_NEGATIVES_FILE).to_pylist()
    assert {(*row["positive_teacher_scores"], *row["negative_teacher_scores"]) for row in rows} == {(2.0, -2.0)}


def test_scored_pairs_are_a_pipeline_that_mines_only_its_extra_sources(support: Callable[..., Pipeline]) -> None:
    own = {"kind": "scored", "path": "alike.parquet", "score_range": [0, 5]}
    alone = support(source=own, extra_sources=[], mining={})
    assert not alone.settings.mines
    make_raw_pairs(alone)
    cleaned = make_cleaned_pairs(alone).artifact
    assert sorted(cleaned.manifest.files) == ["examples.parquet", "rejected_examples.parquet"]
    both = support(source=own, extra_sources=[{"name": "pairs", "kind": "pairs", "path": "own.parquet"}])
    assert made(both) == ["raw_pairs", "cleaned_pairs", "hard_negatives"]
    assert next(iter(both.store.current("hard_negatives").manifest.files)) == "extra/pairs/hard_negatives.parquet"
    assert no_positive_among_negatives(both) == []


def test_paths_of_extra_sources_are_checked_when_definitions_load(support: Callable[..., Pipeline]) -> None:
    one = support(extra_sources=[{"name": "bge", "kind": "flag-embedding", "path": "gone.jsonl"}])
    with pytest.raises(ConfigurationError, match=r"extra_sources\.bge\.path: no such file or folder: .*gone\.jsonl"):
        check_all(one.settings.sources, one.folder)
    (one.folder / "build.py").write_text("")
    built = {"kind": "pairs", "path": "raw/own.parquet", "script": "build.py", "script_output": "raw"}
    two = support(source=built, extra_sources=[{"name": "b", **built, "script": "own.parquet"}])
    with pytest.raises(
        ConfigurationError, match=r"extra_sources\.b\.script_output and source\.script_output are both raw"
    ):
        check_all(two.settings.sources, two.folder)
