"""Running the script that builds a pipeline's raw files, and replacing what it built before, but nothing else."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from embed_pipeline.disk import plain_disk_errors
from embed_pipeline.errors import ConfigurationError, SourceError
from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources.check import is_unicode

logger = logging.getLogger(__name__)

STDERR_LINES = 20
SHOWN = 5


class _Written(BaseModel):
    """A file (or a link, which is not followed) as the script left it."""

    model_config = ConfigDict(frozen=True)

    name: str  # relative to the folder, forward slashes
    what: Literal["file", "link"]
    bytes: int
    modified_ns: int
    sha256: str  # of the content; of a link, of where it leads to


class _List(BaseModel):
    """What a script wrote into a folder: this may be deleted from it, and nothing else.

    It is kept in the store. In the folder it could be delivered with the data, and tell what to delete.
    """

    model_config = ConfigDict(frozen=True)

    folder: str
    script: str
    written: tuple[_Written, ...]


def run_scripts(sources: Sequence[SourceSettings], yaml_folder: Path, lists: Path) -> None:
    """`run_script` for each source; one script that builds the same folder for several runs once."""
    built: set[Path] = set()
    for source in sources:
        output = (yaml_folder / source.script_output).resolve() if source.script_output is not None else None
        if output is not None and output not in built:
            built.add(output)
            run_script(source, yaml_folder, lists)


def run_script(settings: SourceSettings, yaml_folder: Path, lists: Path) -> None:
    """Run `python script OUTPUT_FOLDER` with this Python, if the source has a script; what it prints is shown.

    The script gets an empty folder, which takes the place of `script_output` once it has succeeded: what an older run
    wrote is gone then, and until then it stays as it is. Only what this script wrote, and nobody changed since, is ever
    deleted; `lists`, a folder of the store, holds a list of it for each folder.

    Raises ConfigurationError when `script_output` holds anything else or lies in the store, SourceError when the script
    fails (with its exit code and the last lines of stderr), writes nothing, or its folder cannot take that place.
    """
    if settings.script is None or settings.script_output is None:
        return
    script = (yaml_folder / settings.script).resolve()
    # A link stays, and the folder it leads to is replaced.
    output = (yaml_folder / settings.script_output).resolve()
    store = lists.resolve().parent
    if output.is_relative_to(store):
        raise ConfigurationError(
            f"{settings.where}.script_output: {output} lies in the store {store}, which holds versions and no raw "
            "files. Name a folder elsewhere"
        )
    _refuse_shared_folder(
        settings.where, output, {"the YAML file": yaml_folder, "the script": script, "the store": store}
    )
    own = lists / f"{hashlib.sha256(os.fsencode(output)).hexdigest()}.json"
    _refuse_foreign_files(settings.where, output, output, script, own)
    # Hidden, so that no pattern finds its files, and on the same disk, so that it can be renamed.
    fresh = _beside(output)
    try:
        fresh.mkdir(parents=True)
    except OSError as error:
        raise SourceError(
            f"{settings.where}.script_output: no folder can be made beside {output}: {error.strerror}. Name a folder "
            "in a place that can be written to"
        ) from error
    try:
        _run(settings.where, script, fresh, output)
        written = tuple(_written(path, fresh) for path in sorted(_files_in(fresh)))
        _put_in_place(settings.where, fresh, output, script, written, own)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _refuse_shared_folder(where: str, output: Path, others: Mapping[str, Path]) -> None:
    for what, place in others.items():
        if place.resolve().is_relative_to(output):
            raise ConfigurationError(
                f"{where}.script_output: {output} holds {what}, and all of the folder is replaced by what the script "
                "writes. Name a folder of its own, such as `raw`"
            )
    if output.exists() and (output.is_mount() or not output.is_dir()):
        raise ConfigurationError(
            f"{where}.script_output: {output} is {'a mount point' if output.is_mount() else 'no folder'}, which cannot "
            "be replaced by what the script writes. Name a folder below it"
        )


def _refuse_foreign_files(where: str, folder: Path, output: Path, script: Path, own: Path) -> None:
    """`folder` is `output` or what stood there; it may hold what `script` wrote there before, and nothing else."""
    known = _read_list(own, output)
    files = [*_files_in(folder)]
    if files and known is not None and known.script != str(script):
        raise ConfigurationError(
            f"{where}.script_output: {output} was built by another script, {known.script}, and {script} would replace "
            f"it. Name a folder of its own. If the other script is no longer used, delete {output}; nothing was deleted"
        )
    ours = {*_ours(files, folder, known)}
    foreign = sorted(path.relative_to(folder).as_posix() for path in files if path not in ours)
    if foreign:
        names = ", ".join(ascii(name) if not name.isprintable() else name for name in foreign[:SHOWN])
        names += f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
        raise ConfigurationError(
            f"{where}.script_output: {output} holds {len(foreign)} file(s) that {script.name} did not write for this "
            f"store, or that were changed since: {names}. All of the folder is replaced by what the script writes, so "
            "they would be lost. Nothing was deleted. Name a folder of its own, or move these files elsewhere; what "
            "can be built again may be deleted"
        )


def _ours(files: Sequence[Path], folder: Path, known: _List | None) -> Iterator[Path]:
    """Those of the files in `folder` that are as the list says."""
    listed: dict[str, list[_Written]] = {}
    for written in known.written if known is not None else ():
        listed.setdefault(written.name, []).append(written)
    for path in files:
        if any(_as_written(path, written) for written in listed.get(path.relative_to(folder).as_posix(), ())):
            yield path


def _files_in(folder: Path) -> Iterator[Path]:
    """All that is no folder, below `folder`. Raises SourceError where a folder cannot be read."""

    def fail(error: OSError) -> None:
        raise SourceError(f"{error.filename} cannot be looked into: {error.strerror}") from error

    for place, folders, files in os.walk(folder, onerror=fail) if folder.is_dir() else ():
        linked = [name for name in folders if Path(place, name).is_symlink()]
        yield from (Path(place, name) for name in (*files, *linked))


def _as_written(path: Path, written: _Written) -> bool:
    found = path.lstat()
    if (found.st_size, found.st_mtime_ns) == (written.bytes, written.modified_ns):
        return path.is_symlink() == (written.what == "link")
    # Copied to another place, the same file has another time.
    return found.st_size == written.bytes and _written(path, path.parent).sha256 == written.sha256


def _written(path: Path, folder: Path) -> _Written:
    found = path.lstat()
    name = path.relative_to(folder).as_posix()
    if not is_unicode(name):
        raise SourceError(f"{path.parent} has a file whose name is not UTF-8: {path.name!a}. Let the script name it so")
    if path.is_symlink():
        what, digest = "link", hashlib.sha256(os.fsencode(path.readlink())).hexdigest()
    elif path.is_file():
        with path.open("rb") as stream:
            what, digest = "file", hashlib.file_digest(stream, "sha256").hexdigest()
    else:
        raise SourceError(f"{path} is no file, folder or link. Let the script write files")
    return _Written(
        name=name,
        what=what,
        bytes=found.st_size,
        modified_ns=found.st_mtime_ns,
        sha256=digest,
    )


def _read_list(own: Path, output: Path) -> _List | None:
    """None where there is none, or none that can be understood: then nothing in the folder is known to be ours."""
    try:
        found = _List.model_validate_json(own.read_bytes())
    except (OSError, ValidationError):
        return None
    return found if found.folder == str(output) else None


def _write_list(own: Path, told: _List) -> None:
    with plain_disk_errors(own.parent):
        own.parent.mkdir(parents=True, exist_ok=True)
        partial = own.with_name(f".{own.name}-{uuid4().hex[:12]}")
        try:
            partial.write_text(told.model_dump_json(indent=2) + "\n", encoding="utf-8")
            partial.replace(own)
        finally:
            partial.unlink(missing_ok=True)


def _run(where: str, script: Path, fresh: Path, output: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script), str(fresh)], stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    )
    if done.returncode != 0:
        tail = "\n".join(done.stderr.splitlines()[-STDERR_LINES:]) or "(it wrote nothing to stderr)"
        raise SourceError(
            f"{where}.script: {script} failed with exit code {done.returncode}; {output} is as it was. Run it by hand "
            f"to mend it: python {script} SOME_FOLDER\n{tail}"
        )
    if not any(fresh.iterdir()):
        raise SourceError(
            f"{where}.script: {script} wrote nothing to the folder that is its first argument; {output} is as it was. "
            "Let it write its files there, to sys.argv[1]"
        )


def _put_in_place(
    where: str, fresh: Path, output: Path, script: Path, written: tuple[_Written, ...], own: Path
) -> None:
    old = _beside(output)
    try:
        with suppress(FileNotFoundError):
            output.rename(old)
        # The script may have run for hours: what came meanwhile is not ours to delete either.
        _refuse_foreign_files(where, old, output, script, own)
        before = known.written if old.exists() and (known := _read_list(own, output)) is not None else ()
        # Both are listed while either may lie there: this process can be killed at any moment.
        _write_list(own, _List(folder=str(output), script=str(script), written=(*before, *written)))
        fresh.rename(output)
    except OSError as error:
        raise SourceError(
            f"{where}.script_output: {output} cannot be replaced by what the script wrote: {error}. Another run may "
            "have built it at the same time: run again when it is finished"
        ) from error
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
        elif old.exists():
            _delete_ours(old, _read_list(own, output))
    _write_list(own, _List(folder=str(output), script=str(script), written=written))


def _delete_ours(old: Path, known: _List | None) -> None:
    # What is found there is compared with the list: a name in a list is never a place to delete from.
    for path in _ours([*_files_in(old)], old, known):
        with suppress(OSError):
            path.unlink()
    for place, _, _ in os.walk(old, topdown=False):
        with suppress(OSError):  # not empty
            Path(place).rmdir()
    if old.exists():
        logger.warning("%s keeps files that came while the folder was replaced: they are not the script's", old)


def _beside(output: Path) -> Path:
    return output.with_name(f".{output.name}-{uuid4().hex[:12]}")
