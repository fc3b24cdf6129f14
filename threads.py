"""Calls that would hold up the event loop (name look-ups, reading files), each in a daemon thread of its own.

Not in the event loop's default executor: its threads are few, so that a handful of look-ups that hang would hold up
all others, and Python waits for them when the process ends. A daemon thread that hangs costs its stack, and nothing
else waits for it.
"""

import asyncio
import concurrent.futures
import errno
import socket
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from aiohttp.abc import AbstractResolver, ResolveResult

JOIN_SECONDS = 1.0  # a look-up that takes longer is not waited for by those who come later

P = ParamSpec("P")
Result = TypeVar("Result")


async def call(function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """Return what `function` returns, or raise what it raises; OSError when no thread can be started.

    A cancelled caller leaves the thread to its end.
    """
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # from now on it can not be cancelled under the thread's hands

    def work() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)

    try:
        threading.Thread(target=work, name=f"blocking {function.__name__}", daemon=True).start()
    except RuntimeError as error:  # memory or processes are used up
        raise OSError(errno.EAGAIN, str(error)) from error
    return await asyncio.wrap_future(future)


class Resolver(AbstractResolver):
    """Looks names up anew for each connection, so that a name's new address is found at once.

    Callers that come while a look-up of the same name is under way share it, unless it is older than
    `JOIN_SECONDS`: then it may be stuck at a name server that is gone.
    """

    def __init__(self) -> None:
        self._lookups: dict[tuple[str, int, int], tuple[float, asyncio.Task[list[ResolveResult]]]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of `host` in the order of preference (RFC 6724). Raises `OSError`."""
        key, now = (host, port, family), time.monotonic()
        started, lookup = self._lookups.get(key, (0.0, None))
        if lookup is None or lookup.done() or now - started > JOIN_SECONDS:
            lookup = asyncio.create_task(_look_up(host, port, family))
            lookup.add_done_callback(lambda done: done.cancelled() or done.exception())  # if nobody is left to ask
            self._lookups[key] = now, lookup
        return await asyncio.shield(lookup)

    async def close(self) -> None:
        """Nothing to release: see `call`."""


async def _look_up(host: str, port: int, family: int) -> list[ResolveResult]:
    options = (host, port, family, socket.SOCK_STREAM)
    try:
        found = socket.getaddrinfo(*options, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:  # a name; an address needs no thread
        found = await call(socket.getaddrinfo, *options)
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return [
        ResolveResult(hostname=host, host=str(address[0]), port=port, family=found_family, proto=protocol, flags=flags)
        for found_family, _, protocol, _, address in found
    ]
