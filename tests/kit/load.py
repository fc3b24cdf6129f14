"""Clients that keep asking while something is broken, and the outcome of each request."""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from kit import eventually
from kit.client import PATIENCE, Answer, connection, get


@dataclass
class Reply:
    """A request's outcome: `status` 0 if there was no answer, with the reason in `reason`. Times are monotonic."""

    began: float
    ended: float
    status: int
    reason: str = ""

    @property
    def seconds(self) -> float:
        """How long the client waited."""
        return self.ended - self.began


class Clients:
    """`async with Clients(url) as clients`: each keeps its connection, and asks again a moment after each answer.

    A client reconnects if the server closes its connection, or asks it to. No client repeats a request.
    """

    def __init__(self, url: str, count: int = 8, pause: float = 0.02):
        parts = urlsplit(url)
        self.base, self.path = f"{parts.scheme}://{parts.netloc}", parts.path
        self.count, self.pause = count, pause
        self.replies: list[Reply] = []
        self._ends = False

    async def __aenter__(self) -> Self:
        """Return when all is well."""
        self._tasks = [asyncio.create_task(self._keep_asking()) for _ in range(self.count)]
        await eventually(lambda: len(self.good()) >= 2 * self.count)
        self.replies.clear()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop asking, and wait for the answers that are under way."""
        self._ends = True
        await asyncio.gather(*self._tasks)

    async def _keep_asking(self) -> None:
        while not self._ends:
            began = time.monotonic()
            try:
                async with connection(self.base) as connected:
                    while not self._ends:
                        began = time.monotonic()
                        async with asyncio.timeout(PATIENCE):
                            answer = await connected.get(self.path)
                        self._note(began, answer.status, _reason(answer))
                        await asyncio.sleep(self.pause)
                        if answer.headers.get("Connection") == "close":
                            break
            except (OSError, EOFError, TimeoutError) as error:
                self._note(began, 0, repr(error))
                await asyncio.sleep(self.pause)

    def _note(self, began: float, status: int, reason: str) -> None:
        self.replies.append(Reply(began, time.monotonic(), status, reason))

    def good(self, after: float = 0) -> list[Reply]:
        """Those answered with 200 since then."""
        return [reply for reply in list(self.replies) if reply.status == 200 and reply.ended >= after]

    def statuses(self) -> set[int]:
        """All that came."""
        return {reply.status for reply in list(self.replies)}

    async def see(self, *statuses: int, within: float = PATIENCE) -> None:
        """Return when each client has had one of these."""
        begin = time.monotonic()

        def enough() -> bool:
            new = [reply for reply in self.replies if reply.ended > begin and reply.status in statuses]
            return len(new) >= self.count

        await eventually(enough, within)


class OpenLoop:
    """`async with OpenLoop(*urls) as load`: a request every hundredth of a second, to each URL in turn, whatever the
    fate of earlier ones: the longer a fault lasts, the more requests it meets.
    """

    def __init__(self, *urls: str, rate: float = 100):
        self.urls, self.rate = urls, rate
        self.replies: list[Reply] = []
        self._ends = False

    async def __aenter__(self) -> Self:
        """Return when all is well."""
        for url in self.urls * 5:
            await eventually(lambda url=url: self._ask_well(url))  # type: ignore[misc]
        self.replies.clear()
        self._task = asyncio.create_task(self._keep_asking())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop asking, and wait for the answers that are under way."""
        self._ends = True
        await self._task

    async def _keep_asking(self) -> None:
        tasks: list[asyncio.Task[Reply]] = []
        begin = time.monotonic()
        while not self._ends:
            tasks.append(asyncio.create_task(self._ask(self.urls[len(tasks) % len(self.urls)])))
            await asyncio.sleep(max(0.0, begin + len(tasks) / self.rate - time.monotonic()))
        await asyncio.gather(*tasks)

    async def _ask(self, url: str) -> Reply:
        began = time.monotonic()
        try:
            answer = await get(url)
            reply = Reply(began, time.monotonic(), answer.status, _reason(answer))
        except (OSError, EOFError, TimeoutError) as error:
            reply = Reply(began, time.monotonic(), 0, repr(error))
        self.replies.append(reply)
        return reply

    async def _ask_well(self, url: str) -> bool:
        return (await self._ask(url)).status == 200

    def failed(self) -> list[Reply]:
        """Those that were not answered with 200."""
        return [reply for reply in self.replies if reply.status != 200]

    def slowest(self, share: float = 1) -> float:
        """Seconds in which this share of the requests was answered."""
        times = sorted(reply.seconds for reply in self.replies)
        return times[min(len(times) - 1, int(share * len(times)))]


def _reason(answer: Answer) -> str:
    with contextlib.suppress(ValueError):
        return str(answer.json().get("type", ""))
    return answer.body[:80].decode("latin-1")
