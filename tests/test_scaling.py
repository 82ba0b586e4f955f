"""The tables of benchmarks/README.md are those that benchmarks/scaling.py prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_the_tables_are_what_the_formulas_give() -> None:
    command = [sys.executable, str(BENCHMARKS / "scaling.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    told = (BENCHMARKS / "README.md").read_text().splitlines()
    assert len(printed) > 20
    assert [line for line in printed if line not in told] == []
