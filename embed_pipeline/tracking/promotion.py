"""Who becomes champion: the candidate that passed the gate, or, on a person's word, one that served before.

The pointer in the store is the truth. MLflow's aliases are moved first and the pointer last, by one rename; whatever
goes wrong on the way, the aliases are put back to what the pointer says. A process that is killed in between leaves
aliases that are ahead of the pointer, and the next promotion, rollback or `settle` puts them right.
"""

from __future__ import annotations

import getpass
import logging
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from embed_pipeline.artifacts import PipelineStore
from embed_pipeline.champions import (
    Champion,
    Event,
    History,
    Promotion,
    RegisteredModel,
    Waiting,
    changing,
    let_wait,
    models_of,
    pair_key,
    pointer,
    read_history,
    read_waiting,
    record,
)
from embed_pipeline.errors import ArtifactError, GateError, TrackingError
from embed_pipeline.evaluation.gate import GateReport
from embed_pipeline.evaluation.parity import read_parity
from embed_pipeline.model_files import SERVING_FILE
from embed_pipeline.settings import TrackingSettings
from embed_pipeline.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Aliases,
    Candidate,
    Registry,
    registered_name,
    trusts_code,
)
from embed_pipeline.tracking.runs import TrackedRun, tracked_run

logger = logging.getLogger(__name__)

Track = Callable[[], AbstractContextManager[TrackedRun]]
"""Opens the MLflow run in which models are registered, if any are."""


@dataclass(frozen=True)
class Promoted:
    """The promotion in force, and whether it is a new one: a candidate that serves already moves nothing."""

    promotion: Promotion
    champion: Champion
    new: bool


def promote(store: PipelineStore, candidate: Candidate, track: Track, *, by: str, smoke_test: bool = False) -> Promoted:
    """Register the models, check what the registry gives, then move aliases and pointer, both or neither.

    In a smoke test the gate's verdict does not count. Raises GateError when the candidate may not serve, ArtifactError
    when a file of it is not the one that was published, ModelError when what was registered is not what was evaluated,
    TrackingError when MLflow does not answer; nothing has moved then. In the last case the candidate waits, see
    `promote_waiting`.
    """
    with changing(store) as history:
        if _serves(history, candidate):
            candidate.verify()
            try:
                _settle(Registry(), store, history)
            except TrackingError as error:
                if not error.passing:
                    raise
                logger.warning("the champion serves, but MLflow was not asked where its aliases stand: %s", error)
            promotion = history.promotions[-1]
            assert promotion.champion is not None
            return Promoted(promotion, promotion.champion, new=False)
        gate = _verdict(store, candidate, history, smoke_test)
        candidate.verify()
        try:
            with track() as tracked:
                registry = Registry()
                names = _names(store, candidate, smoke_test)
                embedder, reranker = _registered(registry, store, candidate, names, tracked)
                champion = Champion(
                    embedder_asset=candidate.embedder.manifest.asset,
                    embedder=candidate.embedder.version,
                    reranker=candidate.reranker.version if candidate.reranker else None,
                    cleaned_pairs=candidate.evaluation.input("cleaned_pairs"),
                    evaluation=candidate.evaluation.version,
                    verdict=gate.sentence,
                    registered_embedder=embedder,
                    registered_reranker=reranker,
                )
                registry.check(embedder, reranker, read_parity(candidate.evaluation.path))
                promotion = _put_in_force(registry, store, history, "promoted", champion, by, gate.sentence, tracked)
        except TrackingError as error:
            waiting = _waiting(candidate, by, smoke_test, read_waiting(store), error)
            let_wait(store, waiting)
            raise TrackingError(f"{store.pipeline}: {waiting.sentence(store.pipeline)}", passing=True) from error
        return Promoted(promotion, champion, new=True)


def promote_waiting(store: PipelineStore, track: Track) -> Promoted | None:
    """Promote the candidate that waits for MLflow; None where nobody waits. Raises the errors of `promote`.

    One that may not serve any more, because another champion came or a file was changed, waits no longer.
    """
    waiting = read_waiting(store)
    if waiting is None:
        return None
    try:
        reranker = store.get("reranker", waiting.reranker) if waiting.reranker else None
        embedder = store.get(waiting.embedder_asset, waiting.embedder)
        candidate = Candidate(embedder, reranker, store.get("evaluation", waiting.evaluation))
        return promote(store, candidate, track, by=waiting.by, smoke_test=waiting.smoke_test)
    except (ArtifactError, GateError):
        with changing(store):
            let_wait(store, None)
        raise


def challenge(store: PipelineStore, candidate: Candidate, track: Track) -> None:
    """Mark a candidate that did not pass with the alias `challenger`; an MLflow that does not answer is a warning."""
    if GateReport.model_validate(candidate.evaluation.report["gate"]).passed:
        return
    try:
        with changing(store) as history:
            if _serves(history, candidate):
                return
            registry, names = Registry(), _names(store, candidate, smoke_test=False)
            found = [registry.find(name, model) for (_, model), name in zip(candidate.models, names, strict=True)]
            # An MLflow run is opened only where there is something to register.
            with track() if None in found else nullcontext() as tracked:
                models = _registered(registry, store, candidate, names, tracked)
                registry.move({(model.name, CHALLENGER): model.version for model in models if model is not None})
    except TrackingError as error:
        logger.warning("the candidate is not marked as challenger: %s", error)


def roll_back(store: PipelineStore, *, to: str | None = None, reason: str, by: str | None = None) -> Promotion:
    """Bring back a champion of before: the one that served last, or the one that `to` names.

    `to` is the number of a promotion, or the beginning of a version of the embedder, reranker or evaluation. What comes
    back is checked like a candidate, but not judged again: a person has judged. Raises GateError when nothing or more
    than one champion fits, and the errors of `promote`; nothing has moved then.
    """
    _check_reason(reason)
    with changing(store) as history, _tracked(store, "rollback") as tracked:
        registry = Registry()
        target = _served_before(store, history, to, registry)
        candidate = _candidate_of(store, target)
        names = [model.name for model in target.registered]
        embedder, reranker = _registered(registry, store, candidate, names, tracked)
        registry.check(embedder, reranker, read_parity(candidate.evaluation.path))
        champion = target.model_copy(update={"registered_embedder": embedder, "registered_reranker": reranker})
        return _put_in_force(registry, store, history, "rolled_back", champion, by or person(), reason, tracked)


def retire(store: PipelineStore, *, reason: str, by: str | None = None) -> Promotion:
    """Take the champion out of service without another in its place. Raises GateError when there is none."""
    _check_reason(reason)
    with changing(store) as history, _tracked(store, "retirement") as tracked:
        if history.champion is None:
            raise GateError(f"{store.pipeline} has no champion that could be retired")
        return _put_in_force(Registry(), store, history, "retired", None, by or person(), reason, tracked)


def settle(store: PipelineStore) -> list[str]:
    """Make MLflow's aliases stand where the pointer says; returns a sentence for each that did not."""
    with changing(store) as history:
        return _settle(Registry(), store, history)


def disagreements(store: PipelineStore) -> list[str]:
    """A sentence for each alias of MLflow that does not stand where the pointer says."""
    _, told = _differences(Registry(), read_history(store))
    return told


def check_loads(store: PipelineStore, champion: Champion) -> float:
    """Load the champion from the registry and by path, compare with what was evaluated: the largest difference.

    Raises ArtifactError, ModelError or TrackingError when it is not what the gate judged.
    """
    from embed_pipeline.models.embedder import load_sentence_transformer
    from embed_pipeline.models.reranker import Reranker

    candidate = _candidate_of(store, champion)
    check_copies(store, candidate)
    parity = read_parity(candidate.evaluation.path)
    differences = [Registry().check(champion.registered_embedder, champion.registered_reranker, parity)]
    for kind, artifact in candidate.models:
        folder, trusted = pointer(store) / kind, trusts_code(store, artifact)
        if kind == "embedder":
            model = load_sentence_transformer(folder, trust_remote_code=trusted)
            differences.append(parity.check_embedder(model, str(folder)))
        else:
            by_path = Reranker(folder, precision="float32", trust_remote_code=trusted, batch_size=1)
            score = partial(by_path.score, progress=False)
            differences.append(parity.check_reranker(score, str(folder)))
    return max(differences)


def check_copies(store: PipelineStore, candidate: Candidate) -> None:
    """Raises ArtifactError where a file beside the champion's links is not what its reranker was published with."""
    if candidate.reranker is None:
        return
    served, published = pointer(store) / SERVING_FILE, candidate.reranker.path / SERVING_FILE
    if not served.is_file() or served.read_bytes() != published.read_bytes():
        raise ArtifactError(
            f"{served} is not the one that {store.pipeline}/reranker {candidate.reranker.version} was published with: "
            f"the final score would be blended by another weight. Copy {published} over it"
        )


def person() -> str:
    """Who runs this process, and where."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"user {os.getuid()}"
    return f"{user}@{platform.node()}"


# ------------------------------------------------------------------------------------------------- checks


def _waiting(candidate: Candidate, by: str, smoke_test: bool, before: Waiting | None, error: TrackingError) -> Waiting:
    """A candidate that waits already waits since then."""
    embedder, reranker = candidate.embedder, candidate.reranker
    waiting = Waiting(
        embedder_asset=embedder.manifest.asset,
        embedder=embedder.version,
        reranker=reranker.version if reranker else None,
        evaluation=candidate.evaluation.version,
        smoke_test=smoke_test,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        by=by,
        because=str(error).partition("\n")[0][:500],
    )
    same = before is not None and before.evaluation == waiting.evaluation
    return waiting.model_copy(update={"since": before.since}) if same and before else waiting


def _serves(history: History, candidate: Candidate) -> bool:
    return history.champion is not None and history.champion.key == pair_key(candidate.embedder, candidate.reranker)


def _verdict(store: PipelineStore, candidate: Candidate, history: History, smoke_test: bool) -> GateReport:
    """The gate's verdict, where it lets the candidate pass and the champion in force was compared with."""
    name, evaluation = store.pipeline, candidate.evaluation
    gate = GateReport.model_validate(evaluation.report["gate"])
    if not (gate.passed or smoke_test):
        raise GateError(f"the gate did not let {name}/evaluation {evaluation.version} pass: {gate.sentence}")
    in_force = history.champion.key if history.champion else None
    if evaluation.report["reference"] != in_force:
        raise GateError(
            f"the champion of {name} changed since evaluation {evaluation.version}: the candidate was compared with "
            f"{evaluation.report['reference'] or 'the base models alone'}, and {in_force or 'nobody'} serves now. "
            f"Materialize {name}/evaluation again"
        )
    ended = history.taken_down(pair_key(candidate.embedder, candidate.reranker))
    if ended is not None:
        raise GateError(
            f"what the gate let pass ({candidate.title}) was taken out of service at {ended.at} by {ended.by}: "
            f"{ended.reason}. It does not come back by itself; a person brings it back with `embed-pipeline rollback "
            f"{name} --to {candidate.models[-1][1].version} --reason ...`"
        )
    return gate


def _served_before(store: PipelineStore, history: History, to: str | None, registry: Registry) -> Champion:
    name = store.pipeline
    if to is None:
        if history.previous is None:
            raise GateError(
                f"nobody is left to go back to: no other champion of {name} served before, or all were taken out of "
                f"service. `embed-pipeline history {name}` lists them; name one with --to"
            )
        return history.previous
    found: dict[str, Champion] = {}
    for promotion in history.promotions:
        champion = promotion.champion
        if champion is None:
            continue
        versions = [version for _, version in champion.versions]
        if to == str(promotion.number) or (len(to) >= 4 and any(version.startswith(to) for version in versions)):
            found[champion.key] = champion
    if len(found) != 1:
        told = f"fits {len(found)} champions: give the number of a promotion" if found else "is none that ever served"
        raise GateError(f"--to {to} {told}. `embed-pipeline history {name}` lists those of {name}")
    (target,) = found.values()
    serves = history.champion is not None and history.champion.key == target.key
    if serves and registry.holds(target):
        raise GateError(f"the champion of {name} is {target.title} already")
    return target


def _candidate_of(store: PipelineStore, champion: Champion) -> Candidate:
    """A champion's models and the evaluation that promoted it, file by file as they were published."""
    try:
        embedder, *rerankers = models_of(store, champion)
        reranker = rerankers[0] if rerankers else None
        candidate = Candidate(embedder, reranker, store.get("evaluation", champion.evaluation))
        candidate.verify()
    except ArtifactError as error:
        raise ArtifactError(f"{champion.title} of {store.pipeline}: not what was promoted: {error}") from error
    return candidate


def _check_reason(reason: str) -> None:
    if not reason.strip():
        raise GateError("a reason is needed: the history keeps it for whoever asks later")


# ------------------------------------------------------------------------------------------- registration


def _names(store: PipelineStore, candidate: Candidate, smoke_test: bool) -> list[str]:
    return [registered_name(store.pipeline, kind, smoke_test=smoke_test) for kind, _ in candidate.models]


def _registered(
    registry: Registry, store: PipelineStore, candidate: Candidate, names: Sequence[str], tracked: TrackedRun | None
) -> tuple[RegisteredModel, RegisteredModel | None]:
    """The models' versions in the registry, registered in the run `tracked` where they are not yet."""
    models = []
    for (kind, model), name in zip(candidate.models, names, strict=True):
        found = registry.find(name, model)
        if found is None:
            assert tracked is not None, "something is to be registered, and no run was opened for it"
            found = registry.register(store, candidate, kind, name, tracked)
        models.append(found)
    return models[0], models[1] if len(models) > 1 else None


def _tracked(store: PipelineStore, name: str) -> AbstractContextManager[TrackedRun]:
    """A run in MLflow that tells of what a person asked for."""
    return tracked_run(TrackingSettings(), store, name, None)


# -------------------------------------------------------------------------------------- aliases and pointer


def _put_in_force(
    registry: Registry,
    store: PipelineStore,
    history: History,
    event: Event,
    champion: Champion | None,
    by: str,
    reason: str,
    tracked: TrackedRun,
) -> Promotion:
    """Aliases, then the pointer: both, or the aliases are put back."""
    planned = Promotion(
        number=len(history.promotions) + 1,
        event=event,
        at="",
        by=by,
        reason=reason,
        champion=champion,
        replaced=history.champion,
    )
    try:
        registry.move(_aliases(registry, History(promotions=(*history.promotions, planned))))
        promotion = record(store, history, event, champion, by=by, reason=reason)
    except BaseException:
        _settle_or_warn(registry, store)
        raise
    _settle_or_warn(registry, store)  # the champion is no challenger any more
    tracked.log_parameters(promotion.model_dump(mode="json"))
    return promotion


def _aliases(registry: Registry, history: History) -> Aliases:
    """Where `champion` and `previous` have to stand; a former champion that MLflow has lost is `previous` no more."""
    served = [champion for entry in history.promotions for champion in (entry.champion, entry.replaced) if champion]
    wanted: dict[tuple[str, str], str | None] = {
        (model.name, alias): None
        for champion in served
        for model in champion.registered
        for alias in (CHAMPION, PREVIOUS)
    }
    for model in history.champion.registered if history.champion else ():
        wanted[model.name, CHAMPION] = model.version
    for model in history.previous.registered if history.previous and registry.holds(history.previous) else ():
        wanted[model.name, PREVIOUS] = model.version
    return wanted


def _differences(registry: Registry, history: History) -> tuple[Aliases, list[str]]:
    """The aliases that have to move, and a sentence for each."""
    wanted = dict(_aliases(registry, history))
    now = registry.aliases(sorted({name for name, _ in wanted}))
    for (name, alias), version in now.items():
        if alias == CHALLENGER and version is not None and version == wanted[name, CHAMPION]:
            wanted[name, CHALLENGER] = None
    moves = {key: version for key, version in wanted.items() if now[key] != version}
    told = [
        f"the alias {alias} of {name} stands at {_at(now[name, alias])} in MLflow, and has to stand at {_at(version)}"
        for (name, alias), version in moves.items()
    ]
    return moves, told


def _settle(registry: Registry, store: PipelineStore, history: History) -> list[str]:
    if history.champion is not None and not registry.holds(history.champion):
        versions = " and ".join(f"version {model.version} of {model.name}" for model in history.champion.registered)
        raise TrackingError(
            f"the champion is {versions}, but MLflow does not hold all of it any more. Register it again from the "
            f"store: `embed-pipeline rollback {store.pipeline} --to {history.promotions[-1].number} --reason ...`"
        )
    moves, told = _differences(registry, history)
    registry.move(moves)
    return told


def _settle_or_warn(registry: Registry, store: PipelineStore) -> None:
    try:
        _settle(registry, store, read_history(store))
    except TrackingError as error:
        logger.warning(
            "MLflow's aliases may not say what the store says (%s): the next promotion, or "
            "`embed-pipeline champion %s --settle`, puts them right",
            error,
            store.pipeline,
        )


def _at(version: str | None) -> str:
    return "no version" if version is None else f"version {version}"
