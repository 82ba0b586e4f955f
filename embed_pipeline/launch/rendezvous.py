"""How torchrun's agents, and then the ranks, find each other: in files of a private folder.

torchrun's own ways open a TCPStore, which listens on all interfaces and believes whoever connects; one of them (c10d)
unpickles what it finds there, so whoever reaches the port runs code. Here nothing listens and nothing is unpickled. Who
is which node is decided by whoever launches the job.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch.distributed import FileStore, PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)

from embed_pipeline.launch.network import LOOPBACK, bind_to
from embed_pipeline.launch.ownership import check_private
from embed_pipeline.launch.rank import RANKS_FILE_VARIABLE
from embed_pipeline.launch.torchrun import RENDEZVOUS_BACKEND

_LOOK_SECONDS = 0.2
_OVER, _CLOSED = "over", "closed"  # keys of an attempt: its processes start again; the job has ended
# In case a rank asks torch for a store on the network nevertheless: an address that leads nowhere.
_NO_STORE = RendezvousStoreInfo("ranks-meet-in-a-file.invalid", 0)


class FileRendezvous(RendezvousHandler):
    """Nodes of fixed ranks in `folder`, which all of them see; a new file for each time that the processes start."""

    def __init__(self, folder: Path, run_id: str, nnodes: int, rank: int, wait_seconds: float) -> None:
        self.folder, self.run_id, self.nnodes, self.rank = folder, run_id, nnodes, rank
        self.wait_seconds = wait_seconds
        self.attempt = 0
        self.store: FileStore | None = None
        self.looked_at = 0.0

    @classmethod
    def create(cls, parameters: RendezvousParameters) -> FileRendezvous:
        """As torchrun does. Raises TrainingError for a folder of others, or a network that this machine is not in."""
        folder = Path(parameters.endpoint)
        check_private(folder)
        nnodes = parameters.max_nodes
        bind_to(parameters.get("network", LOOPBACK))
        rank, wait_seconds = parameters.get_as_int("rank", 0), parameters.get_as_int("join_timeout", 600)
        assert rank is not None
        assert wait_seconds is not None
        return cls(folder, parameters.run_id, nnodes, rank, wait_seconds)

    def get_backend(self) -> str:
        return RENDEZVOUS_BACKEND

    def get_run_id(self) -> str:
        return self.run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """Return when all nodes are there. Raises RendezvousTimeoutError, or RendezvousClosedError if one has left."""
        if self.store is not None:
            self._closed()
            self.store.set(_OVER, "1")
        self.attempt += 1
        store = self.store = FileStore(str(self.folder / f"agents-{self.attempt}"), self.nnodes)
        store.set(_node(self.rank), "1")
        deadline = time.monotonic() + self.wait_seconds
        # Not by waiting in the store, where no signal would be heard.
        while not store.check([_node(rank) for rank in range(self.nnodes)]):
            self._closed()
            if time.monotonic() > deadline:
                missing = [rank for rank in range(self.nnodes) if not store.check([_node(rank)])]
                raise RendezvousTimeoutError(f"nodes {missing} did not come within {self.wait_seconds:.0f} s")
            time.sleep(_LOOK_SECONDS)
        # The ranks, which inherit it, meet in a file of their own.
        os.environ[RANKS_FILE_VARIABLE] = str(self.folder / f"ranks-{self.attempt}")
        return RendezvousInfo(PrefixStore("agents", store), self.rank, self.nnodes, _NO_STORE)

    def num_nodes_waiting(self) -> int:
        """1 when another node starts its processes again; torchrun then does so here. Looked at once a second."""
        if self.nnodes == 1 or self.store is None or time.monotonic() - self.looked_at < 1:
            return 0
        if not self.folder.exists():  # the job is over, and the store would wait for its file
            return 0
        self.looked_at = time.monotonic()
        return int(self.store.check([_OVER]))

    def is_closed(self) -> bool:
        return self.store is not None and self.store.check([_CLOSED])

    def set_closed(self) -> None:
        if self.store is not None and self.folder.exists():
            self.store.set(_CLOSED, "1")

    def shutdown(self) -> bool:
        self.set_closed()
        return True

    def _closed(self) -> None:
        if self.is_closed():
            raise RendezvousClosedError("another node has ended the job")


def _node(rank: int) -> str:
    return f"node-{rank}"


rendezvous_handler_registry.register(RENDEZVOUS_BACKEND, FileRendezvous.create)
