"""What of a YAML reaches the library's loss: each argument by the value that the loss holds, without a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer import losses

from embed_pipeline.errors import TrainingError
from embed_pipeline.losses import EMBEDDER_LOSSES, RERANKER_LOSSES, SourceKind
from embed_pipeline.settings import EmbedderSettings
from embed_pipeline.training.losses import embedder_loss, reranker_loss
from embed_pipeline.training.sources import Example, TrainingSource


@pytest.fixture(scope="module")
def embedder(tiny_bert_folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_bert_folder), device="cpu")


@pytest.fixture(scope="module")
def reranker(base_models: tuple[Path, Path]) -> CrossEncoder:
    return CrossEncoder(str(base_models[1]), device="cpu")


def source(loss: str, kind: SourceKind = "pairs", **told: Any) -> TrainingSource:
    return TrainingSource("shop", kind, loss, EMBEDDER_LOSSES[loss], told.pop("arguments", {}), **told)


def settings(**told: Any) -> EmbedderSettings:
    return EmbedderSettings.model_validate({"base_model": {"path": "x"}, **told})


RANKING = [name for name, facts in EMBEDDER_LOSSES.items() if facts.in_batch and not facts.needs]
IN_PARTS = [name for name, facts in EMBEDDER_LOSSES.items() if facts.caches]


@pytest.mark.parametrize("name", RANKING)
def test_in_batch_negatives_are_scaled_and_gathered_as_asked(embedder: SentenceTransformer, name: str) -> None:
    made: Any = embedder_loss(embedder, source(name), settings(temperature=0.04, negatives_cross_device=False))
    assert (type(made).__name__, made.scale, made.gather_across_devices) == (name, 25.0, False)
    assert made.model is embedder
    made = embedder_loss(embedder, source(name), settings(negatives_cross_device=True))
    assert made.gather_across_devices


@pytest.mark.parametrize("name", ["GISTEmbedLoss", "CachedGISTEmbedLoss"])
def test_a_guide_is_another_model_that_does_not_learn(
    embedder: SentenceTransformer, tiny_bert_folder: Path, name: str
) -> None:
    made: Any = embedder_loss(
        embedder,
        source(name, arguments={"margin": 0.3}),
        settings(temperature=0.04, guide={"path": "x"}, loss=name, sub_batch_size=2),
        guide=tiny_bert_folder,
    )
    assert (made.temperature, made.margin, made.gather_across_devices) == (0.04, 0.3, True)
    assert isinstance(made.guide, SentenceTransformer)
    assert made.guide is not embedder
    assert not made.guide.training
    assert made.guide.device == embedder.device


@pytest.mark.parametrize("name", IN_PARTS)
def test_the_sub_batch_is_that_of_gradient_caching(
    embedder: SentenceTransformer, tiny_bert_folder: Path, name: str
) -> None:
    guide = tiny_bert_folder if "guide" in EMBEDDER_LOSSES[name].needs else None
    made: Any = embedder_loss(embedder, source(name), settings(sub_batch_size=3), guide=guide)
    assert made.mini_batch_size == 3


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, facts in EMBEDDER_LOSSES.items() for kind in facts.rows if facts.defaults]
)
def test_our_defaults_and_what_the_yaml_says_instead(
    embedder: SentenceTransformer, name: str, kind: SourceKind
) -> None:
    for argument, value in EMBEDDER_LOSSES[name].defaults.items():
        assert value == 0.5
        made: Any = embedder_loss(embedder, source(name, kind), settings())
        attribute = argument if hasattr(made, argument) else "triplet_margin"  # as the library keeps it
        assert getattr(made, attribute) == 0.5
        made = embedder_loss(embedder, source(name, kind, arguments={argument: 0.25}), settings())
        assert getattr(made, attribute) == 0.25


ONE, OTHER = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
DISTANCES = {"cosine": 0.4, "euclidean": 0.8**0.5, "manhattan": 1.2}


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", ["TripletLoss", "ContrastiveLoss", "OnlineContrastiveLoss"])
def test_a_distance_goes_by_its_name(embedder: SentenceTransformer, name: str, distance: str) -> None:
    for spelling in (distance, distance.upper(), f"{distance}_distance"):
        made: Any = embedder_loss(embedder, source(name, arguments={"distance_metric": spelling}), settings())
        assert float(made.distance_metric(ONE, OTHER)) == pytest.approx(DISTANCES[distance], abs=1e-5)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("name", [name for name in EMBEDDER_LOSSES if name.startswith("Batch")])
def test_a_distance_within_a_batch_goes_by_its_name(embedder: SentenceTransformer, name: str, distance: str) -> None:
    chosen = source(name, "labelled", arguments={"distance_metric": distance})
    made: Any = embedder_loss(embedder, chosen, settings())
    assert float(made.distance_metric(torch.cat([ONE, OTHER]))[0, 1]) == pytest.approx(DISTANCES[distance], abs=1e-5)


def test_a_distance_that_a_loss_does_not_know_is_refused(embedder: SentenceTransformer) -> None:
    chosen = source("BatchAllTripletLoss", "labelled", arguments={"distance_metric": "Manhattan"})
    with pytest.raises(TrainingError) as refused:
        embedder_loss(embedder, chosen, settings())
    assert str(refused.value) == (
        "loss_arguments.distance_metric: BatchAllTripletLoss knows cosine, euclidean; found 'Manhattan'"
    )


def test_the_classifier_of_softmax_loss_fits_the_classes(embedder: SentenceTransformer) -> None:
    examples = tuple(Example("a", "b", None, label) for label in ("no", "yes", "maybe", "yes"))
    made: Any = embedder_loss(embedder, source("SoftmaxLoss", "labelled", examples=examples), settings())
    assert made.classifier.weight.shape == (3, 3 * 32)  # classes; both embeddings and their difference


def test_a_student_of_logits_is_sharpened_unless_the_yaml_says_otherwise(embedder: SentenceTransformer) -> None:
    made: Any = embedder_loss(embedder, source("DistillKLDivLoss"), settings(temperature=0.04))
    assert made.student_temperature == 0.04
    told = source("DistillKLDivLoss", arguments={"student_temperature": 0.5})
    made = embedder_loss(embedder, told, settings(temperature=0.04))
    assert made.student_temperature == 0.5


def test_a_wrapper_stands_around_the_loss(embedder: SentenceTransformer) -> None:
    chosen = source(
        "TripletLoss", wrapper="MatryoshkaLoss", wrapper_arguments={"matryoshka_dims": [8, 32], "n_dims_per_step": 1}
    )
    made: Any = embedder_loss(embedder, chosen, settings())
    assert isinstance(made, losses.MatryoshkaLoss)
    assert isinstance(made.loss, losses.TripletLoss)
    assert (sorted(made.matryoshka_dims), made.n_dims_per_step) == ([8, 32], 1)
    layers = embedder_loss(embedder, source("TripletLoss", wrapper="AdaptiveLayerLoss"), settings())
    assert isinstance(layers, losses.AdaptiveLayerLoss)


def test_lists_become_the_tuples_that_the_library_compares(embedder: SentenceTransformer) -> None:
    ways = ["query_to_doc", "doc_to_query"]
    name = "MultipleNegativesRankingLoss"
    made: Any = embedder_loss(
        embedder, source(name, arguments={"directions": ways, "partition_mode": "per_direction"}), settings()
    )
    assert made.directions == tuple(ways)


@pytest.mark.parametrize("given", [{"nonsense": 1}, {"partition_mode": "nonsense"}])
def test_what_the_library_does_not_take_is_told(embedder: SentenceTransformer, given: dict[str, Any]) -> None:
    name = "MultipleNegativesRankingLoss"
    with pytest.raises(TrainingError, match=rf"^{name} does not take these arguments: .*nonsense.*Mend loss_arguments"):
        embedder_loss(embedder, source(name, arguments=given), settings())


def test_a_rerankers_loss_takes_its_arguments(reranker: CrossEncoder) -> None:
    def made(name: str, **arguments: Any) -> Any:
        return reranker_loss(reranker, TrainingSource("shop", "pairs", name, RERANKER_LOSSES[name], arguments))

    weighted = made("BinaryCrossEntropyLoss", pos_weight=3)
    assert type(weighted).__name__ == "BinaryCrossEntropyLoss"
    assert weighted.model is reranker
    assert torch.equal(weighted.bce_with_logits_loss.pos_weight, torch.tensor(3.0))
    assert made("BinaryCrossEntropyLoss").bce_with_logits_loss.pos_weight is None
    assert made("LambdaLoss", k=7).k == 7
    with pytest.raises(TrainingError, match=r"^LambdaLoss does not take these arguments: .*nonsense"):
        made("LambdaLoss", nonsense=1)
