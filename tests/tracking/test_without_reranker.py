"""An embedder that serves by itself, before and after a pair that does."""

from __future__ import annotations

from click.testing import CliRunner

from embed_pipeline.champions import pointer, read_history
from embed_pipeline.command_line import main
from embed_pipeline.evaluation.parity import read_parity
from embed_pipeline.tracking.promotion import challenge, check_loads, disagreements, roll_back
from embed_pipeline.tracking.registry import Registry
from tests.tracking.candidates import Workshop

NAMES = ("support-embedder", "support-reranker")


def standing(alias: str) -> tuple[str | None, ...]:
    found = Registry().aliases(NAMES)
    return tuple(found[name, alias] for name in NAMES)


def run(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_an_embedder_alone_is_registered_loaded_and_shown(workshop: Workshop) -> None:
    candidate = workshop.candidate(1, alone=True)
    assert read_parity(candidate.evaluation.path).scores == []
    promoted = workshop.promote(candidate)
    assert (promoted.champion.reranker, promoted.champion.registered_reranker) == (None, None)
    assert promoted.champion.key == candidate.embedder.version
    assert sorted(path.name for path in pointer(workshop.store).iterdir()) == ["embedder", "promotion.json"]
    assert standing("champion") == ("1", None)
    assert check_loads(workshop.store, promoted.champion) < 1e-5
    assert not workshop.promote(candidate).new

    told = run("champion", "support", "--verify")
    assert candidate.embedder.version in told
    assert "reranker" not in told.lower().replace("crossencoder", "reranker")
    assert "0.500" in run("history", "support")

    challenge(workshop.store, workshop.next(2, outcome="refuse", alone=True), workshop.tracked)
    assert standing("challenger") == ("2", None)
    workshop.promote(workshop.next(2, alone=True))
    assert standing("previous") == ("1", None)
    assert candidate.embedder.version in run("rollback", "support", "--reason", "complaints")
    assert standing("champion") == ("1", None)


def test_a_pair_gives_way_to_an_embedder_and_comes_back(in_service: Workshop) -> None:
    pair = read_history(in_service.store).champion
    assert pair is not None
    in_service.promote(in_service.next(4, alone=True))
    assert standing("champion") == ("4", None)
    assert standing("previous") == ("2", "2")
    assert not (pointer(in_service.store) / "reranker").exists()
    assert disagreements(in_service.store) == []
    kept = run("prune", "support")
    assert not any(version in kept for _, version in pair.versions)

    back = roll_back(in_service.store, reason="the ranking got worse")
    assert back.champion is not None
    assert back.champion.key == pair.key
    assert standing("champion") == ("2", "2")
    assert (pointer(in_service.store) / "reranker").exists()
    assert check_loads(in_service.store, back.champion) < 1e-5


def test_an_embedder_gets_a_reranker(workshop: Workshop) -> None:
    workshop.promote(workshop.candidate(1, alone=True))
    workshop.promote(workshop.next(2))
    assert standing("champion") == ("2", "1")
    assert standing("previous") == ("1", None)
