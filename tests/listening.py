"""Which sockets processes listen on, and which of them may."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

LOOPBACK = {"127.0.0.1", "::1"}
# What each kind of job and service may listen on. What is not named here may not listen at all.
ALLOWED: dict[str, set[str]] = {
    "training, one process": set(),
    "training, two processes": LOOPBACK,  # gloo's exchange of gradients
    "encoding, two processes": set(),
    "training, two nodes on the network lo": LOOPBACK,
    "encoding, two nodes": set(),
    "training, Slurm on the network lo": LOOPBACK,
    "join": set(),
    "make ui": LOOPBACK,
    "make mlflow": LOOPBACK,
}


@dataclass
class Seen:
    """Addresses that were listened on, with a process of each."""

    addresses: dict[str, str] = field(default_factory=dict)
    processes: set[str] = field(default_factory=set)  # the last words of the command lines that were looked at

    def look(self, processes: Iterable[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                for one in process.net_connections("inet"):
                    waits = one.type == socket.SOCK_DGRAM and not one.raddr
                    if one.laddr and (waits or one.status == psutil.CONN_LISTEN):
                        self.addresses.setdefault(one.laddr.ip, f"port {one.laddr.port} of {command[-200:]}")
                self.processes.add(command)

    def check(self, kind: str) -> None:
        """Fails on an address that `kind` may not listen on."""
        others = {address: who for address, who in self.addresses.items() if address not in ALLOWED[kind]}
        assert not others, f"{kind} listens on {others}"


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def naming(text: str) -> Callable[[], list[psutil.Process]]:
    """All processes of this machine whose command line names `text`."""

    def find() -> list[psutil.Process]:
        return [one for one in psutil.process_iter(["cmdline"]) if text in " ".join(one.info["cmdline"] or ())]

    return find


@contextmanager
def watched(kind: str, processes: Callable[[], Iterable[psutil.Process]] = descendants) -> Iterator[Seen]:
    """Look at what `processes` listen on, many times a second, and fail at the end on what `kind` may not."""
    seen, over = Seen(), threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            seen.look(processes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
    seen.check(kind)
