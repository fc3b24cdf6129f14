"""Linearizable request coalescing: many callers share a run, and no answer is older than its question.

Ordinary request coalescing (single-flight) lets a caller join a run that is under way. What that run read may be older
than the caller's question: a client that has just seen its own write committed can be answered with the value from
before. Here an answer is good only for callers who asked before its run started. Each answer then comes from a read
that began after the request arrived, as if nobody shared anything: the history stays linearizable, with no cache, no
time to live and nothing to invalidate.

The idea is known from consensus systems as ReadIndex batching (etcd, TiKV), from RCU as the grace period that serves
all who asked before it began, and from I/O as natural batching: what arrives during one run is served by the next. It
also makes a second run safe, since the first answer is good for all who asked before its run started: so a run that is
late gets company, as hedged requests do (Dean and Barroso, "The Tail at Scale"; gRPC A6), and one that failed is
repeated, within a budget, as in Finagle and gRPC.

What a `Coalescer` guarantees, for each key, which is what callers ask for:

- Freshness: a caller gets the answer, or the error, of a run for its key that started after it asked.
- Delay: a run starts at once when none is in flight; a waiting batch starts when a run has ended and no more callers
  join it for `QUIET_TURNS`, or `MAX_ADDED_DELAY` after its first caller: however slow or stuck the runs in flight are.
- First answer: it settles every caller who asked before its run started, whichever run was started for them. Runs that
  can answer nobody any more are cancelled.
- Company: while no run has answered for `patience` seconds since the newest run's start, or four times what runs of
  this kind usually take, one more is started; each further one waits twice as long, up to `LONGEST_WAIT`. An answer
  resets that. At a bound, a run makes room (`_run_in_the_way`): the next try for its callers takes its place.
- Repeats: after a failure, callers whom no run in flight can answer get another run, 10, 20, 40 … ms later.
- Trouble: company and repeats come only in the first `TROUBLE_WINDOW` seconds without an answer, and answered runs pay
  for repeats, so that neither a long outage nor a partial one causes many more runs than there would be without them.
- Time: each caller waits at most `timeout` seconds, counted from its question. Then it gets `TimeoutError`.
- Cancellation: a caller that gives up disturbs nobody; when none is left, the runs are cancelled.
- Memory: a key that nobody waits for is forgotten within `LONGEST_WAIT`.

And for all keys together:

- Load: at most `limit` runs are in flight, `KEY_LIMIT` of one key, and three quarters of `limit` of one kind, such as a
  route or a statement, so that a stuck kind leaves room for others.
- Turns: without room, whoever asked first starts first. A repeat asks again; company never waits for a turn.
- What runs usually take, their trouble and the budget for repeats belong to their kind.

This module knows neither HTTP nor SQL, and imports nothing of the project. Its tests: tests/chassis/test_coalescing.py.
"""

import asyncio
import contextvars
import functools
import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

KEY_LIMIT = 4  # runs of one key in flight: enough to get past stuck ones
# Seconds that a batch waits for a run in flight to end: long enough to batch callers while runs take their usual
# millisecond or two, short enough to vanish in a network's own jitter when a run is stuck.
MAX_ADDED_DELAY = 0.005
# Turns of the event loop that bring no more callers, after which a batch is complete: some ten microseconds. In the
# first of them the answers of the last run are sent; clients that ask again at once come in the next, and share a run
# with those who wait, where otherwise two halves of them would take turns, at twice the cost.
QUIET_TURNS = 2
LONGEST_WAIT = 0.4  # seconds between two tries while none answers: a caller with a second to spare sees four of them
# Seconds, from the first failure or late run after the last answer, in which repeats and company are worth their load:
# long enough to restart a process, or to try several replicas.
TROUBLE_WINDOW = 2.0
FIRST_REPEAT = 0.01  # seconds from a failure to its repeat; doubled each time, so that eight fit into `TROUBLE_WINDOW`
MAX_REPEATS = 10  # that are paid for in advance: more than an outage needs
REPEATS_PER_ANSWER = 2  # that an answered run pays for: while every second run fails, one is needed, and one to spare
PATIENCE_FACTOR = 4  # how many times as long as usual a run may take before it is late
MAX_KINDS = 1000  # that are remembered: an application has some dozens, unless it makes one of each question
MOMENT = 1e-6  # seconds by which a timer may be early, since floating-point numbers are rounded

Result = TypeVar("Result")
Function = Callable[[], Awaitable[Any]]
Observe = Callable[[Hashable, int, str, str, Exception | None], None]
_Place = tuple[int, Callable[[], None]]  # in a line: its number, and what to call when the turn comes


@dataclass(slots=True, eq=False)
class _Caller:
    """A waiting caller. Callers are numbered in the order of their questions."""

    number: int
    deadline: float
    future: asyncio.Future[Any]


@dataclass(slots=True, eq=False)
class _Due:
    """A run to come: when, why ("asked", "late", "failed"), and the function and context of the caller it is for."""

    at: float
    reason: str
    function: Function
    context: contextvars.Context


@dataclass(slots=True, eq=False)
class _Run:
    """One call of a function, from the creation of its task to the end of that task."""

    key: "_Key"
    due: _Due
    started: float = math.inf
    reach: float = math.inf  # number of the last caller that it can answer; until its first step, that is any caller
    outcome: str = ""  # once it is known; a cancelled run may take time to end
    makes_room: bool = False
    task: asyncio.Task[None] = field(init=False)


@dataclass(slots=True, eq=False)
class _Kind:
    """What the keys of one kind share: how runs went, and who waits for a turn."""

    name: Hashable
    wait: float  # seconds after which a run is late: four times the median of what runs took, which it follows
    repeats_left: float  # apart from those that are planned
    taken: int = 0  # turns
    line: OrderedDict[object, _Place] = field(default_factory=OrderedDict)  # who waits for a turn
    runs: list[_Run] = field(default_factory=list)  # by their starts; cancelled ones, too, until they have ended
    answered_at: float = -math.inf
    answered_start: float = -math.inf  # when the newest of the answered runs started
    trouble_since: float = math.inf  # the first failure or late run after the last answer
    evict_at: float = -math.inf  # before that, no key makes another's run make room


@dataclass(slots=True, eq=False)
class _Key:
    """A key that somebody waits for: its callers and its runs."""

    name: Hashable
    kind: _Kind
    callers: deque[_Caller] = field(default_factory=deque)  # in order; the first and the last still wait
    runs: list[_Run] = field(default_factory=list)  # as in `_Kind`
    due: _Due | None = None  # for callers whom no run in flight can answer
    wait: float = 0.0  # seconds after which a run is late
    late_at: float = math.inf
    trouble_since: float = math.inf  # as in `_Kind`
    wakes_at: float = math.inf  # its place in `Coalescer._wakes`

    def newest(self) -> _Run | None:
        """The run in flight that started last."""
        for run in reversed(self.runs):
            if not run.outcome:
                return run
        return None

    def reach(self) -> float:
        """The number of the last caller whom a run in flight can answer."""
        newest = self.newest()
        return newest.reach if newest else 0

    def late_run(self, now: float) -> _Run | None:
        """The newest run, if it is worth company."""
        self.late_at = now + self.wait  # to ask again, if there is no room now
        newest = self.newest()
        return newest if newest and now < self.note_trouble(now) else None

    def note_trouble(self, now: float) -> float:
        """Note that there is trouble; return until when it is worth company and repeats."""
        self.trouble_since = min(self.trouble_since, now)
        self.kind.trouble_since = min(self.kind.trouble_since, now)
        return min(self.trouble_since, self.kind.trouble_since) + TROUBLE_WINDOW


class Coalescer:
    """Calls functions for all who ask, as the module's docstring says.

    `limit` is the number of runs in flight at most, `timeout` the seconds that a caller waits at most, `patience` the
    least number of seconds after which a run is late. `is_failure` tells whether an error is a failure of what is
    behind; any other error is an answer, which says no. `repeats`: whether another try may do better, as with several
    replicas: then failed runs are repeated.

    A run executes in a copy of the context (`contextvars`) of the first caller that it was started for, so that traces
    show it there. `observe` is called for each run that ended: its kind; how many callers it settled; its outcome,
    "answered", "failed", "timed out" or "cancelled"; why it was started, "asked", "late" or "failed" for a repeat; and
    its error. Use a coalescer in one event loop only.
    """

    def __init__(
        self,
        *,
        limit: int,
        timeout: float,
        patience: float,
        is_failure: Callable[[Exception], bool] = lambda _: True,
        repeats: bool = False,
        observe: Observe = lambda *_: None,
    ) -> None:
        self._limit = limit
        self._share = limit - limit // 4  # of one kind
        self._key_limit = min(KEY_LIMIT, self._share)
        self._timeout = timeout
        self._patience = patience
        self._is_failure = is_failure
        self._max_repeats = MAX_REPEATS if repeats else 0
        self._observe = observe

        self._keys: dict[Hashable, _Key] = {}
        self._kinds: dict[Hashable, _Kind] = {}
        self._lines: set[_Kind] = set()  # kinds with somebody in line
        # When each key is to be looked at, or forgotten: a heap, since a timer of the event loop for each takes longer.
        self._wakes: list[tuple[float, int, _Key]] = []
        self._timer: asyncio.TimerHandle | None = None  # for the first of them
        self._taken = 0  # turns, those of runs included
        self._numbers = itertools.count()  # for whatever has to be told apart, in its order
        self._arrivals = 0

    async def __call__(self, key: Hashable, function: Callable[[], Awaitable[Result]], kind: Hashable = None) -> Result:
        """Return what `function`, or that of another caller with this key, returns in a run that starts after now.

        Raises what it raises, and `TimeoutError` when `timeout` seconds have passed. Cancelling is safe at any time.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        asked = self._keys.get(key)
        if asked is None:
            asked = self._keys[key] = _Key(key, self._kind(kind))
            asked.wait = asked.kind.wait
        self._arrivals += 1
        caller = _Caller(self._arrivals, now + self._timeout, loop.create_future())
        asked.callers.append(caller)
        if not (asked.runs or asked.due) and self._has_room(asked.kind):
            self._start(asked, _Due(now, "asked", function, contextvars.copy_context()))
        elif (asked.due is None or asked.due.reason == "failed") and asked.reach() < caller.number:
            at = now + MAX_ADDED_DELAY if asked.runs else now
            if asked.due is None or at < asked.due.at:  # else a repeat comes first
                self._plan(asked, _Due(at, "asked", function, contextvars.copy_context()))
                self._advance(asked)
        try:
            result: Result = await caller.future
        except asyncio.CancelledError:
            if caller.future.cancelled():  # not when its answer or its deadline came first
                self._advance(asked)
            raise
        return result

    # ---- turns -------------------------------------------------------------------------------------------------

    async def turn(self, kind: Hashable) -> None:
        """Wait for a turn to do something that is not shared; `end_turn` ends it. Cancelling is safe."""
        own, given = self._kind(kind), asyncio.get_running_loop().create_future()

        def begin() -> None:
            if not given.cancelled():
                self._begin_turn(own)
                given.set_result(None)

        self._queue(own, given, begin)
        self._give_turns()
        try:
            await given
        except asyncio.CancelledError:
            if given.cancelled():
                self._leave_line(own, given)
            else:  # it was given at the last moment
                self.end_turn(kind)
            raise

    def end_turn(self, kind: Hashable) -> None:
        self._taken -= 1
        self._kinds[kind].taken -= 1
        self._give_turns()

    def _begin_turn(self, kind: _Kind) -> None:
        self._taken += 1
        kind.taken += 1

    def _kind(self, name: Hashable) -> _Kind:
        kind = self._kinds.get(name)
        if kind is None:
            if len(self._kinds) >= MAX_KINDS:
                self._kinds = {it.name: it for it in self._kinds.values() if it.taken or it.line}
            kind = self._kinds[name] = _Kind(name, self._patience, self._max_repeats)
        return kind

    def _has_room(self, kind: _Kind) -> bool:
        return self._taken < self._limit and kind.taken < self._share

    def _queue(self, kind: _Kind, who: object, begin: Callable[[], None]) -> None:
        kind.line[who] = next(self._numbers), begin
        self._lines.add(kind)

    def _leave_line(self, kind: _Kind, who: object) -> None:
        if kind.line.pop(who, None) and not kind.line:
            self._lines.remove(kind)

    def _give_turns(self) -> None:
        """Give the turns that are free to those who have waited longest."""
        while self._taken < self._limit:
            kinds = [kind for kind in self._lines if kind.taken < self._share]
            if not kinds:
                return
            kind = min(kinds, key=lambda kind: next(iter(kind.line.values()))[0])
            who, (_, begin) = next(iter(kind.line.items()))
            self._leave_line(kind, who)
            begin()

    # ---- what is due -------------------------------------------------------------------------------------------

    def _advance(self, key: _Key) -> None:
        """Do what is due for a key, and note when something is due next."""
        now = asyncio.get_running_loop().time() + MOMENT
        timed_out = self._release_callers(key, now)
        for run in key.runs[:]:  # those that can answer nobody, since everybody who waits asked after their start
            if not run.outcome and (not key.callers or run.reach < key.callers[0].number):
                self._cancel(run, "timed out" if timed_out else "cancelled")
        newest = key.newest()
        if key.due and (not key.callers or (newest and key.callers[-1].number <= newest.reach)):
            self._plan(key, None)
            self._leave_line(key.kind, key)
        if not key.callers:
            if not key.runs and key.wakes_at == math.inf:
                self._keys.pop(key.name, None)
            return
        if newest and newest.reach == math.inf:  # it is about to start, and can answer all
            return
        due = key.due if key.due and key.due.at <= now else None
        has_room = len(key.runs) < self._key_limit and self._has_room(key.kind)
        late = key.late_run(now) if key.late_at <= now else None
        if late and has_room:
            due = replace(late.due, reason="late")
        elif late and (victim := self._run_in_the_way(late, now)):
            victim.makes_room = True  # for the next try of its own key
            self._cancel(victim, "cancelled")
        if due and has_room:
            self._start(key, due)
            return
        if due and len(key.runs) < self._key_limit and key not in key.kind.line:
            self._queue(key.kind, key, functools.partial(self._start, key, due))
        self._look_again(key, now)

    def _release_callers(self, key: _Key, now: float) -> bool:
        """Time out callers whose deadline has passed, and forget those who have left; whether any was timed out."""
        callers, timed_out = key.callers, False
        while callers and (callers[0].future.done() or callers[0].deadline <= now):
            caller = callers.popleft()
            if not caller.future.done():
                caller.future.set_exception(TimeoutError("no answer in time"))
                timed_out = True
        while callers and callers[-1].future.done():
            callers.pop()
        return timed_out

    def _run_in_the_way(self, late: _Run, now: float) -> _Run | None:
        """The run that makes room when there is none for the company of a late one.

        If its key has too many, the second oldest of them; never the oldest, which ends first when all are merely slow.
        Otherwise the late one itself, if one that started later has been answered; a second time only where replicas
        may be stuck. While nobody is answered, the second oldest of the kind, but only now and then.
        """
        key, kind = late.key, late.key.kind
        if len(key.runs) >= self._key_limit:
            runs = key.runs
        elif late.started < kind.answered_start and (self._max_repeats or late.due.reason == "asked"):
            return late
        elif late.started < kind.answered_at or now < kind.evict_at:
            return None
        else:
            runs = kind.runs
        if len(runs) < 2 or any(run.outcome for run in runs) or late.started < runs[1].started:
            return None  # or one is about to end anyway, or the second oldest has had less time than the late one
        kind.evict_at = now + 2 * runs[1].key.wait
        return runs[1]

    def _plan(self, key: _Key, due: _Due | None) -> None:
        """Replace the run to come. A repeat that is not needed any more costs nothing."""
        if key.due and key.due.reason == "failed":
            key.kind.repeats_left += 1
        key.due = due

    def _look_again(self, key: _Key, now: float) -> None:
        """Look at a key when something is due next. An earlier time stays, since the next one is set then."""
        when = min(key.late_at, key.callers[0].deadline, now + LONGEST_WAIT)
        if key.due and now < key.due.at < when:
            when = key.due.at
        if when < key.wakes_at:
            key.wakes_at = when
            heapq.heappush(self._wakes, (when, next(self._numbers), key))
            if self._wakes[0][2] is key:
                self._set_timer(now)

    def _set_timer(self, now: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._wakes[0][0] - now, self._wake)

    def _wake(self) -> None:
        """Look at the keys whose time has come. Those that are idle are forgotten, even before their time."""
        self._timer, now = None, asyncio.get_running_loop().time()
        while self._wakes:
            when, _, key = self._wakes[0]
            is_current = when == key.wakes_at  # else it has been looked at before
            if is_current and when > now + MOMENT and (key.callers or key.runs):
                break
            heapq.heappop(self._wakes)
            if is_current:
                key.wakes_at = math.inf
                self._advance(key)
        if self._wakes and not self._timer:
            self._set_timer(now)

    # ---- runs --------------------------------------------------------------------------------------------------

    def _start(self, key: _Key, due: _Due) -> None:
        if due.reason == "late":
            self._plan(key, None)  # this run is for all
            key.wait = max(key.wait, min(2 * key.wait, LONGEST_WAIT))
        key.due = None
        self._leave_line(key.kind, key)
        run = _Run(key, due)
        run.task = asyncio.get_running_loop().create_task(self._execute(run), context=due.context.copy())
        key.runs.append(run)
        key.kind.runs.append(run)
        self._begin_turn(key.kind)

    def _cancel(self, run: _Run, outcome: str) -> None:
        run.outcome = outcome
        run.task.cancel()
        if run.reach == math.inf:  # its task never takes a step, so it cannot end the run itself
            self._ended(run, 0)

    async def _execute(self, run: _Run) -> None:
        # Callers who come from now on need another run. Those who came since the task was created get a fresh answer.
        key, now = run.key, asyncio.get_running_loop().time()
        run.reach, run.started = self._arrivals, now
        key.late_at = now + key.wait
        self._look_again(key, now)
        try:
            result = await run.due.function()
        except (Exception, asyncio.CancelledError) as error:
            if run.outcome:
                self._ended(run, 0)
            elif not isinstance(error, Exception):  # the function cancelled itself, or the event loop is closing
                self._failed(run, RuntimeError("the run was cancelled"))
            elif self._is_failure(error):
                self._failed(run, error)
            else:
                self._answered(run, error=error)
            if not isinstance(error, Exception):
                raise
        else:
            self._answered(run, result)

    def _answered(self, run: _Run, result: object = None, error: Exception | None = None) -> None:
        """Settle all who asked before the run started. The trouble is over."""
        key, kind, callers, settled = run.key, run.key.kind, run.key.callers, 0
        run.outcome = "answered"
        while callers and callers[0].number <= run.reach:
            future = callers.popleft().future
            if not future.done():
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
                settled += 1
        now = asyncio.get_running_loop().time()
        kind.answered_at, kind.answered_start = now, max(kind.answered_start, run.started)
        step = 1.25 if (now - run.started) * PATIENCE_FACTOR > kind.wait else 0.8
        kind.wait = max(kind.wait * step, self._patience)
        kind.repeats_left = min(kind.repeats_left + REPEATS_PER_ANSWER, self._max_repeats)
        key.trouble_since = kind.trouble_since = math.inf
        key.wait = kind.wait
        key.late_at = now + key.wait
        self._ended(run, settled)

    def _failed(self, run: _Run, error: Exception) -> None:
        """Plan another run for those whom no other run in flight can answer, or give them the error."""
        key, kind, settled = run.key, run.key.kind, 0
        run.outcome = "failed"
        now = asyncio.get_running_loop().time()
        reach = key.reach()
        # Half of those in flight may fail at once, before the others have paid for their repeats.
        can_pay = self._max_repeats and kind.repeats_left + len(kind.runs) >= 1
        end = key.note_trouble(now) - FIRST_REPEAT
        at = min(now + FIRST_REPEAT + (now - kind.trouble_since), end)  # the time doubles while nothing is answered
        repeated = now < end and can_pay
        for caller in key.callers:
            if repeated and caller.deadline > at:  # a repeat comes in time for this one, and so for all behind it
                break
            if reach < caller.number <= run.reach and not caller.future.done():
                caller.future.set_exception(error)
                settled += 1
        if repeated and key.due is None and reach < run.reach:  # the run of a batch that waits is theirs, too
            self._plan(key, replace(run.due, at=at, reason="failed"))
            kind.repeats_left -= 1
        self._ended(run, settled, error)

    def _ended(self, run: _Run, settled: int, error: Exception | None = None) -> None:
        key, kind = run.key, run.key.kind
        key.runs.remove(run)
        kind.runs.remove(run)
        self._taken -= 1
        kind.taken -= 1
        if run.makes_room and key.callers and key.callers[0].number <= run.reach:
            self._start(key, replace(run.due, reason="late"))
        elif key.due and key.due.reason != "failed":
            self._complete_batch(key, key.due)
        self._observe(kind.name, settled, run.outcome, run.due.reason, error)
        if self._lines:
            self._give_turns()
        if key.callers or key.runs or key.wakes_at == math.inf:  # else it is forgotten when its time has come
            self._advance(key)

    def _complete_batch(self, key: _Key, due: _Due, last: int = 0, turns: int = 0) -> None:
        """Start the batch that is `due`, unless it has been started, when `turns` have brought no more callers."""
        if key.due is not due:
            return
        newest = key.callers[-1].number
        if newest > last:
            turns = QUIET_TURNS
        if turns:
            asyncio.get_running_loop().call_soon(self._complete_batch, key, due, newest, turns - 1)
        else:
            key.due = replace(due, at=-math.inf)
            self._advance(key)
