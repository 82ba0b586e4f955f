"""Which of a machine's networks the processes of a job talk over.

Left alone, gloo and NCCL listen where the host name leads: often on a network that has nothing to do with the job.
"""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil

from embed_pipeline.errors import TrainingError

# NCCL takes a name for the beginning of others unless it follows "=".
_VARIABLES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
LOOPBACK = "127.0.0.0/8"


def bind_to(network: str) -> None:
    """Have gloo and NCCL use this machine's interface in `network`, in this process and its children.

    Raises TrainingError where no interface, or more than one, is in that network.
    """
    interface = interface_in(network)
    for variable, before in _VARIABLES.items():
        os.environ[variable] = before + interface


def interface_in(network: str) -> str:
    """The interface that `network` names, by its name or its addresses. Raises TrainingError where that is not one."""
    have = _addresses()
    listed = ", ".join(f"{name} ({', '.join(addresses)})" for name, addresses in sorted(have.items()))
    if "/" not in network:
        if network not in have:
            raise TrainingError(
                f"launch.network is {network}, but {socket.gethostname()} has no such interface with an address. It "
                f"has: {listed}. Where the nodes' names differ, give the network as addresses, e.g. 10.0.0.0/24"
            )
        return network
    within = ipaddress.ip_network(network, strict=False)
    # gloo listens on the first address of an interface.
    first = [name for name, addresses in have.items() if ipaddress.ip_address(addresses[0]) in within]
    if len(first) != 1:
        any_of = [name for name, all in have.items() if any(ipaddress.ip_address(one) in within for one in all)]
        found = (
            f"{', '.join(sorted(first))} are in it; name one of them" if first
            else f"it is not the first address of {', '.join(any_of)}, on which they would listen" if any_of
            else "no interface is in it"
        )  # fmt: skip
        raise TrainingError(
            f"launch.network is {network}, and on {socket.gethostname()} {found}. The machine has: {listed}"
        )
    return first[0]


def _addresses() -> dict[str, list[str]]:
    """IP addresses by interface, in the system's order; an interface without any is left out."""
    found = {
        name: [one.address.partition("%")[0] for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)]
        for name, addresses in psutil.net_if_addrs().items()
    }
    return {name: addresses for name, addresses in found.items() if addresses}
