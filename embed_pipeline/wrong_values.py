"""What a value of the settings had to be and what was found, in the words of a user's file instead of pydantic's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from embed_pipeline.masking import named_like_a_secret, secret_in
from embed_pipeline.settings import PIPELINE_NAME

LONGEST_SHOWN = 80
NAMES = "lowercase letters, digits and _, starting with a letter"
_TINY = 1e-6  # a lowest value below it is there to keep numbers apart from 0

_TYPES = {
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("string_type", "string_unicode"), "text"),
    **dict.fromkeys(("path_type", "path_parsing"), "a path"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type"), "a list"),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type"), "keys with values"),
}
_BOUNDS = {
    "greater_than": ("gt", "greater than {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "less than {}"),
    "less_than_equal": ("le", "at most {}"),
}


def dotted(key: Sequence[str | int]) -> str:
    """`('guards', 0, 'path')` as `guards[0].path`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")


def shown(value: Any, key: Sequence[str | int]) -> str:
    """What was found at `key`, cut to one short line; nothing of a value that may be a secret."""
    if isinstance(value, Mapping):
        return "keys with values" if value else "{}"
    if isinstance(value, list | tuple | set):
        return "a list" if value else "[]"
    if any(named_like_a_secret(str(part)) for part in key):
        return "something that is not shown, as it may be a secret"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    if secret_in(text):
        return "something that is not shown, as it holds a secret"
    if len(text) > LONGEST_SHOWN:
        text = f"{text[:LONGEST_SHOWN]}... ({len(text):,} characters)"
    return text if isinstance(value, int | float) else repr(text)


def expectation(error: ErrorDetails) -> str:
    """What pydantic expected where it tells `error`: 'must be at least 1'."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"{dotted(error['loc'])} is required"
    if kind == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if kind in _TYPES:
        quotes = ". Put it in quotes" if kind == "string_type" and isinstance(error["input"], int | float) else ""
        return f"must be {_TYPES[kind]}{quotes}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound, found = context[name], error["input"]
        if kind == "greater_than_equal" and 0 < bound < _TINY and not (_is_number(found) and found > 0):
            return "must be greater than 0"
        return f"must be {words.format(f'{bound:,}' if isinstance(bound, int) else f'{bound:g}')}"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "string_pattern_mismatch" and context["pattern"] == f"^{PIPELINE_NAME}$":
        return f"must consist of {NAMES}"
    if kind in ("string_too_long", "string_too_short"):
        most = kind == "string_too_long"
        number = context["max_length" if most else "min_length"]
        return f"must have at {'most' if most else 'least'} {number:,} characters"
    if kind in ("too_long", "too_short"):
        number = context["max_length" if kind == "too_long" else "min_length"]
        return f"must have at {'most' if kind == 'too_long' else 'least'} {number:,} entries"
    return f"is not valid: {error['msg']}"


def repeats_input(error: ErrorDetails) -> bool:
    """Whether what was found belongs behind the expectation: our own sentences say it themselves."""
    return error["type"] not in ("missing", "value_error")


def either(expectations: Sequence[str]) -> str:
    """The expectations of one value, of which one has to be met: "must be 'auto' or a whole number"."""
    first, *others = dict.fromkeys(expectations)
    if first.startswith("must be ") and all(other.startswith("must be ") for other in others):
        others = [other.removeprefix("must be ") for other in others]
    return " or ".join([first, *others])


def sentences(error: ValidationError) -> str:
    """All that is wrong in one line, each with its key."""
    told = []
    for one in error.errors(include_url=False):
        key, message = dotted(one["loc"]), expectation(one)
        found = f"; found {shown(one['input'], one['loc'])}" if repeats_input(one) else ""
        told.append(f"{message if one['type'] == 'missing' or not key else f'{key}: {message}'}{found}")
    return "; ".join(told)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, int | float)
