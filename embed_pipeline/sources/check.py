"""Which files a pipeline's YAML names, and whether they can be there at all."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embed_pipeline.errors import ConfigurationError
from embed_pipeline.settings import SourceSettings

Key = Literal["path", "corpus", "queries", "qrels", "extra_corpus"]
KEYS: tuple[Key, ...] = ("path", "corpus", "queries", "qrels", "extra_corpus")
PARQUET, JSONL = ".parquet", ".jsonl"


@dataclass(frozen=True)
class SourceFile:
    """One raw file: the YAML key that names it, the name its rows carry, and where it lies."""

    key: Key
    name: str
    path: Path


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
    ConfigurationError naming the key, the place looked at and the fix. Opens no file.
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
    """All raw files in the order their rows are read: by key, then by name.

    Names are relative to the YAML's folder with forward slashes (absolute where the YAML gives an absolute path), so
    they are the same on every machine. Raises ConfigurationError where a pattern matches nothing or two keys name the
    same file.
    """
    found = [file for key, pattern in _patterns(settings) for file in _find(settings, key, pattern, yaml_folder)]
    keys: dict[Path, SourceFile] = {}
    for file in found:
        other = keys.setdefault(file.path.resolve(), file)
        if other is not file:
            raise ConfigurationError(
                f"{settings.where}.{file.key} and {settings.where}.{other.key} both name {file.path}: its rows would "
                "be read twice. Narrow one of the two patterns"
            )
    return found


def _patterns(settings: SourceSettings) -> list[tuple[Key, str]]:
    return [(key, pattern) for key in KEYS if (pattern := getattr(settings, key)) is not None]


def _suffix(settings: SourceSettings, key: Key) -> str:
    return JSONL if settings.kind == "flag-embedding" and key == "path" else PARQUET


def _find(settings: SourceSettings, key: Key, pattern: str, yaml_folder: Path) -> list[SourceFile]:
    where, suffix = f"{settings.where}.{key}", _suffix(settings, key)
    if "://" in pattern:
        raise ConfigurationError(
            f"{where}: found '{pattern}', expected a local path. Copy the files, or mount the store they lie in"
        )
    place = yaml_folder / pattern
    if place.is_file():
        return [SourceFile(key, Path(pattern).as_posix(), place)]
    wanted = f"{glob.escape(pattern.rstrip('/'))}/**/*{suffix}" if place.is_dir() else pattern
    # Path.glob knows neither absolute patterns nor `..`.
    names = sorted(glob.glob(wanted, root_dir=yaml_folder, recursive=True))  # noqa: PTH207
    files = [name for name in names if name.endswith(suffix) and (yaml_folder / name).is_file()]
    if not files:
        raise ConfigurationError(f"{where}: {_why_nothing(place, names, suffix)}")
    return [SourceFile(key, Path(name).as_posix(), yaml_folder / name) for name in files]


def _folder(place: Path) -> Path:
    """The part of a pattern before its first wildcard, without the file's name."""
    while glob.has_magic(str(place)) or place.suffix in (PARQUET, JSONL):
        place = place.parent
    return place


def _why_nothing(place: Path, matched: list[str], suffix: str) -> str:
    if place.is_dir():
        return f"the folder {place} holds no {suffix} file. Put the raw files there, or name another folder"
    if matched:
        return f"{place} matches {len(matched)} file(s), none ending in {suffix} (first: {matched[0]})"
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
