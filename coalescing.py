"""Linearizable request coalescing: many callers share a run, and no answer is older than its question.

Ordinary request coalescing (single-flight) lets a caller join a run that is under way. What that run read may be older
than the caller's question: a client that has just seen its own write committed can be answered with the value from
before. Here an answer is good only for callers who arrived before its run started. Each answer then comes from a read
that began after the request arrived, as if nobody shared anything: the history stays linearizable, with no cache, no
time to live and nothing to invalidate.

The idea is known from consensus systems as ReadIndex batching (etcd, TiKV), from RCU as the grace period that serves
all who asked before it began, and from I/O as natural batching: what arrives during one run is served by the next, so
batches grow by themselves under load and vanish when there is none.

It also makes a second run safe: whichever run answers first, its answer is good for all who arrived before it started.
So a run that is late gets company, as hedged requests do (Dean and Barroso, "The Tail at Scale"; gRPC A6), and one that
failed is repeated. Those need a budget in per cent of all requests (Finagle's retry budget, gRPC's throttling), lest
they double the load of what is slow already. Here two bounds suffice: `limit` runs in flight, whatever they are for,
and company and repeats only in the first `TROUBLE_WINDOW` seconds of a trouble. A longer trouble causes no more runs
than it would without them.

What a `Coalescer` guarantees:

- Freshness: a caller gets the answer, or the error, of a run that started after it arrived.
- Delay: a run starts at once when none is in flight; a waiting batch starts when a run has ended and no more callers
  join it for `QUIET_TURNS`, or `MAX_ADDED_DELAY` after its first caller. So while fewer than `limit` runs are in
  flight, nobody waits longer than that for a run to start, however slow or stuck the runs in flight are.
- First answer: it settles every caller who arrived before its run started, whichever run was started for them. Runs
  that can answer nobody any more are cancelled.
- Company: while nobody has been answered for `patience` seconds since the newest run's start, one more is started; each
  further one waits twice as long, up to `LONGEST_WAIT`. When `limit` are in flight the second oldest makes room: never
  the oldest, which ends first when all are merely slow. An answer resets that.
- Repeats: after an error that `repeat` accepts, callers whom no run in flight can answer get another one, 10, 20,
  40 … ms later. They get other errors at once.
- Load: at most `limit` runs are in flight, repeats and company included.
- Time: each caller waits at most `timeout` seconds, counted from its arrival. Then it gets the last error, if the run
  that raised it started after the caller arrived, or `RunTimeoutError`.
- Cancellation: a caller that gives up disturbs nobody; when none is left, the runs are cancelled.

This module knows neither HTTP nor SQL, and imports nothing of the project.
"""

import asyncio
import contextvars
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

MAX_ADDED_DELAY = 0.005
"""Seconds that a batch waits for a run in flight to end. Long enough to batch callers while runs take their
usual millisecond or two, short enough to vanish in a network's own jitter when a run is stuck."""

QUIET_TURNS = 2
"""Turns of the event loop that bring no more callers, after which a batch is complete: some ten microseconds. In the
first of them the answers of the last run are sent; clients that ask again at once come in the next, and share a run
with those who wait, where otherwise two halves of them would take turns, at twice the cost."""

LONGEST_WAIT = 0.4
"""Seconds between two runs that are started because none answers: a caller with a second to spare sees four of them."""

TROUBLE_WINDOW = 2.0
"""Seconds, from the first failure or late run after the last answer, in which repeats and company are worth their load:
long enough to restart a process, or to try several replicas."""

FIRST_REPEAT = 0.01
"""Seconds from a failure to its repeat; doubled each time, so that eight fit into `TROUBLE_WINDOW`."""

PATIENCE_FACTOR = 4
"""How many times as long as usual a run may take before it is late."""

MOMENT = 1e-6
"""Seconds by which a timer may be early, since floating-point numbers are rounded."""

Result = TypeVar("Result")


class RunTimeoutError(TimeoutError):
    """A caller's time is up. `context` belongs to the caller that the newest run was started for (see `Coalescer`)."""

    def __init__(self, context: contextvars.Context) -> None:
        super().__init__("no answer in time")
        self.context = context


class _Caller(Generic[Result]):
    """A waiting caller. Callers are numbered in the order of their arrival."""

    __slots__ = ("deadline", "future", "number")

    def __init__(self, number: int, deadline: float, future: asyncio.Future[Result]) -> None:
        self.number = number
        self.deadline = deadline
        self.future = future


class _Run:
    """One call of the function, from the creation of its task to the end of that task."""

    __slots__ = ("cancelled", "reach", "reason", "started", "task")

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.started = math.inf
        self.reach = math.inf  # number of the last caller that it can answer; until its first step, that is any caller
        self.cancelled = False
        self.task: asyncio.Task[None]


def _never(_error: Exception) -> bool:
    return False


def _ignore(_callers: int, _outcome: str, _reason: str, _error: Exception | None) -> None:
    """No metrics."""


class Coalescer(Generic[Result]):
    """Calls `function` for all who ask, as the module's docstring says.

    `limit` is the number of runs in flight at most, `timeout` the seconds that a caller waits at most, `patience` the
    least number of seconds after which a run is late, `repeat` whether a run that raised this error is to be repeated.

    A run executes in a copy of the context (`contextvars`) of the first caller that it was started for, so that it can
    act in that caller's name. `observe` is called for each run that ended: how many callers it settled; its outcome,
    "answered", "failed" or "cancelled"; why it was started, "asked", "late" or "failed" for a repeat; and its error.
    Use a coalescer in one event loop only.
    """

    def __init__(
        self,
        function: Callable[[], Awaitable[Result]],
        *,
        limit: int,
        timeout: float,
        patience: float,
        repeat: Callable[[Exception], bool] = _never,
        observe: Callable[[int, str, str, Exception | None], None] = _ignore,
    ) -> None:
        self._function = function
        self._limit = limit
        self._timeout = timeout
        self._patience = patience
        self._repeat = repeat
        self._observe = observe

        self._callers: deque[_Caller[Result]] = deque()  # in the order of arrival; the first and the last still wait
        self._arrivals = 0
        self._runs: list[_Run] = []  # in the order of their starts, including cancelled ones that have not ended yet
        self._due = math.inf  # when a run is due for those whom no run in flight can answer; infinite if there are none
        self._reason = "asked"  # why that run is due
        self._context = self._run_context = contextvars.Context()  # of that run's caller; of the last run's
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = math.inf

        self._usual = patience / PATIENCE_FACTOR  # seconds that a run takes: follows the median
        self._wait = patience  # seconds after which a run is late
        self._answered_at = -math.inf
        self._late_since = math.inf  # since the last answer, as is the next
        self._failing_since = math.inf
        self._repeat_after = FIRST_REPEAT
        self._last_failure: tuple[float, Exception] | None = None  # its run's reach, and the error

    async def __call__(self) -> Result:
        """Return what a run that starts after this call returns, or raise what it raises.

        Raises `RunTimeoutError` when `timeout` seconds have passed since the call. Cancelling is safe at any time.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._arrivals += 1
        caller: _Caller[Result] = _Caller(self._arrivals, now + self._timeout, loop.create_future())
        self._callers.append(caller)
        due = now + MAX_ADDED_DELAY if self._runs or self._batch_waits() else now
        if due < self._due and self._reach() < caller.number:
            self._due, self._reason = due, "asked"
            self._context = contextvars.copy_context()
            self._advance()
        try:
            return await caller.future
        except asyncio.CancelledError:
            if caller.future.cancelled():  # not when its answer or its deadline came first
                self._advance()
            raise

    # ---- what is due -------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Do what is due now, and set the timer for what is due next."""
        if not (self._callers or self._runs):
            self._due = math.inf
            return
        now = asyncio.get_running_loop().time() + MOMENT
        self._release_callers(now)
        self._cancel_useless_runs()
        newest = self._newest()
        in_window = now < self._late_since + TROUBLE_WINDOW
        late_at = max(newest.started, self._answered_at) + self._wait if newest and in_window else math.inf
        has_room = len(self._runs) < self._limit
        if newest and newest.reach == math.inf:
            pass  # it is about to start, and can answer all
        elif has_room and min(self._due, late_at) <= now:
            self._start(now, "late" if late_at <= now else self._reason)
        elif late_at <= now and self._limit > 1 and not any(run.cancelled for run in self._runs):
            self._cancel(self._runs[1])  # its end makes room
        self._wake_at(now, late_at)
        if has_room:
            self._wake_at(now, self._due)
        if self._callers:
            self._wake_at(now, self._callers[0].deadline)

    def _release_callers(self, now: float) -> None:
        """Time out callers whose deadline has passed, and forget those who have left."""
        callers = self._callers
        while callers and (callers[0].future.done() or callers[0].deadline <= now):
            caller = callers.popleft()
            if not caller.future.done():
                reach, failure = self._last_failure or (0, None)
                timed_out = RunTimeoutError(self._run_context)
                caller.future.set_exception(failure if failure and caller.number <= reach else timed_out)
        while callers and callers[-1].future.done():
            callers.pop()
        if not callers or callers[-1].number <= self._reach():
            self._due = math.inf
        elif self._due == math.inf:  # the run that would have answered them has made room
            self._due, self._reason = now, "late"

    def _cancel_useless_runs(self) -> None:
        """Cancel runs that can answer nobody, because everybody who waits arrived after they started."""
        for run in self._runs[:]:
            if not run.cancelled and (not self._callers or run.reach < self._callers[0].number):
                self._cancel(run)

    def _wake_at(self, now: float, when: float) -> None:
        """Call `_advance` at that time, unless it has passed. An earlier timer stays, since it sets the next one."""
        if now < when < self._wakes_at:
            if self._timer:
                self._timer.cancel()
            self._wakes_at = when
            self._timer = asyncio.get_running_loop().call_later(when - now, self._wake)

    def _wake(self) -> None:
        self._timer, self._wakes_at = None, math.inf
        self._advance()

    def _newest(self) -> _Run | None:
        """The run in flight that started last."""
        for run in reversed(self._runs):
            if not run.cancelled:
                return run
        return None

    def _reach(self) -> float:
        """The number of the last caller whom a run in flight can answer."""
        newest = self._newest()
        return newest.reach if newest else 0

    # ---- runs --------------------------------------------------------------------------------------------------

    def _start(self, now: float, reason: str) -> None:
        if reason == "late":
            self._late_since = min(self._late_since, now)
            self._wait = max(self._wait, min(2 * self._wait, LONGEST_WAIT))
        if reason == "failed":
            self._repeat_after *= 2
        run = _Run(reason)
        run.task = asyncio.get_running_loop().create_task(self._execute(run), context=self._context.copy())
        self._runs.append(run)
        self._due = math.inf
        self._run_context = self._context

    def _cancel(self, run: _Run) -> None:
        run.cancelled = True
        run.task.cancel()
        if run.reach == math.inf:  # its task never takes a step, so it cannot end the run itself
            self._ended(run, "cancelled", 0)

    async def _execute(self, run: _Run) -> None:
        # Callers who come from now on need another run. Those who came since the task was created get a fresh answer.
        run.reach, run.started = self._arrivals, asyncio.get_running_loop().time()
        self._wake_at(run.started, run.started + self._wait)
        try:
            result = await self._function()
        except (Exception, asyncio.CancelledError) as error:
            if run.cancelled:
                self._ended(run, "cancelled", 0)
            elif isinstance(error, Exception):
                self._failed(run, error)
            else:  # the function cancelled itself, or the event loop is closing
                self._failed(run, RuntimeError("the run was cancelled"))
            if not isinstance(error, Exception):
                raise
        else:
            self._answered(run, result)

    def _answered(self, run: _Run, result: Result) -> None:
        """Settle all who arrived before the run started. The trouble is over."""
        settled = 0
        while self._callers and self._callers[0].number <= run.reach:
            caller = self._callers.popleft()
            if not caller.future.done():
                caller.future.set_result(result)
                settled += 1
        self._answered_at = asyncio.get_running_loop().time()
        step = 1.25 if self._answered_at - run.started > self._usual else 0.8
        self._usual = max(self._usual * step, self._patience / PATIENCE_FACTOR)
        self._wait = self._usual * PATIENCE_FACTOR
        self._late_since = self._failing_since = math.inf
        self._repeat_after = FIRST_REPEAT
        self._last_failure = None
        self._ended(run, "answered", settled)

    def _failed(self, run: _Run, error: Exception) -> None:
        """Plan another run for those whom no other run in flight can answer, or give them the error."""
        now = asyncio.get_running_loop().time()
        self._failing_since = min(self._failing_since, now)
        self._last_failure = run.reach, error
        self._runs.remove(run)
        reach = self._reach()
        concerned = [caller for caller in self._callers if reach < caller.number <= run.reach]
        settled = 0
        if not self._repeat(error) or now + self._repeat_after > self._failing_since + TROUBLE_WINDOW:
            for caller in concerned:
                if not caller.future.done():
                    caller.future.set_exception(error)
                    settled += 1
        elif self._due == math.inf:  # otherwise the waiting batch's run, which starts next, is theirs, too
            self._due, self._reason = now + self._repeat_after, "failed"
        self._ended(run, "failed", settled, error)

    def _ended(self, run: _Run, outcome: str, settled: int, error: Exception | None = None) -> None:
        if run in self._runs:
            self._runs.remove(run)
        if self._batch_waits():
            self._complete_batch(self._due, self._arrivals, QUIET_TURNS)
        self._observe(settled, outcome, run.reason, error)
        self._advance()

    def _batch_waits(self) -> bool:
        return self._due < math.inf and self._reason != "failed"

    def _complete_batch(self, due: float, arrivals: int, turns: int) -> None:
        """Start the batch that is `due` then, unless it has been started, when `turns` have brought no more callers."""
        if self._due != due:
            return
        if self._arrivals > arrivals:
            turns = QUIET_TURNS
        if turns:
            asyncio.get_running_loop().call_soon(self._complete_batch, due, self._arrivals, turns - 1)
        else:
            self._due = -math.inf
            self._advance()
