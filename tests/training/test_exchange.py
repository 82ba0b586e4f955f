"""What the ranks of a training exchange are numbers and text; a pickle that comes over the network runs nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from embed_pipeline.launch.local import run_local
from embed_pipeline.launch.torchrun import torchrun_command


def test_ranks_exchange_values_and_refuse_pickles(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = torchrun_command("exchange", tmp_path, 2, log_folder=tmp_path / "logs")
    run_local(command, env={"PYTHONPATH": path}, error_file=tmp_path / "error.json")
    for rank in (0, 1):
        told = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert [one["rank"] for one in told["from_all"]] == [0, 1]
        assert [one["exact"] for one in told["from_all"]] == [0.1, 1.1]
        assert all(math.isnan(one["not a number"]) and one["numpy"] == 0.5 for one in told["from_all"])
        assert told["from_main"]["rank"] == 0
        assert told["arrays"] == [0, 3]
        assert told["same bits"]
        assert "a library exchanges pickled objects" in told["refused"]
    assert not (tmp_path / "code-ran").exists()
