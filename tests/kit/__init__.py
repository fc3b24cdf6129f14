"""The test kit: real processes on real sockets, and the means to break them on purpose.

postgres   a PostgreSQL cluster of our own: start, stop, kill, freeze; databases in it
pooler     PgBouncer in front of it
processes  the servers as a user starts them, with their log lines
network    what stands between them: proxies, ports that refuse, peers that send garbage, DNS
client     HTTP as a client sees it, down to the bytes
metrics    the samples at /metrics
kubernetes how a cluster reads k8s.yaml: selectors, network policies, a container's environment

application  what the servers of this project are called, and their paths, keys and tables
faults, load, table  clients that keep asking while a test breaks something, and the table that `make faults` writes

Nothing here knows a server's internals. The fixtures in conftest.py end whatever is started.
"""

import asyncio
import inspect
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


async def eventually(condition: Callable[[], Any], within: float = 5, every: float = 0.02) -> Any:
    """Return the condition's value as soon as it is true; AssertionError if it is not, `within` these seconds.

    The condition may be a coroutine function, and an AssertionError that it raises counts as "not yet".
    """
    deadline = time.monotonic() + within
    while True:
        try:
            value = condition()
            result = await value if inspect.isawaitable(value) else value
            reason = f"is {result!r}"
        except AssertionError as error:
            result, reason = None, str(error)
        if result:
            return result
        assert time.monotonic() < deadline, f"not true within {within} s: {reason}"
        await asyncio.sleep(every)


def wait_until(condition: Callable[[], Any], within: float, fault: Callable[[], str]) -> None:
    """Like `eventually`, outside an event loop; AssertionError with the text of `fault` if it stays false."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within} s: {fault()}"
        time.sleep(0.005)


def reserve_port(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A socket that is bound but does not listen: until another process listens there, connecting is refused.

    SO_REUSEADDR lets a server listen on the port meanwhile, and the kernel gives it to no other: neither to a listener
    nor as the local port of a client's connection, which would connect to itself.
    """
    reservation = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind((host, port))
    return reservation


def child_pids(pid: int) -> list[int]:
    """The running processes that `pid` started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def open_sockets(pid: int) -> int:
    """How many sockets a process has open."""
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += str(descriptor.readlink()).startswith("socket:")
        except FileNotFoundError:  # closed while we looked
            continue
    return count


def memory(pid: int) -> int:
    """Resident memory of a process in bytes."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE")
