"""Running the script that builds a pipeline's raw files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from embed_pipeline.errors import ConfigurationError, SourceError
from embed_pipeline.settings import SourceSettings

STDERR_LINES = 20


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
    wrote is gone then, and until then it stays as it is. Raises ConfigurationError when `script_output` holds more than
    such a script's files, SourceError when the script fails (with its exit code and the last lines of stderr), writes
    nothing, or its folder cannot take that place.
    """
    if settings.script is None or settings.script_output is None:
        return
    script = yaml_folder / settings.script
    # A link stays, and the folder it leads to is replaced.
    output = (yaml_folder / settings.script_output).resolve()
    _refuse_shared_folder(settings.where, output, script, yaml_folder)
    # Hidden, so that no pattern finds its files, and on the same disk, so that it can be renamed.
    fresh = _beside(output)
    fresh.mkdir(parents=True)
    try:
        _run(settings.where, script, fresh, output)
        _put_in_place(settings.where, fresh, output)
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


def _put_in_place(where: str, fresh: Path, output: Path) -> None:
    old = _beside(output)
    try:
        with suppress(FileNotFoundError):
            output.rename(old)
        fresh.rename(output)
    except OSError as error:
        if old.exists() and not output.exists():
            old.rename(output)
        raise SourceError(
            f"{where}.script_output: {output} cannot be replaced by what the script wrote: {error}. Another run may "
            "have built it at the same time: run again when it is finished"
        ) from error
    finally:
        # Where nothing stands in its place, it could not be put back, and is all there is.
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)


def _beside(output: Path) -> Path:
    return output.with_name(f".{output.name}-{uuid4().hex[:12]}")
