"""Single-flight, as one writes it for asyncio: whoever asks while a call is under way shares it.

The answer may be older than the question, since the call may have started before it.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Hashable
from typing import Any


class SingleFlight:
    def __init__(self) -> None:
        self._calls: dict[Hashable, asyncio.Future[Any]] = {}

    async def __call__(self, key: Hashable, call: Callable[[], Awaitable[Any]]) -> Any:
        task = self._calls.get(key)
        if task is None:
            task = self._calls[key] = asyncio.ensure_future(call())
            task.add_done_callback(lambda _: self._calls.pop(key))
        return await asyncio.shield(task)


async def unshared(_key: Hashable, call: Callable[[], Awaitable[Any]]) -> Any:
    """Each request makes its own call."""
    return await call()


shared = SingleFlight() if os.environ.get("SINGLE_FLIGHT") else unshared
