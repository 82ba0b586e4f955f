"""All sources of a pipeline, each cleaned by the rules of its kind, and kept apart from each other."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embed_pipeline.cleaning.clean import CleaningReport, clean
from embed_pipeline.cleaning.elsewhere import Apart, CleanedSource, collect, verify_apart
from embed_pipeline.cleaning.examples import ExamplesReport, clean_examples
from embed_pipeline.cleaning.verify import verify, verify_examples
from embed_pipeline.errors import ArtifactError
from embed_pipeline.settings import CleaningSettings, SourceSettings
from embed_pipeline.tables import RAW_EXAMPLES_FILE, RAW_FILE, source_folder

Reports = dict[str | None, CleaningReport | ExamplesReport]
"""By the name of an extra source, None for the pipeline's own."""


def clean_sources(
    raw: Path, sources: Sequence[SourceSettings], settings: CleaningSettings, seed: int, out: Path
) -> Reports:
    """Clean the raw rows of every source, in their order; raises CleaningError where one cannot be."""
    reports: Reports = {}
    before: list[CleanedSource] = []
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".sources-") as work:
        for source in sources:
            rows, folder = source_folder(raw, source.extra_name), source_folder(out, source.extra_name)
            folder.mkdir(parents=True, exist_ok=True)
            report: CleaningReport | ExamplesReport
            if source.is_retrieval:
                report = clean(rows / RAW_FILE, settings, seed, folder, before=before)
            else:
                report = clean_examples(rows / RAW_EXAMPLES_FILE, source, settings, seed, folder, before=before)
            reports[source.extra_name] = report
            if len(reports) < len(sources):
                before.append(_collected(source, out, report, Path(work)))
    return reports


def verify_sources(raw: Path, cleaned: Path, sources: Sequence[SourceSettings], reports: Reports) -> list[str]:
    """What is broken of the promises about each source, a sentence each (see `verify`), by its name."""
    broken = []
    for source in sources:
        rows, folder = source_folder(raw, source.extra_name), source_folder(cleaned, source.extra_name)
        report = reports[source.extra_name]
        missing = [text for texts in report.read_as_missing.values() for text in texts]
        if source.is_retrieval:
            found = verify(folder, rows / RAW_FILE, missing)
        else:
            found = verify_examples(folder, source, _apart(report), rows / RAW_EXAMPLES_FILE, missing)
        broken += [sentence if source.extra_name is None else f"{source.extra_name}: {sentence}" for sentence in found]
    return broken


def verify_sources_apart(cleaned: Path, sources: Sequence[SourceSettings], reports: Reports) -> list[str]:
    """What one source holds out for dev or test and another trains on, a sentence each pair of sources."""
    if len(sources) < 2:
        return []
    with tempfile.TemporaryDirectory(prefix="verify-") as work:
        return verify_apart([_collected(one, cleaned, reports[one.extra_name], Path(work)) for one in sources])


def told(reports: Reports) -> dict[str, Any]:
    """The reports as a manifest keeps them: the own source's, with the others under `extra_sources`."""
    extra = {name: report.model_dump(mode="json") for name, report in reports.items() if name is not None}
    return {**reports[None].model_dump(mode="json"), "extra_sources": extra}


def read_reports(report: dict[str, Any], sources: Sequence[SourceSettings]) -> Reports:
    """What `told` kept of these sources. Raises ArtifactError where it was told of others."""
    both: dict[str | None, dict[str, Any]] = {None: report, **report["extra_sources"]}
    wanted = [source.extra_name for source in sources]
    if list(both) != wanted:
        names = [", ".join(name for name in found if name is not None) or "none" for found in (both, wanted)]
        raise ArtifactError(
            f"cleaned_pairs was made with the extra sources {names[0]}, but the YAML names {names[1]}. Materialize "
            "raw_pairs and cleaned_pairs first"
        )
    return {
        name: (ExamplesReport if "apart" in one else CleaningReport).model_validate(one) for name, one in both.items()
    }


def _collected(
    source: SourceSettings, cleaned: Path, report: CleaningReport | ExamplesReport, work: Path
) -> CleanedSource:
    folder = source_folder(cleaned, source.extra_name)
    return collect(source.extra_name or "the own source", folder, _apart(report), work)


def _apart(report: CleaningReport | ExamplesReport) -> Apart:
    return report.apart if isinstance(report, ExamplesReport) else "texts"
