"""A pipeline's store and an MLflow of its own on SQLite, and tiny models to promote."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from embed_pipeline.artifacts import PipelineStore
from tests.tracking.candidates import Workshop


@pytest.fixture(scope="session")
def base_models(tiny_bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of an embedder with prompts and lengths of its own, and of a cross-encoder."""
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer

    folder = tmp_path_factory.mktemp("base_models")
    embedder = SentenceTransformer(str(tiny_bert_folder), device="cpu")
    embedder.prompts.update(query="search: ", document="text: ")
    embedder[0].query_length, embedder[0].document_length = 12, 24  # type: ignore[union-attr]
    embedder.save_pretrained(str(folder / "embedder"), create_model_card=False)
    torch.manual_seed(0)
    plain = str(tiny_bert_folder.parent / "plain")
    reranker = CrossEncoder(plain, num_labels=1, max_length=32, device="cpu", activation_fn=torch.nn.Identity())
    reranker.save_pretrained(str(folder / "reranker"), create_model_card=False)
    return folder / "embedder", folder / "reranker"


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take seconds to create."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads wait for each other longer than these tiny models take."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def workshop(
    tmp_path: Path, base_models: tuple[Path, Path], empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch
) -> Workshop:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    for name in ("EMBED_PIPELINE_STORE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    shutil.copy2(empty_mlflow, tmp_path / "mlflow.db")
    return Workshop(PipelineStore(tmp_path / "store", "support"), *base_models)
