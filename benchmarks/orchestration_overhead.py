"""Claim: under Dagster and MLflow, the `embedder` asset takes at most 1.05 times the bare torchrun command.

Materializes the demo up to its hard negatives in a temporary home, then, in turn and `--rounds` times, the `embedder`
asset (from the start to the end of its step, as Dagster's event log has it) and the bare torchrun command on the same
job file. Prints both times of each round, whether both made the same weights, and the ratio of the medians; exits with
1 when the claim does not hold. `--quick` does it once with two steps.

    python benchmarks/orchestration_overhead.py [--rounds 2] [--max-steps N] [--json orchestration_overhead.json]
                                                [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import claims

GOAL = 1.05
REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--max-steps", type=int, help="shorter trainings than the demo's own (the overhead is constant)"
    )
    parser.add_argument("--json", type=Path, default=Path("orchestration_overhead.json"))
    parser.add_argument("--quick", action="store_true", help="one round of two steps: does it run at all")
    arguments = parser.parse_args()
    rounds, max_steps = (1, 2) if arguments.quick else (arguments.rounds, arguments.max_steps)
    with tempfile.TemporaryDirectory(prefix="orchestration_overhead_") as folder:
        home = Path(folder)
        shutil.copy(REPOSITORY / "dagster_home" / "dagster.yaml", home)
        os.environ["DAGSTER_HOME"] = str(home)
        os.environ.pop("EMBED_PIPELINE_STORE", None)
        if arguments.quick:
            os.environ["EMBED_PIPELINE_SMOKE_TEST"] = "1"  # a sample of the rows
        materialize("demo/raw_pairs,demo/cleaned_pairs,demo/hard_negatives", {})
        measured = [measure(home, max_steps) for _ in range(rounds)]
    for asset_seconds, bare_seconds in measured:
        print(f"asset {asset_seconds:7.1f} s   bare torchrun {bare_seconds:7.1f} s")
    ratio = statistics.median(asset for asset, _ in measured) / statistics.median(bare for _, bare in measured)
    claim = claims.Claim("embedder asset under Dagster and MLflow / bare torchrun, seconds", ratio, GOAL, at_most=True)
    print(claims.sentence(claim))
    told = [{"asset_seconds": asset, "bare_seconds": bare} for asset, bare in measured]
    claims.write(arguments.json, [claim], told, quick=arguments.quick)
    sys.exit(not claim.holds)


def measure(home: Path, max_steps: int | None) -> tuple[float, float]:
    """Seconds of the asset, seconds of the bare command."""
    from embed_pipeline.artifacts import PipelineStore, sha256_of, store_root

    store = PipelineStore(store_root(), "demo")
    if store.has_current("embedder"):
        store.remove(store.current("embedder"))
    config = {"ops": {"demo__embedder": {"config": {"max_steps": max_steps}}}} if max_steps else {}
    materialize("demo/embedder", config)
    asset_seconds = last_step_seconds("demo__embedder")
    embedder = store.current("embedder").path
    seconds = bare_seconds(json.loads((embedder / "job.json").read_text()), home / "bare")
    weights = Path("model") / "model.safetensors"
    print("same weights:", sha256_of(embedder / weights) == sha256_of(home / "bare" / weights))
    return asset_seconds, seconds


def materialize(selection: str, config: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "embed_pipeline.definitions"]
    subprocess.run([*command, "--select", selection, "--config-json", json.dumps(config)], check=True, cwd=REPOSITORY)


def last_step_seconds(step: str) -> float:
    import dagster as dg

    with dg.DagsterInstance.get() as instance:
        run = instance.get_runs(limit=1)[0]
        stats = next(s for s in instance.get_run_step_stats(run.run_id) if s.step_key == step)
    assert stats.start_time is not None
    assert stats.end_time is not None
    return stats.end_time - stats.start_time


def bare_seconds(job: dict[str, Any], folder: Path) -> float:
    from embed_pipeline.launch.torchrun import torchrun_command
    from embed_pipeline.training.job import EmbedderJob

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    job_file = folder / "job.json"
    job_file.write_text(json.dumps({**job, "output": str(folder)}))
    started = time.monotonic()
    subprocess.run(torchrun_command(EmbedderJob.entry_point, job_file, job["world_size"]), check=True)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
