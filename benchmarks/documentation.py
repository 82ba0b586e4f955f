"""The questions and passages of the demo's raw data, as rows for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from embed_pipeline.defs.demo import build_raw


def question_passage_pairs(
    libraries: Sequence[str] = build_raw.LIBRARIES, characters: int | None = None
) -> list[tuple[str, str]]:
    """(question, passage) of everything that the libraries document. No text stands twice among either.

    `characters` is where passages are cut; by default where the demo cuts them.
    """
    default = build_raw.PASSAGE_CHARACTERS
    build_raw.PASSAGE_CHARACTERS = default if characters is None else characters
    try:
        found: dict[str, str] = {}
        for library in libraries:
            for *_, question, passage in build_raw.documented(library):
                found.setdefault(passage, question)
    finally:
        build_raw.PASSAGE_CHARACTERS = default
    return list({question: passage for passage, question in found.items()}.items())
