"""The library's evaluators by kind of source: their own figures, under plain names, on what a split really holds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cleaned_folder import write_cleaned, write_examples
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.cross_encoder.evaluation import CrossEncoderCorrelationEvaluator
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    TranslationEvaluator,
    TripletEvaluator,
)

from embed_pipeline.errors import ArtifactError
from embed_pipeline.evaluation.evaluators import (
    EmbedderEvaluators,
    MeasuredSource,
    RerankerEvaluators,
    embedder_evaluators,
    reranker_evaluators,
)
from embed_pipeline.models.embedder import Embedder, load_sentence_transformer
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.settings import EncodingSettings
from embed_pipeline.tracking.metrics import valid_name

THINGS = ["cat", "dog", "car", "boat", "house", "river", "apple", "pear", "violin", "drum"]
ALIKE = [(f"A {thing} on the street", f"On the street there is a {thing}") for thing in THINGS]
OTHER = [
    (f"A {a} on the street", f"The sky above a {b} is blue")
    for a, b in zip(THINGS, THINGS[1:] + THINGS[:1], strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a kind."""
    folder = tmp_path_factory.mktemp("sources")
    queries = [(f"q{i}", f"where is the {thing}") for i, thing in enumerate(THINGS)]
    passages = [(f"p{i}", f"The {thing} is in the garden") for i, thing in enumerate(THINGS)]
    passages += [(f"o{i}", f"Nobody has a {thing}") for i, thing in enumerate(THINGS)]
    qrels = [(f"q{i}", f"p{i}", 1.0) for i in range(len(THINGS))] + [(f"q{i}", f"o{i}", 0.0) for i in range(6)]
    write_cleaned(folder / "faq", queries, passages, qrels, split="test")
    pairs = [*ALIKE, *OTHER]
    shades = np.linspace(1.0, 0.0, len(pairs)).round(2).tolist()
    write_examples(folder / "sts", [(*pair, score, None) for pair, score in zip(pairs, shades, strict=True)])
    write_examples(folder / "dup", [(*pair, float(pair in ALIKE), str(pair in ALIKE)) for pair in pairs])
    classes = ["same", "other", "far"]
    nli = [(*pair, None, classes[i % 3]) for i, pair in enumerate(pairs)]
    write_examples(folder / "nli", nli, splits=["train", "test"])
    topics = [(f"{prefix} {thing}", None, None, thing) for thing in THINGS[:4] for prefix in ("the", "my old", "every")]
    write_examples(folder / "topics", topics)
    write_examples(folder / "parallel", [(*pair, None, None) for pair in ALIKE])
    return folder


@pytest.fixture(scope="module")
def sources(folder: Path, embedder: Embedder) -> list[MeasuredSource]:
    return [
        MeasuredSource("faq", "triplets", folder / "faq"),
        MeasuredSource("sts", "scored", folder / "sts"),
        MeasuredSource("dup", "labelled", folder / "dup"),
        MeasuredSource("nli", "labelled", folder / "nli"),
        MeasuredSource("topics", "labelled", folder / "topics"),
        MeasuredSource("parallel", "parallel", folder / "parallel", teacher=embedder),
    ]


@pytest.fixture(scope="module")
def embedder(tiny_bert_folder: Path) -> Embedder:
    """With prompts that change every embedding of a query or a passage."""
    return Embedder(
        tiny_bert_folder, EncodingSettings(query_prompt="zebra: ", passage_prompt="stone: "), precision="float32"
    )


@pytest.fixture(scope="module")
def reranker(tiny_bert_folder: Path) -> Reranker:
    torch.manual_seed(0)
    model = CrossEncoder(str(tiny_bert_folder.parent / "plain"), num_labels=1, max_length=32, device="cpu")
    return Reranker.around(model, "float32")


def of(sources: Sequence[MeasuredSource], **told: int | None) -> EmbedderEvaluators:
    found = embedder_evaluators(sources, "test", **{"seed": 3, "max_queries": None, "max_passages": None, **told})  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.fixture(scope="module")
def figures(sources: list[MeasuredSource], embedder: Embedder) -> dict[str, float]:
    return of(sources)(embedder.model)


def test_every_kind_has_its_evaluators_and_names_that_mlflow_takes(
    sources: list[MeasuredSource], figures: dict[str, float]
) -> None:
    assert of(sources).main_metrics == (
        "faq/ndcg_at_10",
        "faq/triplet_accuracy",
        "faq/reranking_ndcg_at_10",
        "sts/spearman",
        "dup/ap",
        "dup/paraphrase_mining_ap",
        "nli/label_accuracy",
        "topics/triplet_accuracy",
        "parallel/translation_accuracy",
        "parallel/negative_mse",
    )
    assert set(of(sources).main_metrics) <= set(figures)
    assert [name for name in figures if valid_name(name) != name or "@" in name or "cosine" in name] == []
    assert all(np.isfinite(list(figures.values())))


def test_figures_are_those_of_the_library(folder: Path, embedder: Embedder, figures: dict[str, float]) -> None:
    model = embedder.model
    first, second = ([pair[side] for pair in [*ALIKE, *OTHER]] for side in (0, 1))
    # Sentences are read as they stand; queries and passages with their prompts.
    scores = np.linspace(1.0, 0.0, len(first)).round(2).tolist()
    sts = EmbeddingSimilarityEvaluator(first, second, scores, main_similarity="cosine")(model)
    assert (figures["sts/spearman"], figures["sts/pearson"]) == pytest.approx(
        (sts["spearman_cosine"], sts["pearson_cosine"]), abs=1e-6
    )
    labels = [1] * len(ALIKE) + [0] * len(OTHER)
    dup = BinaryClassificationEvaluator(first, second, labels, similarity_fn_names=["cosine"])(model)
    for name in ("ap", "f1", "accuracy", "mcc"):
        assert figures[f"dup/{name}"] == pytest.approx(dup[f"cosine_{name}"], abs=1e-6)
    translated = TranslationEvaluator(*([pair[side] for pair in ALIKE] for side in (0, 1)))(model)
    assert figures["parallel/translation_accuracy"] == translated["mean_accuracy"]

    queries = {f"q{i}": f"where is the {thing}" for i, thing in enumerate(THINGS)}
    answers = {f"p{i}": f"The {thing} is in the garden" for i, thing in enumerate(THINGS)}
    others = {f"o{i}": f"Nobody has a {thing}" for i, thing in enumerate(THINGS)}
    searched = InformationRetrievalEvaluator(
        queries, {**answers, **others}, {f"q{i}": {f"p{i}"} for i in range(len(THINGS))}
    )(model)
    for name in ("ndcg@10", "mrr@10", "accuracy@1", "recall@5", "map@100"):
        assert figures[f"faq/{name.replace('@', '_at_')}"] == pytest.approx(searched[f"cosine_{name}"], abs=1e-6)
    bare = Embedder.around(SentenceTransformer(str(embedder.folder), device="cpu"), "float32")
    without_prompts = of([MeasuredSource("faq", "triplets", folder / "faq")])(bare.model)
    assert without_prompts["faq/mrr_at_10"] != figures["faq/mrr_at_10"]
    triplets = TripletEvaluator(
        list(queries.values())[:6],
        list(answers.values())[:6],
        list(others.values())[:6],
        main_similarity_function="cosine",
    )(model)
    assert figures["faq/triplet_accuracy"] == triplets["cosine_accuracy"]


def test_items_are_what_the_figures_are_made_of(sources: list[MeasuredSource], embedder: Embedder) -> None:
    measured = of(sources).measure(embedder)
    means = {name: found for name, found in measured.items() if found.items is not None and found.expected is None}
    assert {name.split("/")[0] for name in means} == {"faq", "nli", "topics", "parallel"}
    for name, found in means.items():
        assert found.items is not None
        assert found.items.mean() == pytest.approx(found.value, abs=1e-5), name
    spearman = measured["sts/spearman"]
    assert spearman.items is not None
    assert spearman.expected is not None
    assert len(spearman.items) == len(spearman.expected) == len(ALIKE) + len(OTHER)
    assert measured["dup/ap"].items is None


def test_samples_are_seeded_and_capped(sources: list[MeasuredSource], embedder: Embedder) -> None:
    faq = sources[:1]
    first, again, other = (
        of(faq, max_queries=4, max_passages=9, seed=seed).measure(embedder)["faq/ndcg_at_10"] for seed in (1, 1, 2)
    )
    assert first.items is not None
    assert again.items is not None
    assert other.items is not None
    assert len(first.items) == len(other.items) == 4
    assert np.array_equal(first.items, again.items)
    # Nine passages at most, judged ones among them, are an easier search than all twenty.
    assert first.value >= of(faq, max_queries=4, seed=1).measure(embedder)["faq/ndcg_at_10"].value


def test_a_corpus_may_be_left_to_others(folder: Path) -> None:
    own = MeasuredSource("own", "triplets", folder / "faq", search=False)
    assert of([own]).main_metrics == ("own/triplet_accuracy", "own/reranking_ndcg_at_10")
    assert embedder_evaluators([own], "dev", seed=1, max_queries=None, max_passages=None) is None


def test_what_cannot_be_told_is_not_measured(folder: Path, tmp_path: Path) -> None:
    write_examples(tmp_path / "flat", [(*pair, 0.5, None) for pair in ALIKE])
    write_examples(tmp_path / "one_class", [(*pair, 1.0, "same") for pair in ALIKE])
    flat = [
        MeasuredSource("flat", "scored", tmp_path / "flat"),
        MeasuredSource("one_class", "labelled", tmp_path / "one_class"),
    ]
    told = {"seed": 1, "max_queries": None, "max_passages": None}
    assert embedder_evaluators(flat, "test", **told) is None  # type: ignore[arg-type]
    assert reranker_evaluators(flat, "test", **told) is None  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=r"no examples\.parquet in .*faq"):
        embedder_evaluators([MeasuredSource("x", "scored", folder / "faq")], "test", **told)  # type: ignore[arg-type]


def test_a_model_that_gives_no_numbers_has_nan_as_its_main_figure(
    sources: list[MeasuredSource], tiny_bert_folder: Path
) -> None:
    model = load_sentence_transformer(tiny_bert_folder, device="cpu")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    evaluators = of(sources[:5])
    found = evaluators(model)
    assert tuple(found) == evaluators.main_metrics
    assert all(np.isnan(list(found.values())))


def test_cross_encoder(sources: list[MeasuredSource], reranker: Reranker) -> None:
    evaluators = reranker_evaluators(sources, "test", seed=1, max_queries=None, max_passages=None)
    assert isinstance(evaluators, RerankerEvaluators)
    assert evaluators.main_metrics == ("faq/ndcg_at_10", "sts/spearman", "dup/ap")
    measured = evaluators.measure(reranker)
    found = evaluators(reranker.model)
    assert {name: figure.value for name, figure in measured.items()} == pytest.approx(found)
    assert {"faq/bm25_ndcg_at_10", "faq/mrr_at_10", "sts/pearson", "dup/f1"} <= set(found)
    pairs = [list(pair) for pair in [*ALIKE, *OTHER]]
    scores = np.linspace(1.0, 0.0, len(pairs)).round(2).tolist()
    library = CrossEncoderCorrelationEvaluator(pairs, scores, show_progress_bar=False)(reranker.model)
    assert found["sts/pearson"] == pytest.approx(library["pearson"], abs=1e-4)
    of_queries = measured["faq/ndcg_at_10"].items
    assert of_queries is not None
    assert of_queries.shape == (len(THINGS),)
    assert of_queries.mean() == pytest.approx(found["faq/ndcg_at_10"])


def test_nothing_is_written_or_told(
    sources: list[MeasuredSource],
    embedder: Embedder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        of(sources[1:3])(embedder.model)
    assert list(tmp_path.iterdir()) == []
    assert [record for record in caplog.records if record.name.startswith("sentence_transformers")] == []
    assert capfd.readouterr().out == ""
