"""Linearizable request coalescing: many callers share one run, and no answer is older than its question.

Ordinary request coalescing (single-flight) lets a caller join a run that is already under way. What that run
read may be older than the caller's question: a client that has just seen its own write committed can be
answered with the value from before. Here a caller joins only a run that has not started yet. Each answer then
comes from a read that began after the request arrived, as if nobody shared anything: the history stays
linearizable, with no cache, no time to live and nothing to invalidate.

The idea is known from consensus systems as ReadIndex batching (etcd, TiKV), from RCU as the grace period that
serves all who asked before it began, and from I/O as natural batching: what arrives during one run is served by
the next, so batches grow by themselves under load and vanish when there is none.

What a `Coalescer` guarantees:

- Freshness: a run starts after the arrival of every caller that it answers.
- Delay: a run starts at once when none is in flight; a waiting batch starts as soon as a run ends, or
  `MAX_ADDED_DELAY` after its first caller. So while fewer than `limit` runs are in flight, nobody waits longer
  than that for a run to start, however slow or stuck the runs in flight are.
- Load: at most `limit` runs are in flight, however many callers there are.
- Time: each caller waits at most `timeout` seconds, counted from its arrival. As no caller arrives after its
  run's start, no run outlives its start by more than `timeout` either.
- Sharing: all callers of a run get its result, or its error.
- Cancellation: a caller that gives up disturbs nobody; when none is left, the run is cancelled.

This module knows neither HTTP nor SQL, and imports nothing of the project.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

MAX_ADDED_DELAY = 0.005
"""Seconds that a batch waits for a run in flight to end. Long enough to batch callers while runs take their
usual millisecond or two, short enough to vanish in a network's own jitter when a run is stuck."""

Result = TypeVar("Result")


class RunTimeoutError(TimeoutError):
    """A caller's time is up. `context` is that of the caller that opened the batch (see `Coalescer`)."""

    def __init__(self, context: contextvars.Context) -> None:
        super().__init__("no answer in time")
        self.context = context


class _Batch(Generic[Result]):
    """The callers of one run; open to more until the run starts."""

    def __init__(self, context: contextvars.Context) -> None:
        self.context = context
        self.callers: deque[tuple[float, asyncio.Future[Result]]] = deque()  # with deadlines, earliest first
        self.expired = 0  # callers whose deadline has passed; they are no longer among `callers`
        self.waiting = 0  # callers that have not given up; counted, since scanning for each that leaves is quadratic
        self.run: asyncio.Task[None] | None = None
        self.expiry: asyncio.TimerHandle  # at the deadline of the earliest caller
        self.start: asyncio.TimerHandle | None = None  # when the batch has waited for `MAX_ADDED_DELAY`


class Coalescer(Generic[Result]):
    """Calls `function` for all who ask, as the module's docstring says.

    `limit` is the number of runs in flight at most, `timeout` the seconds that a caller waits at most. A run
    executes in a copy of the context (`contextvars`) of the caller that opened its batch, so that it can act in
    that caller's name. `observe` is told of each run that ended: its number of callers and its outcome, "answered",
    "failed" or "abandoned". Use a coalescer in one event loop only.
    """

    def __init__(
        self,
        function: Callable[[], Awaitable[Result]],
        *,
        limit: int,
        timeout: float,
        observe: Callable[[int, str], None] = lambda _callers, _outcome: None,
    ) -> None:
        self._function = function
        self._observe = observe
        self._limit = limit
        self._timeout = timeout
        self._open: _Batch[Result] | None = None  # the batch that callers can still join
        self._started: set[_Batch[Result]] = set()  # batches with a task, be it before its first step

    async def __call__(self) -> Result:
        """Return what a run that starts after this call returns, or raise what it raises.

        Raises `RunTimeoutError` when `timeout` seconds have passed since the call. Cancelling is safe at any time.
        """
        loop = asyncio.get_running_loop()
        batch = self._open or self._open_batch(loop)
        caller: asyncio.Future[Result] = loop.create_future()
        batch.callers.append((loop.time() + self._timeout, caller))
        batch.waiting += 1
        try:
            return await caller
        except asyncio.CancelledError:
            if caller.cancelled():  # not when its answer or its deadline came first
                self._give_up(batch)
            raise

    def _open_batch(self, loop: asyncio.AbstractEventLoop) -> _Batch[Result]:
        batch = self._open = _Batch(contextvars.copy_context())
        batch.expiry = loop.call_later(self._timeout, self._expire, batch)
        if self._started:
            batch.start = loop.call_later(MAX_ADDED_DELAY, self._start_if_room, batch)
        else:
            self._start(batch)
        return batch

    def _start_if_room(self, batch: _Batch[Result]) -> None:
        if len(self._started) < self._limit:  # otherwise the next run that ends starts the batch
            self._start(batch)

    def _start(self, batch: _Batch[Result]) -> None:
        if batch.start:
            batch.start.cancel()
        self._started.add(batch)
        batch.run = asyncio.get_running_loop().create_task(self._run(batch), context=batch.context)

    async def _run(self, batch: _Batch[Result]) -> None:
        # Closed to further callers only now: those who came since the task was made are still served freshly.
        self._open = None
        try:
            result = await self._function()
        except asyncio.CancelledError:
            # Nobody is left; or `function` has cancelled itself, or the event loop ends, and somebody still waits.
            self._end(batch, "abandoned", lambda caller: caller.set_exception(RuntimeError("the run was cancelled")))
            raise
        except Exception as error:
            failure = error
            self._end(batch, "failed", lambda caller: caller.set_exception(failure))
        else:
            self._end(batch, "answered", lambda caller: caller.set_result(result))

    def _end(self, batch: _Batch[Result], outcome: str, settle: Callable[[asyncio.Future[Result]], None]) -> None:
        """Settle the callers that still wait, and start the batch that waits for room."""
        batch.expiry.cancel()
        for _, caller in batch.callers:
            if not caller.done():
                settle(caller)
        self._started.discard(batch)
        if self._open and self._open.run is None:
            self._start(self._open)
        self._observe(len(batch.callers) + batch.expired, outcome)

    def _expire(self, batch: _Batch[Result]) -> None:
        """Let go the callers whose time is up, and come back for the next."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while batch.callers and batch.callers[0][0] <= now:
            _, caller = batch.callers.popleft()
            batch.expired += 1
            if not caller.done():
                caller.set_exception(RunTimeoutError(batch.context))
                self._give_up(batch)
        if batch.callers and batch.waiting:
            batch.expiry = loop.call_at(batch.callers[0][0], self._expire, batch)

    def _give_up(self, batch: _Batch[Result]) -> None:
        """One caller fewer; cancel the run, or the plan of one, when it was the last."""
        batch.waiting -= 1
        if batch.waiting:
            return
        batch.expiry.cancel()
        if batch.start:
            batch.start.cancel()
        if batch.run:
            batch.run.cancel()
        if batch is self._open:
            self._open = None
            if batch.run:  # cancelled before its first step, so that it never comes to its own end
                self._end(batch, "abandoned", lambda _: None)
