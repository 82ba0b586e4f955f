"""The services of compose.yaml as processes of this machine: same commands, variables, health checks and order.

Differences, all made here: ports are free ones, service names are 127.0.0.1, and what a container would find at a
path (a volume, what the image copied) lies under a folder of the test.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.deployment.deployment_files import DOCKER, REPOSITORY, Service, services

HOST = "127.0.0.1"
POSTGRES_FOLDER = "/var/lib/postgresql/data"


def postgres_programs() -> Path | None:
    """Where initdb and postgres are: on the PATH, or where Debian puts them."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return versions[-1].parent if versions else None


@dataclass
class StartedServices:
    """`folder` takes what volumes and containers would hold; `variables` are those of .env."""

    folder: Path
    variables: Mapping[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.services = services(self.variables)
        self.ports = {container_port(service): free_port() for service in self.services.values()}

    def start_all(self) -> None:
        """Start every service once what it depends on is healthy."""
        while waiting := [name for name in self.services if name not in self.processes]:
            for name in waiting:
                if all(needed in self.processes for needed in self.services[name].settings.get("depends_on", {})):
                    self.start(name)

    def start(self, name: str) -> None:
        """Start one service and wait until its health check passes."""
        service = self.services[name]
        if name == "postgres":
            self._start_postgres(service)
            return
        self._copy_into_image(service)
        self._run(name, self.translated(service.command), self.environment(service))
        self._wait_until_healthy(service)

    def stop(self, name: str) -> int:
        """As `docker compose stop`: SIGTERM, to the whole group where tini has -g; SIGKILL after the grace period."""
        process, service = self.processes.pop(name), self.services[name]
        send = os.killpg if service.image and "-g" in service.image.start else os.kill
        # Docker's image of Postgres names SIGINT as its stop signal.
        send(process.pid, signal.SIGINT if name == "postgres" else signal.SIGTERM)
        try:
            return process.wait(seconds(service.settings["stop_grace_period"]))
        finally:
            kill_session(process.pid)

    def kill(self, name: str) -> None:
        """As the kernel ends a container's processes when it runs out of memory: all at once, without a word."""
        kill_session(self.processes.pop(name).pid)

    def stop_all(self) -> None:
        for name in reversed(list(self.processes)):
            with suppress(subprocess.TimeoutExpired):
                self.stop(name)

    def address(self, name: str) -> str:
        """`http://127.0.0.1:port` of a service."""
        return f"http://{HOST}:{self.ports[container_port(self.services[name])]}"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def path(self, inside: str) -> Path:
        """Where the folder `inside` of a container lies."""
        return self.folder / "containers" / inside.lstrip("/")

    def environment(self, service: Service) -> dict[str, str]:
        """Nothing of this process's own, so that what a service needs must be in the files."""
        given = {key: self._translated_value(key, value) for key, value in service.environment.items()}
        programs = [str(Path(sys.executable).parent), "/usr/bin", "/bin"]
        return {"PATH": os.pathsep.join(programs), "HOME": str(self.folder), "HF_HUB_OFFLINE": "1", **given}

    def translated(self, command: Sequence[str]) -> list[str]:
        return [self._with_paths(self._with_ports(word)).replace("0.0.0.0", HOST) for word in command]

    def execute(self, name: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """As `docker compose exec`: a command in the container of a service."""
        service = self.services[name]
        where = self._working_directory(name)
        return subprocess.run(command, env=self.environment(service), cwd=where, capture_output=True, text=True)

    def query(self, sql: str, database: str) -> list[str]:
        """The lines that `sql` gives, as the superuser."""
        command = ["psql", "--no-psqlrc", "--tuples-only", "--no-align", "--dbname", database, "--command", sql]
        environment = {**os.environ, **self._superuser()}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def _run(self, name: str, command: Sequence[str], environment: Mapping[str, str], **options: Any) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                # A test suite in the background ignores SIGINT, and so would all its children; a container does not.
                ["env", "--default-signal", *command],
                env=dict(environment),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **{"cwd": self._working_directory(name), **options},
            )

    def _working_directory(self, name: str) -> Path:
        image = self.services[name].image
        if image is None:
            return self.folder
        inside = image.expand(image.all("WORKDIR")[-1])
        if name == "code":  # the checkout: `embed_pipeline` is installed from there, as in the image
            return REPOSITORY
        self.path(inside).mkdir(parents=True, exist_ok=True)
        return self.path(inside)

    def _copy_into_image(self, service: Service) -> None:
        """The configuration that the Dockerfile copies, and an empty folder for each volume."""
        assert service.image is not None
        for text in service.image.all("COPY"):
            *sources, target = service.image.expand(text).split()
            if target.startswith("/") and not text.startswith("--from"):
                self.path(target).mkdir(parents=True, exist_ok=True)
                for source in sources:
                    shutil.copy(REPOSITORY / source, self.path(target))
        for inside, source in service.mounts.items():
            if not source.startswith("/"):
                self.path(inside).mkdir(parents=True, exist_ok=True)

    def _translated_value(self, key: str, value: str) -> str:
        if key.endswith("_HOST") and value in self.services:
            return HOST
        if key.endswith("_PORT"):
            return str(self.ports[value])
        for name, service in self.services.items():
            port = container_port(service)
            value = value.replace(f"{name}:{port}", f"{HOST}:{self.ports[port]}")
        return self._with_paths(value)

    def _with_ports(self, word: str) -> str:
        """A port that stands alone, behind --port or behind this machine's address; not in a list of allowed hosts."""
        for port, free in self.ports.items():
            word = re.sub(rf"(^|--port[= ]|//{re.escape(HOST)}:){port}(?=$|[ /'])", rf"\g<1>{free}", word)
        return word

    def _with_paths(self, value: str) -> str:
        folders = {"/opt/dagster": str(self.path("/opt/dagster"))}
        for service in self.services.values():
            for inside, source in service.mounts.items():
                folders[inside] = source if source.startswith("/") else str(self.path(inside))
        for inside, outside in folders.items():
            value = re.sub(rf"(?<![\w.]){re.escape(inside)}(?![\w])", outside, value)
        return value

    def _wait_until_healthy(self, service: Service) -> None:
        check = service.settings["healthcheck"]
        kind, *command = check["test"]
        assert kind == "CMD", check
        patience = seconds(check["start_period"]) + check["retries"] * seconds(check["interval"])
        environment = self.environment(service)
        if service.name == "postgres":
            environment["PATH"] = f"{postgres_programs()}{os.pathsep}{environment['PATH']}"
            command += ["--port", str(self.ports["5432"])]
        deadline = time.monotonic() + patience
        failure = ""
        while time.monotonic() < deadline:
            if self.processes[service.name].poll() is not None:
                raise RuntimeError(f"{service.name} ended:\n{self.log(service.name)[-4000:]}")
            try:
                done = subprocess.run(
                    self.translated(command),
                    env=environment,
                    cwd=self._working_directory(service.name),
                    capture_output=True,
                    text=True,
                    timeout=seconds(check["timeout"]),
                )
            except subprocess.TimeoutExpired as error:  # as in Docker: one that did not pass, and is tried again
                failure = str(error)
                continue
            if done.returncode == 0:
                return
            failure = done.stdout + done.stderr
            time.sleep(0.3)
        raise TimeoutError(f"{service.name} is not healthy after {patience} s: {failure}\n{self.log(service.name)}")

    def _start_postgres(self, service: Service) -> None:
        """As its image's entry point does it: an empty volume is initialised first, and gets the project's script."""
        programs = postgres_programs()
        assert programs is not None
        data = self.path(POSTGRES_FOLDER)
        new = not data.exists()
        options: dict[str, Any] = {"cwd": "/"}
        if os.geteuid() == 0:  # Postgres refuses to run as root
            user = pwd.getpwnam("postgres")
            options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        if new:
            data.mkdir(parents=True)
            password_file = data.parent / "password"
            password_file.write_text(service.environment["POSTGRES_PASSWORD"])
            if os.geteuid() == 0:
                shutil.chown(data, "postgres")
                shutil.chown(password_file, "postgres")
            # scram over TCP, and nothing else: so every password is proven.
            how = ["--pwfile", password_file, "--auth-host", "scram-sha-256", "--auth-local", "reject", "--no-sync"]
            initdb = [programs / "initdb", "--pgdata", data, "--username", service.environment["POSTGRES_USER"], *how]
            subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, env={"LANG": "C.UTF-8"}, **options)
            password_file.unlink()
        command = [str(programs / "postgres"), "-D", str(data), "-p", str(self.ports["5432"]), "-h", HOST, "-k", ""]
        self._run("postgres", command, {"PATH": "/usr/bin:/bin"}, **options)
        self._wait_until_healthy(service)
        if new:
            (script,) = (source for inside, source in service.mounts.items() if inside.startswith("/docker-entrypoint"))
            environment = {**os.environ, **service.environment, **self._superuser()}
            subprocess.run(["bash", DOCKER / script], env=environment, check=True, stdout=subprocess.DEVNULL)

    def _superuser(self) -> dict[str, str]:
        environment = self.services["postgres"].environment
        return {
            "PGHOST": HOST,
            "PGPORT": str(self.ports["5432"]),
            "PGUSER": environment["POSTGRES_USER"],
            "PGPASSWORD": environment["POSTGRES_PASSWORD"],
        }


def container_port(service: Service) -> str:
    """The port that a service listens on in its container, or its name where it listens on none."""
    if service.name == "postgres":
        return "5432"
    exposed = service.image.all("EXPOSE") if service.image else []
    return exposed[-1] if exposed and service.name != "daemon" else service.name


def kill_session(session: int) -> None:
    """End what is left of a session and of its processes' own children, which may have sessions of their own."""
    members = [process for process in psutil.process_iter() if _session(process.pid) == session]
    tree = {member.pid: member for member in members}
    for member in members:
        with suppress(psutil.NoSuchProcess):
            tree |= {child.pid: child for child in member.children(recursive=True)}
    for member in tree.values():
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(list(tree.values()), timeout=30)


def _session(pid: int) -> int | None:
    with suppress(ProcessLookupError, PermissionError):
        return os.getsid(pid)
    return None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def seconds(duration: str) -> int:
    """compose's durations: 30s, 2m."""
    return sum(int(count) * {"s": 1, "m": 60, "h": 3600}[unit] for count, unit in re.findall(r"(\d+)([smh])", duration))
