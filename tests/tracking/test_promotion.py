"""Promotion, rollback and retirement: both the aliases and the pointer move, or neither does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from safetensors.numpy import load_file, save_file

from embed_pipeline import champions
from embed_pipeline.artifacts import Artifact
from embed_pipeline.champions import models_of, pointer, read_history
from embed_pipeline.errors import ArtifactError, GateError, ModelError, TrackingError, UserError
from embed_pipeline.evaluation.parity import read_parity
from embed_pipeline.tracking import promotion
from embed_pipeline.tracking.promotion import challenge, check_loads, disagreements, retire, roll_back, settle
from embed_pipeline.tracking.registry import Registry
from embed_pipeline.tracking.server import tracking_uri
from tests.tracking.candidates import Workshop

NAMES = ("support-embedder", "support-reranker")
IN_SERVICE = {"champion": ("2", "2"), "previous": ("1", "1"), "challenger": ("3", "3")}
REPOSITORY = Path(__file__).resolve().parents[2]


def aliases() -> dict[str, tuple[str | None, str | None]]:
    """alias -> versions of the embedder and of the reranker, without the aliases that stand nowhere."""
    found = Registry().aliases(NAMES)
    both = {alias: (found[NAMES[0], alias], found[NAMES[1], alias]) for _, alias in found}
    return {alias: versions for alias, versions in both.items() if versions != (None, None)}


def embedder_served(workshop: Workshop) -> str:
    """The version that the pointer leads to."""
    return (pointer(workshop.store) / "embedder").resolve().parent.name


def past_models(workshop: Workshop, number: int) -> tuple[Artifact, Artifact]:
    champion = read_history(workshop.store).promotions[number - 1].champion
    assert champion is not None
    return models_of(workshop.store, champion)


# ---------------------------------------------------------------------------------------------- promotion


def test_the_first_champion(workshop: Workshop) -> None:
    candidate = workshop.candidate(1)
    first = workshop.promote(candidate)
    assert first.new
    assert first.champion.verdict == "nDCG@10 0.412 → 0.471: promote"
    assert (first.promotion.replaced, first.promotion.by) == (None, "test")
    assert aliases() == {"champion": ("1", "1")}
    assert embedder_served(workshop) == candidate.embedder.version

    again = workshop.promote(candidate)
    assert not again.new
    assert len(read_history(workshop.store).promotions) == 1
    assert aliases() == {"champion": ("1", "1")}
    assert len(mlflow.MlflowClient(tracking_uri()).search_model_versions("name = 'support-embedder'")) == 1


def test_a_challenger_that_passes_later_takes_over_and_is_registered_once(in_service: Workshop) -> None:
    assert aliases() == IN_SERVICE
    candidate = in_service.next(3)  # the same models, judged again by an easier gate
    third = in_service.promote(candidate)
    assert aliases() == {"champion": ("3", "3"), "previous": ("2", "2")}
    assert embedder_served(in_service) == candidate.embedder.version
    assert third.promotion.replaced == read_history(in_service.store).promotions[1].champion
    assert check_loads(in_service.store, third.champion) < 1e-6
    assert not disagreements(in_service.store)


def test_each_line_loads_it_where_this_package_is_not_installed(in_service: Workshop, tmp_path: Path) -> None:
    champion = read_history(in_service.store).champion
    assert champion is not None
    parity = read_parity(in_service.store.get("evaluation", champion.evaluation).path)
    asked = json.dumps({"queries": parity.queries, "passages": parity.passages})
    program = f"""
import json, sys
sys.modules["embed_pipeline"] = None
import mlflow, pandas
from sentence_transformers import CrossEncoder, SentenceTransformer
queries, passages = json.loads({asked!r}).values()
pairs = list(zip(queries, passages))
embedder = mlflow.sentence_transformers.load_model("models:/support-embedder@champion")
reranker = mlflow.pyfunc.load_model("models:/support-reranker@champion")
served = mlflow.pyfunc.load_model("models:/support-embedder@champion")
by_path = SentenceTransformer("{pointer(in_service.store)}/embedder")
cross_encoder = CrossEncoder("{pointer(in_service.store)}/reranker")
as_passages = {{"task": "document", "prompt_name": "document"}}
given = {{
    "queries": [embedder.encode_query(queries), by_path.encode_query(queries), served.predict(queries)],
    "passages": [embedder.encode_document(passages), by_path.encode_document(passages),
                 served.predict(passages, params=as_passages)],
    "scores": [reranker.predict(pandas.DataFrame(pairs, columns=["query", "passage"])), cross_encoder.predict(pairs)],
}}
print(json.dumps({{what: [each.tolist() for each in ways] for what, ways in given.items()}}))
"""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    given = json.loads(done.stdout.splitlines()[-1])
    for found in given["queries"]:
        assert found == [pytest.approx(row, abs=1e-5) for row in parity.query_embeddings]
    for found in given["passages"]:
        assert found == [pytest.approx(row, abs=1e-5) for row in parity.passage_embeddings]
    for found in given["scores"]:
        assert found == pytest.approx(parity.scores, abs=1e-5)


def test_a_merged_embedder_serves_and_comes_back(in_service: Workshop) -> None:
    merged = in_service.candidate(4, reference=in_service.serving, merged=True)
    done = in_service.promote(merged)
    assert done.champion.embedder_asset == "merged_embedder"
    assert embedder_served(in_service) == merged.embedder.version
    assert (pointer(in_service.store) / "embedder").resolve().parents[1].name == "merged_embedder"
    roll_back(in_service.store, reason="bad")
    roll_back(in_service.store, to=merged.embedder.version, reason="not so bad")
    assert check_loads(in_service.store, done.champion) < 1e-6
    served = pointer(in_service.store) / "serving.json"
    served.write_text(served.read_text().replace('"embedder_weight": ', '"embedder_weight": 0.1'))
    with pytest.raises(ArtifactError, match=r"serving\.json is not the one that .*Copy .* over it"):
        check_loads(in_service.store, done.champion)


@pytest.mark.parametrize("outcome", ["refuse", "too_few"])
def test_only_a_passed_gate_promotes(in_service: Workshop, outcome: str) -> None:
    before = in_service.serving
    with pytest.raises(GateError, match=f"did not let support/evaluation .* pass: .*{outcome}"):
        in_service.promote(in_service.next(3, outcome=outcome))
    assert (in_service.serving, aliases()) == (before, IN_SERVICE)


def test_a_smoke_test_promotes_whatever_the_verdict_under_other_names(workshop: Workshop) -> None:
    done = workshop.promote(workshop.candidate(1, outcome="too_few"), smoke_test=True)
    assert [model.name for model in done.champion.registered] == [f"{name}-smoke-test" for name in NAMES]
    assert aliases() == {}
    assert not disagreements(workshop.store)


def test_a_candidate_that_was_compared_with_another_champion_is_refused(in_service: Workshop) -> None:
    before = in_service.serving
    with pytest.raises(GateError, match=r"changed since evaluation .*base models alone.*Materialize support"):
        in_service.promote(in_service.candidate(3))
    assert (in_service.serving, aliases()) == (before, IN_SERVICE)


@pytest.mark.parametrize(
    "part", ["embedder/model/model.safetensors", "reranker/serving.json", "evaluation/parity.json"]
)
def test_a_candidate_that_was_tampered_with_is_refused(in_service: Workshop, part: str) -> None:
    candidate, before = in_service.next(3), in_service.serving
    asset, _, name = part.partition("/")
    path = getattr(candidate, asset).path / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="was changed after support/"):
        in_service.promote(candidate)
    assert (in_service.serving, aliases()) == (before, IN_SERVICE)


def test_what_mlflow_gives_back_must_be_what_was_registered(
    in_service: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights change on their way to the registry."""
    before, upload = in_service.serving, mlflow.MlflowClient.log_model_artifacts

    def change_and_upload(self: mlflow.MlflowClient, model_id: str, local_dir: str) -> None:
        for weights in Path(local_dir).rglob("model.safetensors"):
            changed = {name: tensor * (1 + 1e-3) for name, tensor in load_file(weights).items()}
            save_file(changed, weights, metadata={"format": "pt"})
        upload(self, model_id, local_dir)

    monkeypatch.setattr(mlflow.MlflowClient, "log_model_artifacts", change_and_upload)
    with pytest.raises(ModelError, match=r"models:/support-embedder/4 is registered, but .* not those that were"):
        in_service.promote(in_service.next(4))
    assert (in_service.serving, aliases()) == (before, IN_SERVICE)


def test_without_mlflow_nothing_moves(in_service: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    before, candidate = in_service.serving, in_service.next(3)
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9") as told:
            in_service.promote(candidate)
        assert told.value.passing
        with pytest.raises(TrackingError):
            retire(in_service.store, reason="it is bad")
    assert (in_service.serving, aliases()) == (before, IN_SERVICE)


# ------------------------------------------------------------------------------------------ both or neither


def fail(*arguments: object, **more: object) -> None:
    raise OSError("the disk is full")


def fail_at_call(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """MLflow goes away when an alias is moved for the `number`-th time, and is back for the one after."""

    def inject(patch: pytest.MonkeyPatch) -> None:
        move, calls = mlflow.MlflowClient.set_registered_model_alias, 0

        def counted(*arguments: object) -> None:
            nonlocal calls
            calls += 1
            if calls == number:
                raise mlflow.MlflowException("the server went away")
            move(*arguments)

        patch.setattr(mlflow.MlflowClient, "set_registered_model_alias", counted)

    return inject


def fail_to_copy_evaluation(patch: pytest.MonkeyPatch) -> None:
    """Into the history; MLflow copies by the same function."""
    copy = shutil.copy2

    def copied(source: Path, target: Path, **more: bool) -> object:
        return fail() if champions.PROMOTIONS in Path(target).parts else copy(source, target, **more)

    patch.setattr(shutil, "copy2", copied)


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    **{f"alias {number}": fail_at_call(number) for number in (1, 2, 3, 4)},
    "entry": fail_to_copy_evaluation,
    "pointer": lambda patch: patch.setattr(champions.Path, "replace", fail),
}


@pytest.mark.parametrize("at", FAILURES)
def test_a_failure_on_the_way_moves_neither(in_service: Workshop, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    before, candidate = in_service.serving, in_service.next(3)
    with monkeypatch.context() as patch:
        FAILURES[at](patch)
        with pytest.raises((UserError, OSError), match=r"went away|disk is full"):
            in_service.promote(candidate)
    assert (in_service.serving, aliases()) == (before, IN_SERVICE)
    assert embedder_served(in_service) == past_models(in_service, 2)[0].version

    assert in_service.promote(candidate).new
    assert aliases() == {"champion": ("3", "3"), "previous": ("2", "2")}


def test_a_rollback_that_fails_on_the_way_moves_neither(in_service: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    before = in_service.serving
    with monkeypatch.context() as patch:
        patch.setattr(promotion, "record", fail)
        with pytest.raises(OSError, match="disk is full"):
            roll_back(in_service.store, reason="bad")
    assert (in_service.serving, aliases()) == (before, IN_SERVICE)


def test_a_promotion_that_is_killed_between_the_aliases_is_settled(in_service: Workshop) -> None:
    before, candidate = in_service.serving, in_service.next(3)
    versions = [(a.manifest.asset, a.version) for a in (candidate.embedder, candidate.reranker, candidate.evaluation)]
    program = f"""
import os, signal, mlflow
from pathlib import Path
from embed_pipeline.artifacts import PipelineStore
from embed_pipeline.tracking.registry import Candidate
from tests.tracking.candidates import Workshop

move, moved = mlflow.MlflowClient.set_registered_model_alias, []

def move_and_die(*arguments):
    move(*arguments)
    moved.append(arguments)
    if len(moved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

mlflow.MlflowClient.set_registered_model_alias = move_and_die
store = PipelineStore(Path({str(in_service.store.folder.parent)!r}), "support")
candidate = Candidate(*[store.get(*version) for version in {versions}])
Workshop(store, Path(), Path()).promote(candidate)
"""
    command, environment = [sys.executable, "-c", program], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert in_service.serving == before
    assert len(disagreements(in_service.store)) == 2

    told = settle(in_service.store)
    assert len(told) == 2
    assert any("the alias champion of support-embedder stands at version 3 in MLflow" in sentence for sentence in told)
    assert aliases() == IN_SERVICE
    assert settle(in_service.store) == []
    assert in_service.promote(candidate).new


# ---------------------------------------------------------------------------------------------- challenger


def test_neither_a_champion_nor_a_passed_candidate_is_a_challenger(in_service: Workshop) -> None:
    challenge(in_service.store, in_service.next(2, outcome="refuse"), in_service.tracked)
    challenge(in_service.store, in_service.next(4), in_service.tracked)
    assert aliases() == IN_SERVICE


def test_without_mlflow_a_challenger_costs_a_warning(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    challenge(workshop.store, workshop.candidate(1, outcome="refuse"), workshop.tracked)
    assert "is not marked as challenger" in caplog.text


# ------------------------------------------------------------------------------------------------ rollback


def test_a_rollback_goes_back_is_recorded_and_lasts(in_service: Workshop) -> None:
    second, _ = past_models(in_service, 2)
    entry = roll_back(in_service.store, reason="customers complain", by="kim@desk")
    assert (entry.event, entry.by, entry.reason) == ("rolled_back", "kim@desk", "customers complain")
    # What was taken down is nobody's `previous`.
    assert aliases() == {"champion": ("1", "1"), "challenger": ("3", "3")}
    assert embedder_served(in_service) == past_models(in_service, 1)[0].version
    client = mlflow.MlflowClient(tracking_uri())
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, "tags.`embed_pipeline.asset` = 'rollback'")
    assert run.data.params["reason"] == "customers complain"

    # Trained again, it is the same candidate: it passed the gate against the first, and yet does not come back.
    with pytest.raises(GateError, match=r"taken out of service at .* by kim@desk: customers complain.*rollback"):
        in_service.promote(in_service.next(2))
    with pytest.raises(GateError, match="nobody is left to go back to"):
        roll_back(in_service.store, reason="again")

    roll_back(in_service.store, to=second.version[:6], reason="the complaint was about something else")
    assert aliases() == {"champion": ("2", "2"), "challenger": ("3", "3")}
    assert not disagreements(in_service.store)


def test_two_rollbacks_go_back_two_steps(in_service: Workshop) -> None:
    in_service.promote(in_service.next(3))
    roll_back(in_service.store, reason="bad")
    assert aliases() == {"champion": ("2", "2"), "previous": ("1", "1")}
    roll_back(in_service.store, reason="bad as well")
    assert aliases() == {"champion": ("1", "1")}
    assert embedder_served(in_service) == past_models(in_service, 1)[0].version


def test_what_a_rollback_cannot_go_to(in_service: Workshop) -> None:
    embedder, _ = past_models(in_service, 2)
    for to, said in (
        ("9", "--to 9 is none that ever served"),
        ("2", "the champion of support is embedder .* already"),
        (embedder.version, "the champion of support is embedder .* already"),
    ):
        with pytest.raises(GateError, match=said):
            roll_back(in_service.store, to=to, reason="because")
    with pytest.raises(GateError, match="a reason is needed"):
        roll_back(in_service.store, to="1", reason=" ")
    assert len(read_history(in_service.store).promotions) == 2


def test_a_former_champion_whose_folder_is_gone_or_changed_does_not_come_back(in_service: Workshop) -> None:
    before, (embedder, reranker) = in_service.serving, past_models(in_service, 1)
    (reranker.path / "serving.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"not what was promoted.*serving\.json was changed"):
        roll_back(in_service.store, reason="bad")
    shutil.rmtree(embedder.path)
    with pytest.raises(ArtifactError, match="support/embedder has no version"):
        roll_back(in_service.store, reason="bad")
    assert (in_service.serving, aliases()) == (before, IN_SERVICE)


def test_a_retired_champion_leaves_nobody_and_does_not_come_back_by_itself(in_service: Workshop) -> None:
    assert retire(in_service.store, reason="withdrawn").champion is None
    assert aliases() == {"previous": ("1", "1"), "challenger": ("3", "3")}
    with pytest.raises(GateError, match="has no champion that could be retired"):
        retire(in_service.store, reason="withdrawn")
    with pytest.raises(GateError, match=r"taken out of service .*: withdrawn"):
        in_service.promote(in_service.next(2))
    roll_back(in_service.store, reason="better than nobody")
    assert aliases() == {"champion": ("1", "1"), "challenger": ("3", "3")}


def test_a_champion_that_mlflow_has_lost_is_registered_again(in_service: Workshop, empty_mlflow: Path) -> None:
    shutil.copy2(empty_mlflow, tracking_uri().removeprefix("sqlite:///"))
    lost = r"version 2 of support-embedder and .*does not hold all of it any more.*rollback support --to 2"
    with pytest.raises(TrackingError, match=lost):
        settle(in_service.store)
    roll_back(in_service.store, to="2", reason="the database was lost")
    assert aliases() == {"champion": ("1", "1")}  # the new database counts from 1, and knows no one before
    assert not disagreements(in_service.store)
