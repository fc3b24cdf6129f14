"""A server whose callers join a running call: `python -m tests.kit.single_flight SERVER`.

Ordinary request coalescing does this, and the test of freshness must detect it.
"""

import asyncio
import runpy
import sys
from collections.abc import Awaitable, Callable, Hashable
from typing import Any

from chassis import coalescing


class SingleFlight:
    """Stands in for `Coalescer`."""

    def __init__(self, *, limit: int, timeout: float, **_: object) -> None:
        self._turns, self._timeout = asyncio.Semaphore(limit), timeout
        self._runs: dict[Hashable, asyncio.Future[Any]] = {}

    async def __call__(self, key: Hashable, function: Callable[[], Awaitable[Any]], _kind: Hashable = None) -> Any:
        if key not in self._runs:
            self._runs[key] = asyncio.ensure_future(function())
            self._runs[key].add_done_callback(lambda _: self._runs.pop(key))
        async with asyncio.timeout(self._timeout):
            return await asyncio.shield(self._runs[key])

    async def turn(self, _kind: Hashable) -> None:
        await self._turns.acquire()

    def end_turn(self, _kind: Hashable) -> None:
        self._turns.release()


if __name__ == "__main__":
    coalescing.Coalescer = SingleFlight  # type: ignore[assignment, misc]
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
