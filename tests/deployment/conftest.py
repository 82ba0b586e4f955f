"""The deployment's services, started on this machine with two small pipelines."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from tests.deployment.started_services import StartedServices, postgres_programs
from tests.orchestration.conftest import settings_of, write_pipeline

# Characters that break a connection string that was put together by hand.
PASSWORDS = {
    "POSTGRES_PASSWORD": "s'u$p@er",
    "DAGSTER_POSTGRES_PASSWORD": "d:a@g/s%t er",
    "MLFLOW_POSTGRES_PASSWORD": "m'l/f@low",
}
Start = Callable[..., AbstractContextManager[StartedServices]]


@pytest.fixture(scope="session")
def start(tiny_bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start every service with pipelines by name (their attributes that differ from the small one's), until left."""
    if postgres_programs() is None:
        pytest.skip("needs PostgreSQL's initdb and postgres: apt-get install postgresql")
    if os.geteuid() == 0 and "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        pytest.skip("needs the user postgres: PostgreSQL refuses to run as root")

    @contextmanager
    def started(pipelines: dict[str, dict[str, Any]], **variables: str) -> Iterator[StartedServices]:
        folder = tmp_path_factory.mktemp("deployed")
        for parent in takewhile(lambda path: not path.stat().st_mode & 0o001, (folder, *folder.parents)):
            parent.chmod(0o755)  # the user postgres has to reach its folder
        for name, changed in pipelines.items():
            write_pipeline(folder / "pipelines", {**settings_of(tiny_bert_folder), "name": name, **changed})
            (folder / "pipelines" / "small").rename(folder / "pipelines" / name)
        deployed = StartedServices(folder, {**PASSWORDS, "PIPELINES_FOLDER": str(folder / "pipelines"), **variables})
        try:
            deployed.start_all()
            yield deployed
        finally:
            deployed.stop_all()

    return started
