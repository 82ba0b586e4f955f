"""What is registered: everything a person needs to load it, trust it and trace it, and nothing twice."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer

from embed_pipeline.champions import RegisteredModel
from embed_pipeline.errors import ModelError, TrackingError
from embed_pipeline.evaluation.parity import read_parity
from embed_pipeline.tracking.registry import Candidate, Registry, registered_name
from embed_pipeline.tracking.server import tracking_uri
from tests.tracking.candidates import LONG, Workshop

NAMES = ("support-embedder", "support-reranker")


def register(workshop: Workshop, candidate: Candidate) -> tuple[RegisteredModel, RegisteredModel]:
    with workshop.tracked() as tracked:
        assert tracked is not None
        embedder, reranker = (
            Registry().register(workshop.store, candidate, kind, name, tracked)
            for name, (kind, _) in zip(NAMES, candidate.models, strict=True)
        )
    return embedder, reranker


def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri())


def folder_of(model: RegisteredModel) -> Path:
    return Path(client().get_model_version_download_uri(model.name, model.version).removeprefix("file://"))


def test_a_version_carries_signature_example_packages_figures_and_lineage(workshop: Workshop) -> None:
    candidate = workshop.candidate(1)
    registered = register(workshop, candidate)

    for model, (kind, artifact) in zip(registered, candidate.models, strict=True):
        version = client().get_model_version(model.name, model.version)
        told = {key.removeprefix("embed_pipeline."): value for key, value in version.tags.items()}
        assert told["pipeline"] == "support"
        assert (told["asset"], told["version"], told["content"]) == (kind, artifact.version, artifact.content)
        assert told["evaluation"] == candidate.evaluation.version
        assert told["cleaned_pairs"] == candidate.evaluation.input("cleaned_pairs")
        assert told["base_model"] == str(workshop.embedder if kind == "embedder" else workshop.reranker)
        assert (told["training_run"], told["dagster.run_id"]) == ("a-training-run", "a-dagster-run")
        assert version.description == "nDCG@10 0.412 → 0.471: promote"

        logged = client().get_logged_model(version.source.removeprefix("models:/"))
        figures = {metric.key: metric.value for metric in logged.metrics or []}
        value = 0.5 if kind == "embedder" else 0.625
        assert figures == {f"{kind}/ndcg_at_10": value, f"{kind}/ndcg_at_10_gain_over_base": 0.25}
        assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": model.name, "version": model.version}]

        folder = folder_of(model)
        saved = mlflow.models.Model.load(str(folder))
        assert saved.signature.inputs.input_names() == ([0] if kind == "embedder" else ["query", "passage"])
        assert len(saved.load_input_example(str(folder))) == 2
        packages = (folder / "requirements.txt").read_text().split()
        assert f"transformers=={importlib.metadata.version('transformers')}" in packages
        assert all("==" in package and "+" not in package for package in packages)
    assert mlflow.models.Model.load(str(folder_of(registered[1]))).metadata == {"embedder_weight": 0.4}


def test_the_same_weights_are_found_again_and_others_are_not(workshop: Workshop) -> None:
    candidate, other = workshop.candidate(1), workshop.candidate(2)
    embedder, reranker = register(workshop, candidate)
    registry = Registry()

    assert registry.find("support-embedder", candidate.embedder) == embedder
    assert registry.find("support-reranker", candidate.reranker) == reranker
    assert registry.find("support-embedder", other.embedder) is None
    # The same recipe on another machine gives the same version of slightly other weights.
    weights = candidate.embedder.path / "model" / "model.safetensors"
    save_file({name: tensor * 1.001 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert registry.find("support-embedder", candidate.embedder) is None


def test_what_is_loaded_gives_what_was_evaluated(workshop: Workshop) -> None:
    candidate = workshop.candidate(1)
    registered = register(workshop, candidate)
    parity = read_parity(candidate.evaluation.path)

    assert LONG in parity.queries  # what a lost maximum length would show on
    assert Registry().check(*registered, parity) < 1e-6

    other = parity.model_copy(update={"scores": [score + 1 for score in parity.scores]})
    with pytest.raises(ModelError, match=r"models:/support-reranker/1 as MLflow loads it, pair 'where.*differs by"):
        Registry().check(*registered, other)


@pytest.mark.parametrize("file", ["artifacts/model/model.safetensors", "served_reranker.py", "added.py", "MLmodel"])
def test_nothing_is_loaded_of_a_model_whose_files_are_not_those_that_were_registered(
    workshop: Workshop, tmp_path: Path, file: str
) -> None:
    candidate = workshop.candidate(1)
    registered = register(workshop, candidate)
    parity = read_parity(candidate.evaluation.path)
    ran = tmp_path / "ran"
    with (folder_of(registered[1]) / file).open("a") as changed:
        changed.write(f"\nopen({str(ran)!r}, 'w')\n")
    with pytest.raises(ModelError, match=r"support-reranker/1 is registered, but does not load: its files are not"):
        Registry().check(*registered, parity)
    assert not ran.exists()


@pytest.mark.parametrize("lost", ["prompt", "length"])
def test_lost_prompts_and_lengths_are_noticed(workshop: Workshop, lost: str) -> None:
    candidate = workshop.candidate(1)
    parity = read_parity(candidate.evaluation.path)
    model = SentenceTransformer(str(candidate.embedder.path / "model"), device="cpu")
    assert parity.check_embedder(model, "it") < 1e-6
    if lost == "prompt":
        model.prompts["document"] = ""
    else:
        model[0].query_length = 24  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=f"it, {'text' if lost == 'prompt' else 'query'} '.*differs by"):
        parity.check_embedder(model, "it")


def with_code(folder: Path, out: Path) -> Path:
    """A copy of the model that names Python code of its authors: the same architecture with embeddings turned round."""
    shutil.copytree(folder, out)
    (out / "modeling_mine.py").write_text(
        "from transformers import BertConfig, BertForSequenceClassification, BertModel\n"
        "class MyBert(BertModel):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        output = super().forward(*args, **kwargs)\n"
        "        output.last_hidden_state = -output.last_hidden_state\n"
        "        return output\n"
        "class MyClassifier(BertForSequenceClassification):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        output = super().forward(*args, **kwargs)\n"
        "        output.logits = -output.logits\n"
        "        return output\n"
    )
    config = json.loads((out / "config.json").read_text())
    config["auto_map"] = {
        "AutoModel": "modeling_mine.MyBert",
        "AutoModelForSequenceClassification": "modeling_mine.MyClassifier",
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_models_authors_runs_where_it_was_trusted_and_only_there(
    workshop: Workshop, tmp_path: Path, trusted: bool
) -> None:
    bases = [with_code(folder, tmp_path / folder.name) for folder in (workshop.embedder, workshop.reranker)]
    plain = workshop.candidate(1)
    store = replace(workshop, store=type(workshop.store)(tmp_path / "other", "support"))
    candidate = replace(store, embedder=bases[0], reranker=bases[1], trusted=trusted).candidate(1)
    expected, found = read_parity(plain.evaluation.path), read_parity(candidate.evaluation.path)
    sign = -1 if trusted else 1
    assert np.allclose(found.query_embeddings, sign * np.array(expected.query_embeddings), atol=1e-5)
    assert np.allclose(found.scores, sign * np.array(expected.scores), atol=1e-5)

    with workshop.tracked() as tracked:
        assert tracked is not None
        registered = [
            Registry().register(store.store, candidate, kind, name, tracked)
            for name, (kind, _) in zip(NAMES, candidate.models, strict=True)
        ]
    Registry().check(registered[0], registered[1], found)


def test_a_dead_server_is_told_with_its_address_but_no_password(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:secret@127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"MLflow at http://127\.0\.0\.1:9 does not") as told:
        Registry().aliases(NAMES)
    assert told.value.passing
    assert "secret" not in str(told.value)


def test_a_smoke_test_registers_under_names_of_its_own() -> None:
    assert registered_name("demo", "embedder", smoke_test=False) == "demo-embedder"
    assert registered_name("demo", "reranker", smoke_test=True) == "demo-reranker-smoke-test"
