"""What a user is told when a pipeline's YAML cannot be right: when definitions load, before any work."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from jsonschema import Draft202012Validator

from embed_pipeline.definitions import defs, load_folder
from embed_pipeline.errors import ConfigurationError
from embed_pipeline.orchestration.component import RetrievalPipeline
from embed_pipeline.pipeline_file import Document, read_documents
from tests.orchestration.conftest import settings_of, write_pipeline, write_yaml

HUB = {"hub": "BAAI/bge-small-en-v1.5"}
PAIRS = {"name": "alike", "kind": "scored", "path": "gone.parquet"}

# what is changed in a right YAML (dots reach into nested keys) -> what the message must say, besides the file
BAD = [
    ({"embedder.lerning_rate": 1}, "unknown key 'lerning_rate'. Did you mean 'learning_rate'? Allowed here: arguments"),
    ({"minning": {}}, "unknown key 'minning'. Did you mean 'mining'?"),
    ({"embedder.epochs": "many"}, "embedder.epochs: must be a number; found 'many'"),
    ({"embedder.epochs": 0}, "embedder.epochs: must be at least 0.001; found 0"),
    ({"embedder.engine": "keras"}, "must be 'sentence-transformers' or 'flag-embedding'; found 'keras'"),
    ({"embedder.base_model": HUB}, "needs `revision`: the 40-digit commit hash"),
    ({"embedder.base_model": {**HUB, "revision": "main"}}, "found 'main'. A branch such as main can change"),
    ({"embedder.base_model": {**HUB, "path": "x"}}, "exactly one of hub, path, package; found hub and path"),
    ({"embedder.base_model": {}}, "exactly one of hub, path, package; found none of them"),
    ({"embedder.base_model": {"path": "gone"}}, "embedder.base_model: no model at"),
    ({"embedder.base_model": {"package": "no_such_package"}}, "'no_such_package' that carries the base model is not"),
    ({"embedder.base_model.sha256": "abc"}, "sha256 must be 64 hexadecimal digits; found 'abc'"),
    ({"reranker.base_model": "the embedder"}, "must be keys with values or 'embedder'; found 'the embedder'"),
    ({"reranker.loss": "CosineLoss"}, "no loss is called 'CosineLoss'."),
    ({"source.kind": "csv"}, "must be 'pairs', 'triplets', 'beir', 'flag-embedding', 'scored', 'labelled'"),
    ({"source": {"kind": "beir", "queries": "q.parquet"}}, "a source of kind 'beir' needs `corpus`"),
    ({"source.qrels": "q.parquet"}, "`qrels` does not belong to a source of kind 'pairs'"),
    ({"source.path": "nothing/*.parquet"}, "source.path: no file matches"),
    ({"source.columns": {"positive": "answer"}}, "`columns.positive` means nothing to a source of kind 'pairs'"),
    ({"source": {"kind": "labelled", "path": "a"}}, "a labelled data set goes under `extra_sources`"),
    ({"extra_sources": [{"name": "more", "path": "gone.parquet"}]}, "extra_sources.more.path: no such file or folder"),
    ({"source.script": "build.py"}, "`script` and `script_output` go together"),
    ({"cleaning": {"split": {"dev": 0.5, "test": 0.5}}}, "dev + test must leave rows for train; found 0.5 + 0.5"),
    ({"mining.range_min": 20}, "range_min (20) must be below top_k (20)"),
    ({"mining.max_score_ratio": 1.5}, "must be at most 1; found 1.5"),
    ({"forgetting.guards": [PAIRS]}, "forgetting.guards[0].path (alike): no parquet file at"),
    ({"forgetting.guards": [PAIRS, PAIRS]}, "two sets are called 'alike'; give each a name of its own"),
    ({"forgetting.guards": [{**PAIRS, "max_passages": 50}]}, "max_passages belongs to a guard of kind beir"),
    ({"forgetting.coefficients": [0.5, 1.0]}, "must be less than 1; found 1"),
    (
        {"name": "My Pipeline"},
        "starting with a letter; found 'My Pipeline'",
    ),
    ({"seed": -1}, "seed: must be at least 0; found -1"),
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


def test_environment_variables_can_stand_in_the_yaml(
    tmp_path: Path, tiny_bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAW_PAIRS", "raw/*.parquet")
    settings = changed(settings_of(tiny_bert_folder), {"source.path": "{{ env.RAW_PAIRS }}"})
    write_pipeline(tmp_path, settings, pairs=2)

    definitions = load_folder(tmp_path, "templated_pipeline_under_test")

    assert len(list(definitions.resolve_all_asset_specs())) == 7


PROMPTS = {"query_prompt": "'query:\n", "passage_prompt": "Q {{text}}: "}


def test_a_text_reaches_the_settings_as_it_is_written(tmp_path: Path, tiny_bert_folder: Path) -> None:
    settings = changed(settings_of(tiny_bert_folder), {"embedder.encoding": PROMPTS, "description": "None"})
    write_pipeline(tmp_path, settings, pairs=2)
    module = {"project_root": tmp_path, "defs_module": _module(tmp_path)}

    component = dg.ComponentTree.from_module(**module).load_component("small", RetrievalPipeline)

    told = component.pipeline.settings
    assert told.embedder.encoding.model_dump(include=set(PROMPTS)) == PROMPTS
    assert told.description == "None"


def _module(folder: Path) -> Any:
    from types import ModuleType

    module = ModuleType("templates_under_test")
    module.__path__, module.__file__ = [str(folder)], str(folder / "__init__.py")
    return module


# ---------------------------------------------------------------------------------- one broken among others

AUTOMATION = {"watch": True, "retrain": "0 3 * * *", "timezone": "Europe/Berlin"}


@pytest.fixture
def deployment(
    tmp_path: Path, tiny_bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str | bytes | None], dg.Definitions]:
    """The definitions of a deployment of the pipeline `small` and one more, with `text` for its YAML."""
    write_pipeline(tmp_path / "defs", settings_of(tiny_bert_folder), pairs=2)
    other = tmp_path / "defs" / "other" / "defs.yaml"
    other.parent.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("EMBED_PIPELINE_DEFS", str(tmp_path / "defs"))
    monkeypatch.delenv("DAGSTER_IS_DEFS_VALIDATION_CLI", raising=False)

    def load(text: str | bytes | None) -> dg.Definitions:
        if text is None:
            other.symlink_to("/nowhere/defs.yaml")
        else:
            other.write_bytes(text if isinstance(text, bytes) else text.encode())
        return defs()

    return load


def keys_of(definitions: dg.Definitions) -> set[str]:
    return {spec.key.to_user_string() for spec in definitions.resolve_all_asset_specs()}


SHOP = "type: embed_pipeline.RetrievalPipeline\nattributes:\n  name: shop\n"


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        (f"{SHOP}  automation: {AUTOMATION}\n", "shop", "defs.yaml:2: source is required"),
        (f"{SHOP}  sources: [\n", "other", "this is not YAML"),
        (f"{SHOP}  description: K\u00e4se\n".encode("latin-1"), "other", "defs.yaml:4: the byte 0xe4 is not UTF-8"),
        ("type: no_such_package.Component\n", "other", "no_such_package"),
        ("", "other", "the file is empty"),
        (None, "other", "the link leads to /nowhere/defs.yaml, which is not there"),
        (f"{SHOP}  automation: {{retrain: every night}}\n", "shop", "source is required"),
        (f"{SHOP}  seed: !!int abc\n", "other", "defs.yaml:4: seed: found 'abc', expected a whole number"),
        (f"{SHOP}  card: !!omap [license: b]\n", "other", "defs.yaml:4: card: the tag !!omap is not known here"),
        (f"requirements: {{env: 3}}\n{SHOP}", "shop", "requirements.env: must be a list; found 3"),
        (f"post_processing: 3\n{SHOP}", "shop", "post_processing: must be keys with values; found 3"),
    ],
)
def test_one_broken_yaml_leaves_the_others_alone_and_is_seen(
    text: str | bytes | None,
    name: str,
    reason: str,
    deployment: Callable[[str | bytes | None], dg.Definitions],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR):
        definitions = deployment(text)

    assert {"demo/embedder", "small/embedder", "small/champion", f"{name}/broken_yaml"} <= keys_of(definitions)
    (logged,) = [record.getMessage() for record in caplog.records if "cannot be loaded" in record.getMessage()]
    where = str(tmp_path / "defs" / "other" / "defs.yaml")
    assert where in logged
    assert reason in logged
    spec = definitions.get_assets_def([name, "broken_yaml"]).get_asset_spec()
    assert reason in (spec.description or "")
    dg.Definitions.validate_loadable(definitions)

    job = definitions.resolve_job_def(f"{name}_pipeline")
    with dg.DagsterInstance.ephemeral() as instance:
        done = job.execute_in_process(raise_on_error=False, instance=instance)
    assert not done.success
    (failure,) = [event for event in done.all_events if event.is_step_failure]
    assert reason in str(failure.step_failure_data.error_display_string)
    assert where in str(failure.step_failure_data.error_display_string)


def test_its_check_schedule_and_sensor_say_why_it_does_not_run(
    deployment: Callable[[str | bytes | None], dg.Definitions],
) -> None:
    definitions = deployment(f"{SHOP}  automation: {AUTOMATION}\n")

    schedule = definitions.resolve_schedule_def("shop_nightly")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("0 3 * * *", "Europe/Berlin")
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
    with dg.DagsterInstance.ephemeral() as instance:
        tick = schedule.evaluate_tick(dg.build_schedule_context(instance))
        assert tick.run_requests == []
        assert "source is required" in (tick.skip_message or "")
        sensor = definitions.resolve_sensor_def("shop_raw_files")
        assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
        look = sensor.evaluate_tick(dg.build_sensor_context(instance))
        assert look.run_requests == []
        assert "source is required" in (look.skip_message or "")

        check = dg.AssetCheckKey(dg.AssetKey(["shop", "broken_yaml"]), "yaml_can_be_loaded")
        job = definitions.resolve_implicit_global_asset_job_def()
        done = job.get_subset(asset_check_selection={check}, asset_selection=set()).execute_in_process(
            instance=instance, raise_on_error=False
        )
    (evaluation,) = done.get_asset_check_evaluations()
    assert not evaluation.passed
    assert "source is required" in (evaluation.description or "")


def test_on_change_says_why_as_well_and_what_asks_for_nothing_has_no_schedule(
    deployment: Callable[[str | bytes | None], dg.Definitions],
) -> None:
    definitions = deployment(f"{SHOP}  automation: {{retrain: on_change}}\n")
    assert {s.name for s in definitions.sensors or []} == {"shop_retraining"}
    definitions = deployment(SHOP)
    assert not [*(definitions.sensors or []), *(definitions.schedules or [])]


def test_where_definitions_are_only_checked_every_reason_is_an_error(
    deployment: Callable[[str | bytes | None], dg.Definitions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_IS_DEFS_VALIDATION_CLI", "1")
    with pytest.raises(ConfigurationError, match=r"defs.yaml:2: source is required\n.*embedder is required"):
        deployment(SHOP)


def test_two_pipelines_of_one_name_are_both_refused_and_name_each_other(
    deployment: Callable[[str | bytes | None], dg.Definitions], tmp_path: Path
) -> None:
    text = (tmp_path / "defs" / "small" / "defs.yaml").read_text()
    definitions = deployment(text)

    keys = keys_of(definitions)
    assert {"small/broken_yaml", "small_broken/broken_yaml", "demo/embedder"} <= keys
    assert "small/embedder" not in keys
    reasons = [
        definitions.get_assets_def([name, "broken_yaml"]).get_asset_spec().description or ""
        for name in ("small", "small_broken")
    ]
    for reason in reasons:
        assert str(tmp_path / "defs" / "small" / "defs.yaml") in reason
        assert str(tmp_path / "defs" / "other" / "defs.yaml") in reason


def test_a_folder_that_is_not_there_leaves_the_others_alone(
    deployment: Callable[[str | bytes | None], dg.Definitions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBED_PIPELINE_DEFS", f"{tmp_path / 'defs'}:/no/such/folder:{tmp_path / 'defs' / '.'}")
    definitions = deployment(SHOP)

    assert {"small/embedder", "shop/broken_yaml", "folder/broken_yaml"} <= keys_of(definitions)
    spec = definitions.get_assets_def(["folder", "broken_yaml"]).get_asset_spec()
    assert "EMBED_PIPELINE_DEFS names /no/such/folder, which is not a folder" in (spec.description or "")


def test_links_that_lead_back_leave_the_pipelines_alone(
    deployment: Callable[[str | bytes | None], dg.Definitions], tmp_path: Path
) -> None:
    data = tmp_path / "defs" / "data"
    data.mkdir()
    for name in ("first", "second"):
        (data / name).symlink_to(data)
    definitions = deployment(None)

    assert {"small/embedder", "first/broken_yaml", "second/broken_yaml", "demo/embedder"} <= keys_of(definitions)
    spec = definitions.get_assets_def(["first", "broken_yaml"]).get_asset_spec()
    assert f"{data / 'first'} is a link to {data}, which it lies in" in (spec.description or "")


def test_an_error_that_nobody_foresaw_is_that_of_one_file_alone(
    deployment: Callable[[str | bytes | None], dg.Definitions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(file: Path) -> list[Document]:
        if file.parent.name == "other":
            raise LookupError("nobody thought of this")
        return read_documents(file)

    for module in ("definitions", "orchestration.broken"):
        monkeypatch.setattr(f"embed_pipeline.{module}.read_documents", read)
    definitions = deployment(SHOP)

    assert {"demo/embedder", "small/embedder", "other/broken_yaml"} <= keys_of(definitions)
    spec = definitions.get_assets_def(["other", "broken_yaml"]).get_asset_spec()
    where = tmp_path / "defs" / "other" / "defs.yaml"
    assert f"{where}: LookupError: nobody thought of this" in (spec.description or "")


def test_python_beside_a_broken_yaml_is_loaded(
    deployment: Callable[[str | bytes | None], dg.Definitions], tmp_path: Path
) -> None:
    code = "import dagster as dg\n\n\n@dg.asset\ndef {name}() -> None: ...\n"
    (tmp_path / "defs" / "beside.py").write_text(code.format(name="beside"))
    (tmp_path / "defs" / "deeper" / "one").mkdir(parents=True)
    (tmp_path / "defs" / "deeper" / "below.py").write_text(code.format(name="below"))
    (tmp_path / "defs" / "worse.py").write_text("raise RuntimeError('no')\n")
    (tmp_path / "defs" / "worst.py").write_text("raise SystemExit(1)\n")

    keys = keys_of(deployment(SHOP))

    assert {"beside", "below", "small/embedder", "shop/broken_yaml", "worse/broken_yaml", "worst/broken_yaml"} <= keys


def test_two_pipelines_may_stand_in_one_file(
    deployment: Callable[[str | bytes | None], dg.Definitions], tmp_path: Path, tiny_bert_folder: Path
) -> None:
    two = tmp_path / "defs" / "small" / "defs.yaml"
    first = two.read_text()
    write_yaml(two, {**settings_of(tiny_bert_folder), "name": "second"})
    two.write_text(f"{first}---\n{two.read_text()}")

    assert {"small/embedder", "second/embedder", "shop/broken_yaml"} <= keys_of(deployment(SHOP))


def test_the_schema_that_dg_checks_by_takes_what_is_read_and_no_more() -> None:
    schema = Draft202012Validator(RetrievalPipeline.get_model_cls().model_json_schema())
    right = {"name": "shop", "source": {"path": "x"}, "embedder": {"base_model": {"path": "m"}}}
    for given in (right, {**right, "seed": "{{ env.SEED }}"}, changed(right, {"embedder.learning_rate": "1e-5"})):
        assert schema.is_valid(given)
    for wrong in ({"seed": -1}, {"seed": "many"}, {"gate": {"min_queries": 0}}, {"minning": {}}, {"name": "a" * 99}):
        assert not schema.is_valid({**right, **wrong})
    (problem,) = schema.iter_errors({**right, "seed": -1})
    assert problem.message == "-1 is less than the minimum of 0"
