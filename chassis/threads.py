"""Calls that would block the event loop (name look-ups, reading files), each in its own daemon thread.

Not in the event loop's default executor: its threads are few, so a handful of hanging look-ups would block all others,
and Python waits for them when the process exits. A hanging daemon thread costs its stack, and nothing waits for it.
"""

import asyncio
import concurrent.futures
import errno
import socket
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from aiohttp.abc import AbstractResolver, ResolveResult

P = ParamSpec("P")
Result = TypeVar("Result")


async def call(function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """Return what `function` returns, or raise what it raises; OSError if no thread can be started.

    If the caller is cancelled, the thread still runs to its end.
    """
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # from now on it cannot be cancelled while the thread sets it

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
    """Looks names up again for each connection, so that a name's new address is found at once."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of `host` in order of preference (RFC 6724). Raises `OSError`."""
        found = await call(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM)
        return [
            ResolveResult(hostname=host, host=str(address[0]), port=port, family=family, proto=protocol, flags=0)
            for family, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        """Nothing to release: see `call`."""
