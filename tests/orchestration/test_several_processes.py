"""Assets whose jobs have several processes, on this machine and on two nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from embed_pipeline.models import blocks, ranks
from tests.conftest import one_thread
from tests.joined_node import joined
from tests.listening import watched
from tests.orchestration.conftest import SmallPipeline, settings_of, write_yaml

MakePipeline = Callable[..., SmallPipeline]
TABLES = ("raw_pairs", "cleaned_pairs", "hard_negatives")


@pytest.mark.slow
def test_an_asset_trains_in_two_processes(make_pipeline: MakePipeline, tiny_bert_folder: Path) -> None:
    embedder = {**settings_of(tiny_bert_folder)["embedder"], "nproc_per_node": 2}
    small = make_pipeline(embedder=embedder)
    with watched("training, two processes") as seen:
        small.materialize(*TABLES, "embedder")
    made = small.store.current("embedder").path
    assert json.loads((made / "job.json").read_text())["world_size"] == 2
    assert json.loads((made / "summary.json").read_text())["steps"] == 4
    # Both took part in the exchange.
    assert "127.0.0.1" in seen.addresses


@pytest.mark.slow
def test_two_nodes_mine_what_one_does(
    make_pipeline: MakePipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (blocks, ranks):
        monkeypatch.setattr(module, "BLOCK_SIZE", 16)
    monkeypatch.setattr(ranks, "START_SECONDS", 0.0)  # a job, however little there is to do
    small = make_pipeline(launch={"kind": "nodes", "nnodes": 2, "network": "127.0.0.0/8"}, encode_processes=1)
    log = tmp_path / "join.log"
    with one_thread():
        with joined(small.store.folder.parent, log, pipeline="small"), watched("encoding, two nodes") as seen:
            small.materialize(*TABLES)
        assert all(any(f"=rank={rank},network=" in process for process in seen.processes) for rank in (0, 1))
        assert "as seat-1" in log.read_text()
        assert "done with" in log.read_text()
        together = small.store.current("hard_negatives").content

        attributes = yaml.safe_load(small.yaml_file.read_text())["attributes"]
        write_yaml(small.yaml_file, {name: value for name, value in attributes.items() if name != "launch"})
        monkeypatch.setenv("EMBED_PIPELINE_STORE", str(tmp_path / "alone"))
        alone = small.materialize(*TABLES)
    versions = {
        event.asset_key.path[-1]: (event.materialization.tags or {})["dagster/data_version"]
        for event in alone.get_asset_materialization_events()
        if event.asset_key is not None
    }
    assert (tmp_path / "alone" / "small" / "hard_negatives").is_dir()
    assert versions["hard_negatives"] == together
