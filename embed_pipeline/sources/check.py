"""Which files a pipeline's YAML names, and whether they can be there at all."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote

from pydantic import BaseModel

from embed_pipeline.errors import ConfigurationError
from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources import delta

Key = Literal["path", "corpus", "queries", "qrels", "extra_corpus"]
KEYS: tuple[Key, ...] = ("path", "corpus", "queries", "qrels", "extra_corpus")
PARQUET, JSONL = ".parquet", ".jsonl"
# What somebody may have meant to be read, when it lies in a folder that is.
DATA_SUFFIXES = {PARQUET, JSONL, ".json", ".ndjson", ".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".xlsx"}
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class SourceFile:
    """One raw file: the YAML key that names it, the name its rows carry, and where it lies."""

    key: Key
    name: str
    path: Path
    partition: delta.Partition = ()  # of a Delta table: the values that its log gives all rows of the file

    def values(self) -> dict[str, str | None]:
        """Column -> value of all its rows, by the folders in its name; what a Delta log says takes precedence."""
        logged = dict(self.partition)
        others = {name.casefold() for name in logged}
        folders = {name: v for name, v in folder_values(self.name).items() if name.casefold() not in others}
        return {**folders, **logged}


class NotRead(BaseModel):
    """A file or folder where the YAML names one, of which no row is read."""

    key: Key
    source: str  # named as the source of a row
    reason: str


@dataclass(frozen=True)
class Found:
    files: list[SourceFile]
    not_read: list[NotRead]


def check_all(sources: Sequence[SourceSettings], yaml_folder: Path, *, unattended: bool = False) -> None:
    """`check_sources` for each, and that no script's folder is replaced by the script of another."""
    built: dict[Path, SourceSettings] = {}
    for source in sources:
        check_sources(source, yaml_folder, unattended=unattended)
        if source.script_output is None or source.script is None:
            continue
        other = built.setdefault((yaml_folder / source.script_output).resolve(), source)
        if other.script != source.script:
            raise ConfigurationError(
                f"{source.where}.script_output and {other.where}.script_output are both {source.script_output}: each "
                "script would replace what the other built. Give each a folder of its own"
            )


def check_sources(settings: SourceSettings, yaml_folder: Path, *, unattended: bool = False) -> None:
    """Every path, glob and folder must match a file now, unless `script` will build it.

    `unattended`: files come and go while nobody looks, so only the folder they are to lie in must be there. Raises
    ConfigurationError naming the key, the place looked at and the fix. Opens nothing but the log of a Delta table.
    """
    if settings.script is not None and not (yaml_folder / settings.script).is_file():
        raise ConfigurationError(
            f"{settings.where}.script: no file at {yaml_folder / settings.script}. Give the path of a Python script, "
            "relative to the YAML file"
        )
    for key, pattern in _patterns(settings):
        if _will_be_built(settings, yaml_folder, pattern):
            continue
        if not (unattended and _folder(yaml_folder / pattern).is_dir()):
            _find(settings, key, pattern, yaml_folder)


def source_files(settings: SourceSettings, yaml_folder: Path) -> list[SourceFile]:
    """The `files` of `find_files`."""
    return find_files(settings, yaml_folder).files


def find_files(settings: SourceSettings, yaml_folder: Path) -> Found:
    """All raw files in the order their rows are read, by key, then by name; and those that are passed over.

    A folder is read whole, also where a glob finds it (`part.parquet/`), but for folders whose name starts with `_` or
    `.`, in which Spark, Delta and unfinished jobs keep what is no data. Of a Delta table its current files are read.
    Names are relative to the YAML's folder with forward slashes (absolute where the YAML gives an absolute path), so
    they are the same on every machine. Opens nothing but the log of a Delta table.

    Raises ConfigurationError where a pattern matches nothing or something that cannot be read (a broken link, a pipe, a
    folder without permission), where a Delta table cannot be read file by file, and where two keys name the same file.
    """
    found = Found([], [])
    keys: dict[Path, SourceFile] = {}
    for key, pattern in _patterns(settings):
        files, passed_over = _find(settings, key, pattern, yaml_folder)
        found.not_read.extend(NotRead(key=key, source=name, reason=why) for name, why in sorted(passed_over.items()))
        for file in files:
            other = keys.setdefault(file.path.resolve(), file)
            if other is file:
                found.files.append(file)
            elif other.key == key:
                found.not_read.append(NotRead(key=key, source=file.name, reason=f"the same file as {other.name}"))
            else:
                raise ConfigurationError(
                    f"{settings.where}.{file.key} and {settings.where}.{other.key} both name {file.path}: its rows "
                    "would be read twice. Narrow one of the two patterns"
                )
    return found


def folder_values(name: str) -> dict[str, str | None]:
    """What the folders `key=value` in the name of a raw file say, as Spark, Hive and DuckDB write them."""
    parts = (part.partition("=") for part in PurePosixPath(name).parts[:-1])
    return {unquote(key): None if value == NO_VALUE else unquote(value) for key, equals, value in parts if equals}


def _patterns(settings: SourceSettings) -> list[tuple[Key, str]]:
    return [(key, pattern) for key in KEYS if (pattern := getattr(settings, key)) is not None]


def _suffix(settings: SourceSettings, key: Key) -> str:
    return JSONL if settings.kind == "flag-embedding" and key == "path" else PARQUET


def _find(
    settings: SourceSettings, key: Key, pattern: str, yaml_folder: Path
) -> tuple[list[SourceFile], dict[str, str]]:
    """The files of one key, and by name why others are not read."""
    where, suffix = f"{settings.where}.{key}", _suffix(settings, key)
    if "://" in pattern:
        raise ConfigurationError(
            f"{where}: found '{pattern}', expected a local path. Copy the files, or mount the store they lie in"
        )
    try:
        names, passed_over = _names(where, suffix, pattern, yaml_folder)
    except OSError as error:
        raise ConfigurationError(
            f"{where}: {error.filename} cannot be looked into: {error.strerror}. Name a place that this user may read"
        ) from error
    return [SourceFile(key, name, yaml_folder / name, partition) for name, partition in names.items()], passed_over


def _names(
    where: str, suffix: str, pattern: str, yaml_folder: Path
) -> tuple[dict[str, delta.Partition], dict[str, str]]:
    place = yaml_folder / pattern
    search = _Search(where, suffix, yaml_folder, frozenset(PurePosixPath(pattern).parts))
    names: list[str] = []
    if place.is_file():
        search.files.add(Path(pattern).as_posix())
    elif place.is_dir():
        search.below(pattern)
    else:
        _refuse_unreadable_folders(pattern, yaml_folder)
        # Path.glob knows neither absolute patterns nor `..`.
        names = sorted(glob.glob(pattern, root_dir=yaml_folder, recursive=True))  # noqa: PTH207
        for name in names:
            search.take(name)
    if not search.files:
        raise ConfigurationError(f"{where}: {_why_nothing(place, names, search.passed_over, suffix)}")
    return search.current_files(), search.passed_over


def _refuse_unreadable_folders(pattern: str, yaml_folder: Path) -> None:
    """glob passes over what it may not look into; raises OSError there."""
    parts = PurePosixPath(pattern).parts
    for end, part in enumerate(parts):
        if glob.has_magic(part):
            above = str(PurePosixPath(*parts[:end])) if end else "."
            for name in glob.glob(above, root_dir=yaml_folder, recursive=True):  # noqa: PTH207
                if (yaml_folder / name).is_dir():
                    os.scandir(yaml_folder / name).close()


class _Search:
    """Collects the files of one key: `files` are to be read, `passed_over` are not, with the reason."""

    def __init__(self, where: str, suffix: str, yaml_folder: Path, named: frozenset[str]) -> None:
        self.where, self.suffix, self.yaml_folder, self.named = where, suffix, yaml_folder, named
        self.files: set[str] = set()
        self.passed_over: dict[str, str] = {}
        self.searched: dict[Path, str] = {}  # a folder, links followed -> the name by which it was searched

    def take(self, name: str) -> None:
        """Something that a glob found."""
        parts = PurePosixPath(name).parts
        for end, part in enumerate(parts, 1):
            above = "/".join(parts[:end]).replace("//", "/")
            if self._is_aside(part) and (end < len(parts) or (self.yaml_folder / name).is_dir()):
                self._pass_over_folder(above)
                return
        if (self.yaml_folder / name).is_dir():
            self.below(name)
        else:
            self._take_file(PurePosixPath(name).as_posix(), named_by_pattern=True)

    def below(self, name: str) -> None:
        """A folder and all below it, once by whatever links it is reached: they may lead back, or to each other."""
        waiting = deque([name])
        while waiting:
            name = waiting.popleft()
            place = self.yaml_folder / name
            if (first := self.searched.setdefault(place.resolve(), name)) != name:
                self.passed_over[name] = f"the same folder as {first}"
                continue
            for entry in os.scandir(place):
                child = (PurePosixPath(name) / entry.name).as_posix()
                if not (self.yaml_folder / child).is_dir():
                    self._take_file(child)
                elif self._is_aside(entry.name):
                    self._pass_over_folder(child)
                elif entry.is_symlink():  # after all others: a folder is known by its own name
                    waiting.append(child)
                else:
                    waiting.appendleft(child)

    def current_files(self) -> dict[str, delta.Partition]:
        """`files` in order, without those that a Delta table has given up, and what its log says of the others."""
        current: dict[str, dict[Path, delta.Partition]] = {}
        partitions: dict[str, delta.Partition] = {}
        for name in sorted(self.files):
            for folder in PurePosixPath(name).parents:
                table = self.yaml_folder / folder
                if not (table / delta.LOG_FOLDER).is_dir():
                    continue
                if str(folder) not in current:
                    current[str(folder)] = delta.current_files(self.where, table)
                if self.yaml_folder / name in current[str(folder)]:
                    partitions[name] = current[str(folder)][self.yaml_folder / name]
                else:
                    self.files.discard(name)
                    self.passed_over[name] = f"the log of the Delta table {folder} does not name it any more"
                break
        if not self.files:
            raise ConfigurationError(
                f"{self.where}: none of the {len(self.passed_over)} file(s) found is part of its Delta table any more, "
                "as the log says: the table is empty"
            )
        return {name: partitions.get(name, ()) for name in sorted(self.files)}

    def _is_aside(self, folder: str) -> bool:
        return folder.startswith(("_", ".")) and folder not in self.named and folder not in (".", "..")

    def _pass_over_folder(self, name: str) -> None:
        if any(path.name.lower().endswith(self.suffix) for path in (self.yaml_folder / name).rglob("*")):
            self.passed_over[name] = (
                "a folder whose name starts with `_` or `.`, where Spark, Delta and unfinished jobs keep what is no "
                "data; named in the YAML, it is read"
            )

    def _take_file(self, name: str, *, named_by_pattern: bool = False) -> None:
        path = self.yaml_folder / name
        if not is_unicode(name):
            raise ConfigurationError(f"{self.where}: the name of {name!a} is not UTF-8. Rename the file")
        hidden = path.name.startswith(".") and path.name not in self.named
        if not hidden and path.is_symlink() and not path.exists():
            raise ConfigurationError(
                f"{self.where}: {path} is a link to {path.readlink()}, which is not there. Bring it back (a disk that "
                "is not mounted, a file that is not fetched?), or delete the link"
            )
        if not path.name.lower().endswith(self.suffix):
            if not path.name.startswith((".", "_")) and (named_by_pattern or _is_data(path)):
                self.passed_over[name] = f"not a {self.suffix} file"
        elif hidden:
            self.passed_over[name] = "a hidden file, as programs write them until they are whole"
        elif path.is_file():
            self.files.add(name)
        else:
            raise ConfigurationError(f"{self.where}: {path} is no file but a pipe, socket or device. Move it elsewhere")


def is_unicode(name: str) -> bool:
    """Whether a name of a file is UTF-8: Python has surrogates for the bytes that are not."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _is_data(path: Path) -> bool:
    return any(suffix.lower() in DATA_SUFFIXES for suffix in path.suffixes)


def _folder(place: Path) -> Path:
    """The part of a pattern before its first wildcard, without the file's name."""
    while glob.has_magic(str(place)) or place.suffix in (PARQUET, JSONL):
        place = place.parent
    return place


def _why_nothing(place: Path, matched: Sequence[str], passed_over: Mapping[str, str], suffix: str) -> str:
    if passed_over:
        first = next(iter(passed_over))
        return (
            f"{place} names {len(passed_over)} file(s) or folder(s), none of which is read (first: {first}, "
            f"{passed_over[first]}). Expected at least one {suffix} file"
        )
    if place.is_dir():
        return f"the folder {place} holds no {suffix} file. Put the raw files there, or name another folder"
    if matched:
        return f"{place} matches {len(matched)} folder(s), none of which holds a {suffix} file (first: {matched[0]})"
    if place.exists():
        return f"{place} is no file but a pipe, socket or device. Expected a {suffix} file"
    if place.is_symlink():
        return f"{place} is a link to {place.readlink()}, which is not there"
    if glob.has_magic(str(place)):
        return f"no file matches {place}. Expected at least one {suffix} file; paths are relative to the YAML file"
    return (
        f"no such file or folder: {place}. Expected a {suffix} file, a folder of them or a glob, relative to the "
        "YAML file"
    )


def _will_be_built(settings: SourceSettings, yaml_folder: Path, pattern: str) -> bool:
    if settings.script_output is None:
        return False
    built = (yaml_folder / settings.script_output).absolute()
    return (yaml_folder / pattern).absolute().is_relative_to(built)
