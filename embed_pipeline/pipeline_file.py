"""A pipeline's YAML file, read as it is written: the one way from the text to the settings.

Every string stays what it is, quoted or not; only `{{ env.NAME }}` is replaced, by the text of the environment
variable. What cannot be right is a ConfigurationError that names file, line and key, and shows what was
found unless it may be a secret. This module imports no dagster.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from embed_pipeline.errors import ConfigurationError
from embed_pipeline.masking import without_password
from embed_pipeline.settings import LONGEST_NAME, PIPELINE_NAME, PipelineSettings
from embed_pipeline.wrong_values import dotted, either, expectation, repeats_input, shown

FILE_NAMES = ("defs.yaml", "defs.yml", "component.yaml")  # in the order in which Dagster looks for them
COMPONENT_TYPES = ("embed_pipeline.RetrievalPipeline", "embed_pipeline.orchestration.component.RetrievalPipeline")
# What Dagster allows beside each other in a component's YAML.
TOP_KEYS = ("type", "attributes", "requirements", "post_processing", "template_vars_module")
MOST_VALUES = 20_000  # of a file, each alias counted as often as it is used
MOST_LEVELS = 40  # of keys and lists in each other; Dagster's own reader fails at some hundreds
_ENVIRONMENT = re.compile(r"\{\{\s*env\.([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """One document of a YAML file: its plain values, and the line on which each key stands."""

    file: Path
    value: Mapping[Any, Any]
    lines: Mapping[Key, int]

    @property
    def is_pipeline(self) -> bool:
        return self.value.get("type") in COMPONENT_TYPES

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The mapping under `attributes`; empty where there is none."""
        given = self.value.get("attributes")
        return given if isinstance(given, Mapping) else {}

    @property
    def name(self) -> str | None:
        """The pipeline's name, where a valid one is given."""
        given = self.attributes.get("name")
        if isinstance(given, str):
            given = _ENVIRONMENT.sub(lambda match: os.environ.get(match[1], match[0]), given)
            return given if re.fullmatch(PIPELINE_NAME, given) and len(given) <= LONGEST_NAME else None
        return None

    def at(self, key: Key = ()) -> str:
        """`file:line` of the value under `attributes`, or of the nearest key above it."""
        key = ("attributes", *key)
        while key not in self.lines and key:
            key = key[:-1]
        return f"{self.file}:{self.lines.get(key, 1)}"

    def at_named(self, message: str) -> str:
        """`at` the key that a message begins with: 'source.path: no such file'."""
        return self.at(_named_in(message, (), self))

    def stands(self, key: Key) -> bool:
        return ("attributes", *key) in self.lines

    def shown(self, value: Any, key: Key) -> str:
        """What was found at `key`, for a message; of a value that comes from the environment only the variable."""
        written: Any = self.attributes
        for part in key:
            try:
                written = written[part]
            except (KeyError, IndexError, TypeError):
                break
        if isinstance(written, str) and _ENVIRONMENT.search(written):
            return f"the value of {written}"
        return shown(value, key)


def file_in(folder: Path) -> Path | None:
    """The YAML file that makes `folder` a component, even if it is a link to nothing."""
    return next((file for name in FILE_NAMES if os.path.lexists(file := folder / name)), None)


def files_below(folder: Path) -> Iterator[Path]:
    """The YAML files of all components in `folder`, found as Dagster finds them."""
    if (file := file_in(folder)) is not None:
        yield file
        return
    for child in children_of(folder):
        if child.is_dir():
            yield from files_below(child)


def links_back(folder: Path) -> Iterator[Path]:
    """Links below `folder`, outside of components, to a folder that they lie in: Dagster would follow them for ever."""
    if file_in(folder) is None:
        yield from (child for child in _entries(folder) if _leads_back(child))
        for child in children_of(folder):
            if child.is_dir():
                yield from links_back(child)


def children_of(folder: Path) -> list[Path]:
    """What Dagster looks at in a folder, by name; nothing in one that cannot be read, no link that leads back."""
    return [child for child in _entries(folder) if not _leads_back(child)]


def _entries(folder: Path) -> list[Path]:
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return []
    return [child for child in found if not child.name.startswith(".") and child.name != "__pycache__"]


def _leads_back(path: Path) -> bool:
    return path.is_symlink() and path.is_dir() and path.parent.resolve().is_relative_to(path.resolve())


def read_documents(file: Path) -> list[Document]:
    """The documents of a YAML file, nothing replaced.

    Raises ConfigurationError for a file that is no readable UTF-8 YAML of mappings with a `type`, for a value that
    cannot be what its tag or form says, for a key that is no text or is given twice, and for aliases that expand to
    more than `MOST_VALUES` values.
    """
    return list(_read(_text_of(file), file))


@functools.lru_cache(maxsize=256)  # a file is read when the pipelines are counted, and again by its component
def _read(text: str, file: Path) -> tuple[Document, ...]:
    try:
        documents = tuple(_documents(text, file))
    except ConfigurationError:
        raise
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigurationError(
            f"{file}:{line}: found the control character {error.character:#04x}. Expected plain text"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark is not None else f"{file}"
        told = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigurationError(f"{where}: this is not YAML: {told}") from None
    except RecursionError:
        raise ConfigurationError(f"{file}: keys are nested too deeply to be a pipeline") from None
    except Exception as error:  # whatever else PyYAML's reader trips over is the file's fault, too
        raise ConfigurationError(f"{file}: this cannot be read as YAML: {type(error).__name__}: {error}") from error
    if not documents:
        raise ConfigurationError(f"{file}: the file is empty. Expected `type: {COMPONENT_TYPES[0]}` and `attributes`")
    return documents


def settings_of(document: Document) -> PipelineSettings:
    """The settings under `attributes`, environment variables resolved.

    Raises ConfigurationError with one line for each fault: file, line, key, and what was expected.
    """
    if not document.attributes:
        raise ConfigurationError(
            f"{document.file}:{document.lines.get(('attributes',), 1)}: `attributes` is missing: give at least name, "
            "source, embedder"
        )
    unset: list[str] = []
    given = _resolved(document.attributes, (), document, unset)
    if unset:
        raise ConfigurationError("\n".join(unset))
    try:
        return PipelineSettings.model_validate(given)
    except ValidationError as error:
        raise ConfigurationError("\n".join(_problems(error, document))) from None


def same_names(read: Mapping[Path, Sequence[Document]]) -> dict[Path, str]:
    """For each file with a pipeline that has the name of another's: what is wrong."""
    named: dict[str, list[Document]] = {}
    for document in (document for documents in read.values() for document in documents):
        if document.is_pipeline and document.name is not None:
            named.setdefault(document.name, []).append(document)
    return {
        document.file: f"{document.at(('name',))}: name: '{name}' is also the name at "
        f"{', '.join(other.at(('name',)) for other in documents if other is not document)}. They would write into one "
        "folder of the store: give each a name of its own"
        for name, documents in named.items()
        if len(documents) > 1
        for document in documents
    }


# ------------------------------------------------------------------------------------------------ the text


def _text_of(file: Path) -> str:
    if file.is_symlink() and not file.exists():
        raise ConfigurationError(f"{file}: the link leads to {file.readlink()}, which is not there")
    if not file.is_file():
        raise ConfigurationError(f"{file}: expected a file")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{file}: the file cannot be read: {error.strerror}") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in content[:4]:
        raise ConfigurationError(f"{file}: the file is UTF-16 or UTF-32. Save it as UTF-8")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigurationError(
            f"{file}:{line}: the byte {content[error.start]:#04x} is not UTF-8; the file seems to be Latin-1 or "
            "another older encoding. Save it as UTF-8"
        ) from None


class _Loader(yaml.SafeLoader):
    """YAML's plain types, without the surprises of YAML 1.1: dates, 12:30 and 007 as numbers, and 1e-5 as text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":int", ":float", ":value"))
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_INTEGER = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0o[0-7_]+|(?:0|[1-9][0-9_]*))$")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$")
_INFINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
for _pattern in (_FLOAT, _INFINITE):
    _Loader.add_implicit_resolver("tag:yaml.org,2002:float", _pattern, list("-+0123456789."))


class _DagstersLoader(yaml.SafeLoader):
    """The types that Dagster, which reads the file as well, sees in a text without quotes."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
}
_TAGS = {_TAG + name for name in (*_SCALARS, "map", "seq", "merge")}


def _documents(text: str, file: Path) -> Iterator[Document]:
    loader = _Loader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None  # check_node found one
            lines: dict[Key, int] = {}
            _Walk(file, lines, loader, _is_pipeline(node)).visit(node, (), ())
            value = loader.construct_document(node)
            where = f"{file}:{node.start_mark.line + 1}"
            if value is None:
                raise ConfigurationError(f"{where}: the document is empty. Expected `type` and `attributes`")
            if not isinstance(value, dict):
                raise ConfigurationError(f"{where}: expected the keys `type` and `attributes`; found no keys at all")
            component = value.get("type")
            if not isinstance(component, str):
                raise ConfigurationError(f"{where}: `type` is missing. Expected `type: {COMPONENT_TYPES[0]}`")
            if component.startswith("embed_pipeline.") and component not in COMPONENT_TYPES:
                raise ConfigurationError(
                    f"{file}:{lines['type',]}: there is no component '{component}'. Expected `type: "
                    f"{COMPONENT_TYPES[0]}`"
                )
            document = Document(file, value, lines)
            if document.is_pipeline and (unknown := [key for key in value if key not in TOP_KEYS]):
                near = difflib.get_close_matches(unknown[0], TOP_KEYS, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise ConfigurationError(
                    without_password(
                        f"{file}:{lines[unknown[0],]}: unknown key '{unknown[0]}' beside `type`.{hint} Settings stand "
                        f"under `attributes`. Allowed here: {', '.join(TOP_KEYS)}"
                    )
                )
            yield document
    finally:
        loader.dispose()


def _is_pipeline(node: yaml.Node) -> bool:
    return isinstance(node, yaml.MappingNode) and any(
        name.value == "type" and value.value in COMPONENT_TYPES for name, value in node.value
    )


@dataclass
class _Walk:
    """Goes through the nodes of a document once for each place where they stand.

    It notes their lines, and refuses what cannot be constructed, keys that are given twice or are no text, and aliases
    without an end.
    """

    file: Path
    lines: dict[Key, int]
    loader: _Loader
    is_pipeline: bool  # another component's keys may be numbers
    values: int = 0

    def visit(self, node: yaml.Node, key: Key, above: tuple[yaml.Node, ...]) -> None:
        self.values += 1
        line = node.start_mark.line + 1
        if self.values > MOST_VALUES:
            raise ConfigurationError(
                f"{self.file}: the file expands to more than {MOST_VALUES:,} values. Aliases (*name) that repeat "
                "aliases multiply; write what is needed"
            )
        if any(node is other for other in above):
            raise ConfigurationError(f"{self.file}:{line}: an alias stands for what it stands in, without an end")
        if len(above) > MOST_LEVELS:
            raise ConfigurationError(f"{self.file}:{line}: keys are nested too deeply to be a pipeline")
        self.lines.setdefault(key, line)
        self._tag(node, key)
        if isinstance(node, yaml.ScalarNode):
            self._scalar(node, key)
        elif isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                self.visit(item, (*key, number), (*above, node))
        elif isinstance(node, yaml.MappingNode):
            self._mapping(node, key, above)

    def _mapping(self, node: yaml.MappingNode, key: Key, above: tuple[yaml.Node, ...]) -> None:
        seen: dict[str, int] = {}
        merged = []
        for name, value in node.value:
            line = name.start_mark.line + 1
            if name.tag == "tag:yaml.org,2002:merge":
                merged.append(value)
                continue
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigurationError(f"{self.file}:{line}: expected a plain word as key; found a list or mapping")
            self._tag(name, key)
            self._scalar(name, key)
            if self.is_pipeline and (read := {name.tag, _as_dagster(name)} - {f"{_TAG}str"}):
                kind = _SCALARS.get(min(read).removeprefix(_TAG), "no text")
                found = shown(name.value, (*key, name.value))
                self._refuse(
                    name, key, f"found the key {found}, which YAML reads as {kind}. If it is meant, put it in quotes"
                )
            if name.value in seen:
                path = ".".join(str(part) for part in (*key, name.value) if part != "attributes")
                raise ConfigurationError(
                    f"{self.file}:{line}: the key '{path}' is given twice, on lines {seen[name.value]} and {line}. "
                    "Only one would count: put both into one"
                )
            seen[name.value] = line
            self.lines[*key, name.value] = line
            self.visit(value, (*key, name.value), (*above, node))
        for value in merged:  # after the keys of its own, which win
            for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                self.visit(one, key, (*above, node))

    def _tag(self, node: yaml.Node, key: Key) -> None:
        if node.tag not in _TAGS:
            tag = node.tag.replace(_TAG, "!!")
            self._refuse(node, key, f"the tag {tag} is not known here. Leave it out, and write the plain value")

    def _scalar(self, node: yaml.ScalarNode, key: Key) -> None:
        """Refuse a value that PyYAML, or Dagster after it, would fail to make: !!int abc, 0x_, = and the like."""
        kind = node.tag.removeprefix(_TAG)
        try:
            if kind == "null" and _as_untagged(node) != node.tag:
                raise ValueError
            self.loader.construct_object(node)
        except Exception:
            self._refuse(node, key, f"found {shown(node.value, key)}, expected {_SCALARS.get(kind, 'a plain value')}")
        if (seen := _as_dagster(node)) != node.tag:
            loader = _DagstersLoader("")
            try:
                loader.construct_object(yaml.ScalarNode(seen, node.value))
            except Exception:
                found = shown(node.value, key)
                self._refuse(node, key, f"found {found}, which YAML takes for something else than text. Quote it")
            finally:
                loader.dispose()

    def _refuse(self, node: yaml.Node, key: Key, problem: str) -> NoReturn:
        named = dotted(key[1:] if key[:1] == ("attributes",) else key)
        where = f"{self.file}:{node.start_mark.line + 1}: {f'{named}: ' if named else ''}"
        raise ConfigurationError(without_password(f"{where}{problem}")) from None


_PLAIN, _DAGSTERS = _Loader(""), _DagstersLoader("")  # asked for tags only


def _as_untagged(node: yaml.ScalarNode) -> str:
    return str(_PLAIN.resolve(yaml.ScalarNode, node.value, (True, False)))


def _as_dagster(node: yaml.ScalarNode) -> str:
    """The tag that Dagster sees: its own where the text has neither quotes nor a tag."""
    if node.style is not None or node.tag != _as_untagged(node):
        return node.tag
    return str(_DAGSTERS.resolve(yaml.ScalarNode, node.value, (True, False)))


# ---------------------------------------------------------------------------------------------- the values


def _resolved(value: Any, key: Key, document: Document, unset: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _resolved(item, (*key, name), document, unset) for name, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, (*key, number), document, unset) for number, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        if (found := os.environ.get(match[1])) is not None:
            return found
        unset.append(
            f"{document.at(key)}: {dotted(key)}: the environment variable {match[1]} is not set. Set it where Dagster "
            "is started, or write the value itself"
        )
        return ""

    return _ENVIRONMENT.sub(variable, value)


def _problems(error: ValidationError, document: Document) -> list[str]:
    """One line for each key that is wrong. The branches of a union, which pydantic reports apart, are one."""
    told: dict[tuple[str, str, str, Key], list[str]] = {}
    for one in error.errors(include_url=False):
        message, key = expectation(one), one["loc"]
        if one["type"] != "missing":
            while key and not document.stands(key):
                key = key[:-1]
        found = f"; found {document.shown(one['input'], key)}" if repeats_input(one) else ""
        deeper = _named_in(message, key, document)
        named, _, rest = message.partition(": ")
        if key and deeper[len(key) :] and dotted(deeper[len(key) :]) == named:  # of `hub`: 'embedder: expected ...'
            key, message = deeper, rest
        shown_key = f"{dotted(key)}: " if key and not message.startswith(dotted(key)) else ""
        told.setdefault((document.at(deeper), shown_key, found, key), []).append(message)
    return [
        without_password(f"{where}: {shown_key}{either(messages)}{found}")
        for (where, shown_key, found, _), messages in told.items()
    ]


def _named_in(message: str, key: Key, document: Document) -> Key:
    """`key`, or the deeper one that a message on several keys begins with: 'embedder.arguments: ...'."""
    if match := re.match(r"`?([a-z_0-9]+(?:\.[a-z_0-9]+)*)(?:\[\d+\][\w.]*)?`?[:\s]", message):
        deeper = (*key, *match[1].split("."))
        if document.stands(deeper):
            return deeper
    if match := re.match(r"unknown key '([^']*)'", message):
        return (*key, match[1]) if document.stands((*key, match[1])) else key
    return key
