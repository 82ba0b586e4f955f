"""Who a candidate has to beat, and that it cannot get around it: the evaluation stage with a champion in the store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from embed_pipeline.artifacts import Artifact, PipelineStore
from embed_pipeline.champions import Champion, RegisteredModel, changing, pair_key, record
from embed_pipeline.errors import ArtifactError
from embed_pipeline.settings import PipelineSettings
from embed_pipeline.stages import (
    Pipeline,
    make_champion,
    make_cleaned_pairs,
    make_embedder,
    make_evaluation,
    make_hard_negatives,
    make_raw_pairs,
    make_reranker,
    reference,
)
from tests.orchestration.conftest import settings_of, write_pipeline

OTHER_RATE = 2e-3


def with_rate(pipeline: Pipeline, learning_rate: float) -> Pipeline:
    embedder = pipeline.settings.embedder.model_copy(update={"learning_rate": learning_rate})
    return replace(pipeline, settings=pipeline.settings.model_copy(update={"embedder": embedder}))


def train(pipeline: Pipeline) -> tuple[Artifact, Artifact]:
    return make_embedder(pipeline).artifact, make_reranker(pipeline).artifact


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_bert_folder: Path) -> Iterator[Pipeline]:
    """A pipeline whose embedder and reranker were trained twice, at two learning rates; the first is current."""
    folder = tmp_path_factory.mktemp("champion")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(folder / "home"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        (folder / "home").mkdir()
        write_pipeline(folder / "defs", settings_of(tiny_bert_folder))
        settings = PipelineSettings.model_validate(
            {**settings_of(tiny_bert_folder), "tracking": {"system_metrics": False, "log_model": False}}
        )
        pipeline = Pipeline(settings, folder / "defs" / "small", PipelineStore(folder / "store", "small"))
        make_raw_pairs(pipeline)
        make_cleaned_pairs(pipeline)
        make_hard_negatives(pipeline)
        train(with_rate(pipeline, OTHER_RATE))
        train(pipeline)
        yield pipeline


@pytest.fixture
def pipeline(trained: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The trained pipeline with a copy of its store, to be changed at will."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    shutil.copytree(trained.store.folder, tmp_path / "store" / "small", symlinks=True)
    return replace(trained, store=PipelineStore(tmp_path / "store", "small"))


def models(pipeline: Pipeline) -> tuple[Artifact, Artifact]:
    return pipeline.store.current("embedder"), pipeline.store.current("reranker")


def the_other_models(pipeline: Pipeline) -> tuple[Artifact, Artifact]:
    current = {model.version for model in models(pipeline)}
    embedder, reranker = (
        next(a for a in pipeline.store.versions(asset) if a.version not in current)
        for asset in ("embedder", "reranker")
    )
    return embedder, reranker


def crown(pipeline: Pipeline, embedder: Artifact, reranker: Artifact, evaluation: str = "e") -> Champion:
    champion = Champion(
        embedder_asset="embedder",
        embedder=embedder.version,
        reranker=reranker.version,
        cleaned_pairs=embedder.input("cleaned_pairs"),
        evaluation=evaluation,
        verdict="better",
        registered_embedder=RegisteredModel(name="small-embedder", version="1"),
        registered_reranker=RegisteredModel(name="small-reranker", version="1"),
    )
    with changing(pipeline.store) as history:
        record(pipeline.store, history, "promoted", champion, by="test", reason="")
    return champion


def test_the_champion_is_measured_again_and_a_promotion_makes_nothing_anew(pipeline: Pipeline) -> None:
    first = make_evaluation(pipeline)
    assert first.artifact.report["reference"] is None
    assert first.artifact.report["gate"]["outcome"] == "too_few"  # 24 test questions are no evidence

    # Promoted itself: it is compared with whom it beat, which was measured already.
    crown(pipeline, *models(pipeline))
    again = make_evaluation(pipeline)
    assert again.reused
    assert again.artifact.version == first.artifact.version

    other = crown(pipeline, *the_other_models(pipeline))
    compared = make_evaluation(pipeline)
    assert not compared.reused
    assert compared.artifact.report["reference"] == other.key
    systems = {row["system"] for row in compared.artifact.report["summary"]}
    assert {"champion_embedder", "champion_pair"} <= systems
    # Of one split, so the champion was trained on none of the questions.
    against = [j for j in compared.artifact.report["gate"]["judgements"] if j["against"] == "champion_embedder"]
    queries = next(r["num_queries"] for r in compared.artifact.report["summary"] if r["system"] == "embedder")
    assert {j["found"]["num_queries"] for j in against} == {queries}


def test_an_evaluation_of_other_models_promotes_nobody(pipeline: Pipeline) -> None:
    make_evaluation(pipeline)
    other = with_rate(pipeline, OTHER_RATE)
    train(other)  # found again, and current now
    with pytest.raises(ArtifactError, match=r"was made with embedder .* is current\. Materialize small/evaluation"):
        make_champion(other)


def test_who_has_to_be_beaten(pipeline: Pipeline) -> None:
    candidate = models(pipeline)
    assert reference(pipeline, *candidate) is None
    old = crown(pipeline, *the_other_models(pipeline))
    assert reference(pipeline, *candidate) == old
    crown(pipeline, *candidate)
    assert reference(pipeline, *candidate) == old
    assert reference(pipeline, *the_other_models(pipeline)).key == pair_key(*candidate)  # type: ignore[union-attr]


def test_questions_the_champion_was_trained_on_are_left_out(pipeline: Pipeline) -> None:
    """The champion's split was another one: what was train then is partly test now."""
    crown(pipeline, *the_other_models(pipeline))
    cleaning = pipeline.settings.cleaning
    split = cleaning.split.model_copy(update={"test": 0.4})
    changed = pipeline.settings.model_copy(update={"cleaning": cleaning.model_copy(update={"split": split})})
    later = replace(pipeline, settings=changed)
    make_cleaned_pairs(later)
    make_hard_negatives(later)
    train(later)
    report = make_evaluation(later).artifact.report
    judgements = report["gate"]["judgements"]
    of_champion = {j["found"]["num_queries"] for j in judgements if j["against"] == "champion_embedder"}
    of_base = {j["found"]["num_queries"] for j in judgements if j["against"] == "base_embedder"}
    assert 0 < max(of_champion) < min(of_base)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("change", r"model\.safetensors was changed after small/embedder version"),
        ("delete", r"small/embedder has no version"),
        ("negatives", r"small/hard_negatives has no version|hard_negatives"),
    ],
)
def test_a_champion_that_cannot_be_trusted_stops_everything(pipeline: Pipeline, harm: str, said: str) -> None:
    embedder, reranker = the_other_models(pipeline)
    crown(pipeline, embedder, reranker)
    if harm == "change":
        weights = embedder.path / "model" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif harm == "delete":
        shutil.rmtree(embedder.path)
    else:
        shutil.rmtree(pipeline.store.get("hard_negatives", embedder.input("hard_negatives")).path)
        # The candidate was trained on the same ones; make_evaluation itself does not need them.
    with pytest.raises(ArtifactError, match=rf"the champion of small is not what it was.*({said}).*rollback"):
        make_evaluation(pipeline)
    assert not pipeline.store.has_current("evaluation")


def test_a_model_of_another_pipeline_is_not_evaluated(pipeline: Pipeline) -> None:
    """Somebody copies the folder of a better model from another pipeline over the candidate's."""
    embedder, _ = models(pipeline)
    manifest = embedder.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"pipeline": "small"', '"pipeline": "large"'))
    with pytest.raises(ArtifactError, match=r"holds large/embedder version .*, not small/embedder"):
        make_evaluation(pipeline)
