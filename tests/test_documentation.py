"""What is written says what the code says."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import yaml

from embed_pipeline.losses import EMBEDDER_LOSSES, NOT_OFFERED, RERANKER_LOSSES, WRAPPERS
from embed_pipeline.reference import losses_reference, write_reference
from embed_pipeline.settings import PipelineSettings
from tests.conftest import REPOSITORY


def test_the_reference_in_docs_is_what_the_code_gives(tmp_path: Path) -> None:
    for path in write_reference(tmp_path):
        assert (REPOSITORY / "docs" / path.name).read_text() == path.read_text(), "run `make docs` and commit"


def test_every_key_has_a_word_on_what_it_is_for() -> None:
    tables = (REPOSITORY / "docs" / "settings.md").read_text().splitlines()
    silent = [line for line in tables if line.startswith("| `") and line.endswith("|  |")]
    assert not silent, silent


def test_every_loss_stands_in_the_table() -> None:
    text = losses_reference()
    for name in (*EMBEDDER_LOSSES, *RERANKER_LOSSES, *WRAPPERS, *NOT_OFFERED):
        assert name in text


def test_the_pipelines_of_the_readme_are_right() -> None:
    """Blocks that show some keys alone are added to the whole example."""
    readme = (REPOSITORY / "README.md").read_text() + (REPOSITORY / "docs" / "jobs.md").read_text()
    blocks = [yaml.safe_load(textwrap.dedent(text)) for text in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)]
    whole, *others = [block for block in blocks if "jobs" not in block]
    assert whole["type"] == "embed_pipeline.RetrievalPipeline"
    assert PipelineSettings.model_validate(whole["attributes"]).embedder.encoding.query_max_length == 64
    assert len(others) > 5
    for block in others:
        PipelineSettings.model_validate({**whole["attributes"], **block.get("attributes", block)})


def test_the_page_of_everything_is_right_and_is_a_page() -> None:
    text = (REPOSITORY / "docs" / "everything.yaml").read_text()
    told: dict[str, Any] = yaml.safe_load(text)["attributes"]
    settings = PipelineSettings.model_validate(told)
    assert set(told) == set(PipelineSettings.model_fields)
    assert {source.kind for source in settings.sources} == {
        *("pairs", "triplets", "beir", "flag-embedding"),
        *("scored", "labelled", "parallel"),
    }
    assert len(text.splitlines()) < 100
    assert len((REPOSITORY / "embed_pipeline" / "defs" / "demo" / "defs.yaml").read_text().splitlines()) < 30


def test_links_lead_to_files() -> None:
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"), *REPOSITORY.glob("benchmarks/**/*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page}: {link}"
