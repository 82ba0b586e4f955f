"""Guard sets and merging through Dagster: what is made, what goes on, and who judges by what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from embed_pipeline.evaluation.gate import GateReport
from embed_pipeline.merging.trade_off import MergingReport
from embed_pipeline.models.source import weights_digest
from tests.guard_files import small_pairs, small_retrieval, write_beir, write_pairs
from tests.orchestration.conftest import SmallPipeline, write_yaml

MakePipeline = Callable[..., SmallPipeline]
TO_EMBEDDER = ("raw_pairs", "cleaned_pairs", "hard_negatives", "embedder")
FROM_MERGED = ("merged_embedder", "reranker", "evaluation")


@pytest.fixture
def guards(tmp_path: Path) -> list[dict[str, Any]]:
    """36 test pairs and 40 queries; the pairs may not lose anything."""
    write_pairs(tmp_path / "guards" / "pairs.parquet", small_pairs(48))
    write_beir(tmp_path / "guards" / "set", **small_retrieval(40))
    return [
        {"name": "alike", "kind": "scored", "path": str(tmp_path / "guards" / "pairs.parquet"), "max_loss": 0.0},
        {
            "name": "general",
            "kind": "beir",
            "path": str(tmp_path / "guards" / "set"),
            "split": None,
            "max_loss": 1.0,
        },
    ]


def change(small: SmallPipeline, **attributes: Any) -> None:
    given = yaml.safe_load(small.yaml_file.read_text())["attributes"]
    write_yaml(small.yaml_file, {**given, **attributes})


def keys(small: SmallPipeline) -> dict[str, set[str]]:
    """asset -> what the graph shows it to be made from."""
    graph = small.definitions().resolve_asset_graph()
    return {
        key.path[-1]: {parent.path[-1] for parent in graph.get(key).parent_keys} for key in graph.get_all_asset_keys()
    }


def made(result: dg.ExecuteInProcessResult) -> dict[str, bool]:
    return {
        event.asset_key.path[-1]: not event.materialization.metadata["reused"].value
        for event in result.get_asset_materialization_events()
        if event.asset_key is not None
    }


def failure(result: dg.ExecuteInProcessResult, asset: str) -> str:
    error = result.failure_data_for_node(f"small__{asset}")
    assert error is not None
    assert error.user_failure_data is not None
    return str(error.user_failure_data.description)


def test_merging_is_an_asset_only_where_guard_sets_are_named(
    make_pipeline: MakePipeline, guards: list[dict[str, Any]]
) -> None:
    small = make_pipeline()
    assert "merged_embedder" not in keys(small)
    change(small, forgetting={"guards": guards, "merging": "off"})
    assert "merged_embedder" not in keys(small)
    assert keys(small)["reranker"] == {"embedder"}
    change(small, forgetting={"guards": guards})
    assert keys(small)["merged_embedder"] == {"embedder"}
    assert keys(small)["reranker"] == {"merged_embedder"}
    assert "merged_embedder" in keys(small)["evaluation"]


def test_what_was_forgotten_is_merged_back_and_the_merged_embedder_goes_on(
    make_pipeline: MakePipeline, guards: list[dict[str, Any]]
) -> None:
    forgetting = {"guards": guards, "merging": "auto", "coefficients": [0.1, 0.3]}
    small = make_pipeline(forgetting=forgetting)
    change(
        small, embedder={**yaml.safe_load(small.yaml_file.read_text())["attributes"]["embedder"], "learning_rate": 0.03}
    )

    # A verdict that stops a run here is the gate's own matter.
    result = small.materialize(*TO_EMBEDDER, *FROM_MERGED, raise_on_error=False)

    assert made(result) == dict.fromkeys((*TO_EMBEDDER, *FROM_MERGED), True)
    merged, embedder = small.store.current("merged_embedder"), small.store.current("embedder")
    report = MergingReport.model_validate(merged.report)
    assert report.outcome == "merged", "choose a learning rate that makes the tiny model forget"
    assert [one.coefficient for one in report.tried] == [0.0, 0.1, 0.3, 1.0]
    assert {guard.name: guard.items for guard in report.guards} == {"alike": 18, "general": 20}
    assert merged.manifest.inputs == {
        "cleaned_pairs": small.store.current("cleaned_pairs").version,
        "embedder": embedder.version,
    }
    assert weights_digest(merged.path / "model") != weights_digest(embedder.path / "model")
    _the_asset_shows_it(result)
    _later_stages_use_it(small, report)
    _what_changed_since_is_refused_and_what_did_not_is_used_again(small, guards)
    _what_forgot_nothing_goes_on_unchanged(small, guards)


def test_a_guard_set_that_cannot_be_read_is_told_before_the_training(
    make_pipeline: MakePipeline, guards: list[dict[str, Any]]
) -> None:
    write_pairs(Path(guards[0]["path"]), [{"sentence1": "a", "sentence2": "b", "split": "test"}])
    small = make_pipeline(forgetting={"guards": guards})
    result = small.materialize(*TO_EMBEDDER, raise_on_error=False)
    assert "pairs.parquet: no column 'score'; found: sentence1, sentence2, split" in failure(result, "embedder")
    assert not small.store.has_current("embedder")


def _the_asset_shows_it(result: dg.ExecuteInProcessResult) -> None:
    (shown,) = [
        event.materialization.metadata
        for event in result.get_asset_materialization_events()
        if event.asset_key is not None and event.asset_key.path[-1] == "merged_embedder"
    ]
    assert "Fine-tuning lost too much: alike Spearman" in str(shown["decision"].value)
    assert "goes on" in str(shown["trade_off"].value)
    assert str(shown["curve"].value).startswith("![domain and guard sets over coefficients](data:image/svg+xml")
    assert shown["coefficient"].value in (0.1, 0.3)


def _later_stages_use_it(small: SmallPipeline, report: MergingReport) -> None:
    merged, reranker, evaluation = (
        small.store.current(asset) for asset in ("merged_embedder", "reranker", "evaluation")
    )
    assert set(reranker.manifest.inputs) == {"cleaned_pairs", "merged_embedder"}
    assert evaluation.input("merged_embedder") == merged.version
    gate = GateReport.model_validate(evaluation.report["gate"])
    found = {guard.name: guard for guard in gate.guards}
    assert {name: guard.items for name, guard in found.items()} == {"alike": 18, "general": 20}
    # The half that judges is not the one that chose, whose figures stand in the merging report.
    assert found["alike"].base != report.tried[0].guards["alike"].value


def _what_changed_since_is_refused_and_what_did_not_is_used_again(
    small: SmallPipeline, guards: list[dict[str, Any]]
) -> None:
    before = small.store.current("merged_embedder")
    # Another allowance, the same decision: a new version of the same content, so nothing after it is trained again.
    stricter = [guards[0], {**guards[1], "max_loss": 0.9}]
    change(small, forgetting={"guards": stricter, "merging": "auto", "coefficients": [0.1, 0.3]})
    for asset in ("reranker", "evaluation"):
        refused = small.materialize(asset, raise_on_error=False)
        assert "the settings under `forgetting` changed since. Materialize small/merged_embedder" in failure(
            refused, asset
        )
    assert made(small.materialize("merged_embedder", "reranker")) == {"merged_embedder": True, "reranker": False}
    after = small.store.current("merged_embedder")
    assert (after.version != before.version, after.content) == (True, before.content)

    write_beir(Path(guards[1]["path"]), **small_retrieval(44))
    refused = small.materialize("evaluation", raise_on_error=False)
    assert "a guard set or the settings" in failure(refused, "evaluation")


def _what_forgot_nothing_goes_on_unchanged(small: SmallPipeline, guards: list[dict[str, Any]]) -> None:
    change(small, forgetting={"guards": [{**guard, "max_loss": 1.0} for guard in guards]})
    small.materialize("merged_embedder")
    merged, embedder = small.store.current("merged_embedder"), small.store.current("embedder")
    assert merged.report["outcome"] == "kept"
    assert weights_digest(merged.path / "model") == weights_digest(embedder.path / "model")
    merged.verify()
    embedder.verify()
