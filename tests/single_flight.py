"""A server whose callers join a running call: `python -m tests.single_flight gateway`.

Ordinary request coalescing does this, and the test of freshness must detect it.
"""

import asyncio
import runpy
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import coalescing


class SingleFlight:
    """Stands in for `Coalescer`."""

    def __init__(self, function: Callable[[], Awaitable[Any]], *, timeout: float, **_: object) -> None:
        self._function, self._timeout = function, timeout
        self._run: asyncio.Future[Any] | None = None

    async def __call__(self) -> Any:
        if self._run is None or self._run.done():
            self._run = asyncio.ensure_future(self._function())
        async with asyncio.timeout(self._timeout):
            return await asyncio.shield(self._run)


if __name__ == "__main__":
    coalescing.Coalescer = SingleFlight  # type: ignore[assignment, misc]
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
