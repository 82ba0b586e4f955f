"""What goes to the Hub: the champion's model folders with their cards, the reranker's with `serving.json`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from embed_pipeline.artifacts import Artifact, Recipe
from embed_pipeline.exporting.forms import ORIGINAL, RERANKER_FORM, ExportReport, markdown
from embed_pipeline.model_files import MODEL_FOLDER, SERVING_FILE
from embed_pipeline.publishing.card import Carded, Kind, model_card
from embed_pipeline.publishing.hub import Pushed, push
from embed_pipeline.settings import HubSettings

PUSHED_FILE = "pushed.json"
EXPORTS_FOLDER = "exports"  # in a repository: the champion's other forms
CARD_FILE = "README.md"


class PushReport(BaseModel):
    """What `pushed.json` holds: model -> where it lies."""

    model_config = ConfigDict(frozen=True)

    pushed: dict[Kind, Pushed]


def pushed_already(last: Artifact, recipe: Recipe) -> bool:
    """Whether the last push was of exactly this, so that the Hub holds it."""
    inputs = {name: content for name, content in last.manifest.recipe.inputs.items() if name != "after"}
    return last.manifest.recipe.model_copy(update={"inputs": inputs}) == recipe


def push_champion(carded: Carded, hub: HubSettings, exports: Artifact | None, out: Path) -> PushReport:
    """Push each model that `hub` names a repository for; its card and `pushed.json` stay in `out`.

    Raises HubError; a repository that was pushed before another one was refused is found as it is the next time.
    """
    pushed: dict[Kind, Pushed] = {}
    repositories: dict[Kind, str | None] = {"embedder": hub.embedder, "reranker": hub.reranker}
    with tempfile.TemporaryDirectory(prefix=".folders-", dir=out) as scratch:
        for kind in carded.kinds:
            repository = repositories[kind]
            if repository is None:
                continue
            folder = Path(scratch) / kind
            version = lay_out(carded, kind, exports, folder, repository)
            shutil.copy2(folder / CARD_FILE, out / f"{kind}.md")
            pushed[kind] = push(
                folder,
                repository,
                private=hub.private,
                tag=f"{carded.settings.name}-{version}",
                message=f"{carded.settings.name}/{kind} {version}: {carded.champion.verdict}",
            )
    report = PushReport(pushed=pushed)
    (out / PUSHED_FILE).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return report


def lay_out(carded: Carded, kind: Kind, exports: Artifact | None, folder: Path, repository: str | None = None) -> str:
    """Fill `folder` with what a repository holds: the model, its card, its other forms; returns the model's version."""
    model = carded.model(kind)
    assert model is not None
    shutil.copytree(model.path / MODEL_FOLDER, folder)
    table = None
    if exports is not None:
        report = ExportReport.model_validate(exports.report)
        for name in _forms_of(report, kind):
            shutil.copytree(exports.path / name, folder / EXPORTS_FOLDER / name)
        table = f"{markdown(report)}\nWhat is published lies in `{EXPORTS_FOLDER}/`, with the lines that load it."
    if kind == "reranker":
        shutil.copy2(model.path / SERVING_FILE, folder / SERVING_FILE)
        table = None  # it tells of the embedder's forms
    card = model_card(carded, kind, repository=repository, exports=table)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return model.version


def _forms_of(report: ExportReport, kind: Kind) -> Iterator[str]:
    if kind == "embedder":
        yield from (form.name for form in report.forms if form.published and form.name != ORIGINAL)
    elif report.reranker is not None and report.reranker.published:
        yield RERANKER_FORM
