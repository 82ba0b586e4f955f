"""What is said of the library's losses and arguments holds for the version that is installed."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest

from embed_pipeline.library_arguments import passed_through
from embed_pipeline.losses import (
    DEFAULT_LOSSES,
    EMBEDDER_LOSSES,
    NOT_OFFERED,
    RERANKER_LOSSES,
    WRAPPERS,
    losses_for,
)

# Decided by other settings, by how the models here are made, or not sayable in YAML.
OURS = {"self", "model", "loss", "guide", "show_progress_bar", "gather_across_devices", "kwargs", "similarity_fct"}
OURS |= {"activation_fn", "weighting_scheme", "lambda_weight", "loss_fct", "cos_score_transformation"}
OURS |= {"embedding_dimension", "num_labels", "use_mini_batched_version"}


def libraries_losses(module: ModuleType) -> set[str]:
    return {name for name in module.__all__ if name.endswith("Loss")} | {
        name for name in module.__all__ if name.startswith("ContrastiveTensionLoss")
    }


def test_every_loss_of_the_library_is_offered_or_refused_with_a_reason() -> None:
    from sentence_transformers.cross_encoder import losses as of_pairs
    from sentence_transformers.sentence_transformer import losses as of_texts

    refused = set(NOT_OFFERED)
    assert libraries_losses(of_texts) == {*EMBEDDER_LOSSES, *WRAPPERS} | (refused & libraries_losses(of_texts))
    assert libraries_losses(of_pairs) == {*RERANKER_LOSSES} | (refused & libraries_losses(of_pairs))
    assert not refused & {*EMBEDDER_LOSSES, *RERANKER_LOSSES, *WRAPPERS}


@pytest.mark.parametrize("name", [*EMBEDDER_LOSSES, *WRAPPERS])
def test_the_arguments_of_an_embedders_loss_are_the_librarys(name: str) -> None:
    from sentence_transformers.sentence_transformer import losses

    facts = EMBEDDER_LOSSES.get(name)
    ours = set(OURS)
    if facts is not None and facts.in_batch:
        ours |= {"scale", "temperature"}  # embedder.temperature
    if facts is not None and facts.caches:
        ours |= {"mini_batch_size"}  # embedder.sub_batch_size
    offered = set(facts.arguments if facts is not None else WRAPPERS[name])
    assert offered == set(inspect.signature(getattr(losses, name).__init__).parameters) - ours
    if facts is not None:
        assert set(facts.defaults) <= offered
        assert facts.cached is None or EMBEDDER_LOSSES[facts.cached].caches


@pytest.mark.parametrize("name", RERANKER_LOSSES)
def test_the_arguments_of_a_rerankers_loss_are_the_librarys(name: str) -> None:
    from sentence_transformers.cross_encoder import losses

    assert (
        set(RERANKER_LOSSES[name].arguments) == set(inspect.signature(getattr(losses, name).__init__).parameters) - OURS
    )


def test_every_kind_has_a_default_among_its_losses() -> None:
    for kind, name in DEFAULT_LOSSES.items():
        assert name in losses_for(kind, EMBEDDER_LOSSES)


@pytest.mark.parametrize("engine", ["sentence-transformers", "flag-embedding"])
@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_what_may_be_passed_through_is_known_to_the_library(engine: str, kind: Any) -> None:
    import dataclasses
    from importlib import import_module

    if engine == "sentence-transformers":
        model = "sentence_transformer" if kind == "embedder" else "cross_encoder"
        module = import_module(f"sentence_transformers.{model}.training_args")
        prefix = "SentenceTransformer" if kind == "embedder" else "CrossEncoder"
        classes = [getattr(module, f"{prefix}TrainingArguments")]
    else:
        module = import_module(f"FlagEmbedding.abc.finetune.{kind}.AbsArguments")
        classes = [getattr(module, f"Abs{kind.title()}{part}Arguments") for part in ("Training", "Data", "Model")]
    known = {field.name for one in classes for field in dataclasses.fields(one) if field.init}
    offered = passed_through(engine, kind)
    assert set(offered) <= known
    assert {"optim", "lr_scheduler_kwargs", "neftune_noise_alpha", "torch_compile"} <= set(offered)
    # What decides where a training writes, what it reports or how it is repeated is not among them.
    assert not {name for name in offered if name.startswith(("hub", "push", "output", "save", "eval", "log"))}
    assert not {"seed", "report_to", "resume_from_checkpoint", "learning_rate"} & set(offered)
