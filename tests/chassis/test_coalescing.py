"""`Coalescer` alone, on a clock that the test controls: every order of events that can matter, and named corner cases.

`World` surrounds a coalescer with callers, runs and turns, and checks its guarantees at each event, for each key: it
numbers all questions, starts and ends, so that "a run that started after this caller asked" is a fact and no matter of
luck.
"""

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import gc
import itertools
import math
import sys
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator
from random import Random
from typing import Any, TypeVarTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.loops import JumpingLoop

from chassis.coalescing import Coalescer

# The promised times, in seconds, whatever the module's constants are.
ADDED_DELAY = 0.005
LONGEST_WAIT = 0.4
TROUBLE_WINDOW = 2.0
REPEATS = 0.01, 0.02, 0.04
KEY_LIMIT = 4  # runs

PATIENCE = 0.02  # seconds; small, so that few steps reach every combination of times
TIMEOUT = 0.07  # seconds
MOMENT = 2e-6  # seconds
NEVER_STARTED = {(0, "cancelled"), (0, "timed out")}

Args = TypeVarTuple("Args")


class ManualLoop(asyncio.SelectorEventLoop):
    """An event loop that runs one iteration when told to, on a clock that otherwise stands still."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.busy = False  # whether the next iteration has anything to do (timers apart)
        self.timers: list[asyncio.TimerHandle] = []
        self.complaints: list[dict[str, Any]] = []
        super().__init__()
        self.set_exception_handler(lambda _loop, context: self.complaints.append(context))

    def time(self) -> float:
        return self.now

    def call_soon(
        self, callback: Callable[[*Args], object], *args: *Args, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        self.busy = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Args], object], *args: *Args, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        self.busy |= when <= self.now
        self.timers.append(super().call_at(when, callback, *args, context=context))
        return self.timers[-1]

    def tick(self) -> None:
        """Run one iteration: whatever is ready, and the timers that are due."""
        self.busy = False
        self.stop()
        self.run_forever()

    def settle(self) -> None:
        """Run iterations until nothing is left to do at this time."""
        self.tick()
        while self.busy:
            self.tick()


class Run:
    """One call of a coalesced function, which lasts until the test ends it."""

    def __init__(self, number: int, opener: "Caller", loop: asyncio.AbstractEventLoop) -> None:
        self.started, self.started_at = number, loop.time()
        self.opener, self.key, self.kind = opener, opener.key, opener.kind
        self.ended: int | None = None
        self.ended_at = 0.0
        self.end: asyncio.Future[Run] = loop.create_future()
        self.error: Exception | None = None
        self.outcome = ""
        self.evicted = False
        self.settled = 0  # callers who got its answer or its error
        self.observed: list[tuple[int, str]] = []


class Caller:
    """A caller, or who waits for a turn: when it asked, and what it got."""

    def __init__(self, key: Hashable, kind: Hashable) -> None:
        self.key, self.kind = key, kind
        self.task: asyncio.Task[Any]
        self.arrived = math.inf  # not yet
        self.arrived_at = 0.0
        self.in_line = False  # whether it needed nothing but a turn when it asked
        self.cancelled = False
        self.has_turn, self.had_turn_at = False, 0.0
        self.end: asyncio.Future[None] | None = None


class Failure(Exception):
    """What is behind has failed. Any other error is an answer that says no."""


CALLER: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller")


class World:
    """A coalescer with its callers and runs; any step raises `AssertionError` if a guarantee is broken."""

    def __init__(
        self,
        loop: ManualLoop,
        limit: int = 2,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
        *,
        repeats: bool = True,
    ) -> None:
        self.loop, self.limit, self.timeout, self.patience = loop, limit, timeout, patience
        self.share = limit - limit // 4
        self.key_limit = min(KEY_LIMIT, self.share)
        self.order = itertools.count(1)
        self.callers: list[Caller] = []
        self.turns: list[Caller] = []
        self.runs: list[Run] = []
        self.broken: list[str] = []
        self.started: list[Caller] = []  # since everything possible had happened
        self.ended: list[Run] = []  # and not yet observed
        self.full_at: dict[Hashable, float] = {}  # when a key last had no room
        self.observations: list[tuple[int, str, str]] = []
        self.coalescer = Coalescer(
            limit=limit,
            timeout=timeout,
            patience=patience,
            is_failure=lambda error: isinstance(error, Failure),
            repeats=repeats,
            observe=self._observe,
        )

    # What the coalescer calls

    async def _function(self) -> Run:
        run = Run(next(self.order), CALLER.get(), self.loop)
        self._expect(self.has_room(run.key, run.kind), "more runs than a bound")
        is_late = all(run.started_at > it.started_at + self.patience - MOMENT for it in self.in_flight(run.key))
        replaces = any(it.evicted for it in self.runs if it.key == run.key)
        self._expect(bool(self.unserved(run.key)) or is_late or replaces, "a run that nobody needs")
        self._note_first(run.opener)
        self.runs.append(run)
        try:
            answer = await run.end
            run.outcome = "answered"
            return answer
        except asyncio.CancelledError:
            run.outcome = "cancelled"
            self._check_cancelled(run)
            raise
        except Exception as error:
            run.outcome, run.error = "failed" if isinstance(error, Failure) else "answered", error
            raise
        finally:
            run.ended, run.ended_at = next(self.order), self.loop.time()
            self.ended.append(run)

    def _observe(self, _kind: Hashable, callers: int, outcome: str, reason: str, error: Exception | None) -> None:
        self.observations.append((callers, outcome, reason))
        if not self.ended:
            self._expect((callers, outcome) in NEVER_STARTED, f"{outcome} was observed of a run that never started")
            return
        run = self.ended.pop()
        self._expect(error is (run.error if outcome == "failed" else None), "another error than the run's")
        run.observed.append((callers, "cancelled" if outcome == "timed out" else outcome))

    async def _ask(self, caller: Caller) -> Run:
        CALLER.set(caller)
        caller.in_line = not self.in_flight(caller.key) and not self.unserved(caller.key)
        caller.arrived, caller.arrived_at = next(self.order), self.loop.time()
        try:
            run: Run = await self.coalescer(caller.key, self._function, caller.kind)
        except asyncio.CancelledError:
            self._expect(caller.cancelled, "cancelled by nobody")
            raise
        except TimeoutError:
            self._expect(self.loop.time() > caller.arrived_at + self.timeout - MOMENT, "timed out too early")
            raise
        except Exception as error:
            (run,) = [each for each in self.runs if each.error is error]
            if isinstance(error, Failure):
                self._expect(not self._can_be_answered(caller), "an error while another run could answer")
            raise
        finally:
            if not caller.cancelled and "run" in locals():
                run.settled += 1
                self._expect(run.key == caller.key, "an answer to another question")
                self._expect(run.started > caller.arrived, "an answer that is older than its question")
        return run

    async def _take_turn(self, caller: Caller) -> None:
        caller.in_line = True
        caller.arrived = next(self.order)
        try:
            await self.coalescer.turn(caller.kind)
        except asyncio.CancelledError:
            self._expect(caller.cancelled, "cancelled by nobody")
            raise
        self._expect(self.has_room(caller.key, caller.kind), "a turn beyond a bound")
        self._note_first(caller)
        caller.has_turn, caller.end = True, self.loop.create_future()
        try:
            await caller.end
        finally:
            caller.has_turn, caller.had_turn_at = False, self.loop.time()
            self.coalescer.end_turn(caller.kind)

    # What is known about them

    def in_flight(self, key: Hashable = ..., since: float = math.inf) -> list[Run]:
        """Runs that have not ended, or not before that time."""
        return [run for run in self.runs if (run.ended is None or run.ended_at >= since) and key in (..., run.key)]

    def waiting(self, key: Hashable = ...) -> list[Caller]:
        return [it for it in self.callers if it.arrived < math.inf and not it.task.done() and key in (..., it.key)]

    def unserved(self, key: Hashable = ...) -> list[Caller]:
        """Callers for whom no run in flight has started."""
        return [caller for caller in self.waiting(key) if not self._can_be_answered(caller)]

    def _taken(self, since: float) -> list[Run | Caller]:
        turns = [turn for turn in self.turns if turn.has_turn or turn.had_turn_at >= since]
        return [*self.in_flight(since=since), *turns]

    def has_room(self, key: Hashable, kind: Hashable, since: float = math.inf) -> bool:
        taken = self._taken(since)
        of_kind = [each for each in taken if each.kind == kind]
        of_key = self.in_flight(key, since)
        return len(taken) < self.limit and len(of_kind) < self.share and len(of_key) < self.key_limit

    def answered_at(self, key: Hashable) -> float:
        """When a run for a key was last answered."""
        return max((run.ended_at for run in self.runs if run.outcome == "answered" and run.key == key), default=0)

    def _can_be_answered(self, caller: Caller) -> bool:
        """Whether a run in flight started after this caller asked."""
        return any(run.started > caller.arrived and not run.end.done() for run in self.in_flight(caller.key))

    def _still_waits(self, caller: Caller) -> bool:
        in_time = self.loop.time() < caller.arrived_at + self.timeout - MOMENT
        return caller.arrived < math.inf and in_time and not caller.cancelled and not caller.task.done()

    # Checks

    def _expect(self, condition: bool, message: str) -> None:
        """Record a violation: an error raised in a callback would not reach the test."""
        if not condition:
            self.broken.append(message)

    def _tried(self, caller: Caller) -> bool:
        return any(run.key == caller.key and run.started > caller.arrived for run in self.runs)

    def _note_first(self, starter: Caller) -> None:
        if not self._tried(starter):  # a second run may come at any time
            self.started.append(starter)

    def _check_order(self, now: float) -> None:
        """Whoever has just started asked before all others who need nothing but a turn."""
        turns = [turn for turn in self.turns if not turn.has_turn and not turn.task.done()]
        for other in self.unserved() + turns:
            for starter in self.started if other.in_line and not self._tried(other) else []:
                has_share = len([it for it in self._taken(since=now) if it.kind == other.kind]) < self.share
                is_earlier = other.arrived < starter.arrived and (has_share or other.kind == starter.kind)
                assert not is_earlier, "somebody who asked later came first"
        self.started.clear()

    def _check_cancelled(self, run: Run) -> None:
        """It was of no use any more; or it was late, not the oldest, and makes room for the next try."""
        answers = [each for each in self.runs if each.outcome == "answered" and each.key == run.key]
        callers = [it for it in self.callers if it.key == run.key and it.arrived < run.started]
        if not any(self._still_waits(it) and all(each.started < it.arrived for each in answers) for it in callers):
            return
        run.evicted, now = True, self.loop.time()  # the others may have ended in this very moment
        self._expect(now > run.started_at + self.patience - MOMENT, "cancelled though not late")
        older = [each for each in self.in_flight(since=now) if each.kind == run.kind and each.started < run.started]
        later = [each for each in self.runs if each.kind == run.kind and each.started > run.started]
        self._expect(bool(older) or any(each.outcome == "answered" for each in later), "the oldest was cancelled")

    def check(self) -> None:
        """Check what holds at any time, and what holds once everything possible at this time has happened."""
        assert not self.broken, self.broken
        assert not self.loop.complaints, self.loop.complaints
        now = self.loop.time()
        keys = {caller.key: caller.kind for caller in self.waiting()}
        for key, kind in keys.items():
            if not self.has_room(key, kind, since=now):
                self.full_at[key] = now
        if self.loop.busy:
            return
        for caller in self.waiting():
            assert now < caller.arrived_at + self.timeout - MOMENT, "a caller waits beyond its time"
            for run in self.runs:
                assert run.key != caller.key or run.outcome != "answered" or run.started < caller.arrived, "withheld"
        for run in self.in_flight():
            waiting = self.waiting(run.key)
            assert any(run.started > caller.arrived for caller in waiting), "a run goes on that nobody waits for"
        for run in self.runs:
            if run.evicted and run.ended_at == now:
                assert not self.has_room(run.key, run.kind, since=now), "cancelled although there was room"
            if run.evicted and any(caller.arrived < run.started for caller in self.unserved(run.key)):
                later = [each for each in self.runs if each.key == run.key and each.started > (run.ended or 0)]
                assert later, "a run that made room was not replaced"
        self._check_order(now)
        for turn in self.turns:
            waits = turn.arrived < math.inf and not turn.task.done() and not turn.has_turn
            assert not waits or not self.has_room(turn.key, turn.kind), "a turn is withheld"
        for key, kind in keys.items():
            if self.has_room(key, kind):
                self._check_starts(key, now)

    def _check_starts(self, key: Hashable, now: float) -> None:
        """That no run of a key that has room is overdue."""
        in_flight, runs = self.in_flight(key), [run for run in self.runs if run.key == key]
        ends = [run.ended for run in runs if run.ended is not None]
        failed = [run for run in runs if isinstance(run.error, Failure)]
        repeats = bool(failed) and now < failed[-1].ended_at + TROUBLE_WINDOW
        for caller in self.unserved(key) if not repeats else []:
            assert in_flight, "a caller waits for nothing"
            assert now < caller.arrived_at + ADDED_DELAY - MOMENT, "a caller waits longer than promised"
            assert max(ends, default=-1) < caller.arrived, "no run was started when one ended"
        if in_flight:
            answered_at = self.answered_at(key)
            since = max(runs[-1].started_at, answered_at, self.full_at.get(key, 0))
            lates = len([run for run in runs if run.started_at > answered_at and run is not in_flight[0]])
            longest = max((run.ended_at - run.started_at for run in self.runs if run.outcome == "answered"), default=0)
            wait = max(min(self.patience * 2**lates, max(LONGEST_WAIT, self.patience)), 5 * longest * 2**lates)
            first = min((run.started_at for run in runs if run.started_at > answered_at), default=now)
            if now <= first + TROUBLE_WINDOW:
                assert now < since + wait + MOMENT, "a late run got no company"

    # What a test does

    def tick(self) -> None:
        self.loop.tick()
        self.check()

    def settle(self) -> None:
        self.loop.settle()
        self.check()

    def advance(self, seconds: float) -> None:
        """Let time pass; whatever is due by then happens at the next tick."""
        self.loop.now += seconds
        self.loop.busy = True

    def sleep(self, seconds: float) -> None:
        """Let time pass, and everything due happen."""
        self.advance(seconds)
        self.settle()

    def live(self, seconds: float, step: float = 0.001) -> None:
        """Let time pass in small steps, so that everything happens when it is due."""
        for _ in range(round(seconds / step)):
            self.sleep(step)

    def arrive(self, key: Hashable = "a", kind: Hashable = None) -> Caller:
        """A caller asks, in the next iteration of the event loop."""
        caller = Caller(key, kind)
        self.callers.append(caller)
        caller.task = self.loop.create_task(self._ask(caller), context=contextvars.Context())
        return caller

    def arrived(self, number: int = 1, key: Hashable = "a", kind: Hashable = None) -> list[Caller]:
        """This many callers ask, and everything that follows happens."""
        callers = [self.arrive(key, kind) for _ in range(number)]
        self.settle()
        return callers

    def take_turn(self, kind: Hashable = None) -> Caller:
        """Somebody asks for a turn, in the next iteration of the event loop."""
        turn = Caller(object(), kind)
        self.turns.append(turn)
        turn.task = self.loop.create_task(self._take_turn(turn))
        return turn

    def cancel(self, caller: Caller) -> None:
        caller.cancelled = True
        caller.task.cancel()

    def answer(self, run: Run) -> None:
        run.end.set_result(run)

    def fail(self, run: Run, error: Exception | None = None) -> None:
        run.end.set_exception(error or Failure())

    def finish(self) -> None:
        """Answer all waiting callers; then nothing may be left over, and as many can be served at once as ever."""
        self.settle()
        for _ in range(len(self.callers) + len(self.turns) + 300):
            if not self.waiting() and all(turn.task.done() for turn in self.turns):
                break
            for turn in self.turns:
                if turn.has_turn and turn.end and not turn.end.done():
                    turn.end.set_result(None)
            for run in self.unfinished()[:1]:
                self.answer(run)
            self.sleep(ADDED_DELAY)  # a repeat may be planned
        else:
            raise AssertionError("somebody waits for ever")
        for number in range(self.limit):
            self.arrive(object(), number < self.share)
        self.settle()
        assert len(self.unfinished()) == self.limit, "a turn was lost"
        for run in self.unfinished():
            self.answer(run)
        self.settle()
        assert not asyncio.all_tasks(self.loop), "a task is left over"
        self.sleep(LONGEST_WAIT + 2 * MOMENT)
        assert all(timer.cancelled() or timer.when() <= self.loop.now + MOMENT for timer in self.loop.timers), (
            "a timer is left"
        )
        assert not self.coalescer._keys, "a key is left"
        assert not self.coalescer._wakes, "a time at which to look at a key is left"
        self.loop.timers.clear()
        left = sum(caller.cancelled for caller in self.callers)  # some of them when their answer was there
        for run in self.runs:
            ((settled, outcome),) = run.observed
            assert outcome == run.outcome
            assert run.settled <= settled <= run.settled + left, "not what was observed of a run"
        for caller in self.callers:
            if not caller.task.cancelled():
                caller.task.exception()  # retrieved here: any other exception never retrieved is the coalescer's

    def unfinished(self) -> list[Run]:
        """Runs that the test has not ended yet."""
        return [run for run in self.in_flight() if not run.end.done()]

    def cancellable(self, whom: list[Caller] | None = None) -> list[Caller]:
        return [it for it in (self.callers if whom is None else whom) if not it.task.done() and not it.cancelled]


@pytest.fixture
def loop() -> Iterator[ManualLoop]:
    """An event loop, checked for leftovers at the end."""
    loop = ManualLoop()
    yield loop
    gc.collect()
    assert not loop.complaints, loop.complaints
    loop.close()


# ---- every order of events -----------------------------------------------------------------------------------


# What can happen next. An IndexError says that it cannot: there is nobody, or no run, to whom it could.
EVENTS: dict[str, Callable[[World], object]] = {
    "arrive": World.arrive,
    "another key": lambda world: world.arrive("b"),
    "first leaves": lambda world: world.cancel(world.cancellable()[0]),
    "last leaves": lambda world: world.cancel(world.cancellable()[1:][-1]),
    "first answers": lambda world: world.answer(world.unfinished()[0]),
    "last answers": lambda world: world.answer(world.unfinished()[1:][-1]),
    "first fails": lambda world: world.fail(world.unfinished()[0]),
    "last says no": lambda world: world.fail(world.unfinished()[-1], LookupError()),
    "tick": lambda world: [world][not world.loop.busy].tick(),
    "a moment": lambda world: world.advance(0.6 * ADDED_DELAY),
    "patience ends": lambda world: world.advance(PATIENCE),
    "time is up": lambda world: world.advance(TIMEOUT),
}
MORE_EVENTS: dict[str, Callable[[World], object]] = EVENTS | {
    "another kind": lambda world: world.arrive(len(world.callers), "other kind"),
    "a turn": World.take_turn,
    "a turn ends": lambda world: world.cancel(world.cancellable(world.turns)[0]),  # or is not wanted
}

A_RUN = ("arrive", "tick", "tick")  # it is in flight
A_RUN_AND_A_BATCH = (*A_RUN, "arrive", "tick")  # which waits for the run's end
TWO_RUNS_AND_A_BATCH = (*A_RUN_AND_A_BATCH, "a moment", "a moment", "tick", "tick", "arrive", "tick")
LATE = (*A_RUN, "patience ends", "tick", "tick")  # it has company
LATE_AT_THE_LIMIT = (*TWO_RUNS_AND_A_BATCH, "patience ends")
FAILED = (*A_RUN, "first fails", "tick")  # its repeat is planned
A_LINE = (*A_RUN, "a turn", "another key", "tick")
LATE_IN_A_LINE = (*A_RUN, "another key", "tick", "tick", "a turn", "tick", "patience ends")


def explore(loop: ManualLoop, limit: int, prefix: tuple[str, ...], depth: int, events: Iterable[str]) -> int:
    """Play `prefix` and each sequence of up to `depth` events that can follow it; return the number of histories."""
    world = World(loop, limit, repeats=limit > 1)
    try:
        for event in prefix:
            MORE_EVENTS[event](world)
    except IndexError:
        return 0
    finally:
        try:
            world.finish()
        except AssertionError as fault:
            raise AssertionError(f"{prefix}: {fault}") from fault
    return 1 + sum(explore(loop, limit, (*prefix, event), depth - 1, events) for event in events if depth)


@pytest.mark.parametrize(
    ("limit", "situation", "events", "depth"),
    [
        (1, ("arrive",), EVENTS, 3),
        (1, A_RUN_AND_A_BATCH, EVENTS, 3),
        (1, A_LINE, MORE_EVENTS, 2),
        (2, ("arrive",), EVENTS, 3),
        (2, A_RUN_AND_A_BATCH, EVENTS, 3),
        (2, TWO_RUNS_AND_A_BATCH, EVENTS, 3),
        (2, LATE, EVENTS, 3),
        (2, LATE_AT_THE_LIMIT, EVENTS, 3),
        (2, FAILED, EVENTS, 3),
        (2, LATE_IN_A_LINE, MORE_EVENTS, 2),
        (4, A_LINE, MORE_EVENTS, 2),
        pytest.param(2, LATE_IN_A_LINE, MORE_EVENTS, 3, marks=pytest.mark.matrix),
        pytest.param(3, TWO_RUNS_AND_A_BATCH, EVENTS, 3, marks=pytest.mark.matrix),
        pytest.param(3, LATE, EVENTS, 3, marks=pytest.mark.matrix),
        pytest.param(4, LATE_AT_THE_LIMIT, EVENTS, 3, marks=pytest.mark.matrix),
    ],
)
def test_every_short_history_keeps_the_guarantees(
    loop: ManualLoop, limit: int, situation: tuple[str, ...], events: Iterable[str], depth: int
) -> None:
    """Whatever follows, in any order, callers get fresh answers in time, and nothing is left over."""
    assert explore(loop, limit, situation, depth, events) > 100


@settings(
    max_examples=1000,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    limit=st.integers(1, 6),
    repeats=st.booleans(),
    events=st.lists(st.sampled_from(["arrive", "tick", *MORE_EVENTS]), max_size=60),
)
def test_long_histories_keep_the_guarantees(loop: ManualLoop, limit: int, repeats: bool, events: list[str]) -> None:
    """The same for random histories that are long enough for several batches of several keys."""
    world = World(loop, limit, repeats=repeats)
    for event in events:
        with contextlib.suppress(IndexError):
            MORE_EVENTS[event](world)
    world.finish()


# ---- the corners, by name ------------------------------------------------------------------------------------


@pytest.fixture
def world(loop: ManualLoop) -> Iterator[World]:
    """A world with a limit of two runs, which are late only after seconds."""
    world = World(loop, timeout=5, patience=10)
    yield world
    world.finish()


@pytest.fixture
def trouble(loop: ManualLoop) -> Iterator[World]:
    """A world with a limit of three runs, which are late after 50 ms."""
    world = World(loop, limit=3, timeout=5, patience=0.05)
    yield world
    world.finish()


def outcome(caller: Caller) -> Any:
    """A caller's outcome: its answer, or its error."""
    assert caller.task.done()
    return caller.task.exception() or caller.task.result()


def fill(world: World) -> None:
    """Start as many runs as the limit allows."""
    while len(world.runs) < world.limit:
        world.arrived()
        world.sleep(ADDED_DELAY)


def starts(world: World) -> list[float]:
    """When runs were started, in seconds since the first of them."""
    return [round(run.started_at - world.runs[0].started_at, 3) for run in world.runs]


def test_callers_share_a_run_until_its_first_step(world: World) -> None:
    """It serves callers of the tick in which its task is created, but not later ones."""
    early = [world.arrive(), world.arrive()]
    world.tick()
    assert not world.runs
    (late,) = world.arrived()
    (run,) = world.runs
    world.answer(run)
    world.settle()
    assert [outcome(caller) for caller in early] == [run, run]
    assert not late.task.done()


def test_a_batch_waits_five_milliseconds_for_a_run_of_seconds(world: World) -> None:
    """Exactly, counted from the batch's first caller."""
    (first,) = world.arrived()
    world.sleep(2)
    batch = world.arrived()
    world.sleep(0.003)
    batch += world.arrived()
    world.sleep(0.002 - 3 * MOMENT)
    assert len(world.runs) == 1
    world.sleep(3 * MOMENT)
    world.answer(world.runs[1])
    world.settle()
    assert {outcome(caller) for caller in [first, *batch]} == {world.runs[1]}


def test_callers_who_ask_again_at_once_join_the_waiting_batch(world: World) -> None:
    """Those whom a run has answered, and those who waited for its end, share the next run."""
    answered = world.arrived(3)
    waiting = world.arrived(3)
    world.answer(world.runs[0])
    while not all(caller.task.done() for caller in answered):
        world.tick()
    waiting += [world.arrive() for _ in answered]
    world.settle()
    _, run = world.runs
    world.answer(run)
    world.settle()
    assert {outcome(caller) for caller in waiting} == {run}


def test_callers_without_end_hold_up_a_batch_for_five_milliseconds(world: World) -> None:
    """A batch that is joined in each turn of the event loop starts all the same, in time for its first caller."""
    world.arrived()
    world.arrived()
    world.answer(world.runs[0])
    for _ in range(10):
        assert len(world.runs) == 1
        for _ in range(5):
            world.arrive()
            world.tick()
        world.advance(ADDED_DELAY / 10)
    for _ in range(2):
        world.arrive()
        world.tick()
    assert len(world.runs) == 2


def test_at_the_limit_a_batch_waits_for_the_end_of_a_run(world: World) -> None:
    """However long that takes; then it starts at once, with everyone who has come meanwhile."""
    fill(world)
    batch = []
    for _ in range(5):
        batch += world.arrived(2)
        world.sleep(0.5)
    assert len(world.runs) == 2
    world.fail(world.runs[1])
    world.settle()
    world.answer(world.runs[2])
    world.settle()
    assert {outcome(caller) for caller in batch} == {world.runs[2]}


def test_a_run_counts_until_it_has_ended(loop: ManualLoop) -> None:
    """A cancelled run that takes time to clean up still counts towards the limit."""
    running = 0
    cleaned_up = loop.create_future()

    async def function() -> None:
        nonlocal running
        running += 1
        try:
            await loop.create_future()
        finally:
            await cleaned_up
            running -= 1

    coalescer = Coalescer(limit=1, timeout=5, patience=10)
    first = loop.create_task(coalescer("a", function))
    loop.settle()
    second = loop.create_task(coalescer("a", function))
    first.cancel()
    loop.settle()
    loop.now += 1
    loop.settle()
    assert running == 1
    cleaned_up.set_result(None)
    loop.settle()
    assert running == 1
    second.cancel()
    loop.settle()
    assert running == 0


def test_each_caller_has_its_own_time_limit(world: World) -> None:
    """From its arrival, even if it only waits; later callers can still be answered."""
    fill(world)
    callers = []
    for _ in range(3):
        callers += world.arrived()
        world.sleep(1)
    for number in range(2):
        world.sleep(2 - 3 * MOMENT if number == 0 else 1 - 3 * MOMENT)
        assert not callers[number].task.done()
        world.sleep(3 * MOMENT)
        assert isinstance(outcome(callers[number]), TimeoutError)
    world.answer(world.runs[2])
    world.settle()
    assert outcome(callers[2]) is world.runs[2]


def test_a_run_acts_in_a_copy_of_its_openers_context(loop: ManualLoop) -> None:
    """It sees what its opener had set when it asked, and changes nothing for others."""
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")

    async def function() -> str:
        before = name.get()
        name.set("the run")
        return before

    coalescer = Coalescer(limit=1, timeout=5, patience=10)

    async def ask(own_name: str) -> tuple[str, str]:
        name.set(own_name)
        return await coalescer("a", function), name.get()

    tasks = [loop.create_task(ask(own_name)) for own_name in ("first", "second")]
    loop.settle()
    assert [task.result() for task in tasks] == [("first", "first"), ("first", "second")]


def test_an_answer_that_says_no_is_shared(world: World) -> None:
    """All callers of the run get the error that it raised, at once; those of the next run do not."""
    callers = world.arrived(3)
    (late,) = world.arrived()
    world.fail(world.runs[0], LookupError())
    world.settle()
    assert {outcome(caller) for caller in callers} == {world.runs[0].error}
    assert world.observations == [(3, "answered", "asked")]
    world.answer(world.runs[1])
    world.settle()
    assert outcome(late) is world.runs[1]


@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_a_caller_that_leaves_disturbs_nobody(world: World, leaver: int) -> None:
    """Whether or not it opened the batch, before or after the run's start."""
    for callers in (world.arrived(3), world.arrived(3)):
        world.cancel(callers[leaver])
        world.settle()
        assert callers[leaver].task.cancelled()
        assert [caller.task.done() for caller in callers].count(False) == 2
    for number in range(2):
        world.answer(world.runs[number])
        world.settle()
        assert world.observations[number] == (2, "answered", "asked")


def test_a_caller_that_leaves_when_its_time_is_up_holds_up_nobody(world: World) -> None:
    """The run goes on for a later caller that has time left."""
    world.arrived()
    (early,) = world.arrived()
    world.sleep(0.6 * ADDED_DELAY)
    (late,) = world.arrived()
    world.sleep(0.4 * ADDED_DELAY)
    world.advance(5 - ADDED_DELAY)
    world.tick()
    world.cancel(early)
    world.settle()
    assert early.task.cancelled()
    world.answer(world.runs[1])
    world.settle()
    assert outcome(late) is world.runs[1]


def test_a_batch_is_dropped_when_the_last_ones_time_is_up(loop: ManualLoop) -> None:
    """Without a run for the caller that came later and has left."""
    world = World(loop, limit=1, timeout=5, patience=10)
    world.arrived()
    (early,) = world.arrived()
    world.sleep(1)
    (late,) = world.arrived()
    world.cancel(late)
    world.sleep(4)
    assert isinstance(outcome(early), TimeoutError)
    assert len(world.runs) == 1
    world.finish()


def test_when_all_have_left_the_runs_are_cancelled(world: World) -> None:
    """A waiting batch is dropped, too."""
    callers = world.arrived(3) + world.arrived(2)
    for caller in reversed(callers):
        world.cancel(caller)
        world.settle()
    assert world.observations == [(0, "cancelled", "asked")]
    assert len(world.runs) == 1


def test_a_batch_that_is_abandoned_when_its_run_is_due_gets_none(world: World) -> None:
    """The next caller gets a run of its own."""
    world.arrived()
    (leaving,) = world.arrived()
    world.answer(world.runs[0])
    world.cancel(leaving)
    world.tick()
    world.arrived()
    assert [run.opener for run in world.runs] == [world.callers[0], world.callers[2]]


def test_a_run_that_is_cancelled_by_others_is_an_error(loop: ManualLoop) -> None:
    """No caller is left waiting, or cancelled by mistake; the next caller is served."""
    cancels_itself = True

    async def function() -> str:
        if cancels_itself:
            raise asyncio.CancelledError
        return "answer"

    coalescer = Coalescer(limit=1, timeout=5, patience=10)
    tasks = [loop.create_task(coalescer("a", function)) for _ in range(2)]
    loop.settle()
    assert {str(task.exception()) for task in tasks} == {"the run was cancelled"}
    cancels_itself = False
    task = loop.create_task(coalescer("a", function))
    loop.settle()
    assert task.result() == "answer"


def test_a_function_that_fails_before_it_returns_an_awaitable_is_an_error_too(loop: ManualLoop) -> None:
    """The function may be any callable; the next caller is served."""
    fails = True

    def function() -> Awaitable[str]:
        if fails:
            raise LookupError("no awaitable")
        return asyncio.sleep(0, "answer")

    coalescer = Coalescer(limit=1, timeout=5, patience=10)
    task = loop.create_task(coalescer("a", function))
    loop.settle()
    assert isinstance(task.exception(), LookupError)
    fails = False
    task = loop.create_task(coalescer("a", function))
    loop.settle()
    assert task.result() == "answer"


def test_a_caller_costs_neither_a_task_nor_a_timer(world: World) -> None:
    """A thousand callers of one batch need one task and one timer more."""
    world.arrived()
    timers = len(world.loop.timers)
    callers = world.arrived(1000)
    world.answer(world.runs[0])
    world.settle()
    assert len(asyncio.all_tasks(world.loop)) == 1000 + 1
    assert len(world.loop.timers) <= timers + 1
    world.answer(world.runs[1])
    world.settle()
    assert {outcome(caller) for caller in callers} == {world.runs[1]}


# ---- the corners of trouble ------------------------------------------------------------------------------------


def test_a_late_run_gets_company(trouble: World) -> None:
    """After 50 ms, and again after 100 more; the first answer settles every caller, and other runs are cancelled."""
    callers = trouble.arrived(3)
    trouble.live(0.16)
    assert starts(trouble) == [0, 0.05, 0.15]
    trouble.answer(trouble.runs[1])
    trouble.settle()
    assert {outcome(caller) for caller in callers} == {trouble.runs[1]}
    assert [run.outcome for run in trouble.runs] == ["cancelled", "answered", "cancelled"]
    assert (3, "answered", "late") in trouble.observations


def test_company_answers_who_came_later_too(trouble: World) -> None:
    """It started after them; the first run's answer comes later, and no longer helps anyone."""
    (first,) = trouble.arrived()
    trouble.sleep(0.049)
    (second,) = trouble.arrived()
    trouble.live(0.02)
    assert starts(trouble) == [0, 0.05]
    trouble.answer(trouble.runs[1])
    trouble.settle()
    assert {outcome(first), outcome(second)} == {trouble.runs[1]}


def test_at_the_limit_the_second_oldest_makes_room(trouble: World) -> None:
    """Never the oldest, which ends first if all are merely slow."""
    fill(trouble)
    trouble.live(1)
    cancelled = [run for run in trouble.runs if run.outcome == "cancelled"]
    assert cancelled == trouble.runs[1 : 1 + len(cancelled)]
    assert len(cancelled) >= 2
    assert trouble.runs[0].ended is None
    assert len(trouble.in_flight()) == 3


def test_a_single_run_gets_no_company(loop: ManualLoop) -> None:
    """There is no room for it."""
    world = World(loop, limit=1, timeout=5, patience=0.05)
    world.arrived()
    world.sleep(2)
    assert len(world.runs) == 1
    world.finish()


def test_company_comes_ever_more_rarely(trouble: World) -> None:
    """Up to 0.4 s apart; and no more after two seconds, when it is unlikely to help."""
    trouble.arrived()
    trouble.live(4.9, step=0.01)
    gaps = [round(after - before, 2) for before, after in itertools.pairwise(starts(trouble))]
    assert gaps == [0.05, 0.1, 0.2, 0.4, 0.4, 0.4, 0.4]


def test_a_key_that_is_never_answered_gets_company_for_two_seconds(loop: ManualLoop) -> None:
    """As with a locked row, however often others of its kind are answered meanwhile."""
    world = World(loop, limit=8, timeout=5, patience=0.05)
    world.arrived(1, "locked")
    while world.loop.now < world.runs[0].started_at + 4.9:
        world.arrived(1, "free")
        (run,) = world.in_flight("free")
        world.answer(run)
        world.live(0.05, step=0.01)
    last = [run for run in world.runs if run.key == "locked"][-1]
    assert 1 < last.started_at - world.runs[0].started_at < 0.05 + TROUBLE_WINDOW + 0.05
    world.finish()


def test_an_answer_ends_the_trouble(trouble: World) -> None:
    """The next late run gets company as quickly as the first one did."""
    trouble.arrived()
    trouble.live(0.351)
    assert starts(trouble) == [0, 0.05, 0.15, 0.35]
    trouble.answer(trouble.runs[-1])
    trouble.settle()
    trouble.arrived()
    trouble.live(0.051)
    assert starts(trouble)[4:] == [0.351, 0.401]


def test_what_is_usually_slow_is_not_late(trouble: World) -> None:
    """A run is late once it takes four times as long as most do; a single slow one does not change that."""

    def company_for_a_run_of(seconds: float) -> int:
        count = len(trouble.runs)
        trouble.arrived()
        trouble.sleep(seconds)
        company = len(trouble.runs) - count - 1
        trouble.answer(trouble.in_flight()[0])
        trouble.settle()
        return company

    assert company_for_a_run_of(0.1) == 1
    for _ in range(40):
        company_for_a_run_of(0.1)
    assert company_for_a_run_of(0.3) == 0
    assert company_for_a_run_of(0.5) == 1


def test_a_failed_run_is_repeated(trouble: World) -> None:
    """After 10, 20 and 40 ms; then every caller is answered, unaware of the failures."""
    callers = trouble.arrived(3)
    for number, seconds in enumerate(REPEATS):
        trouble.fail(trouble.runs[number], Failure())
        trouble.settle()
        trouble.sleep(seconds - 3 * MOMENT)
        assert len(trouble.runs) == number + 1
        trouble.sleep(3 * MOMENT)
        assert len(trouble.runs) == number + 2
    trouble.answer(trouble.runs[3])
    trouble.settle()
    assert {outcome(caller) for caller in callers} == {trouble.runs[3]}
    assert trouble.observations[:3] == [(0, "failed", "asked"), (0, "failed", "failed"), (0, "failed", "failed")]


def test_who_comes_after_a_failure_need_not_wait_for_its_repeat(trouble: World) -> None:
    """No run is in flight, so one starts at once; it also answers callers who wait for the repeat."""
    (first,) = trouble.arrived()
    trouble.fail(trouble.runs[0], Failure())
    trouble.settle()
    trouble.sleep(0.002)
    (second,) = trouble.arrived()
    assert starts(trouble) == [0, 0.002]
    trouble.answer(trouble.runs[1])
    trouble.settle()
    assert {outcome(first), outcome(second)} == {trouble.runs[1]}


def test_who_comes_just_before_a_repeat_shares_it(trouble: World) -> None:
    """While another run is in flight, a new batch would start later than the repeat, and does not put it off."""
    callers = trouble.arrived()
    trouble.sleep(0.002)
    callers += trouble.arrived()
    trouble.live(0.008)
    trouble.fail(trouble.runs[1], Failure())
    trouble.settle()
    trouble.live(0.008)
    callers += trouble.arrived()
    trouble.live(0.01)
    assert starts(trouble) == [0, 0.007, 0.02]
    trouble.answer(trouble.runs[2])
    trouble.settle()
    assert {outcome(caller) for caller in callers} == {trouble.runs[2]}


def test_runs_for_those_who_come_meanwhile_are_no_repeats(trouble: World) -> None:
    """However many of them fail in the first second, a failed run is still repeated afterwards."""
    callers = []
    for _ in range(100):
        callers += trouble.arrived()
        trouble.fail(trouble.unfinished()[0], Failure())
        trouble.live(0.01, step=0.005)
        for run in trouble.unfinished():
            trouble.fail(run, Failure())
            trouble.settle()
    trouble.live(1 - 0.005)
    trouble.answer(trouble.unfinished()[0])
    trouble.settle()
    assert {type(outcome(caller)) for caller in callers} == {Run}


def test_half_of_the_runs_in_flight_may_fail_at_once(loop: ManualLoop) -> None:
    """As when one of two replicas dies: each is repeated, before answers of the other replica have paid for that."""
    world = World(loop, limit=100)
    callers = [world.arrive(key) for key in range(world.share)]
    world.settle()
    for run in world.unfinished()[::2]:
        world.fail(run)
    world.settle()
    world.sleep(REPEATS[0])
    for run in world.unfinished():
        world.answer(run)
    world.settle()
    assert {type(outcome(caller)) for caller in callers} == {Run}
    world.finish()


@pytest.mark.parametrize("first", [0, 1])
def test_a_failure_is_not_told_while_another_run_can_answer(loop: ManualLoop, first: int) -> None:
    """Callers get neither the first run's error nor its company's, but that of the last run to fail."""
    world = World(loop, limit=3, timeout=5, patience=0.05, repeats=False)
    (caller,) = world.arrived()
    world.live(0.05)
    for number in (first, 1 - first):
        assert not caller.task.done()
        world.fail(world.runs[number])
        world.settle()
    assert outcome(caller) is world.runs[1 - first].error
    world.finish()


def test_after_two_seconds_of_failures_errors_are_told_at_once(loop: ManualLoop) -> None:
    """So a long outage costs no more runs than there are requests; an answer ends this."""
    world = World(loop, limit=10, timeout=5, patience=0.05)
    (first,) = world.arrived()
    while not first.task.done():
        for run in world.unfinished():
            world.fail(run)
        world.sleep(0.001)
    assert 1 < world.loop.now - world.runs[0].started_at < TROUBLE_WINDOW
    assert len(world.runs) == 9
    world.sleep(1)
    for _ in range(20):
        (caller,) = world.arrived()
        world.fail(world.runs[-1])
        world.settle()
        assert outcome(caller) is world.runs[-1].error
    world.arrived()
    world.answer(world.runs[-1])
    world.settle()
    (caller,) = world.arrived()
    world.fail(world.runs[-1])
    world.settle()
    assert not caller.task.done()
    world.finish()


@pytest.mark.parametrize("pause", [pytest.param(0.05, marks=pytest.mark.matrix), 0.3])
def test_the_load_of_a_long_silence_is_as_without_company(pause: float) -> None:
    """Callers that stay unanswered for some seconds cause no more runs than if none were ever late."""

    def runs(patience: float) -> int:
        loop = ManualLoop()
        world = World(loop, limit=6, timeout=5, patience=patience)
        began = loop.now
        while loop.now < began + 20:
            world.arrive()
            world.live(pause, step=0.01)
        loop.close()
        return len([run for run in world.runs if run.started_at > began + 5])

    assert runs(patience=0.1) <= runs(patience=1000)


# ---- keys, bounds and turns ------------------------------------------------------------------------------------


def test_a_hot_key_takes_four_runs(loop: ManualLoop) -> None:
    """However often it is asked for, it leaves all others to other keys."""
    world = World(loop, limit=100, timeout=5, patience=10)
    for _ in range(20):
        world.arrived(3, "hot")
        world.sleep(ADDED_DELAY)
    assert len(world.in_flight("hot")) == KEY_LIMIT
    world.arrived(1, "cold")
    world.answer(world.in_flight("cold")[0])
    world.settle()
    assert len(world.in_flight("hot")) == KEY_LIMIT
    world.finish()


def test_a_stuck_kind_leaves_a_quarter_of_the_runs_to_others(loop: ManualLoop) -> None:
    """A route or a statement that never answers holds up no other one."""
    world = World(loop, limit=8, timeout=5, patience=10)
    for number in range(20):
        world.arrived(1, number, "stuck")
    assert len(world.in_flight()) == 6
    world.arrived(1, "b", "other")
    world.take_turn("other")
    world.settle()
    assert len(world.in_flight("b")) == sum(turn.has_turn for turn in world.turns) == 1
    world.finish()


def test_whoever_asked_first_starts_first(loop: ManualLoop) -> None:
    """Without room, runs of any key and kind and turns for what is not shared come in the order of the questions."""
    world = World(loop, limit=4, timeout=5, patience=10)
    asked = []
    for number in range(9):
        asked += world.arrived(1, number, number % 3)
        asked.append(world.take_turn(number % 2))
        world.settle()
    started: list[Caller] = []
    while len(started) < len(asked):
        new = [turn for turn in asked if turn not in started and (turn.has_turn or world.in_flight(turn.key))]
        assert set(new) == set(asked[len(started) : len(started) + len(new)])
        started += new
        oldest = next(each for each in started if not each.task.done())
        if oldest.end:
            oldest.end.set_result(None)
        else:
            world.answer(world.in_flight(oldest.key)[0])
        world.settle()
    world.finish()


def test_a_single_question_among_hot_keys_gets_its_turn(loop: ManualLoop) -> None:
    """It waits for no more runs than there were keys before it, though each of them is asked for again at once."""
    world = World(loop, limit=4, timeout=500, patience=1000)
    world.arrived(1, "hot 0")
    for number in range(100):
        world.arrive(f"hot {number}")
    world.settle()
    (single,) = world.arrived(1, "single")
    before = len(world.runs)
    while not world.in_flight("single"):
        run = world.unfinished()[0]
        world.arrive(run.key)
        world.answer(run)
        world.settle()
    assert len(world.runs) - before <= 101
    world.answer(world.in_flight("single")[0])
    world.settle()
    assert single.task.done()
    world.finish()


@pytest.mark.parametrize("leaves_first", [True, False])
def test_a_turn_is_not_lost_when_it_is_given_to_who_leaves(loop: ManualLoop, leaves_first: bool) -> None:
    """Whether the turn was given, or the leaver had gone, a moment earlier: the next one gets it."""
    world = World(loop, limit=1)
    holder, leaver, following = world.take_turn(), world.take_turn(), world.take_turn()
    world.settle()
    assert holder.end
    if not leaves_first:
        holder.end.set_result(None)
        world.tick()  # the turn is given, but its new holder does not know yet
        world.cancel(leaver)
    else:
        world.cancel(leaver)
        world.cancel(holder)
    world.settle()
    assert following.has_turn
    world.finish()


# ---- under load: a clock that jumps from timer to timer ---------------------------------------------------------


@dataclasses.dataclass
class Load:
    """What many clients saw, each of which asks again as soon as it is answered."""

    asked: int = 0
    keys: set[int] = dataclasses.field(default_factory=set)
    runs: int = 0
    errors: list[BaseException] = dataclasses.field(default_factory=list)
    slowest: float = 0.0


def put_load(
    call: Callable[[int, int], Awaitable[object]], *, clients: int, keys: int, seconds: float, **options: Any
) -> Load:
    """Let so many clients ask for random keys; `call` gets the number of the run, and its key."""
    load, random = Load(), Random(1)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        coalescer = Coalescer(**options)

        async def run(key: int) -> None:
            load.runs += 1
            await call(load.runs, key)

        async def client() -> None:
            while loop.time() < seconds:
                key, asked_at = random.randrange(keys), loop.time()
                load.asked += 1
                load.keys.add(key)
                try:
                    await coalescer(key, functools.partial(run, key))
                except (Failure, TimeoutError) as error:
                    load.errors.append(error)
                load.slowest = max(load.slowest, loop.time() - asked_at)

        await asyncio.gather(*(client() for _ in range(clients)))

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(main())
    return load


GATEWAY = {"limit": 20, "timeout": 5, "patience": 0.1, "repeats": True}
DATABASE = {"limit": 4, "timeout": 2, "patience": 0.05}


async def never() -> None:
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize(("clients", "keys"), [(1, 1), (100, 1), (100, 100)])
@pytest.mark.parametrize("tenths", [1, 5, 9])
def test_repeats_have_a_budget(tenths: int, clients: int, keys: int) -> None:
    """While every second call fails nobody sees an error; while nine of ten do, calls are few more than questions."""

    async def call(number: int, _: int) -> None:
        await asyncio.sleep(0.002)
        if number * tenths // 10 > (number - 1) * tenths // 10:
            raise Failure

    load = put_load(call, clients=clients, keys=keys, seconds=10 if clients == 1 else 0.5, **GATEWAY)
    if tenths <= 5:
        assert not load.errors
    else:
        assert load.errors
        assert load.runs <= 1.25 * (load.asked + 20)  # the budget that there is from the start


@pytest.mark.parametrize(("clients", "keys"), [(1, 1), (50, 1), (100, 400), (300, 2000)])
def test_a_frozen_replica_of_two_costs_no_answer(clients: int, keys: int) -> None:
    """Not even when all runs of a kind are stuck on different keys: each gets another try."""
    idle: list[int] = []  # connections to the replica that works

    async def call(number: int, _: int) -> None:
        if not idle and number % 2:
            await never()
        connection = idle.pop() if idle else number
        await asyncio.sleep(0.02)
        idle.append(connection)

    load = put_load(call, clients=clients, keys=keys, seconds=5, **GATEWAY)
    assert not load.errors
    assert load.slowest < 2
    assert load.asked > 5 * clients


def test_a_replica_that_freezes_each_second_call_costs_few_answers() -> None:
    """Even with a new connection for each call, to one of two at random, nearly all are answered in time."""
    random = Random(2)
    load = put_load(
        lambda *_: never() if random.random() < 0.5 else asyncio.sleep(0.02),
        clients=100,
        keys=400,
        seconds=10,
        **GATEWAY,
    )
    assert load.asked > 700
    assert len(load.errors) < 0.02 * load.asked


@pytest.mark.parametrize(("options", "runs"), [(GATEWAY, 15), (DATABASE, 3)])
def test_a_kind_whose_runs_are_all_stuck_recovers(options: dict[str, Any], runs: int) -> None:
    """All that may be in flight never answer, each for a key of its own; other tries would: nearly all are answered."""
    load = put_load(
        lambda number, _: never() if number <= runs else asyncio.sleep(0.02), clients=50, keys=400, seconds=5, **options
    )
    assert load.asked > 500
    assert len(load.errors) <= 1


def test_a_lost_connection_to_a_database_costs_no_answer() -> None:
    """One query in fifty never answers, while all connections are busy with others: it gets another try."""
    load = put_load(
        lambda number, _: asyncio.sleep(0.005) if number % 50 else never(), clients=50, keys=400, seconds=5, **DATABASE
    )
    assert not load.errors
    assert load.slowest < 1


@pytest.mark.parametrize("busy", [True, False])
def test_a_query_of_a_second_is_answered_among_quick_ones(busy: bool) -> None:
    """It is not cancelled again and again for being slower than others; hardly any waits too long if all are busy."""
    load = put_load(
        lambda _, key: asyncio.sleep(0.005 if key % 100 else 1),
        clients=50 if busy else 2,
        keys=400,
        seconds=10,
        **DATABASE,
    )
    assert len(load.errors) <= 0.003 * load.asked


@pytest.mark.parametrize("options", [GATEWAY, DATABASE])
def test_a_locked_table_causes_hardly_more_runs_than_keys(options: dict[str, Any]) -> None:
    """While nobody is answered, company would only wait, too; when the lock is gone, all are answered in time."""
    unlocked = 3.0

    async def call(*_: int) -> None:
        await asyncio.sleep(max(0.0, unlocked - asyncio.get_running_loop().time()) + 0.005)

    load = put_load(call, clients=100, keys=400, seconds=unlocked, **options)
    assert load.runs <= 1.2 * len(load.keys)
    assert not load.errors or options is DATABASE  # whose timeout is shorter than the lock
    assert len(load.errors) <= 100


def test_when_all_is_merely_slow_all_are_answered() -> None:
    """A service that takes ten times as long as before, and is fully used, is not kept from answering."""

    async def call(*_: int) -> None:
        await asyncio.sleep(0.02 if asyncio.get_running_loop().time() < 2 else 0.5)

    load = put_load(call, clients=60, keys=400, seconds=6, **GATEWAY)
    assert not load.errors
    assert load.slowest < 4


@pytest.mark.parametrize(("answers", "kinds"), [(True, 1), (False, 1), (True, 4000)])
def test_a_key_that_nobody_waits_for_is_forgotten(answers: bool, kinds: int) -> None:
    """However many keys and kinds are asked for, answered or not, the memory that they take stays the same."""
    blocks = []

    async def main() -> None:
        coalescer = Coalescer(limit=200, timeout=1, patience=0.1)
        call = functools.partial(asyncio.sleep, 0 if answers else 10)
        for start in range(0, 4000, 500):
            asked = [coalescer(key, call, key % kinds) for key in range(start, start + 500)]
            await asyncio.gather(*asked, return_exceptions=True)
            await asyncio.sleep(1)
            gc.collect()
            blocks.append(sys.getallocatedblocks())

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(main())
    assert max(blocks[4:]) - max(blocks[:4]) < 500


def test_a_kind_in_which_keys_wait_is_remembered(loop: ManualLoop) -> None:
    """Even if an application makes up a kind for each question, all get their turn."""
    world = World(loop, limit=4, timeout=500, patience=1000)
    callers = [world.arrive(number, number) for number in range(1200)]
    world.settle()
    while not all(caller.task.done() for caller in callers):
        world.answer(world.unfinished()[0])
        world.loop.settle()
    world.finish()
