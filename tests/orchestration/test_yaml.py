"""What a user is told when a pipeline's YAML cannot be right: when definitions load, before any work."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml

from embed_pipeline.definitions import load_folder
from tests.orchestration.conftest import settings_of, write_pipeline

HUB = {"hub": "BAAI/bge-small-en-v1.5"}
PAIRS = {"name": "alike", "kind": "scored", "path": "gone.parquet"}

# what is changed in a right YAML (dots reach into nested keys) -> what the message must say, besides the file
BAD = [
    ({"embedder.lerning_rate": 1}, "unknown key 'lerning_rate'. Did you mean 'learning_rate'? Allowed here: arguments"),
    ({"minning": {}}, "unknown key 'minning'. Did you mean 'mining'?"),
    ({"embedder.epochs": "many"}, "attributes.embedder.epochs at"),
    ({"embedder.epochs": 0}, "Input should be greater than 0"),
    ({"embedder.engine": "keras"}, "Input should be 'sentence-transformers' or 'flag-embedding'"),
    ({"embedder.base_model": HUB}, "needs `revision`: the 40-digit commit hash"),
    ({"embedder.base_model": {**HUB, "revision": "main"}}, "found 'main'. A branch such as main can change"),
    ({"embedder.base_model": {**HUB, "path": "x"}}, "exactly one of hub, path, package; found hub and path"),
    ({"embedder.base_model": {}}, "exactly one of hub, path, package; found none of them"),
    ({"embedder.base_model": {"path": "gone"}}, "embedder.base_model: no model at"),
    ({"embedder.base_model": {"package": "no_such_package"}}, "'no_such_package' that carries the base model is not"),
    ({"embedder.base_model.sha256": "abc"}, "sha256 must be 64 hexadecimal digits; found 'abc'"),
    ({"reranker.base_model": "the embedder"}, "Input should be 'embedder'"),
    ({"reranker.loss": "CosineLoss"}, "no loss is called 'CosineLoss'."),
    ({"source.kind": "csv"}, "Input should be 'pairs', 'triplets', 'beir', 'flag-embedding', 'scored', 'labelled'"),
    ({"source": {"kind": "beir", "queries": "q.parquet"}}, "a source of kind 'beir' needs `corpus`"),
    ({"source.qrels": "q.parquet"}, "`qrels` does not belong to a source of kind 'pairs'"),
    ({"source.path": "nothing/*.parquet"}, "source.path: no file matches"),
    ({"source.columns": {"positive": "answer"}}, "`columns.positive` means nothing to a source of kind 'pairs'"),
    ({"source": {"kind": "labelled", "path": "a"}}, "a labelled data set goes under `extra_sources`"),
    ({"extra_sources": [{"name": "more", "path": "gone.parquet"}]}, "extra_sources.more.path: no such file or folder"),
    ({"source.script": "build.py"}, "`script` and `script_output` go together"),
    ({"cleaning": {"split": {"dev": 0.5, "test": 0.5}}}, "dev + test must leave rows for train; found 0.5 + 0.5"),
    ({"mining.range_min": 20}, "range_min (20) must be below top_k (20)"),
    ({"mining.max_score_ratio": 1.5}, "Input should be less than or equal to 1"),
    ({"forgetting.guards": [PAIRS]}, "forgetting.guards[0].path (alike): no parquet file at"),
    ({"forgetting.guards": [PAIRS, PAIRS]}, "two sets are called 'alike'; give each a name of its own"),
    ({"forgetting.guards": [{**PAIRS, "max_passages": 50}]}, "max_passages belongs to a guard of kind beir"),
    ({"forgetting.coefficients": [0.5, 1.0]}, "Input should be less than 1"),
    ({"name": "My Pipeline"}, "String should match pattern"),
    ({"seed": -1}, "Input should be greater than or equal to 0"),
]


def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    copy: dict[str, Any] = yaml.safe_load(yaml.safe_dump(settings))
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = copy
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return copy


def told(folder: Path) -> str:
    """The whole message, causes included, that loading `folder` shows."""
    with pytest.raises(Exception) as raised:  # noqa: PT011  Dagster wraps what a component raises
        load_folder(folder, "bad_pipeline_under_test")
    return "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[next(iter(c)) + f" {i}" for i, (c, _) in enumerate(BAD)])
def test_a_bad_yaml_names_its_file_the_key_and_what_is_allowed(
    changes: dict[str, Any], message: str, tmp_path: Path, tiny_bert_folder: Path
) -> None:
    write_pipeline(tmp_path, changed(settings_of(tiny_bert_folder), changes), pairs=2)

    text = told(tmp_path)

    assert message in text
    assert str(tmp_path / "small" / "defs.yaml") in text


def test_a_pipeline_without_attributes_is_told_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "defs.yaml").write_text("type: embed_pipeline.RetrievalPipeline\n")

    assert "`attributes` is missing: give at least name, source, embedder" in told(tmp_path)


def test_a_folder_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from embed_pipeline.definitions import extra_folders

    monkeypatch.setenv("EMBED_PIPELINE_DEFS", "/no/such/folder")
    with pytest.raises(Exception, match="EMBED_PIPELINE_DEFS names /no/such/folder, which is not a folder"):
        extra_folders()


def test_environment_variables_can_stand_in_the_yaml(
    tmp_path: Path, tiny_bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAW_PAIRS", "raw/*.parquet")
    settings = changed(settings_of(tiny_bert_folder), {"source.path": "{{ env.RAW_PAIRS }}"})
    write_pipeline(tmp_path, settings, pairs=2)

    definitions = load_folder(tmp_path, "templated_pipeline_under_test")

    assert len(list(definitions.resolve_all_asset_specs())) == 7
