"""Pushing the champion by the real client to a Hub on this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sentence_transformers import CrossEncoder, SentenceTransformer

from embed_pipeline.champions import read_history
from embed_pipeline.command_line import main
from embed_pipeline.errors import ArtifactError, HubError
from embed_pipeline.model_files import MODEL_FOLDER
from embed_pipeline.publishing.pushing import PushReport
from embed_pipeline.stages import Pipeline, make_hub
from embed_pipeline.tracking.promotion import retire, roll_back
from tests.publishing.local_hub import LocalHub
from tests.tracking.candidates import Workshop

EMBEDDER, RERANKER = "your-company/support-embedder", "your-company/support-reranker"


def test_the_champion_arrives_byte_for_byte_and_loads(in_force: Pipeline, hub: LocalHub) -> None:
    pushed = PushReport.model_validate(make_hub(in_force).artifact.report).pushed

    champion = read_history(in_force.store).champion
    assert champion is not None
    models = {EMBEDDER: in_force.store.get("embedder", champion.embedder)}
    models[RERANKER] = in_force.store.get("reranker", str(champion.reranker))
    for repository, model in models.items():
        arrived = hub.files(repository)
        own = {p.relative_to(model.path / MODEL_FOLDER).as_posix(): p for p in (model.path / MODEL_FOLDER).rglob("*")}
        files = {name: path for name, path in own.items() if path.is_file() and name != "README.md"}
        assert {name: path.read_bytes() for name, path in files.items()} == {
            name: arrived[name].read_bytes() for name in files
        }
        assert hub.private[repository]
        assert len(hub.commits[repository]) == 1
        assert champion.verdict in hub.commits[repository][0]
    assert len(hub.offered) == 2, "the weights go as large files"
    assert hub.tags[EMBEDDER] == {f"support-{champion.embedder}": pushed["embedder"].commit}
    assert pushed["reranker"].url == f"{hub.address}/{RERANKER}/tree/{hub.head(RERANKER)}"
    card = hub.files(EMBEDDER)["README.md"].read_text()
    assert f"SentenceTransformer('{EMBEDDER}')" in card
    assert "embedder_weight" in hub.files(RERANKER)["serving.json"].read_text()

    texts = ["where is the river of the castle"]
    ours = SentenceTransformer(str(models[EMBEDDER].path / MODEL_FOLDER), device="cpu").encode_query(texts)
    theirs = SentenceTransformer(str(hub.folder / EMBEDDER), device="cpu").encode_query(texts)
    np.testing.assert_array_equal(ours, theirs)
    assert CrossEncoder(str(hub.folder / RERANKER), device="cpu").predict([("a", "b")]).shape == (1,)


def test_an_unchanged_champion_is_not_pushed_again_and_a_rolled_back_one_is(
    in_force: Pipeline, hub: LocalHub, in_service: Workshop
) -> None:
    first = make_hub(in_force)
    again = make_hub(in_force)
    assert again.reused
    assert len(hub.commits[EMBEDDER]) == 1

    weights = hub.files(EMBEDDER)["model.safetensors"].read_bytes()
    roll_back(in_service.store, reason="a test")
    told = CliRunner().invoke(main, ["champion", "support"]).output
    assert f"embedder {hub.address}/{EMBEDDER}/tree/" in told
    assert "an earlier champion: materialize hub" in told
    make_hub(in_force)
    assert "an earlier champion" not in CliRunner().invoke(main, ["champion", "support"]).output
    assert hub.files(EMBEDDER)["model.safetensors"].read_bytes() != weights
    roll_back(in_service.store, to=first.artifact.manifest.inputs["embedder"], reason="a test")
    back = make_hub(in_force)
    assert not back.reused, "other weights lie there since"
    assert hub.files(EMBEDDER)["model.safetensors"].read_bytes() == weights


def test_files_of_another_model_go_and_what_people_added_stays(in_force: Pipeline, hub: LocalHub) -> None:
    hub.create(EMBEDDER, private=True)
    for name in ("pytorch_model.bin", "LICENSE"):
        (hub.folder / EMBEDDER / name).write_text("of before")
    make_hub(in_force)
    assert "pytorch_model.bin" not in hub.files(EMBEDDER)
    assert "LICENSE" in hub.files(EMBEDDER)


def test_a_public_repository_is_refused_where_a_private_one_is_asked_for(in_force: Pipeline, hub: LocalHub) -> None:
    hub.create(EMBEDDER, private=False)
    with pytest.raises(HubError, match=r"is public, but hub\.private asks for a private one: nothing was uploaded"):
        make_hub(in_force)
    assert not hub.files(EMBEDDER)
    assert not in_force.store.has_current("hub")


def test_what_may_not_be_pushed_is_refused(
    in_force: Pipeline, hub: LocalHub, in_service: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dataclasses import replace

    from huggingface_hub import constants

    with pytest.raises(HubError, match="a smoke test pushes nothing"):
        make_hub(replace(in_force, smoke_test=True))
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "another")
        with pytest.raises(HubError, match="Check HF_TOKEN"):
            make_hub(in_force)
        patch.delenv("HF_TOKEN")
        with pytest.raises(HubError, match="HF_TOKEN is not set"):
            make_hub(in_force)
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids"):
            make_hub(in_force)
    retire(in_service.store, reason="a test")
    with pytest.raises(ArtifactError, match="has no champion"):
        make_hub(in_force)
    assert not hub.private
