"""From the name of a loss in a YAML to sentence-transformers' module, with the arguments that our settings decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.cross_encoder import losses as cross_encoder_losses
from sentence_transformers.sentence_transformer import losses
from torch import nn

from embed_pipeline.errors import TrainingError
from embed_pipeline.models.embedder import load_sentence_transformer
from embed_pipeline.settings import EmbedderSettings
from embed_pipeline.training.data_sets import classes_of
from embed_pipeline.training.sources import TrainingSource

# A YAML names a distance; the library wants its function.
_SIAMESE = {
    "cosine": losses.SiameseDistanceMetric.COSINE_DISTANCE,
    "euclidean": losses.SiameseDistanceMetric.EUCLIDEAN,
    "manhattan": losses.SiameseDistanceMetric.MANHATTAN,
}
_BATCH = {
    "cosine": losses.BatchHardTripletLossDistanceFunction.cosine_distance,
    "euclidean": losses.BatchHardTripletLossDistanceFunction.euclidean_distance,
}
_DISTANCES: dict[str, dict[str, Any]] = {
    "TripletLoss": {
        "cosine": losses.TripletDistanceMetric.COSINE,
        "euclidean": losses.TripletDistanceMetric.EUCLIDEAN,
        "manhattan": losses.TripletDistanceMetric.MANHATTAN,
    },
    "ContrastiveLoss": _SIAMESE,
    "OnlineContrastiveLoss": _SIAMESE,
    "BatchAllTripletLoss": _BATCH,
    "BatchHardTripletLoss": _BATCH,
    "BatchHardSoftMarginTripletLoss": _BATCH,
    "BatchSemiHardTripletLoss": _BATCH,
}


def embedder_loss(
    model: SentenceTransformer,
    source: TrainingSource,
    settings: EmbedderSettings,
    *,
    guide: Path | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The loss of one source, wrapped if asked for. `guide` is the folder of the guide that GIST losses need.

    Raises TrainingError for an argument's value that the library does not take.
    """
    name, facts = source.loss, source.facts
    given = {**facts.defaults, **_values(name, source.arguments)}
    if facts.in_batch:
        # InfoNCE (arXiv 1807.03748): the library's scale is one over the temperature.
        given |= (
            {"temperature": settings.temperature} if "guide" in facts.needs else {"scale": 1 / settings.temperature}
        )
        given["gather_across_devices"] = settings.negatives_cross_device
    if facts.caches and settings.parts is not None:
        given["mini_batch_size"] = settings.parts  # GradCache (arXiv 2101.06983)
    if "guide" in facts.needs:
        assert guide is not None
        given["guide"] = load_sentence_transformer(
            guide, device=str(model.device), trust_remote_code=trust_remote_code
        ).eval()
    if name == "DistillKLDivLoss":
        # Cosines differ by less than a teacher's logits: the student's are sharpened as in the contrastive losses.
        given = {"student_temperature": settings.temperature, **given}
    if name == "SoftmaxLoss":
        given |= {"embedding_dimension": model.get_embedding_dimension(), "num_labels": len(classes_of(source))}
    loss = _made(getattr(losses, name), name, model, given)
    if source.wrapper is None:
        return loss
    arguments = {"loss": loss, **(source.wrapper_arguments or {})}
    return _made(getattr(losses, source.wrapper), source.wrapper, model, arguments)


def reranker_loss(model: CrossEncoder, source: TrainingSource) -> nn.Module:
    """The loss of one source. Raises TrainingError for an argument's value that the library does not take."""
    given = _values(source.loss, source.arguments)
    if "pos_weight" in given:
        given["pos_weight"] = torch.tensor(float(given["pos_weight"]))
    return _made(getattr(cross_encoder_losses, source.loss), source.loss, model, given)


def _made(kind: Any, name: str, model: SentenceTransformer | CrossEncoder, given: dict[str, Any]) -> nn.Module:
    try:
        made: nn.Module = kind(model, **given)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"{name} does not take these arguments: {error}. Mend loss_arguments") from error
    return made


def _values(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """What the library wants where a YAML has lists and names."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    if "distance_metric" not in values or name not in _DISTANCES:
        return values
    asked = str(values["distance_metric"])
    found = _DISTANCES[name].get(asked.lower().removesuffix("_distance"))
    if found is None:
        raise TrainingError(
            f"loss_arguments.distance_metric: {name} knows {', '.join(_DISTANCES[name])}; found {asked!r}"
        )
    return {**values, "distance_metric": found}
