"""Nodes and ranks meet in files."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
)

from embed_pipeline.errors import TrainingError
from embed_pipeline.launch.local import run_local
from embed_pipeline.launch.network import interface_in
from embed_pipeline.launch.ownership import make_private
from embed_pipeline.launch.rank import RANKS_FILE_VARIABLE, Place
from embed_pipeline.launch.rank import meet as meet_others
from embed_pipeline.launch.rendezvous import FileRendezvous
from embed_pipeline.launch.torchrun import RENDEZVOUS_BACKEND, Rendezvous, torchrun_command


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (RANKS_FILE_VARIABLE, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "of the user")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_private(tmp_path / "meeting")
    return tmp_path / "meeting"


def node(folder: Path, rank: int, nnodes: int = 2, wait_seconds: float = 30) -> FileRendezvous:
    return FileRendezvous(folder, "job", nnodes, rank, wait_seconds)


def meet(*nodes: FileRendezvous) -> list[RendezvousInfo]:
    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(FileRendezvous.next_rendezvous, nodes))


def test_nodes_have_the_ranks_they_were_given_and_meet_again_in_a_new_file(folder: Path) -> None:
    first, second = node(folder, 0), node(folder, 1)
    found = meet(first, second)
    assert [(one.rank, one.world_size) for one in found] == [(0, 2), (1, 2)]
    found[0].store.set("word", "spoken")
    assert found[1].store.get("word") == b"spoken"
    before = os.environ[RANKS_FILE_VARIABLE]
    assert second.num_nodes_waiting() == 0

    # The processes of the first die: the second hears of it, and starts its own again.
    second.looked_at = float("-inf")
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(first.next_rendezvous)
        while not second.num_nodes_waiting():
            second.looked_at = float("-inf")
        second.next_rendezvous()
        assert not again.result().store.check(["word"])
    assert os.environ[RANKS_FILE_VARIABLE] != before


def test_a_node_that_does_not_come_is_named(folder: Path) -> None:
    with pytest.raises(RendezvousTimeoutError, match=r"nodes \[0, 2\] did not come within 0 s"):
        node(folder, 1, nnodes=3, wait_seconds=0).next_rendezvous()


def test_a_node_does_not_wait_for_one_that_has_ended_the_job(folder: Path) -> None:
    first, second = node(folder, 0), node(folder, 1)
    meet(first, second)
    first.shutdown()
    with pytest.raises(RendezvousClosedError):
        second.next_rendezvous()


def test_a_node_whose_job_is_gone_hangs_nowhere(folder: Path) -> None:
    first, second = node(folder, 0), node(folder, 1)
    meet(first, second)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    over = threading.Thread(target=lambda: (second.num_nodes_waiting(), second.shutdown()), daemon=True)
    over.start()
    over.join(10)
    assert not over.is_alive()


def test_processes_talk_over_loopback_unless_a_network_is_named(folder: Path) -> None:
    FileRendezvous.create(RendezvousParameters(RENDEZVOUS_BACKEND, str(folder), "job", 1, 1))
    loopback = interface_in("127.0.0.0/8")
    assert os.environ["GLOO_SOCKET_IFNAME"] == loopback
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={loopback}"


def test_an_agent_says_why_it_does_not_meet_there(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    rendezvous = Rendezvous("job", tmp_path, 2, "lo", 1).options(0)
    command = torchrun_command("embed_pipeline.training.embedder", tmp_path / "job.json", 1, rendezvous=rendezvous)
    with pytest.raises(TrainingError, match=r"^/.* with mode 0777; the processes of a job meet there"):
        run_local(command, env={}, error_file=tmp_path / "error.json")


def test_a_rank_does_not_meet_others_at_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun itself would have it."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv(RANKS_FILE_VARIABLE)
    with pytest.raises(TrainingError, match=r"Start them by `python -m embed_pipeline\.launch\.agent"):
        meet_others(Place(0, 2, "cpu", 1), timedelta(minutes=1))
    meet_others(Place(0, 1, "cpu", 1), timedelta(minutes=1))  # alone, it meets nobody


# ------------------------------------------------------------------------------------------------ the network

MACHINE = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["192.168.1.7", "10.9.0.7"],
    "eth1": ["10.0.0.7", "fe80::1%eth1"],
    "eth2": ["10.0.1.7"],
    "down": [],
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    from types import SimpleNamespace

    def address(text: str) -> SimpleNamespace:
        return SimpleNamespace(family=socket.AF_INET6 if ":" in text else socket.AF_INET, address=text)

    found = {name: [address(one) for one in addresses] for name, addresses in MACHINE.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("network", "interface"), [("10.0.0.0/24", "eth1"), ("10.0.1.9/24", "eth2"), ("eth2", "eth2")])
def test_a_network_is_found_by_its_addresses_or_its_name(network: str, interface: str) -> None:
    assert interface_in(network) == interface


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("network", "told"),
    [
        ("10.3.0.0/16", r"10\.3\.0\.0/16, and on .* no interface is in it\. The machine has: eth0 \(192"),
        ("10.0.0.0/16", r"eth1, eth2 are in it; name one of them"),
        ("10.9.0.0/24", r"not the first address of eth0, on which they would listen"),
        ("ib0", r"has no such interface with an address\. It has: eth0 \(192\.168\.1\.7, 10\.9\.0\.7\), eth1"),
        ("down", r"has no such interface with an address"),
    ],
)
def test_a_network_that_is_not_there_is_told_with_those_that_are(network: str, told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        interface_in(network)
