"""`embed-pipeline`: the store and the report from a terminal."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from embed_pipeline.artifacts import Artifact, Made, PipelineStore, Recipe, RunIds
from embed_pipeline.champions import pointer, read_history
from embed_pipeline.command_line import main
from embed_pipeline.tracking.registry import Registry
from tests.small_ledger import model, pair, promote
from tests.tracking.candidates import Workshop


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineStore:
    monkeypatch.setenv("EMBED_PIPELINE_STORE", str(tmp_path))
    return PipelineStore(tmp_path, "support")


def publish(store: PipelineStore, seed: int) -> Artifact:
    def make(out: Path) -> Made:
        (out / "rows.txt").write_text(str(seed))
        return Made({}, RunIds())

    recipe = Recipe(inputs={}, settings={}, seed=seed, code_version="1")
    return store.produce("raw_pairs", recipe, [], make, content=["rows.txt"]).artifact


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), env={"COLUMNS": "200"})


# What takes longer to import than a command that prints a few lines may take.
HEAVY = ("torch", "transformers", "pandas", "pyarrow", "duckdb", "numpy", "mlflow", "dagster")


@pytest.mark.parametrize(
    ("arguments", "left_alone"),
    [
        (("--help",), (*HEAVY, "pydantic", "rich")),
        (("rollback", "--help"), HEAVY),
        (("versions",), HEAVY),
        (("prune", "support"), HEAVY),
        (("history", "support"), HEAVY),
    ],
)
def test_a_light_command_imports_nothing_heavy(
    store: PipelineStore, arguments: tuple[str, ...], left_alone: tuple[str, ...]
) -> None:
    publish(store, 1)
    script = (
        "import sys; from embed_pipeline.command_line import main; "
        "main(sys.argv[1:], standalone_mode=False); print('imported:', *sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)

    imported = done.stdout.splitlines()[-1].split()
    assert imported[0] == "imported:"
    assert not set(imported) & set(left_alone)


def test_versions_lists_all_and_marks_the_current_one(store: PipelineStore) -> None:
    old, new = publish(store, 1), publish(store, 2)

    shown = run("versions").output

    assert old.version in shown
    assert ["*", "support/raw_pairs", new.version] in [line.split()[:3] for line in shown.splitlines()]


def test_prune_shows_first_and_deletes_only_when_told(store: PipelineStore) -> None:
    old, new = publish(store, 1), publish(store, 2)

    assert f"would delete support/raw_pairs {old.version}" in run("prune", "support").output
    assert old.path.is_dir()

    assert f"deleted support/raw_pairs {old.version}" in run("prune", "support", "--yes").output
    assert not old.path.exists()
    assert new.path.is_dir()


def test_prune_leaves_alone_what_it_did_not_write(store: PipelineStore) -> None:
    damaged = publish(store, 1)
    (damaged.path / "rows.txt").write_text("2")
    publish(store, 1)
    (aside,) = store.set_aside()
    foreign = [store.folder / ".staging" / name for name in ("notes.txt", "a folder")]
    foreign[1].mkdir(parents=True)
    foreign[0].write_text("mine")

    result = run("prune", "support", "--yes")

    assert result.exit_code == 0, result.output
    for path in (*foreign, aside):
        assert f"left alone {path}" in result.output
        assert path.exists()


def test_prune_waits_for_a_run_that_is_making_something(store: PipelineStore) -> None:
    publish(store, 1)
    (store.folder / ".staging" / "embedder~another-machine~1~00000000").mkdir(parents=True)

    result = run("prune", "support", "--yes")

    assert result.exit_code == 1
    assert "a run is making embedder" in result.output


def test_prune_keeps_the_champion_and_the_one_before_it_with_all_they_were_made_from(store: PipelineStore) -> None:
    names = ("first", "second", "third", "last")
    made: dict[str, list[Artifact]] = {}
    for name in names:
        raw = model(store, "raw_pairs", name)
        embedder = model(store, "embedder", name, raw)
        reranker = model(store, "reranker", name, embedder)
        evaluation = model(store, "evaluation", name, embedder, reranker)
        made[name] = [raw, embedder, reranker]  # evaluations stay: the history is drawn from them
        if name != "last":
            promote(store, pair(embedder.version, reranker.version, evaluation.version))

    run("prune", "support", "--yes")

    assert [name for name in names if any(artifact.path.exists() for artifact in made[name])] == list(names[1:])
    assert all(artifact.path.is_dir() for name in names[1:] for artifact in made[name])
    assert (pointer(store) / "embedder" / "weights").read_text() == "third"


def test_prune_deletes_nothing_while_it_cannot_tell_who_is_champion(store: PipelineStore) -> None:
    old, new = model(store, "embedder", "old"), model(store, "embedder", "new")
    promote(store, pair(old.version, model(store, "reranker", "old").version))
    (store.folder / "promotions" / "0001" / "promotion.json").write_text("")

    result = run("prune", "support", "--yes")

    assert result.exit_code == 1
    assert "who is the champion of support cannot be told" in result.output
    assert old.path.is_dir()
    assert new.path.is_dir()


def test_verify_names_a_changed_file(store: PipelineStore) -> None:
    artifact = publish(store, 1)
    assert "1 files as published" in run("verify", "support").output

    (artifact.path / "rows.txt").write_text("2")
    result = run("verify", "support")

    assert result.exit_code == 1
    assert "rows.txt was changed after support/raw_pairs version" in result.output


def test_verify_passes_over_no_asset_whose_pointer_is_damaged(store: PipelineStore) -> None:
    publish(store, 1)
    pointer = store.folder / "raw_pairs" / "current.json"
    pointer.unlink()
    pointer.mkdir()

    result = run("verify", "support")

    assert result.exit_code == 1
    assert "current.json cannot be read" in result.output


def test_an_unknown_pipeline_is_told_which_there_are(store: PipelineStore) -> None:
    publish(store, 1)

    result = run("report", "suport")

    assert result.exit_code == 1
    assert "no pipeline 'suport'" in result.output
    assert "there: support" in result.output


def test_a_report_that_was_never_made_names_the_command(store: PipelineStore) -> None:
    publish(store, 1)

    assert "dagster asset materialize" in run("report", "support").output


def test_champion_tells_who_serves_and_how_to_load_it(in_service: Workshop) -> None:
    serving = read_history(in_service.store).champion
    assert serving is not None

    shown = run("champion", "support", "--verify")

    assert shown.exit_code == 0, shown.output
    assert f"{serving.embedder}, support-embedder version 2" in shown.output
    assert "promotion 2: promoted by test" in shown.output
    assert serving.verdict in shown.output
    assert 'embedder = mlflow.sentence_transformers.load_model("models:/support-embedder@champion")' in shown.output
    assert f'reranker = CrossEncoder("{in_service.store.folder}/champion/reranker")' in shown.output
    assert "both give what was evaluated" in shown.output
    assert "aliases stand where the store's pointer says" in shown.output


def test_champion_fails_where_mlflow_disagrees_and_settles_it(in_service: Workshop) -> None:
    Registry().move({("support-embedder", "champion"): "1"})

    told = run("champion", "support")

    assert told.exit_code == 1
    assert "the alias champion of support-embedder stands at version 1 in MLflow, and has to stand at" in told.output
    assert "settled: the alias champion of support-embedder" in run("champion", "support", "--settle").output
    assert run("champion", "support").exit_code == 0


def test_a_champion_whose_folder_is_gone_is_told(in_service: Workshop) -> None:
    serving = read_history(in_service.store).champion
    assert serving is not None
    (in_service.store.get("embedder", serving.embedder).path / "model" / "config.json").unlink()
    assert "config.json is missing" in run("champion", "support", "--verify").output
    shutil.rmtree(in_service.store.folder / "embedder" / serving.embedder)

    told = run("champion", "support")

    assert told.exit_code == 1
    assert f"support/embedder has no version {serving.embedder}" in told.output


def test_rollback_and_retirement_are_commands_and_stand_in_the_history(in_service: Workshop) -> None:
    assert run("rollback", "support").exit_code == 2  # a reason is needed

    assert "rolled back by" in run("rollback", "support", "--reason", "customers complain").output
    assert "has no champion any more" in run("retire", "support", "--reason", "all bad").output
    refused = run("rollback", "support", "--reason", "again")

    assert refused.exit_code == 1
    assert "nobody is left to go back to" in refused.output
    lines = [line.split() for line in run("history", "support").output.splitlines()]
    entries = [line for line in lines if line and line[0].isdigit()]
    assert [line[0] for line in entries] == ["1", "2", "3", "4"]
    assert "nDCG@10" in entries[0]
    assert "0.625" in entries[0]
    assert entries[2][4:6] == ["rolled", "back"]
    assert "nobody" in entries[3]
    assert "has no champion since" in run("champion", "support").output


@pytest.mark.parametrize("harm", ["edited", "truncated", "missing", "added"])
def test_a_report_of_files_that_were_changed_is_not_shown(in_service: Workshop, harm: str) -> None:
    evaluation = in_service.store.current("evaluation")
    path = evaluation.path / "evaluators.json"
    if harm == "edited":
        path.write_text(path.read_text().replace("0.", "1."))
    elif harm == "truncated":
        path.write_text(path.read_text()[:-9])
    elif harm == "missing":
        path.unlink()
    else:
        path = evaluation.path / "summary.json"
        path.write_text("[]")

    told = run("report", "support")

    assert told.exit_code == 1
    assert str(path) in told.output
    assert f"support/evaluation version {evaluation.version}" in told.output
    assert "Materialize evaluation again" in told.output


def test_hard_negatives_of_changed_files_are_not_exported(store: PipelineStore, tmp_path: Path) -> None:
    cleaned = model(store, "cleaned_pairs", "a")
    model(store, "hard_negatives", "b", cleaned)
    (cleaned.path / "model" / "weights").write_text("other rows")

    told = run("export-negatives", "support", "--format", "pairs", "--output", str(tmp_path / "pairs.parquet"))

    assert told.exit_code == 1
    assert f"{cleaned.path / 'model' / 'weights'} was changed after support/cleaned_pairs" in told.output
    assert not (tmp_path / "pairs.parquet").exists()


def test_a_reason_with_brackets_is_shown_as_it_is(in_service: Workshop) -> None:
    assert run("rollback", "support", "--reason", "see [/ticket] :warning: [bold]4711").exit_code == 0
    assert "see [/ticket] :warning: [bold]4711" in run("history", "support").output


def test_nothing_promoted_yet_is_told(store: PipelineStore) -> None:
    publish(store, 1)
    told = "nothing was promoted in support yet: materialize support/champion"
    assert told in run("champion", "support").output
    history = run("history", "support")
    assert (history.exit_code, history.output) == (0, f"{told}\n")


def test_the_list_of_commands_cuts_no_sentence_in_a_narrow_terminal() -> None:
    told = CliRunner().invoke(main, ["--help"], env={"COLUMNS": "80"}).output
    lines = told.partition("Commands:")[2].strip().splitlines()
    assert len(lines) == len(main.commands)
    assert [line for line in lines if not line.endswith(".") or line.endswith("...")] == []
