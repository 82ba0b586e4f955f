"""A real Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, without root's configuration."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=10
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cores} State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cores} State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs that are not installed here; Debian's packages are slurm-wlm and munge."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


@contextmanager
def slurm_cluster() -> Iterator[Path]:
    """Start it and give its slurm.conf, to be named in SLURM_CONF. Everything ends with the body, or with us."""
    # Short, because the path of a socket is.
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(folder=folder, ports=_free_ports(3), user=getpass.getuser(), cores=os.cpu_count())
    )
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munged += [f"--log-file={folder}/munged.log", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/seed"]
    commands = [
        munged,
        ["slurmctld", "-D", "-f", str(configuration)],
        *(["slurmd", "-D", "-N", node, "-f", str(configuration)] for node in ("n1", "n2")),
    ]
    environment = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "SLURM_CONF": str(configuration)}
    daemons: list[psutil.Popen] = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("a") as out:
                tied = [sys.executable, "-m", "embed_pipeline.launch.parent_death", *command]
                daemons.append(psutil.Popen(tied, env=environment, stdout=out, stderr=out))
            if command is munged:
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        _wait(lambda: _idle_nodes(environment) == 2, folder)
        yield configuration
    finally:
        for daemon in reversed(daemons):
            with contextlib.suppress(psutil.NoSuchProcess):
                daemon.terminate()
        _, alive = psutil.wait_procs(daemons, timeout=10)
        for daemon in alive:
            daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _idle_nodes(environment: dict[str, str]) -> int:
    asked = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], env=environment, capture_output=True, text=True
    )
    return asked.stdout.split().count("idle")


def _wait(true: object, folder: Path) -> None:
    assert callable(true)
    deadline = time.monotonic() + 60
    while not true():
        logs = "\n".join(path.read_text() for path in folder.glob("*.out"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)
