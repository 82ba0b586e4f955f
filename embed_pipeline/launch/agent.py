"""torchrun on one node: `python -m embed_pipeline.launch.agent TORCHRUN_ARGUMENTS`.

More than torchrun itself, it tells of a rank that a signal ended: such a rank (out of memory, most often) leaves no
error file, and torchrun then reports a victim that lost its connection, or nothing. Among several nodes it finds the
network by which it reaches the others, and ends when whoever launched it is gone.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from embed_pipeline.launch.ending import run_and_leave
from embed_pipeline.launch.environment import keep_to_job_environment
from embed_pipeline.launch.heartbeat import BEAT_SECONDS, HEARTBEAT_VARIABLE, Listener
from embed_pipeline.launch.local import ERROR_FILE_VARIABLE, leave_error, meaning_of, minutes_waited


def main(arguments: list[str]) -> None:
    """torchrun's main. Raises what it raises, with the killed rank in TORCHELASTIC_ERROR_FILE if there is one."""
    keep_to_job_environment()
    endpoint = next((a.partition("=")[2] for a in arguments if a.startswith("--rdzv-endpoint=")), None)
    if endpoint is not None:
        arguments = [f"--local-addr={_address_towards(endpoint)}", *arguments]
    if HEARTBEAT_VARIABLE in os.environ:
        _end_in_silence(Path(os.environ[HEARTBEAT_VARIABLE]))
    # In a store that they share with torchrun, the ranks of a restart would find the addresses of those before them.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run.main(arguments)
    except ChildFailedError as error:
        # SIGTERM is what torchrun itself sends to the others.
        killed = {
            rank: failure.exitcode
            for rank, failure in error.failures.items()
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
        }
        # One that hung was killed as well, after the others had given up waiting for it.
        gave_up = any(minutes_waited(str(failure.message)) for failure in error.failures.values())
        if killed and not gave_up and ERROR_FILE_VARIABLE in os.environ:
            rank, exit_code = min(killed.items())
            leave_error(f"rank {rank} was ended {meaning_of(exit_code)}", exit_code)
        raise


def _address_towards(endpoint: str) -> str:
    """This machine's address as the others reach it; gloo and NCCL are told its interface, unless a user did.

    They would take what the host name resolves to: on many machines a loopback or a container's bridge.
    """
    host, _, port = endpoint.rpartition(":")
    family, *_, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as towards:
        towards.connect(address)  # sends nothing
        ours: str = towards.getsockname()[0]
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address == ours for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    return ours


def _end_in_silence(heart: Path) -> None:
    listener = Listener(heart)

    def listen() -> None:
        while not listener.silent():
            threading.Event().wait(BEAT_SECONDS)
        print(f"nothing was heard of the launching process for {listener.seconds:.0f} s: ending", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, name="end_in_silence", daemon=True).start()


if __name__ == "__main__":
    run_and_leave(lambda: main(sys.argv[1:]))
