"""Running the script that builds a pipeline's raw files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from embed_pipeline.errors import SourceError
from embed_pipeline.settings import SourceSettings

STDERR_LINES = 20


def run_script(settings: SourceSettings, yaml_folder: Path) -> None:
    """Run `python script OUTPUT_FOLDER` with this Python, if the source has a script; what it prints is shown.

    Raises SourceError with the exit code and the last lines of stderr when the script fails.
    """
    if settings.script is None or settings.script_output is None:
        return
    script, output = yaml_folder / settings.script, yaml_folder / settings.script_output
    output.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(script), str(output)], stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    )
    if done.returncode != 0:
        tail = "\n".join(done.stderr.splitlines()[-STDERR_LINES:]) or "(it wrote nothing to stderr)"
        raise SourceError(
            f"source.script: {script} failed with exit code {done.returncode}. Run it by hand to mend it: "
            f"python {script} {output}\n{tail}"
        )
