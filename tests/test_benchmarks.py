"""The benchmarks run, and their table says what was measured."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def run_all() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("run_all")


def test_the_table_is_that_of_the_results(run_all: ModuleType) -> None:
    readme = (BENCHMARKS / "README.md").read_text()
    assert readme == run_all.with_table(readme, run_all.table(BENCHMARKS / "results"))


def test_what_does_not_hold_is_said_plainly(run_all: ModuleType, tmp_path: Path) -> None:
    importlib.import_module("claims").write(
        tmp_path / "encoding_speed.json",
        [
            importlib.import_module("claims").Claim("slow / fast", 0.74, 1.0),
            importlib.import_module("claims").Claim("memory / theirs", 0.3, 1 / 3, at_most=True),
        ],
        {},
        quick=False,
    )
    importlib.import_module("claims").write(tmp_path / "mining_speed.json", [], {}, quick=True)
    lines = run_all.table(tmp_path).splitlines()
    assert "| slow / fast | 0.74 | at least 1.00 | **no** |" in lines
    assert "| memory / theirs | 0.30 | at most 0.33 | yes |" in lines
    for name in ("training_speed", "mining_speed"):  # one is not there, one was quick
        assert f"| {name}.py | not measured yet | | |" in lines
    assert any(line.startswith("- encoding_speed: ") and "torch 2" in line for line in lines)


def test_only_what_stands_between_the_marks_is_replaced(run_all: ModuleType) -> None:
    readme = f"before\n{run_all.BEGIN}\nold\n{run_all.END}\nafter\n"
    assert run_all.with_table(readme, "new") == readme.replace("old", "new")
    with pytest.raises(ValueError, match="substring not found"):
        run_all.with_table("no marks", "new")


@pytest.mark.slow
def test_the_gpu_check_runs_without_a_gpu(tmp_path: Path) -> None:
    """All but the tests, which are skipped here."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--device", "cpu", "--quick", "--skip-tests"]
    done = subprocess.run([*command, "--json", str(figures)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    measured = json.loads(figures.read_text())["measured"]
    assert [one["model"] for one in measured["training"]] == ["small", "base", "large"]
    assert all(0 < one["share_of_peak"] < 1 for one in (*measured["training"], *measured["encoding"]))
    assert all(one["peak_memory"] > 0 and one["forecast_memory"] > 0 for one in measured["training"])
    assert measured["search"]["pairs_a_second"] > 0
    assert "| base | 4 | " in done.stdout


def test_the_gpu_check_says_what_is_missing() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--skip-tests"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "--device cpu --quick shows that this script runs" in done.stderr
