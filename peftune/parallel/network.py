"""Which network interface leads to the other machines of a run. Imports no torch."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import time
from pathlib import Path

from peftune.errors import Fault, MachineError

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables in which torch's backends take the name of an interface."""
RESOLVED_S = 600
"""How long the first machine may take to get its name, in seconds: it may be fetching its container image."""


def interface_variables(main: str, given: str | None) -> dict[str, str]:
    """The variables that bind torch's exchange to one interface.

    Without one gloo takes the address that the machine's own name stands for, which on many is a loopback address that
    the others cannot reach. NCCL looks for itself and skips loopback: it is told only what somebody has chosen.

    Args:
        main: name or address of the first machine.
        given: an interface that somebody has chosen.

    Raises:
        MachineError: that name means nothing here, or there is no such interface.
    """
    if given is not None:
        names = [name for _, name in socket.if_nameindex()]
        if given not in names:
            raise MachineError(Fault(kind="environment", message=f"--interface {given}: this machine has {names}",
                                     mend="name one of them, the same on every machine"))
        return dict.fromkeys(INTERFACES, given)
    if any(name in os.environ for name in INTERFACES):
        return {}
    found = interface_towards(main)
    return {} if found is None else {INTERFACES[0]: found}


def interface_towards(main: str) -> str | None:
    """The interface whose address this machine uses when it speaks to `main`; None if it has no name.

    If that is loopback, `main` is this machine, and others must reach it elsewhere: then the one of the default route.
    """
    own = _own_address(main)
    if ipaddress.ip_address(own).is_loopback:
        return _default_route()
    import psutil

    return next((name for name, addresses in psutil.net_if_addrs().items()
                 if any(address.address.partition("%")[0] == own for address in addresses)), None)


def _own_address(main: str) -> str:
    deadline = time.monotonic() + RESOLVED_S
    told = False
    while True:
        try:
            family, _, _, _, address = socket.getaddrinfo(main, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # a datagram socket sends nothing: it only looks up the route
                return str(probe.getsockname()[0]).partition("%")[0]
        except OSError as error:
            message = f"the first machine, {main}, cannot be found from {socket.gethostname()}: {error.strerror}"
            if time.monotonic() > deadline:
                raise MachineError(Fault(kind="environment", message=message,
                                         mend="give a name or an address that every machine resolves")) from None
            if not told:
                sys.stderr.write(f"{message}; trying again for {RESOLVED_S} s\n")
            told = True
            time.sleep(1)


def _default_route() -> str | None:
    """Name of the interface of the default route, from Linux's table; None where there is none."""
    table = Path("/proc/net/route")
    rows = [line.split() for line in table.read_text().splitlines()[1:]] if table.is_file() else []
    return next((row[0] for row in rows if row[1] == "00000000"), None)
