"""Merging with real models: what is measured, what goes on, and what is left in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embed_pipeline.errors import ModelError
from embed_pipeline.evaluation.guard_sets import GuardScore, GuardSet, Part, load_guard
from embed_pipeline.markdown import escaped
from embed_pipeline.merging.merge import Ancestry, merge
from embed_pipeline.merging.trade_off import MergingReport
from embed_pipeline.models.embedder import Embedder, load_sentence_transformer
from embed_pipeline.models.source import weights_digest
from embed_pipeline.settings import EncodingSettings, ForgettingSettings, GuardSettings
from embed_pipeline.training.dev_set import EmbedderDevSet
from tests.guard_files import small_pairs, write_pairs

ENCODING = EncodingSettings(query_prompt="ask: ")


@pytest.fixture(scope="module")
def models(tiny_bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ancestry:
    """The tiny BERT, and the same after a training that turned its weights into others."""
    model = load_sentence_transformer(tiny_bert_folder, ENCODING, device="cpu")
    torch.manual_seed(3)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.4 * torch.randn_like(weights)
    folder = tmp_path_factory.mktemp("fine_tuned") / "model"
    model.save_pretrained(str(folder), create_model_card=False)
    (folder / "README.md").write_text("---\ntags: [x]\n---\n\n# An embedder for retrieval\n")
    return Ancestry(tiny_bert_folder, ENCODING, folder)


@pytest.fixture(scope="module")
def dev() -> EmbedderDevSet:
    words = [f"thing{i}" for i in range(20)]
    return EmbedderDevSet(
        {f"q{i}": f"find {word}" for i, word in enumerate(words)},
        {f"p{i}": f"{word} is here" for i, word in enumerate(words)},
        {f"q{i}": {f"p{i}": 1.0} for i in range(20)},
    )


class Counting(GuardSet):
    """A real guard that remembers on which part it was measured."""

    def __init__(self, guard: GuardSet) -> None:
        self.guard, self.settings = guard, guard.settings
        self.parts: list[Part] = []

    def measure(self, embedder: Any, part: Part) -> GuardScore:
        self.parts.append(part)
        return self.guard.measure(embedder, part)


def guard_with(folder: Path, max_loss: float) -> Counting:
    write_pairs(folder / "pairs.parquet", small_pairs(120))
    settings = GuardSettings(name="alike", kind="scored", path="pairs.parquet", max_loss=max_loss)
    return Counting(load_guard(settings, folder, 1))


def run(
    models: Ancestry, dev: EmbedderDevSet | None, guard: GuardSet, out: Path, **settings: Any
) -> tuple[MergingReport, Path]:
    out.mkdir()
    told = ForgettingSettings(**{"coefficients": (0.5,), **settings})
    report = merge(models, dev, [guard], told, out, encode_precision="float32")
    assert MergingReport.model_validate_json((out / "merging.json").read_text()) == report
    assert (out / "weights.sha256").read_text().strip() == weights_digest(out / "model")
    card = (out / "model" / "README.md").read_text()
    assert card.startswith("---\ntags: [x]\n---\n\n# An embedder for retrieval\n")
    assert escaped(report.sentence) in card
    return report, out


def embeddings(folder: Path) -> np.ndarray:
    embedder = Embedder(folder, precision="float32", device="cpu")
    return np.concatenate([embedder.encode_queries(["find thing3"]), embedder.encode_passages(["thing3 is here"])])


def test_nothing_lost_the_very_files_go_on_and_nothing_is_swept(
    models: Ancestry, dev: EmbedderDevSet, tmp_path: Path
) -> None:
    guard = guard_with(tmp_path, max_loss=1.0)
    report, out = run(models, dev, guard, tmp_path / "out", merging="auto")
    assert report.outcome == "kept"
    assert guard.parts == ["choosing", "choosing"]
    assert {path.name for path in out.iterdir()} == {"model", "weights.sha256", "merging.json"}
    assert weights_digest(out / "model") == weights_digest(models.fine_tuned)
    own, theirs = out / "model" / "model.safetensors", models.fine_tuned / "model.safetensors"
    assert own.stat().st_ino == theirs.stat().st_ino  # no second copy of gigabytes
    assert "Merging" not in (models.fine_tuned / "README.md").read_text()


def test_offer_shows_the_trade_off_and_passes_the_fine_tuned_model_on(
    models: Ancestry, dev: EmbedderDevSet, tmp_path: Path
) -> None:
    guard = guard_with(tmp_path, max_loss=0.001)
    report, out = run(models, dev, guard, tmp_path / "out", coefficients=(0.9, 0.1))
    assert report.outcome == "offered"
    assert [one.coefficient for one in report.tried] == [0.0, 0.1, 0.9, 1.0]
    assert guard.parts == ["choosing"] * 4  # never the half that judges
    assert {path.name for path in out.iterdir()} == {"model", "weights.sha256", "merging.json", "trade_off.svg"}
    assert weights_digest(out / "model") == weights_digest(models.fine_tuned)


def test_auto_passes_a_model_between_the_two_on(models: Ancestry, dev: EmbedderDevSet, tmp_path: Path) -> None:
    report, out = run(models, dev, guard_with(tmp_path, max_loss=0.001), tmp_path / "out", merging="auto")
    assert (report.outcome, report.coefficient) == ("merged", 0.5)
    measured = report.tried[1]
    merged = Embedder(out / "model", precision="float32")
    assert merged.encoding.query_prompt == "ask: "
    assert dev.ndcg_at_10(merged).value == pytest.approx(measured.dev, abs=1e-9)
    for other in (models.base, models.fine_tuned):
        assert np.abs(embeddings(out / "model") - embeddings(other)).max() > 1e-3
    assert {path.name for path in out.iterdir()} == {"model", "weights.sha256", "merging.json", "trade_off.svg"}


def test_base_is_measured_with_the_pipelines_encoding(models: Ancestry, dev: EmbedderDevSet, tmp_path: Path) -> None:
    report, _ = run(models, dev, guard_with(tmp_path, max_loss=1.0), tmp_path / "out")
    expected = dev.ndcg_at_10(Embedder(models.base, ENCODING, precision="float32")).value
    assert report.tried[0].dev == pytest.approx(expected, abs=1e-9)
    assert (
        json.loads((models.base / "config_sentence_transformers.json").read_text())["prompts"].get("query") != "ask: "
    )


def test_without_dev_questions_merging_still_works(models: Ancestry, tmp_path: Path) -> None:
    report, _ = run(models, None, guard_with(tmp_path, max_loss=0.001), tmp_path / "out", merging="auto")
    assert (report.outcome, report.coefficient, report.dev_queries) == ("merged", 0.5, 0)


def test_a_model_of_another_form_is_refused(models: Ancestry, minilm_folder: Path, tmp_path: Path) -> None:
    other = Ancestry(minilm_folder, ENCODING, models.fine_tuned)
    with pytest.raises(ModelError, match="Only a model and what was fine-tuned from it can be merged"):
        run(other, None, guard_with(tmp_path, max_loss=0.001), tmp_path / "out", merging="auto")


def test_where_there_are_no_hard_links_the_files_are_copied(
    models: Ancestry, dev: EmbedderDevSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    _, out = run(models, dev, guard_with(tmp_path, max_loss=1.0), tmp_path / "out")
    assert weights_digest(out / "model") == weights_digest(models.fine_tuned)
    assert (out / "model" / "model.safetensors").stat().st_nlink == 1
