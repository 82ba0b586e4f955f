"""A YAML that cannot work is refused when it loads, in words that say what would."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from typing import Any

import annotated_types
import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from embed_pipeline.artifacts import Recipe
from embed_pipeline.settings import PipelineSettings, Settings

MODEL = {"path": "model"}
SMALLEST: dict[str, Any] = {"name": "shop", "source": {"path": "raw.parquet"}, "embedder": {"base_model": MODEL}}


def pipeline(**changed: Any) -> PipelineSettings:
    return PipelineSettings.model_validate({**SMALLEST, **changed})


def embedder(**changed: Any) -> dict[str, Any]:
    return {"embedder": {"base_model": MODEL, **changed}}


def extra(**changed: Any) -> dict[str, Any]:
    return {"extra_sources": [{"name": "sts", "kind": "scored", "path": "sts.parquet", **changed}]}


RERANKER = {"base_model": MODEL}
TEACHER = {"mining": {"cross_encoder": {"model": MODEL}}}


def nodes(network: str) -> dict[str, Any]:
    return {"launch": {"kind": "nodes", "nnodes": 2, "network": network}}


def test_every_kind_of_extra_source_has_a_loss_by_default() -> None:
    kinds = ["pairs", "triplets", "flag-embedding", "scored", "labelled", "parallel"]
    given = [{"name": f"a{i}", "kind": kind, "path": "x"} for i, kind in enumerate(kinds)]
    given[-1]["teacher"] = MODEL
    told = pipeline(extra_sources=given).extra_sources
    assert [one.loss_for(one.kind) for one in told[3:]] == ["CoSENTLoss", "SoftmaxLoss", "MSELoss"]
    assert {one.loss_for(one.kind) for one in told[:3]} == {"MultipleNegativesRankingLoss"}


def test_a_pipeline_of_scored_pairs_is_judged_by_spearman_and_has_no_reranker() -> None:
    told = pipeline(source={"kind": "scored", "path": "x"})
    assert (told.gate.metric, told.gate.max_loss, told.reranker) == ("spearman", {}, None)
    assert told.embedder.loss_for("scored") == "CoSENTLoss"
    assert pipeline(source={"kind": "scored", "path": "x"}, gate={"min_gain": 0.01}).gate.metric == "spearman"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (embedder(loss="CosentLoss"), r"no loss is called 'CosentLoss'. Did you mean 'CoSENTLoss'"),
        (embedder(loss="SoftmaxLoss"), "SoftmaxLoss does not fit the columns of kind 'pairs'. Losses for .*TripletL"),
        (embedder(loss="ContrastiveTensionLoss"), "is not offered: it learns from single texts"),
        (embedder(loss="GISTEmbedLoss"), "GISTEmbedLoss needs `guide`, an embedder"),
        (embedder(guide=MODEL), "MultipleNegativesRankingLoss takes no `guide`"),
        (embedder(loss="MarginMSELoss"), "learns a teacher's scores. Name the teacher under mining.cross_encoder"),
        (embedder(loss_arguments={"margin": 1}), "takes no margin. Allowed: directions, partition_mode"),
        (embedder(loss_arguments={"scale": 1}), "takes no scale"),
        (embedder(loss_arguments={"mini_batch_num_tokens": 9}), "takes no mini_batch_num_tokens"),
        (embedder(loss_wrapper="MatryoshkaLoss"), r"needs loss_wrapper_arguments.matryoshka_dims"),
        (embedder(loss_wrapper_arguments={"matryoshka_dims": [8]}), "are given, but no `loss_wrapper`"),
        (
            embedder(loss_wrapper="AdaptiveLayerLoss", loss_wrapper_arguments={"matryoshka_dims": [8]}),
            "AdaptiveLayerLoss takes no matryoshka_dims",
        ),
        (embedder(loss_wrapper="AdaptiveLayerLoss", sub_batch_size=8), "cannot be put around Cached"),
        (embedder(engine="flag-embedding", loss="TripletLoss"), "`loss` belongs to engine sentence-transformers"),
        (embedder(engine="flag-embedding", batch_sampler="no_duplicates"), "`batch_sampler` belongs to engine"),
        (embedder(knowledge_distillation=True), "`knowledge_distillation` belongs to engine flag-embedding"),
        (embedder(engine="flag-embedding", knowledge_distillation=True), "name the teacher under mining.cross_enc"),
        (embedder(lora={}, freeze={"layers": 1}), "`lora` freezes the whole base model already"),
        (extra(loss="TripletLoss"), "Losses for a source of kind 'scored': CosineSimilarityLoss, CoSENTLoss, AnglE"),
        (extra(kind="parallel"), "MSELoss needs `teacher`"),
        (extra(reranker_loss="BinaryCrossEntropyLoss"), "`reranker_loss` is given, but the pipeline has no reranker"),
        ({**extra(reranker_loss="ListNetLoss"), "reranker": RERANKER}, "ListNetLoss does not fit .* 'scored'"),
        ({"extra_sources": [*extra()["extra_sources"], *extra()["extra_sources"]]}, "two are called 'sts'"),
        ({**extra(), **embedder(engine="flag-embedding")}, "sts: engine flag-embedding has one loss and learns from"),
        (extra(extra_corpus="x"), "`extra_corpus` does not belong to a source of kind 'scored'"),
        (extra(score_range=[5, 1]), r"score_range: expected \[lowest, highest\]"),
        (extra(kind="labelled", score_range=[0, 1]), "`score_range` does not belong to a source of kind 'labelled'"),
        (extra(positive_label="1"), "`positive_label` does not belong to a source of kind 'scored'"),
        ({"source": {"kind": "labelled", "path": "x"}}, "a labelled data set goes under `extra_sources`"),
        ({"source": {"kind": "scored", "path": "x"}, "reranker": RERANKER}, "nothing to rerank. Leave it out"),
        ({"source": {"kind": "scored", "path": "x"}, "mining": {"top_k": 5}}, "scored pairs are not mined"),
        ({"source": {"kind": "scored", "path": "x"}, **embedder(engine="flag-embedding")}, "retrieval kinds only"),
        ({"gate": {"metric": "spearman"}}, "spearman.* cannot be measured on a source of kind 'pairs'"),
        ({"reranker": {**RERANKER, "loss": "MSELoss"}}, "MSELoss learns a teacher's scores"),
        ({"reranker": {**RERANKER, "loss": "CrossEntropyLoss"}}, "is not offered: it gives a reranker one output a"),
        ({"reranker": {**RERANKER, "loss": "LambdaLoss", "engine": "flag-embedding"}}, "`loss` belongs to engine"),
        ({"reranker": {**RERANKER, "loss_arguments": {"k": 1}}}, "BinaryCrossEntropyLoss takes no k"),
        (embedder(arguments={"output_dir": "x"}), "output_dir is not for a YAML: the store decides"),
        (embedder(arguments={"push_to_hub": True}), "push_to_hub is not for a YAML: the asset `hub`"),
        (embedder(arguments={"learning_rate": 1}), "decided by `learning_rate`; set that instead"),
        (embedder(arguments={"adam_beta": 0.9}), "no training argument 'adam_beta' .* Did you mean 'adam_beta"),
        (embedder(arguments={"adam_beta2": "high"}), "adam_beta2 is float in the installed .* found 'high'"),
        (embedder(arguments={"adam_beta1": 5}), "adam_beta1: found 5, expected 0 or more and below 1"),
        (embedder(arguments={"adam_beta1": True}), "adam_beta1 is float in the installed .* found True"),
        (embedder(arguments={"adam_epsilon": -1e-8}), "adam_epsilon: found -1e-08, expected 0 or more"),
        (embedder(arguments={"dataloader_num_workers": -5}), "dataloader_num_workers: found -5, expected 0 or more"),
        (embedder(arguments={"dataloader_num_workers": 1.5}), "dataloader_num_workers is int in the installed"),
        (embedder(arguments={"dataloader_prefetch_factor": 2}), "prefetch_factor needs dataloader_num_workers above 0"),
        (embedder(arguments={"dataloader_persistent_workers": True}), "workers needs dataloader_num_workers above 0"),
        (embedder(arguments={"dataloader_multiprocessing_context": "thread"}), "Expected one of fork, spawn, forkser"),
        (embedder(arguments={"optim": "nonsense"}), "optim: found 'nonsense'.* Expected one of adamw_torch, adamw_tor"),
        (embedder(arguments={"optim": "adamw_torh"}), "optim: found 'adamw_torh'. Did you mean 'adamw_torch'"),
        (embedder(arguments={"optim": "galore_adamw"}), "galore_adamw is in the package galore_torch, which is not"),
        (embedder(arguments={"optim_args": "momentum"}), "optim_args: expected name=value pairs"),
        (embedder(arguments={"torch_compile_backend": "fast"}), "torch_compile_backend: found 'fast'"),
        (embedder(arguments={"torch_empty_cache_steps": 0}), "torch_empty_cache_steps: found 0, expected 1 or more"),
        (embedder(arguments={"neftune_noise_alpha": math.inf}), "neftune_noise_alpha: found inf, expected a finite"),
        (embedder(arguments={"lr_scheduler_kwargs": {"num_cycles": 2}}), "the scheduler linear takes no num_cycles"),
        (
            embedder(scheduler="polynomial", arguments={"lr_scheduler_kwargs": {"power": "two"}}),
            "lr_scheduler_kwargs: power is float in transformers; found 'two'",
        ),
        (
            embedder(engine="flag-embedding", arguments={"kd_loss_type": "mse"}),
            "kd_loss_type: found 'mse'.* Expected one of kl_div, m3_kd_loss",
        ),
        (embedder(engine="flag-embedding", arguments={"mrl_dims": [0]}), "mrl_dims: found 0, expected 1 or more"),
        ({"reranker": {**RERANKER, "arguments": {"optim": "x"}}}, "reranker.arguments: optim: found 'x'"),
        (
            embedder(loss_arguments={"partition_mode": "both"}),
            "loss_arguments: partition_mode is Literal.* found 'both'",
        ),
        (embedder(loss_arguments={"hardness_strength": -1}), "hardness_strength: found -1, expected 0 or more"),
        (embedder(loss="TripletLoss", loss_arguments={"distance_metric": "dot"}), "is one of cosine, euclidean, manh"),
        (embedder(loss="TripletLoss", loss_arguments={"triplet_margin": "wide"}), "triplet_margin is float"),
        (
            embedder(loss_wrapper="MatryoshkaLoss", loss_wrapper_arguments={"matryoshka_dims": [64, "32"]}),
            "loss_wrapper_arguments: matryoshka_dims is Sequence",
        ),
        (
            {"reranker": {**RERANKER, "loss": "LambdaLoss", "loss_arguments": {"k": 0}}},
            "k: found 0, expected 1 or more",
        ),
        (extra(loss_arguments={"scale": 0}), "scale: found 0, expected above 0"),
        (embedder(encoding={"query_max_len": 8, "query_max_length": 9}), "are two names of one key. Leave one out"),
        ({"cleaning": {"query_min_characters": 9, "query_max_characters": 8}}, "must not be above query_max_character"),
        (
            {"launch": {"kind": "slurm", "sbatch": {"comment": "a\nrm -rf /"}}},
            "sbatch.comment: expected one line of text",
        ),
        ({"launch": {"kind": "slurm", "sbatch": {"mem\n": "1"}}}, "expected long names of sbatch's options"),
        ({"launch": {"kind": "slurm", "sbatch": {"mem=1 #": "1"}}}, "expected long names of sbatch's options"),
        ({"launch": {"kind": "ray", "address": "http://head:99999999"}}, "launch.address: expected the address of the"),
        ({"launch": {"kind": "ray", "address": "http://user@head:8265"}}, "leave it out and set RAY_ADDRESS"),
        (embedder(arguments={"same_dataset_within_batch": True}), "sentence-transformers has no training argument"),
        ({"reranker": {**RERANKER, "arguments": {"seed": 1}}}, "reranker.arguments: seed is not for a YAML"),
        ({"hub": {"reranker": "a/b"}}, "hub.reranker: this pipeline has no reranker"),
        ({"launch": {"kind": "nodes", "nnodes": 2}}, "nodes with 2 nodes needs `network`: the network that they share"),
        ({"launch": {"kind": "slurm", "nnodes": 2}}, "slurm with 2 nodes needs `network`"),
        ({"launch": {"network": "10.0.0.0/24"}}, "`network` belongs to launch.kind nodes or slurm, not to local"),
        (nodes("0.0.0.0/0"), "0.0.0.0/0 is every network"),
        (nodes("::/0"), "::/0 is every network"),
        (nodes("10.0.0.7"), "10.0.0.7 is an address. Name the network that the nodes share, e.g. 10.0.0.7/24"),
        (nodes("10.0.0.0/33"), "is no IPv4 or IPv6 network"),
        (nodes("eth0,join_timeout=1"), "is neither a network nor the name of an interface"),
        (nodes("fe80::%eth0,rank=0/64"), "is neither a network nor the name of an interface"),
        (nodes("fe80::%eth0/64"), "is neither a network nor the name of an interface"),
        (nodes("fe80::1%eth0"), "is neither a network nor the name of an interface"),
        (nodes("10.0.0.0/24,rank=0"), "is neither a network nor the name of an interface"),
        (nodes("10.0.0.0/24\n"), "is neither a network nor the name of an interface"),
        (nodes("eth=0"), "is neither a network nor the name of an interface"),
        (nodes("eth 0"), "is neither a network nor the name of an interface"),
        (nodes("an_interface_of_Linux"), "is neither a network nor the name of an interface"),
        (nodes("eth0\nexit"), "is neither a network"),
        (nodes(""), "is neither a network"),
    ],
)
def test_what_cannot_work_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        pipeline(**changed)


@pytest.mark.parametrize(
    "changed",
    [
        embedder(sub_batch_size=2, loss_arguments={"mini_batch_num_tokens": 9}),
        embedder(loss="GISTEmbedLoss", guide=MODEL, loss_arguments={"margin": 0.05}),
        {**embedder(loss="DistillKLDivLoss"), **TEACHER},
        {"source": {"kind": "flag-embedding", "path": "x"}, **embedder(loss="MarginMSELoss")},
        {
            "source": {"kind": "flag-embedding", "path": "x"},
            **embedder(engine="flag-embedding", knowledge_distillation=True, arguments={"kd_loss_type": "m3_kd_loss"}),
        },
        embedder(
            arguments={"optim": "adafactor", "adam_beta2": 0.98, "neftune_noise_alpha": 5, "torch_compile": False}
        ),
        embedder(arguments={"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4, "adam_beta1": 0}),
        embedder(scheduler="cosine_with_restarts", arguments={"lr_scheduler_kwargs": {"num_cycles": 2}}),
        embedder(scheduler="cosine_with_min_lr", arguments={"lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'}),
        embedder(arguments={"debug": "underflow_overflow", "include_num_input_tokens_seen": "non_padding"}),
        embedder(arguments={"torch_compile": True, "torch_compile_backend": "inductor", "optim_target_modules": "all"}),
        embedder(loss_arguments={"directions": ["query_to_doc", "doc_to_query"], "partition_mode": "joint"}),
        embedder(loss_wrapper="Matryoshka2dLoss", loss_wrapper_arguments={"matryoshka_dims": [64, 32]}),
        {**extra(loss_arguments={"scale": 20})},
        embedder(lora={"r": 8, "target_modules": ["query", "value"]}, scheduler="cosine_with_restarts"),
        {**extra(reranker_loss="BinaryCrossEntropyLoss"), "reranker": RERANKER},
        nodes("10.0.0.7/24"),
        nodes("fd00::/8"),
        nodes("eth0.100"),
        nodes("eth0:1"),
        nodes("veth0@if7"),
        nodes("10.0.0.0/255.255.255.0"),
        {"launch": {"kind": "slurm"}},
    ],
)
def test_what_works_is_taken(changed: dict[str, Any]) -> None:
    pipeline(**changed)


# ------------------------------------------------------------------------------------------------- numbers


def numbers() -> Iterator[tuple[type[Settings], str, FieldInfo]]:
    """Every field of the settings that is a number, and may be something else besides."""
    waiting: list[type[Settings]] = [PipelineSettings]
    seen = set(waiting)
    while waiting:
        model = waiting.pop()
        for name, field in model.model_fields.items():
            parts = list(parts_of(field.annotation))
            below = {p for p in parts if isinstance(p, type) and issubclass(p, Settings)} - seen
            waiting += below
            seen |= below
            if int in parts or float in parts:
                yield model, name, field


def parts_of(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in typing.get_args(annotation):
        yield from parts_of(argument)


def bounds_of(annotation: Any, metadata: list[Any]) -> set[str]:
    """Which sides are bounded, of the number somewhere in an annotation."""
    told = [*metadata, *(part for part in parts_of(annotation) if isinstance(part, FieldInfo))]
    told = [one for part in told for one in (part.metadata if isinstance(part, FieldInfo) else [part])]
    lower = any(isinstance(one, annotated_types.Ge | annotated_types.Gt) for one in told)
    upper = any(isinstance(one, annotated_types.Le | annotated_types.Lt) for one in told)
    return {side for side, bounded in (("lower", lower), ("upper", upper)) if bounded}


def test_every_number_has_a_lowest_and_a_highest() -> None:
    found = {
        f"{model.__name__}.{name}": bounds_of(field.annotation, field.metadata) for model, name, field in numbers()
    }
    assert len(found) > 60
    free = {"SourceSettings.score_range", "ExtraSourceSettings.score_range", "LaunchSettings.sbatch"}
    assert {name for name, bounds in found.items() if bounds != {"lower", "upper"}} == free


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("model", "name"), [(model, name) for model, name, _ in numbers()])
def test_no_number_is_infinite(model: type[Settings], name: str, number: float) -> None:
    with pytest.raises(ValidationError, match=f"{name}.*expected a finite number"):
        model.model_validate({name: [number, number] if name == "score_range" else number})


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("model", "name"), [(model, name) for model, name, _ in numbers()])
def test_true_and_false_are_no_numbers(model: type[Settings], name: str, given: bool) -> None:
    nested = {"score_range": [given, 5], "coefficients": [given], "dimensions": [given], "sbatch": {"nice": given}}
    nested |= {"max_loss": {"map_at_100": given}} if model.__name__ == "GateSettings" else {}
    with pytest.raises(ValidationError) as raised:
        model.model_validate({name: nested.get(name, given)})
    told = [one["msg"] for one in raised.value.errors() if one["loc"][:1] == (name,)]
    assert [message.partition("must be ")[2] for message in told] == [
        f"{'text or ' if name == 'sbatch' else ''}a number; found {str(given).lower()}"
    ]


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (embedder(learning_rate=1e5), "learning_rate"),
        (embedder(temperature=1e-320), "temperature"),
        (embedder(evaluations=1e13), "evaluations"),
        ({"name": "a" * 300}, "name"),
        (extra(name="a" * 300), "name"),
        ({"mining": {"absolute_margin": 3}}, "absolute_margin"),
        ({"automation": {"max_run_hours": 1e-9}}, "max_run_hours"),
        ({"forgetting": {"coefficients": [0.5] * 1000}}, "coefficients"),
    ],
)
def test_absurd_values_are_refused(changed: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        pipeline(**changed)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_no_recipe_takes_infinity_for_a_setting_that_is_not_there(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        _ = Recipe(inputs={}, settings={"mining": {"absolute_margin": number}}, seed=1, code_version="1").digest
