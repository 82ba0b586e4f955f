"""A process of a training ends with its exit code, whatever becomes of its last words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")  # takes nothing: every write is one to a full disk


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("body", "code"), [("print('done')", 0), ("raise ValueError('broken')", 1), ("sys.exit(3)", 3)]
)
def test_last_words_that_cannot_be_written_change_nothing(body: str, code: int) -> None:
    program = f"""
import sys
from embed_pipeline.launch.ending import run_and_leave

def main():
    {body}

run_and_leave(main)
"""
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    with FULL.open("w") as full:
        ended = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full, timeout=60, env=env)
    assert ended.returncode == code
