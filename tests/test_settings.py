"""A YAML that cannot work is refused when it loads, in words that say what would."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from embed_pipeline.settings import PipelineSettings

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
        (embedder(arguments={"same_dataset_within_batch": True}), "sentence-transformers has no training argument"),
        ({"reranker": {**RERANKER, "arguments": {"seed": 1}}}, "reranker.arguments: seed is not for a YAML"),
        ({"hub": {"reranker": "a/b"}}, "hub.reranker: this pipeline has no reranker"),
        ({"launch": {"kind": "nodes", "nnodes": 2}}, "nodes with 2 nodes needs `network`: the network that they share"),
        ({"launch": {"kind": "slurm", "nnodes": 2}}, "slurm with 2 nodes needs `network`"),
        ({"launch": {"network": "10.0.0.0/24"}}, "`network` belongs to launch.kind nodes or slurm, not to local"),
        (nodes("0.0.0.0/0"), "0.0.0.0/0 is every network"),
        (nodes("::/0"), "::/0 is every network"),
        (nodes("10.0.0.7"), "10.0.0.7 is an address. Name the network that the nodes share, e.g. 10.0.0.7/24"),
        (nodes("10.0.0.0/33"), "does not appear to be an IPv4 or IPv6 network"),
        (nodes("eth0,join_timeout=1"), "is neither a network .* nor the name of an interface"),
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
        embedder(lora={"r": 8, "target_modules": ["query", "value"]}, scheduler="cosine_with_restarts"),
        {**extra(reranker_loss="BinaryCrossEntropyLoss"), "reranker": RERANKER},
        nodes("10.0.0.7/24"),
        nodes("fd00::/8"),
        nodes("eth0.100"),
        {"launch": {"kind": "slurm"}},
    ],
)
def test_what_works_is_taken(changed: dict[str, Any]) -> None:
    pipeline(**changed)
