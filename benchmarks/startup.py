"""Claim: what does little work starts at once, on two cores with nothing beside it.

- `embed-pipeline --help` and `embed-pipeline versions` take at most 0.3 s.
- The definitions of 50 pipelines load within 3 s, Dagster's own import included.
- A run of the whole DAG with nothing to do takes at most 15 s.
- A smoke test of the demo, everything made, takes at most 45 s.

Each is measured `--rounds` times in processes of its own, in a temporary home and on a copy of the demo's pipeline.
Prints the median of the wall time, and of the processor time of all processes, which a busy machine distorts less;
exits with 1 when the wall time of one is above its limit.

    python benchmarks/startup.py [--rounds 3] [--only commands load nothing_to_do smoke_test]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "embed_pipeline" / "defs" / "demo"
PIPELINES = 50
PR_SET_CHILD_SUBREAPER = 36  # from <linux/prctl.h>
WHOLE_DAG = ("-m", "dagster", "asset", "materialize", "-m", "embed_pipeline.definitions", "--select")
COMMAND = "import sys; from embed_pipeline.command_line import main; main(sys.argv[1:])"
LOAD = "from embed_pipeline.definitions import defs; defs()"


@dataclass(frozen=True)
class Seconds:
    wall: float
    processor: float


@dataclass(frozen=True)
class Measured:
    what: str
    limit: float | None  # seconds of wall time; None: shown for comparison
    rounds: Sequence[Seconds]

    @property
    def holds(self) -> bool:
        return self.limit is None or self.wall <= self.limit

    @property
    def wall(self) -> float:
        return statistics.median(one.wall for one in self.rounds)

    @property
    def line(self) -> str:
        processor = statistics.median(one.processor for one in self.rounds)
        limit = (
            "" if self.limit is None else f"   limit {self.limit:5.1f} s   {'holds' if self.holds else 'DOES NOT HOLD'}"
        )
        return f"{self.what:<46} {self.wall:6.2f} s   processor {processor:6.2f} s{limit}"


def main() -> None:
    parts: Mapping[str, Callable[[Path, int], list[Measured]]] = {
        "commands": commands,
        "load": load,
        "nothing_to_do": nothing_to_do,
        "smoke_test": smoke_test,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    arguments = parser.parse_args()
    if sys.platform == "linux":  # what a run leaves behind for a moment is waited for, and its time is counted
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    measured: list[Measured] = []
    for name in arguments.only:
        with tempfile.TemporaryDirectory(prefix="startup_") as folder:
            found = parts[name](Path(folder), arguments.rounds)
        for one in found:
            print(one.line, flush=True)
        measured += found
    sys.exit(not all(one.holds for one in measured))


def commands(folder: Path, rounds: int) -> list[Measured]:
    """The command line where there is nothing to show yet."""
    home = _home(folder)
    asked: dict[str, list[str]] = {"--help": ["--help"], "versions": ["versions"]}
    return [
        Measured(f"embed-pipeline {shown}", 0.3, [_timed(["-c", COMMAND, *given], home) for _ in range(rounds)])
        for shown, given in asked.items()
    ]


def load(folder: Path, rounds: int) -> list[Measured]:
    """Definitions of many pipelines as a code server loads them, beside the import that nobody can spare."""
    for number in range(PIPELINES):
        _pipeline(folder / "pipelines", f"p{number:02}")
    home = {**_home(folder), "EMBED_PIPELINE_DEFS": str(folder / "pipelines")}
    return [
        Measured("import dagster", None, [_timed(["-c", "import dagster"], home) for _ in range(rounds)]),
        Measured(f"definitions of {PIPELINES} pipelines", 3.0, [_timed(["-c", LOAD], home) for _ in range(rounds)]),
    ]


def nothing_to_do(folder: Path, rounds: int) -> list[Measured]:
    """The whole DAG again, after a first run that is not measured."""
    home, command = _smoke_test(folder)
    _timed(command, home)
    again = [_timed(command, home) for _ in range(rounds)]
    return [Measured("the whole DAG with nothing to do", 15.0, again)]


def smoke_test(folder: Path, rounds: int) -> list[Measured]:
    """The whole DAG from the first row to the champion, each time in a new home."""
    made = []
    for number in range(rounds):
        home, command = _smoke_test(folder / str(number))
        made.append(_timed(command, home))
    return [Measured("the smoke test of the demo", 45.0, made)]


def _smoke_test(folder: Path) -> tuple[dict[str, str], list[str]]:
    name = _pipeline(folder / "pipelines", "startup")
    asked = {"EMBED_PIPELINE_DEFS": str(folder / "pipelines"), "EMBED_PIPELINE_SMOKE_TEST": "1"}
    return {**_home(folder), **asked}, [*WHOLE_DAG, f'key:"{name}/*"']


def _pipeline(folder: Path, name: str) -> str:
    """The demo's pipeline under another name."""
    own = folder / name
    shutil.copytree(DEMO, own, ignore=shutil.ignore_patterns("raw", "__pycache__"))
    told = yaml.safe_load((own / "defs.yaml").read_text())
    told["attributes"]["name"] = name
    (own / "defs.yaml").write_text(yaml.safe_dump(told))
    return name


def _home(folder: Path) -> dict[str, str]:
    home = folder / "home"
    home.mkdir(parents=True)
    shutil.copy(REPOSITORY / "dagster_home" / "dagster.yaml", home)
    return {"DAGSTER_HOME": str(home)}


def _timed(arguments: Sequence[str], environment: Mapping[str, str]) -> Seconds:
    """One run of Python, all that it starts included."""
    others = ("EMBED_PIPELINE_", "MLFLOW_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, **environment},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wall = time.monotonic() - started
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stdout}")
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Seconds(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


if __name__ == "__main__":
    main()
