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
from embed_pipeline.champions import pointer, read_history
from embed_pipeline.errors import ArtifactError, GateError, ModelError, TrackingError, UserError
from embed_pipeline.evaluation.parity import read_parity
from embed_pipeline.tracking import promotion
from embed_pipeline.tracking.promotion import challenge, check_loads, disagreements, retire, roll_back, settle
from embed_pipeline.tracking.registry import Candidate, Registry
from embed_pipeline.tracking.runs import tracking_uri
from tests.tracking.candidates import Workshop

NAMES = ("support-embedder", "support-reranker")
REPOSITORY = Path(__file__).resolve().parents[2]


def aliases() -> dict[str, tuple[str | None, str | None]]:
    """alias -> versions of the embedder and of the reranker, without the aliases that stand nowhere."""
    found = Registry().aliases(NAMES)
    both = {alias: (found[NAMES[0], alias], found[NAMES[1], alias]) for _, alias in found}
    return {alias: versions for alias, versions in both.items() if versions != (None, None)}


def serving(workshop: Workshop) -> str | None:
    champion = read_history(workshop.store).champion
    return champion.key if champion else None


def next_candidate(workshop: Workshop, seed: int, **more: str) -> Candidate:
    """One that was compared with who serves now."""
    return workshop.candidate(seed, reference=serving(workshop), **more)


def promoted(workshop: Workshop, seed: int) -> Candidate:
    candidate = next_candidate(workshop, seed)
    workshop.promote(candidate)
    return candidate


# ---------------------------------------------------------------------------------------------- promotion


def test_one_champion_after_the_other(workshop: Workshop) -> None:
    first = promoted(workshop, 1)
    assert aliases() == {"champion": ("1", "1")}
    assert (pointer(workshop.store) / "embedder").resolve() == first.embedder.path / "model"

    second = workshop.promote(next_candidate(workshop, 2))
    assert second.new
    assert second.champion.verdict == "nDCG@10 0.412 → 0.471: promote"
    assert aliases() == {"champion": ("2", "2"), "previous": ("1", "1")}
    assert second.promotion.replaced is not None
    assert second.promotion.replaced.embedder == first.embedder.version
    assert (pointer(workshop.store) / "reranker").resolve().parent.name == second.champion.reranker
    assert check_loads(workshop.store, second.champion) < 1e-6


def test_a_champion_that_is_promoted_again_moves_and_registers_nothing(workshop: Workshop) -> None:
    candidate = promoted(workshop, 1)
    again = workshop.promote(candidate)
    assert not again.new
    assert len(read_history(workshop.store).promotions) == 1
    assert aliases() == {"champion": ("1", "1")}
    assert len(mlflow.MlflowClient(tracking_uri()).search_model_versions("name = 'support-embedder'")) == 1


def test_each_line_loads_it_where_this_package_is_not_installed(workshop: Workshop, tmp_path: Path) -> None:
    candidate = promoted(workshop, 1)
    parity = read_parity(candidate.evaluation.path)
    asked = {"queries": parity.queries, "passages": parity.passages}
    program = f"""
import json, sys
sys.modules["embed_pipeline"] = None
import mlflow, pandas
from sentence_transformers import CrossEncoder, SentenceTransformer
queries, passages = json.loads({json.dumps(asked)!r}).values()
pairs = list(zip(queries, passages))
embedder = mlflow.sentence_transformers.load_model("models:/support-embedder@champion")
reranker = mlflow.pyfunc.load_model("models:/support-reranker@champion")
served = mlflow.pyfunc.load_model("models:/support-embedder@champion")
by_path = SentenceTransformer("{pointer(workshop.store)}/embedder")
cross_encoder = CrossEncoder("{pointer(workshop.store)}/reranker")
as_passages = {{"task": "document", "prompt_name": "document"}}
print(json.dumps({{
    "queries": [e.tolist() for e in
        (embedder.encode_query(queries), by_path.encode_query(queries), served.predict(queries))],
    "passages": [e.tolist() for e in
        (embedder.encode_document(passages), by_path.encode_document(passages),
         served.predict(passages, params=as_passages))],
    "scores": [s.tolist() for s in
        (reranker.predict(pandas.DataFrame(pairs, columns=["query", "passage"])), cross_encoder.predict(pairs))],
}}))
"""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri()}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    given = json.loads(done.stdout.splitlines()[-1])
    for found in given["queries"]:
        assert found == [pytest.approx(row, abs=1e-5) for row in parity.query_embeddings]
    for found in given["passages"]:
        assert found == [pytest.approx(row, abs=1e-5) for row in parity.passage_embeddings]
    for found in given["scores"]:
        assert found == pytest.approx(parity.scores, abs=1e-5)


@pytest.mark.parametrize("outcome", ["refuse", "too_few"])
def test_only_a_passed_gate_promotes(workshop: Workshop, outcome: str) -> None:
    with pytest.raises(GateError, match=f"did not let support/evaluation .* pass: .*{outcome}"):
        workshop.promote(workshop.candidate(1, outcome=outcome))
    assert (serving(workshop), aliases()) == (None, {})


def test_a_smoke_test_promotes_whatever_the_verdict_under_other_names(workshop: Workshop) -> None:
    done = workshop.promote(workshop.candidate(1, outcome="too_few"), smoke_test=True)
    assert [model.name for model in done.champion.registered] == [f"{name}-smoke-test" for name in NAMES]
    assert aliases() == {}
    assert not disagreements(workshop.store)


def test_a_candidate_that_was_compared_with_another_champion_is_refused(workshop: Workshop) -> None:
    late = workshop.candidate(2)  # compared with the base models alone
    first = promoted(workshop, 1)
    with pytest.raises(GateError, match=r"changed since evaluation .*base models alone.*Materialize support"):
        workshop.promote(late)
    assert (pointer(workshop.store) / "embedder").resolve().parent == first.embedder.path


@pytest.mark.parametrize(
    "part", ["embedder/model/model.safetensors", "reranker/serving.json", "evaluation/parity.json"]
)
def test_a_candidate_that_was_tampered_with_is_refused(workshop: Workshop, part: str) -> None:
    candidate = workshop.candidate(1)
    asset, _, name = part.partition("/")
    path = getattr(candidate, asset).path / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="was changed after support/"):
        workshop.promote(candidate)
    assert (serving(workshop), aliases()) == (None, {})


def test_what_mlflow_gives_back_must_be_what_was_evaluated(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights change on their way to the registry."""
    promoted(workshop, 1)
    before = (serving(workshop), aliases())
    upload = mlflow.MlflowClient.log_model_artifacts

    def change_and_upload(self: mlflow.MlflowClient, model_id: str, local_dir: str) -> None:
        for weights in Path(local_dir).rglob("model.safetensors"):
            changed = {name: tensor * (1 + 1e-3) for name, tensor in load_file(weights).items()}
            save_file(changed, weights, metadata={"format": "pt"})
        upload(self, model_id, local_dir)

    monkeypatch.setattr(mlflow.MlflowClient, "log_model_artifacts", change_and_upload)
    with pytest.raises(ModelError, match="differs by"):
        workshop.promote(next_candidate(workshop, 2))
    assert (serving(workshop), aliases()) == before


def test_without_mlflow_nothing_moves(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    promoted(workshop, 1)
    before = serving(workshop)
    candidate = next_candidate(workshop, 2)
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9") as told:
            workshop.promote(candidate)
        assert told.value.passing
        with pytest.raises(TrackingError):
            retire(workshop.store, reason="it is bad")
    assert serving(workshop) == before
    assert aliases() == {"champion": ("1", "1")}


# ------------------------------------------------------------------------------------------ both or neither


def fail(*arguments: object, **more: object) -> None:
    raise OSError("the disk is full")


def fail_at_call(number: int, method: str) -> Callable[[pytest.MonkeyPatch], None]:
    def inject(patch: pytest.MonkeyPatch) -> None:
        original, calls = getattr(mlflow.MlflowClient, method), 0

        def counted(*arguments: object) -> None:
            nonlocal calls
            calls += 1
            if calls == number:
                raise mlflow.MlflowException("the server went away")
            original(*arguments)

        patch.setattr(mlflow.MlflowClient, method, counted)

    return inject


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    **{f"alias {n}": fail_at_call(n, "set_registered_model_alias") for n in (1, 2, 3, 4)},
    "entry": lambda patch: patch.setattr(promotion, "record", fail),
    "pointer": lambda patch: patch.setattr(champions.Path, "replace", fail),
}


@pytest.mark.parametrize("at", FAILURES)
def test_a_failure_on_the_way_moves_neither(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    promoted(workshop, 1)
    before = (serving(workshop), aliases())
    candidate = next_candidate(workshop, 2)
    with monkeypatch.context() as patch:
        FAILURES[at](patch)
        with pytest.raises((UserError, OSError), match=r"went away|disk is full"):
            workshop.promote(candidate)
    assert (serving(workshop), aliases()) == before

    assert workshop.promote(candidate).new
    assert aliases() == {"champion": ("2", "2"), "previous": ("1", "1")}


def test_a_promotion_that_is_killed_between_the_aliases_is_settled(workshop: Workshop) -> None:
    promoted(workshop, 1)
    before = serving(workshop)
    candidate = next_candidate(workshop, 2)
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
store = PipelineStore(Path({str(workshop.store.folder.parent)!r}), "support")
models = [store.get(*version) for version in {versions}]
Workshop(store, Path(), Path()).promote(Candidate(*models))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert serving(workshop) == before
    assert len(disagreements(workshop.store)) == 2

    told = settle(workshop.store)
    assert len(told) == 2
    assert any("the alias champion of support-embedder stands at version 2 in MLflow" in sentence for sentence in told)
    assert aliases() == {"champion": ("1", "1")}
    assert settle(workshop.store) == []

    assert workshop.promote(candidate).new
    assert aliases() == {"champion": ("2", "2"), "previous": ("1", "1")}


# ---------------------------------------------------------------------------------------------- challenger


def test_a_candidate_that_did_not_pass_is_marked_and_loses_the_mark_when_it_is_promoted(workshop: Workshop) -> None:
    promoted(workshop, 1)
    refused = next_candidate(workshop, 2, outcome="refuse")
    challenge(workshop.store, refused, workshop.tracked)
    challenge(workshop.store, refused, workshop.tracked)
    assert aliases() == {"champion": ("1", "1"), "challenger": ("2", "2")}

    workshop.promote(next_candidate(workshop, 2))  # the same models, judged again by an easier gate
    assert aliases() == {"champion": ("2", "2"), "previous": ("1", "1")}


def test_neither_a_champion_nor_a_passed_candidate_is_a_challenger(workshop: Workshop) -> None:
    promoted(workshop, 1)
    challenge(workshop.store, next_candidate(workshop, 1, outcome="refuse"), workshop.tracked)
    challenge(workshop.store, next_candidate(workshop, 2), workshop.tracked)
    assert aliases() == {"champion": ("1", "1")}


def test_without_mlflow_a_challenger_costs_a_warning(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    challenge(workshop.store, workshop.candidate(1, outcome="refuse"), workshop.tracked)
    assert "is not marked as challenger" in caplog.text


# ------------------------------------------------------------------------------------------------ rollback


def test_a_rollback_goes_back_is_recorded_and_lasts(workshop: Workshop) -> None:
    first, second = promoted(workshop, 1), promoted(workshop, 2)
    entry = roll_back(workshop.store, reason="customers complain", by="kim@desk")
    assert (entry.event, entry.by, entry.reason) == ("rolled_back", "kim@desk", "customers complain")
    assert aliases() == {"champion": ("1", "1")}  # what was taken down is nobody's `previous`
    assert (pointer(workshop.store) / "embedder").resolve().parent == first.embedder.path
    (run,) = mlflow.MlflowClient(tracking_uri()).search_runs(
        [e.experiment_id for e in mlflow.MlflowClient(tracking_uri()).search_experiments()],
        "tags.`embed_pipeline.asset` = 'rollback'",
    )
    assert run.data.params["reason"] == "customers complain"

    # Trained again, it is the same candidate: it passed the gate against the first, and yet does not come back.
    with pytest.raises(GateError, match=r"taken out of service at .* by kim@desk: customers complain.*rollback"):
        workshop.promote(next_candidate(workshop, 2))
    with pytest.raises(GateError, match="nobody is left to go back to"):
        roll_back(workshop.store, reason="again")

    roll_back(workshop.store, to=second.reranker.version[:6], reason="the complaint was about something else")
    assert aliases() == {"champion": ("2", "2")}
    assert not disagreements(workshop.store)


def test_two_rollbacks_go_back_two_steps(workshop: Workshop) -> None:
    first = promoted(workshop, 1)
    for seed in (2, 3):
        promoted(workshop, seed)
    roll_back(workshop.store, reason="bad")
    assert aliases() == {"champion": ("2", "2"), "previous": ("1", "1")}
    roll_back(workshop.store, reason="bad as well")
    assert (pointer(workshop.store) / "embedder").resolve().parent == first.embedder.path
    # A new candidate has to beat who serves now.
    promoted(workshop, 4)
    assert aliases() == {"champion": ("4", "4"), "previous": ("1", "1")}


def test_what_a_rollback_cannot_go_to(workshop: Workshop) -> None:
    candidate = promoted(workshop, 1)
    for to, said in (
        (None, "nobody is left to go back to"),
        ("9", "--to 9 is none that ever served"),
        ("1", "are the champion of support already"),
        (candidate.embedder.version, "are the champion of support already"),
    ):
        with pytest.raises(GateError, match=said):
            roll_back(workshop.store, to=to, reason="because")
    with pytest.raises(GateError, match="a reason is needed"):
        roll_back(workshop.store, to="1", reason=" ")
    assert len(read_history(workshop.store).promotions) == 1


def test_a_former_champion_whose_folder_is_gone_or_changed_does_not_come_back(workshop: Workshop) -> None:
    first, _ = promoted(workshop, 1), promoted(workshop, 2)
    before = (serving(workshop), aliases())
    (first.reranker.path / "serving.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"not what they were when they were promoted.*serving\.json was changed"):
        roll_back(workshop.store, reason="bad")
    shutil.rmtree(first.embedder.path)
    with pytest.raises(ArtifactError, match="support/embedder has no version"):
        roll_back(workshop.store, reason="bad")
    assert (serving(workshop), aliases()) == before


def test_a_rollback_that_fails_on_the_way_moves_neither(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    promoted(workshop, 1)
    promoted(workshop, 2)
    before = (serving(workshop), aliases())
    with monkeypatch.context() as patch:
        patch.setattr(promotion, "record", fail)
        with pytest.raises(OSError, match="disk is full"):
            roll_back(workshop.store, reason="bad")
    assert (serving(workshop), aliases()) == before


def test_a_retired_champion_leaves_nobody_and_does_not_come_back_by_itself(workshop: Workshop) -> None:
    promoted(workshop, 1)
    promoted(workshop, 2)
    assert retire(workshop.store, reason="withdrawn").champion is None
    assert aliases() == {"previous": ("1", "1")}
    with pytest.raises(GateError, match="has no champion that could be retired"):
        retire(workshop.store, reason="withdrawn")
    with pytest.raises(GateError, match=r"taken out of service .*: withdrawn"):
        workshop.promote(next_candidate(workshop, 2))
    roll_back(workshop.store, reason="better than nobody")
    assert aliases() == {"champion": ("1", "1")}


def test_a_champion_that_mlflow_has_lost_is_registered_again(workshop: Workshop, empty_mlflow: Path) -> None:
    promoted(workshop, 1)
    promoted(workshop, 2)
    shutil.copy2(empty_mlflow, tracking_uri().removeprefix("sqlite:///"))
    with pytest.raises(
        TrackingError, match=r"version 2 of support-embedder and .*not hold both any more.*rollback support --to 2"
    ):
        settle(workshop.store)
    roll_back(workshop.store, to="2", reason="the database was lost")
    assert aliases() == {"champion": ("1", "1")}
    assert not disagreements(workshop.store)
