"""Some minutes of faults with one seed; `python -m tests.fault_injection` takes others, and longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault_injection.__main__ import inject

MINUTES = 3.0


@pytest.mark.slow
def test_nothing_is_lost_or_published_by_halves_and_the_next_run_makes_the_same_bits(
    tmp_path: Path, tiny_bert_folder: Path
) -> None:
    assert inject(tmp_path / "work", tiny_bert_folder, seed=20261128, minutes=MINUTES) == []
