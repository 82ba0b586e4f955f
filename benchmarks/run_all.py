"""Runs every benchmark and renews the table in README.md: `make benchmarks`.

Each writes its figures to results/<its name>.json. One whose claim does not hold, or that fails, does not keep the
others from running. On two cores all of it takes about two hours; let nothing else run beside it. `--quick` shows in
some minutes that all run, in results/quick/, and leaves the table alone, because its figures mean nothing. `--table`
only renews the table. `--intents` is handed to mining_speed.py.

    python benchmarks/run_all.py [--only NAME ...] [--intents FILE] [--quick] [--table]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README, RESULTS = HERE / "README.md", HERE / "results"
BENCHMARKS = ("training_speed", "encoding_speed", "mining_speed", "orchestration_overhead")
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--intents", type=Path, help="a CSV file with complete judgements")
    parser.add_argument("--quick", action="store_true", help="do all run at all")
    parser.add_argument("--table", action="store_true", help="run nothing, only renew the table")
    given = parser.parse_args()
    failed = [] if given.table else run(given.only, given.intents, quick=given.quick)
    if not given.quick:
        README.write_text(with_table(README.read_text(), table(RESULTS)))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def run(names: Sequence[str], intents: Path | None, *, quick: bool) -> list[str]:
    """The names of those that left no figures."""
    folder = RESULTS / "quick" if quick else RESULTS
    failed = []
    for name in names:
        result = folder / f"{name}.json"
        result.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(result)]
        command += ["--quick"] if quick else []
        command += ["--intents", str(intents.resolve())] if intents is not None and name == "mining_speed" else []
        print(f"=== {name}", flush=True)
        subprocess.run(command)  # exits with 1 where a claim does not hold, which the table says
        if not result.is_file():
            failed.append(name)
    return failed


def table(results: Path) -> str:
    """The claims of all results in a folder, with the machine of each."""
    lines = ["| claim | measured | goal | holds |", "|---|---|---|---|"]
    machines: dict[str, list[str]] = {}
    for name in (*BENCHMARKS, "gpu_check"):
        path = results / f"{name}.json"
        told = json.loads(path.read_text()) if path.is_file() else None
        if told is None or told["quick"]:
            lines.append(f"| {name}.py | not measured yet | | |")
            continue
        machines.setdefault(machine(told["machine"]), []).append(name)
        lines += [row(claim) for claim in told["claims"]]
    measured_on = [f"- {', '.join(names)}: {told}" for told, names in machines.items()]
    return "\n".join([*lines, "", *measured_on]).rstrip()


def row(claim: dict[str, Any]) -> str:
    bound = "at most" if claim["at_most"] else "at least"
    holds = "yes" if claim["holds"] else "**no**"
    return f"| {claim['what']} | {claim['ratio']:.2f} | {bound} {claim['goal']:.2f} | {holds} |"


def machine(told: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    return f"{told['gpu'] or told['processor']}, {told['cores']} cores, {versions}"


def with_table(readme: str, rendered: str) -> str:
    """`readme` with what stands between the two marks replaced. Raises ValueError where a mark is missing."""
    begin, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return f"{readme[:begin]}\n{rendered}\n{readme[end:]}"


if __name__ == "__main__":
    main()
