"""Where the figures of a training go while it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from embed_pipeline.errors import TrainingError


def test_dagster_gets_every_event_as_a_message_and_the_file_too(tmp_path: Path) -> None:
    from dagster_pipes import encode_param

    context = {"asset_keys": None, "code_version_by_asset_key": None, "provenance_by_asset_key": None,
               "partition_key": None, "partition_key_range": None, "partition_time_window": None, "run_id": "r",
               "job_name": None, "retry_number": 0, "extras": {}}  # fmt: skip
    (tmp_path / "context.json").write_text(json.dumps(context))
    messages = tmp_path / "messages.jsonl"
    code = (
        "import sys; from pathlib import Path; from embed_pipeline.training.reporting import open_reporter\n"
        "with open_reporter(Path(sys.argv[1])) as reporter: reporter.report(7, {'loss': 0.5})\n"
        "assert 'torch' not in sys.modules and 'mlflow' not in sys.modules"
    )
    environment = {
        "PATH": "",
        "DAGSTER_PIPES_CONTEXT": encode_param({"path": str(tmp_path / "context.json")}),
        "DAGSTER_PIPES_MESSAGES": encode_param({"path": str(messages)}),
    }
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)

    sent = [json.loads(line) for line in messages.read_text().splitlines()]
    payloads = [message["params"]["payload"] for message in sent if message["method"] == "report_custom_message"]
    assert payloads == [{"type": "metrics", "step": 7, "metrics": {"loss": 0.5}}]
    (row,) = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert (row["step"], row["loss"]) == (7, 0.5)
    assert row["seconds"] >= 0


def test_ranks_that_trained_alone_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from embed_pipeline.training.process import check_same_weights

    def of_all(mine: list[float]) -> list[list[float]]:
        return [mine, mine, [value + 1e-9 for value in mine]]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("embed_pipeline.training.process.from_all", of_all)
    with pytest.raises(TrainingError, match=r"ranks \[2\] ended with other weights than rank 0"):
        check_same_weights(torch.nn.Linear(3, 2))
