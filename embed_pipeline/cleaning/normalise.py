"""Text as every later stage sees it, and the keys under which two texts count as the same: DuckDB macros."""

from __future__ import annotations

import sys
import unicodedata
from functools import lru_cache

import duckdb
import numpy as np
import regex

# Controls, soft hyphens, zero-width spaces, byte-order marks and marks of direction. The joiners U+200C and U+200D
# stay: scripts such as Persian and Hindi, and emoji, are spelled with them.
_INVISIBLE = (
    r"[\x00-\x08\x0E-\x1F\x7F-\x{84}\x{86}-\x{9F}\x{AD}\x{200B}\x{200E}\x{200F}\x{202A}-\x{202E}"
    r"\x{2060}-\x{2064}\x{2066}-\x{2069}\x{FEFF}]"
)
# What nothing is drawn for, by Unicode's own property: joiners, fillers, variation selectors, tags. Texts that differ
# in it look the same, so it never counts where texts are compared.
_IGNORABLE = r"\p{Default_Ignorable_Code_Point}"
# A text of these alone is empty: besides, controls, spaces, the empty Braille cell and annotation anchors.
_BLANK = rf"[{_IGNORABLE}\p{{Cc}}\p{{Z}}\u2800\uFFF9-\uFFFB]"
_IGNORED = regex.compile(f"{_IGNORABLE}+")
_HIDDEN = regex.compile(_BLANK)
_SPACE = r"[\t-\r\x{85}\p{Z}]"
_SPACE_IN_LINE = r"[\t\p{Zs}]"
_LINE_END = r"[\n-\r\x{85}\p{Zl}\p{Zp}]"
# Scripts written without spaces (and Hangul, whose spacing varies): each character is a word.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = rf"[{_UNSPACED}]|(?:[^\P{{L}}{_UNSPACED}]|\p{{N}}|\p{{M}})+"

_MACROS = (
    # Of an id or a split: null where nothing is drawn.
    "named(t) AS CASE WHEN is_drawn(t) THEN trim(t) END",
    # Under which two ids are likely meant to be one: see `rows`.
    r"""id_key(t) AS regexp_replace(regexp_replace(regexp_replace(casefolded(t), '\.0+$', ''),
        '(^|[^0-9])0+([0-9])', '\1\2', 'g'), '[^\p{L}\p{N}]+', '', 'g')""",
    # Invisible characters go first: taking them out can bring a letter and its accent together.
    rf"visible(t) AS nfc_normalize(regexp_replace(t, '{_INVISIBLE}', '', 'g'))",
    # null where nothing is left
    rf"one_line(t) AS CASE WHEN is_drawn(t) THEN trim(regexp_replace(visible(t), '{_SPACE}+', ' ', 'g')) END",
    rf"""lines(t) AS CASE WHEN is_drawn(t) THEN trim(regexp_replace(
        regexp_replace(visible(t), '{_SPACE_IN_LINE}*{_LINE_END}{_SPACE}*', chr(10), 'g'),
        '{_SPACE_IN_LINE}+', ' ', 'g'), ' ' || chr(10)) END""",
    # The words of a text in their order: letter case, punctuation, width and other forms of a character aside.
    # Symbols and # stay, for C++ is not C#; but for accents and apostrophes that pass for letters or become marks.
    r"""folded(t) AS coalesce(nullif(trim(regexp_replace(casefolded(regexp_replace(t, '[\p{Sk}\x{2BC}]', ' ', 'g')),
        '[^\p{L}\p{N}\p{M}\p{S}#]+', ' ', 'g')), ''), casefolded(t))""",
    "letters(f) AS replace(f, ' ', '')",
    rf"""sorted_words(f) AS array_to_string(list_sort(string_split(
        trim(regexp_replace(regexp_replace(f, '([{_UNSPACED}])', ' \1 ', 'g'), ' +', ' ', 'g')), ' ')), ' ')""",
    # Of a folded query: however its words are spaced and hyphenated ("log in", "login"), and in any order of them.
    "query_keys(f) AS list_distinct([letters(f), sorted_words(f)])",
    # The same, short whatever the length; and of two folded texts, in either order.
    "text_keys(f) AS list_transform(query_keys(f), lambda key: md5(key))",
    "pair_key(a, b) AS md5(least(a, b) || chr(0) || greatest(a, b))",
    """pair_keys(a, b) AS list_distinct(
        [pair_key(letters(a), letters(b)), pair_key(sorted_words(a), sorted_words(b))])""",
    rf"words(t) AS regexp_extract_all(casefolded(t), '{_WORD}')",
    "passage_text(title, t) AS CASE WHEN title IS NULL THEN t ELSE title || ' ' || t END",
    # Of a class: letter case and width aside, and with one name for what is written true, yes or 1.
    """class_key(t) AS CASE casefolded(t) WHEN 'true' THEN '1' WHEN 'yes' THEN '1' WHEN 'false' THEN '0'
        WHEN 'no' THEN '0' ELSE casefolded(t) END""",
    "short_hash(t) AS sha256(t)[:16]",
)


def casefolded(text: str) -> str:
    """Without differences of letter case, full width, ligatures and what is not drawn: Unicode's NFKC_Casefold."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", drawn(text)).casefold())


def drawn(text: str) -> str:
    """Without the characters that nothing is drawn for (zero-width joiners, fillers, variation selectors, ...)."""
    return _IGNORED.sub("", text)


def side_by_side(id: str, there: str) -> str:
    """An id and one that is there; characters that cannot be seen, or that only one of them has, are escaped."""
    return f"{_escaped(id, there)}, while {_escaped(there, id)} is there"


def _escaped(text: str, other: str) -> str:
    return f"'{''.join(c if _is_shown(c, other) else ascii(c)[1:-1] for c in text)}'"


def _is_shown(character: str, other: str) -> bool:
    if character.isascii():
        return character.isprintable()
    return character in other and character.isprintable() and not _HIDDEN.match(character)


def create_macros(connection: duckdb.DuckDBPyConnection) -> None:
    """Create `one_line` (queries, titles), `lines` (passages), `query_keys`, `words` and the others above."""
    connection.create_function("casefolded", casefolded, ["VARCHAR"], "VARCHAR")
    connection.create_function("side_by_side", side_by_side, ["VARCHAR", "VARCHAR"], "VARCHAR")
    ignorable, blank = _characters(f"{_IGNORABLE}+"), _characters(f"{_BLANK}+")
    for macro in (
        f"drawn(t) AS regexp_replace(t, '[{ignorable}]', '', 'g')",
        f"is_drawn(t) AS regexp_matches(t, '[^{blank}]')",
        *_MACROS,
    ):
        connection.execute(f"CREATE OR REPLACE TEMP MACRO {macro}")


@lru_cache
def _characters(runs: str) -> str:
    """The characters that `runs` matches, as ranges for DuckDB, whose expressions lack most of Unicode's properties."""
    points = np.arange(sys.maxunicode + 1, dtype="<u4")
    everything = points[(points < 0xD800) | (points > 0xDFFF)].tobytes().decode("utf-32-le")
    found = [match[0] for match in regex.finditer(runs, everything)]
    return "".join(rf"\x{{{ord(run[0]):X}}}-\x{{{ord(run[-1]):X}}}" for run in found)
