"""Running the script that builds a pipeline's raw files, and replacing what it built before, but nothing else."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from embed_pipeline.errors import ConfigurationError, SourceError
from embed_pipeline.settings import SourceSettings

logger = logging.getLogger(__name__)

STDERR_LINES = 20
SHOWN = 5
# Hidden, so that no pattern reads it. It goes with the folder when that is moved or copied.
MARKER = ".written-by-script.json"


class _Written(BaseModel):
    """A file (or a link, which is not followed) as the script left it."""

    model_config = ConfigDict(frozen=True)

    name: str  # relative to the folder, forward slashes
    what: Literal["file", "link"]
    bytes: int
    modified_ns: int
    sha256: str  # of the content; of a link, of where it leads to


class _Marker(BaseModel):
    """What a script wrote into the folder that holds the marker: this may be deleted, and nothing else."""

    model_config = ConfigDict(frozen=True)

    script: str  # relative to the folder, so that both can be moved together
    written: tuple[_Written, ...]


def run_scripts(sources: Sequence[SourceSettings], yaml_folder: Path) -> None:
    """`run_script` for each source; one script that builds the same folder for several runs once."""
    built: set[Path] = set()
    for source in sources:
        output = (yaml_folder / source.script_output).resolve() if source.script_output is not None else None
        if output is not None and output not in built:
            built.add(output)
            run_script(source, yaml_folder)


def run_script(settings: SourceSettings, yaml_folder: Path) -> None:
    """Run `python script OUTPUT_FOLDER` with this Python, if the source has a script; what it prints is shown.

    The script gets an empty folder, which takes the place of `script_output` once it has succeeded: what an older run
    wrote is gone then, and until then it stays as it is. Only what this script wrote, and nobody changed since, is ever
    deleted; a file in the folder, `.written-by-script.json`, lists it.

    Raises ConfigurationError when `script_output` holds anything else, SourceError when the script fails (with its exit
    code and the last lines of stderr), writes nothing, or its folder cannot take that place.
    """
    if settings.script is None or settings.script_output is None:
        return
    script = yaml_folder / settings.script
    # A link stays, and the folder it leads to is replaced.
    output = (yaml_folder / settings.script_output).resolve()
    _refuse_shared_folder(settings.where, output, script, yaml_folder)
    _refuse_foreign_files(settings.where, output, output, script)
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
        _mark(fresh, output, script)
        _put_in_place(settings.where, fresh, output, script)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _refuse_shared_folder(where: str, output: Path, script: Path, yaml_folder: Path) -> None:
    for what, place in (("the YAML file", yaml_folder), ("the script", script)):
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


def _refuse_foreign_files(where: str, folder: Path, output: Path, script: Path) -> None:
    """`folder` is `output` or what stood there; it may hold what `script` wrote there before, and nothing else."""
    marker = _read_marker(folder)
    ours = _relative(script, output)
    if marker is not None and marker.script != ours:
        raise ConfigurationError(
            f"{where}.script_output: {output} was built by another script, {marker.script} (seen from there), and "
            f"{ours} would replace it. Name a folder of its own. If the other script is no longer used, delete "
            f"{output}; nothing was deleted"
        )
    foreign = sorted(_foreign(folder, marker))
    if foreign:
        names = ", ".join(foreign[:SHOWN]) + (f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else "")
        raise ConfigurationError(
            f"{where}.script_output: {output} holds {len(foreign)} file(s) that {script.name} did not write, or that "
            f"were changed since: {names}. All of the folder is replaced by what the script writes, so they would be "
            "lost. Nothing was deleted. Name a folder of its own, or move these files elsewhere; what can be built "
            "again may be deleted"
        )


def _foreign(folder: Path, marker: _Marker | None) -> Iterator[str]:
    known = {written.name: written for written in marker.written} if marker is not None else {}
    for path in _files_in(folder):
        name = path.relative_to(folder).as_posix()
        if name not in known or not _as_written(path, known[name]):
            yield name


def _files_in(folder: Path) -> Iterator[Path]:
    """All that is no folder, below `folder`, but for the marker. Raises SourceError where a folder cannot be read."""

    def fail(error: OSError) -> None:
        raise SourceError(f"{error.filename} cannot be looked into: {error.strerror}") from error

    for place, folders, files in os.walk(folder, onerror=fail) if folder.is_dir() else ():
        linked = [name for name in folders if Path(place, name).is_symlink()]
        yield from (path for name in (*files, *linked) if (path := Path(place, name)) != folder / MARKER)


def _as_written(path: Path, written: _Written) -> bool:
    found = path.lstat()
    if (found.st_size, found.st_mtime_ns) == (written.bytes, written.modified_ns):
        return path.is_symlink() == (written.what == "link")
    # Copied to another place, the same file has another time.
    return found.st_size == written.bytes and _written(path, path.parent).sha256 == written.sha256


def _written(path: Path, folder: Path) -> _Written:
    found = path.lstat()
    if path.is_symlink():
        what, digest = "link", hashlib.sha256(os.fsencode(path.readlink())).hexdigest()
    elif path.is_file():
        with path.open("rb") as stream:
            what, digest = "file", hashlib.file_digest(stream, "sha256").hexdigest()
    else:
        raise SourceError(f"{path} is no file, folder or link. Let the script write files")
    return _Written(
        name=path.relative_to(folder).as_posix(),
        what=what,
        bytes=found.st_size,
        modified_ns=found.st_mtime_ns,
        sha256=digest,
    )


def _mark(fresh: Path, output: Path, script: Path) -> None:
    written = tuple(_written(path, fresh) for path in sorted(_files_in(fresh)))
    (fresh / MARKER).write_text(
        _Marker(script=_relative(script, output), written=written).model_dump_json(indent=2) + "\n", encoding="utf-8"
    )


def _read_marker(folder: Path) -> _Marker | None:
    """None where there is none, or none that can be understood: then nothing in the folder is known to be ours."""
    try:
        return _Marker.model_validate_json((folder / MARKER).read_bytes())
    except (OSError, ValidationError):
        return None


def _relative(script: Path, output: Path) -> str:
    return Path(os.path.relpath(script.resolve(), output)).as_posix()


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


def _put_in_place(where: str, fresh: Path, output: Path, script: Path) -> None:
    old = _beside(output)
    try:
        with suppress(FileNotFoundError):
            output.rename(old)
        # The script may have run for hours: what came meanwhile is not ours to delete either.
        _refuse_foreign_files(where, old, output, script)
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
            _delete_written(old)


def _delete_written(old: Path) -> None:
    marker = _read_marker(old)
    for written in marker.written if marker is not None else ():
        with suppress(OSError):
            (old / written.name).unlink()
    with suppress(OSError):
        (old / MARKER).unlink()
    for place, _, _ in os.walk(old, topdown=False):
        with suppress(OSError):  # not empty
            Path(place).rmdir()
    if old.exists():
        logger.warning("%s keeps files that came while the folder was replaced: they are not the script's", old)


def _beside(output: Path) -> Path:
    return output.with_name(f".{output.name}-{uuid4().hex[:12]}")
