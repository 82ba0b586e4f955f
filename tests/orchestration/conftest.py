"""A small pipeline in a folder of its own: real stages on made-up text and a tiny model."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from embed_pipeline.artifacts import PipelineStore
from embed_pipeline.definitions import load_folder

SENTENCE = (
    "river stone cloud engine paper window garden silver mountain letter bridge candle forest mirror pocket winter "
    "thunder basket copper valley ladder feather harbor island jacket kettle lantern meadow needle orchard pepper "
    "quarry ribbon saddle timber umbrella velvet whistle yellow zipper anchor barrel cactus dragon emerald falcon "
    "glacier hammer ivory jungle"
)
WORDS = SENTENCE.split()


@dataclass(frozen=True)
class SmallPipeline:
    """`folder` is what EMBED_PIPELINE_DEFS would name; the pipeline is called `small`."""

    folder: Path
    home: Path
    store: PipelineStore

    @property
    def yaml_file(self) -> Path:
        return self.folder / "small" / "defs.yaml"

    def definitions(self) -> dg.Definitions:
        return load_folder(self.folder, "small_pipeline_under_test")

    def materialize(
        self, *assets: str, config: Mapping[str, Any] | None = None, raise_on_error: bool = True
    ) -> dg.ExecuteInProcessResult:
        """Materialize the named assets (all without a name) with their checks, in this process."""
        job = self.definitions().get_implicit_global_asset_job_def()
        ops = {f"small__{asset}": {"config": dict(values)} for asset, values in (config or {}).items()}
        selection = [dg.AssetKey(["small", asset]) for asset in assets] if assets else None
        return job.execute_in_process(
            run_config={"ops": ops}, asset_selection=selection, raise_on_error=raise_on_error, instance=self.instance
        )

    @property
    def instance(self) -> dg.DagsterInstance:
        # Capturing the output of a run in another thread can leave its `tail` processes behind.
        silent = {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}
        return dg.DagsterInstance.local_temp(str(self.home), overrides={"compute_logs": silent})


def settings_of(model: Path) -> dict[str, Any]:
    """The YAML's attributes: everything small enough for seconds."""
    training = {
        "batch_size": 8,
        "train_group_size": 3,
        "max_steps": 4,
        "evaluations": 2,
        "logging_steps": 1,
        "precision": "float32",
    }
    return {
        "name": "small",
        "seed": 7,
        "encode_precision": "float32",
        "source": {"path": "raw/*.parquet", "columns": {"query": "question"}},
        "mining": {"top_k": 20, "num_negatives": 3},
        "embedder": {"base_model": {"path": str(model)}, "learning_rate": 1e-3, **training},
        "reranker": {
            "base_model": {"path": str(model)},
            "query_max_length": 16,
            "passage_max_length": 48,
            **training,
        },
        "evaluation": {"rerank_top_k": 5, "bootstrap_samples": 200, "examples": 2},
    }


def write_pipeline(folder: Path, settings: Mapping[str, Any], pairs: int = 120) -> None:
    """`folder/small/defs.yaml` with its raw parquet: questions share two words with their passages."""
    (folder / "small" / "raw").mkdir(parents=True)
    generator = random.Random(0)
    rows = []
    for number in range(pairs):
        passage = generator.sample(WORDS, 14)
        question = f"where is the {passage[3]} of {passage[9]} number {number}"
        rows.append({"question": question, "passage": " ".join(passage), "document_id": f"page {number // 2}"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "small" / "raw" / "pairs.parquet")
    write_yaml(folder / "small" / "defs.yaml", settings)


def write_yaml(path: Path, settings: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump({"type": "embed_pipeline.RetrievalPipeline", "attributes": dict(settings)}))


@pytest.fixture
def make_pipeline(
    tmp_path: Path, tiny_bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., SmallPipeline]:
    """Build the small pipeline, with some of its attributes changed, in a home of its own."""

    def build(**changed: Any) -> SmallPipeline:
        home = tmp_path / "home"
        home.mkdir()
        monkeypatch.setenv("DAGSTER_HOME", str(home))
        monkeypatch.delenv("EMBED_PIPELINE_STORE", raising=False)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        write_pipeline(tmp_path / "defs", {**settings_of(tiny_bert_folder), **changed})
        return SmallPipeline(tmp_path / "defs", home, PipelineStore(home / "store", "small"))

    return build
