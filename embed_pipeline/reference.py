"""The written reference, made from the code: `python -m embed_pipeline.reference docs` writes it, a test compares."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from embed_pipeline import losses
from embed_pipeline.library_arguments import passed_through
from embed_pipeline.losses import EMBEDDER_LOSSES, NOT_OFFERED, RERANKER_LOSSES, WRAPPERS, Loss, SourceKind
from embed_pipeline.settings import PipelineSettings, Settings

_KINDS: tuple[SourceKind, ...] = get_args(SourceKind)
_ROWS = {
    "group": "query, positive, its negatives",
    "pair": "query, positive",
    "hardest": "query, positive, the hardest negative",
    "triplet": "query, positive, negative",
    "judged": "query, passage, 1 or 0",
    "teacher_group": "query, positive, negatives, a teacher's scores",
    "teacher_pair": "query, passage, a teacher's score",
    "list": "query, passages, 1 or 0 each",
    "scored": "two sentences, score",
    "classes": "two sentences, class",
    "text_classes": "sentence, class",
    "embeddings": "two texts, a teacher's embeddings",
}


def write_reference(folder: Path) -> list[Path]:
    """Write `settings.md` and `losses.md` into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (("settings.md", settings_reference()), ("losses.md", losses_reference())):
        (folder / name).write_text(text, encoding="utf-8")
        written.append(folder / name)
    return written


def settings_reference() -> str:
    """Every key of a pipeline's YAML, its type, default and what it is for, one table a model."""
    lines = [
        "# Settings",
        "",
        "Everything that a pipeline's YAML can say under `attributes`, made from `embed_pipeline/settings.py`. Why the",
        "defaults are what they are stands in the README. A key that is not here is refused when definitions load.",
        "",
        "A text is what is written, quoted or not: only `{{ env.NAME }}` is replaced, by the text of the environment",
        "variable, and one that is not set is an error. A key that stands twice and a value that is out of bounds are",
        "errors too. An error names file, line and key. The pipeline of a broken YAML is replaced by one asset,",
        "`<pipeline>/broken_yaml`, which fails with the reason, as its check, schedule and sensors say it; the other",
        "pipelines work on, and `dg check defs` fails. Settings are published with every version, so an address with a",
        "password and a token of the Hub are refused anywhere in them: leave those to the environment.",
        "",
    ]
    for model, keys in _models(PipelineSettings):
        where = "`attributes`" if not keys else ", ".join(f"`{key}`" for key in keys)
        lines += [f"## {model.__name__}", "", f"At {where}. {_one_line(model.__doc__)}", ""]
        lines += ["| key | type | default | |", "|---|---|---|---|"]
        lines += [_row(name, field) for name, field in model.model_fields.items()]
        lines.append("")
    lines += ["## What `arguments` may hold", ""]
    for engine in ("sentence-transformers", "flag-embedding"):
        for kind in ("embedder", "reranker"):
            names = ", ".join(f"`{name}`" for name in passed_through(engine, typing.cast(Any, kind)))
            lines += [f"**{kind}, {engine}:** {names}", ""]
    lines += [
        "They are those of the versions in `constraints.txt`; a pipeline is checked against what is installed. What a",
        "key of ours decides, or the pipeline itself (output, seeds, reporting), is refused with the reason.",
        "",
    ]
    return "\n".join(lines)


def losses_reference() -> str:
    """Which loss learns from which kind of source, and what it is given."""
    lines = [
        "# Losses",
        "",
        "Those of sentence-transformers, by their own names, made from `embed_pipeline/losses.py`. `embedder.loss` and",
        "`reranker.loss` are for the pipeline's own source; each of `extra_sources` has a `loss` and, where the",
        "reranker is to learn from it, a `reranker_loss`. Engine flag-embedding has one loss, for retrieval kinds.",
        "",
        "## Embedders",
        "",
        *_loss_table(EMBEDDER_LOSSES),
        "",
        "## Rerankers",
        "",
        *_loss_table(RERANKER_LOSSES),
        "",
        "## Around an embedder's loss",
        "",
        "| `loss_wrapper` | `loss_wrapper_arguments` |",
        "|---|---|",
        *(f"| {name} | {_names(arguments)} |" for name, arguments in WRAPPERS.items()),
        "",
        "AdaptiveLayerLoss and Matryoshka2dLoss cannot be put around losses that cache gradients.",
        "",
        "## Not offered",
        "",
        *(f"- **{name}** {reason}." for name, reason in NOT_OFFERED.items()),
        "",
    ]
    return "\n".join(lines)


def _loss_table(table: Mapping[str, Loss]) -> Iterator[str]:
    yield "| loss | kinds of source | rows | arguments | needs | batches |"
    yield "|---|---|---|---|---|---|"
    for name, loss in table.items():
        by_rows: dict[str, list[str]] = {}
        for kind in _KINDS:
            if kind in loss.rows:
                by_rows.setdefault(loss.rows[kind], []).append(kind)
        kinds = "; ".join(_kinds(kinds) for kinds in by_rows.values())
        rows = "; ".join(_ROWS[rows] for rows in by_rows)
        told = [*loss.arguments, *(f"{key}: {value} by default" for key, value in loss.defaults.items())]
        told = [one for one in told if one not in loss.defaults]
        settings = ["temperature"] if loss.in_batch else []
        settings += ["sub_batch_size"] if loss.cached or loss.caches else []
        ours = f" (and embedder.{', embedder.'.join(settings)})" if settings else ""
        needs = ", ".join(need.replace("_", " ") for need in loss.needs)
        yield f"| {name} | {kinds} | {rows} | {_names(told)}{ours} | {needs} | {loss.sampler} |"


def _kinds(kinds: list[str]) -> str:
    return "retrieval" if kinds == list(losses.RETRIEVAL_KINDS) else ", ".join(kinds)


def _names(names: typing.Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "-"


def _models(root: type[Settings]) -> Iterator[tuple[type[BaseModel], list[str]]]:
    """Every settings model below `root` once, in the order of the YAML, with the keys where it stands."""
    places: dict[type[BaseModel], list[str]] = {root: []}
    waiting: list[tuple[type[BaseModel], str]] = [(root, "")]
    while waiting:
        model, prefix = waiting.pop(0)
        for name, field in model.model_fields.items():
            for inner in _inner_models(field.annotation):
                key = f"{prefix}{name}"
                if inner in places:
                    places[inner].append(key)
                else:
                    places[inner] = [key]
                    waiting.append((inner, f"{key}."))
    yield from places.items()


def _inner_models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _inner_models(argument)


def _row(name: str, field: FieldInfo) -> str:
    aliases = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
    others = [f"`{alias}`" for alias in aliases if alias != name]
    also = f" (or {', '.join(others)})" if others else ""
    told = field.description or next((_one_line(model.__doc__) for model in _inner_models(field.annotation)), "")
    text = _cell(told)
    return f"| `{name}`{also} | {_cell(_type(field.annotation))} | {_cell(_default(field))} | {text} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value is PydanticUndefined:
        return "unset"
    if isinstance(value, BaseModel):
        return "its own defaults"
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{value}`" if value != "" else "empty"


def _type(annotation: Any) -> str:
    """A type as a YAML writer would say it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(one) for one in arguments if one is not type(None))
    if origin in (tuple, list):
        inner = [one for one in arguments if one is not Ellipsis]
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    plain = {str: "text", int: "whole number", float: "number", bool: "true, false", Path: "path", Any: "anything"}
    return plain.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    for path in write_reference(Path(sys.argv[1])):
        print(path)
