"""What is changed inside a model for the time of its training; none of it is saved but the weights it leads to."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import nn

from embed_pipeline.errors import TrainingError
from embed_pipeline.settings import LoraSettings, TrainingSettings

logger = logging.getLogger(__name__)


def set_up_for_training(model: SentenceTransformer | CrossEncoder, settings: TrainingSettings, device: str) -> None:
    """Float32 weights (a base may come in half precision), the dropout asked for, and attention that is fast here.

    Then what is to be trained at all: everything, or what `freeze` leaves, or `lora`'s adapters. Raises TrainingError
    where the architecture does not have what is named.
    """
    model.float()
    if settings.dropout is not None:
        _set_dropout(model, settings.dropout)
    if device == "cpu":
        # The fused kernel's backward takes ten times as long on a CPU (torch 2.13, bfloat16, 64 tokens).
        model[0].auto_model.set_attn_implementation("eager")  # type: ignore[union-attr, operator]
    _freeze(model, settings)
    if settings.lora is not None:
        _add_adapters(model, settings.lora)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    if trained < every:
        logger.info("training %s of %s parameters (%.2f %%)", f"{trained:,}", f"{every:,}", 100 * trained / every)


def merge_adapters(model: SentenceTransformer | CrossEncoder) -> None:
    """Add the adapters into the weights they adapt: what is saved loads anywhere, without PEFT."""
    transformer: Any = model[0]
    if isinstance(transformer.model, PeftModel):
        transformer.model = transformer.model.merge_and_unload()
        for parameter in model.parameters():
            parameter.requires_grad_(True)


def _add_adapters(model: SentenceTransformer | CrossEncoder, lora: LoraSettings) -> None:
    """LoRA (arXiv 2106.09685) in the transformer; a cross-encoder's head is trained whole, since it may be fresh."""
    transformer: Any = model[0]
    task = TaskType.SEQ_CLS if isinstance(model, CrossEncoder) else TaskType.FEATURE_EXTRACTION
    told = lora.model_dump()
    if isinstance(told["target_modules"], tuple):
        told["target_modules"] = list(told["target_modules"])
    try:
        transformer.model = get_peft_model(transformer.model, LoraConfig(task_type=task, **told))
    except (ValueError, KeyError) as error:
        raise TrainingError(
            f"lora: {error}. Name the layers under lora.target_modules, e.g. [query, value], or all-linear"
        ) from error


def _freeze(model: SentenceTransformer | CrossEncoder, settings: TrainingSettings) -> None:
    if settings.freeze.embeddings:
        embeddings = model[0].auto_model.get_input_embeddings()  # type: ignore[union-attr, operator]
        # Position and type embeddings stand beside those of the words.
        for name, module in model[0].auto_model.named_modules():  # type: ignore[union-attr]
            if name.rpartition(".")[2] == "embeddings":
                embeddings = module
                break
        embeddings.requires_grad_(False)
    if settings.freeze.layers:
        layers = _layers(model)
        if settings.freeze.layers > len(layers):
            raise TrainingError(f"freeze.layers: {settings.freeze.layers}, but the model has {len(layers)} layers")
        for layer in layers[: settings.freeze.layers]:
            layer.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("freeze: nothing is left to train. Lower freeze.layers")


def _layers(model: nn.Module) -> nn.ModuleList:
    """The transformer's layers: its longest list of modules of one kind."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    alike = [found for found in lists if len({type(module) for module in found}) == 1]
    return max(alike, key=len, default=nn.ModuleList())


def _set_dropout(model: nn.Module, share: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        # Architectures that hand a number to the attention function instead of having a layer for it.
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = share  # type: ignore[assignment]


def losses_of(trainer: Any) -> dict[str, nn.Module]:
    """sentence-transformers' losses by source; FlagEmbedding's are in the model."""
    loss = getattr(trainer, "loss", None)
    losses = loss if isinstance(loss, dict) else {"": loss}
    return {name: one for name, one in losses.items() if isinstance(one, nn.Module)}


def learnt_by_losses(losses: Mapping[str, nn.Module], model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What losses learn besides the model (classifiers, projections), as `<source>.<parameter>`."""
    of_model = {id(parameter) for parameter in model.parameters()}
    for source, loss in losses.items():
        for name, parameter in loss.named_parameters():
            if parameter.requires_grad and id(parameter) not in of_model:
                yield f"{source}.{name}", parameter
