"""`make ui`, `make mlflow` and `embed-pipeline join` listen on loopback at most; compose.yaml: test_files.py."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from tests.deployment.deployment_files import REPOSITORY
from tests.deployment.started_services import free_port
from tests.listening import LOOPBACK, descendants, watched

SECONDS = 180


def command_of(target: str, home: Path) -> list[str]:
    """What `make TARGET` runs, after its set-up."""
    told = subprocess.run(
        [
            "make",
            "--dry-run",
            "--no-print-directory",  # which make tells where it was started by another make
            "--assume-old=setup",
            target,
            f"BIN={Path(sys.executable).parent}",
            f"DAGSTER_HOME={home}",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(told.stdout.splitlines()[-1])


@contextmanager
def started(command: list[str], folder: Path, **variables: str) -> Iterator[psutil.Popen]:
    with (folder / "log").open("w") as log:
        process = psutil.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "DAGSTER_HOME": str(folder), **variables},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        family = [*process.children(recursive=True), process]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for one in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(alive, timeout=20)


@pytest.mark.services
@pytest.mark.parametrize(("target", "page"), [("ui", "server_info"), ("mlflow", "health")])
def test_a_service_of_the_makefile_listens_on_loopback(target: str, page: str, tmp_path: Path) -> None:
    port = free_port()
    command = [*command_of(target, tmp_path), "--port", str(port)]
    with watched(f"make {target}") as seen, started(command, tmp_path) as process:
        deadline = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/{page}", timeout=10) as answer:
                assert answer.status == 200
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        looked_at = {one.pid for one in descendants()}
        seen.look(descendants())  # once more, now that everything is there
    assert process.pid in looked_at
    assert seen.addresses.keys() & LOOPBACK


def test_a_waiting_node_listens_nowhere(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("embed-pipeline")), "join", "shop"]
    with watched("join") as seen, started(command, tmp_path, EMBED_PIPELINE_STORE=str(tmp_path)) as process:
        deadline = time.monotonic() + SECONDS
        while "waiting for jobs of shop" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        seen.look([process])
    assert any("join shop" in one for one in seen.processes)
    assert not seen.addresses
