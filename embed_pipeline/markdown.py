"""Markdown of texts that come from data: each is shown as it is, whatever Markdown or HTML it holds.

What `code` and `escaped` return is marked as safe, so tables take it as it is; every other text they escape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

# With a backslash before it none of them begins anything; in front of a line some more do.
_ANYWHERE = re.compile(r"([\\`*\[\]~$]|(?<![^\W_])_|_(?![^\W_]))")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}


def escaped(text: object) -> Markup:
    """One line of Markdown that shows `text` itself: no emphasis, code, link, image, heading, list, table or HTML."""
    line = " ".join(str(text).split())
    line = re.sub(r"^(\d+)([.)])", r"\1\\\2", re.sub(r"^([-+](?!\d)|[=#])", r"\\\1", _ANYWHERE.sub(r"\\\1", line)))
    return Markup("".join(_ENTITIES.get(character, character) for character in line))


def code(text: str) -> Markup:
    """A span of code on one line, whatever backticks the text has; its spaces stay."""
    line = re.sub(r"[\r\n\v\f\x85\u2028\u2029]+", " ", text)
    if not line.strip():
        return escaped(repr(text)) if text else Markup()
    fence = "`" * (_longest_run(line) + 1)
    edge = " " if "`" in (line[0], line[-1]) or (line[0] == line[-1] == " ") else ""
    return Markup(f"{fence}{edge}{line}{edge}{fence}")


def fenced(text: str, language: str = "") -> str:
    """A block of code of any text."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], longest: int | None = None) -> str:
    """A Markdown table; floats have four decimals, texts are cut to `longest` characters."""
    lines = [[_cell(cell, longest) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any, longest: int | None) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, Markup):
        return str(value).replace("|", "\\|")  # what splits a table into cells takes the backslash away, in code too
    text = str(value)
    return str(escaped(text if longest is None or len(text) <= longest else f"{text[: longest - 1]}…"))


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
