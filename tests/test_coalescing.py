"""`Coalescer` alone, on a clock that the test controls: every order of events that can matter, and named corner cases.

`World` surrounds a coalescer with callers and runs, and checks its guarantees at each event: it numbers all arrivals,
starts and ends, so that "a run that started after this caller arrived" is a fact and no matter of luck.
"""

import asyncio
import contextvars
import gc
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVarTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coalescing import Coalescer, RunTimeoutError

# The promised times, in seconds, whatever the module's constants are.
ADDED_DELAY = 0.005
LONGEST_WAIT = 0.4
TROUBLE_WINDOW = 2.0
REPEATS = 0.01, 0.02, 0.04

PATIENCE = 0.02  # seconds; small, so that few steps reach every combination of times
TIMEOUT = 0.07  # seconds
MOMENT = 2e-6  # seconds

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
    """One call of the coalesced function, which lasts until the test ends it."""

    def __init__(self, started: int, started_at: float, opener: "Caller", loop: asyncio.AbstractEventLoop) -> None:
        self.started, self.started_at = started, started_at
        self.opener = opener
        self.ended: int | None = None
        self.ended_at = 0.0
        self.end: asyncio.Future[Run] = loop.create_future()
        self.error: Exception | None = None
        self.outcome = ""
        self.settled = self.perhaps_settled = 0  # callers who got its answer or its error
        self.observed: list[tuple[int, str]] = []
        self.reason = ""


class Caller:
    """A caller: when it came, and what it got."""

    def __init__(self) -> None:
        self.task: asyncio.Task[Run]
        self.arrived: int | None = None  # not yet
        self.arrived_at = 0.0
        self.cancelled = False


class Transient(Exception):
    """An error worth repeating."""


CALLER: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller")


class World:
    """A coalescer with its callers and runs; any step raises `AssertionError` if a guarantee is broken."""

    def __init__(self, loop: ManualLoop, limit: int = 2, timeout: float = TIMEOUT, patience: float = PATIENCE) -> None:
        self.loop, self.limit, self.timeout, self.patience = loop, limit, timeout, patience
        self.order = itertools.count(1)
        self.callers: list[Caller] = []
        self.runs: list[Run] = []
        self.broken: list[str] = []
        self.ended: list[Run] = []  # and not yet observed
        self.observations: list[tuple[int, str, str]] = []
        self.coalescer = Coalescer(
            self._function,
            limit=limit,
            timeout=timeout,
            patience=patience,
            repeat=lambda error: isinstance(error, Transient),
            observe=self._observe,
        )

    # What the coalescer calls

    async def _function(self) -> Run:
        run = Run(next(self.order), self.loop.time(), CALLER.get(), self.loop)
        self._expect(len(self.in_flight()) < self.limit, "more runs than the limit")
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
            run.outcome, run.error = "failed", error
            raise
        finally:
            run.ended, run.ended_at = next(self.order), self.loop.time()
            self.ended.append(run)

    def _observe(self, callers: int, outcome: str, reason: str, error: Exception | None) -> None:
        self.observations.append((callers, outcome, reason))
        if not self.ended:
            self._expect((callers, outcome) == (0, "cancelled"), f"{outcome} was observed of a run that never started")
            return
        run = self.ended.pop()
        self._expect(error is run.error, "another error than the run's")
        run.reason = reason
        run.observed.append((callers, outcome))

    async def _ask(self, caller: Caller) -> Run:
        CALLER.set(caller)
        caller.arrived, caller.arrived_at = next(self.order), self.loop.time()
        try:
            run = await self.coalescer()
            self._expect(run.started > caller.arrived, "an answer that is older than its question")
        except asyncio.CancelledError:
            self._expect(caller.cancelled, "cancelled by nobody")
            raise
        except RunTimeoutError:
            self._expect(self.loop.time() > caller.arrived_at + self.timeout - MOMENT, "timed out too early")
            raise
        except Exception as error:
            (run,) = [each for each in self.runs if each.error is error]
            self._expect(run.started > caller.arrived, "an error of a run from before the question")
            in_time = self.loop.time() < caller.arrived_at + self.timeout - MOMENT
            if in_time:
                run.settled += 1
                self._expect(not self._can_be_answered(caller, run), "an error while another run could answer")
            else:  # its run's at the last moment, or the last error of all
                run.perhaps_settled += 1
            raise
        run.settled += 1
        return run

    # What is known about them

    def in_flight(self) -> list[Run]:
        return [run for run in self.runs if run.ended is None]

    def waiting(self) -> list[Caller]:
        return [caller for caller in self.callers if caller.arrived is not None and not caller.task.done()]

    def answered_at(self, before: float = math.inf) -> float:
        """When a caller was last answered."""
        times = [run.ended_at for run in self.runs if run.outcome == "answered"]
        return max((time for time in times if time < before), default=0)

    def _can_be_answered(self, caller: Caller, apart_from: Run | None = None) -> bool:
        """Whether a run in flight started after this caller arrived."""
        arrived = caller.arrived or 0
        return any(run.started > arrived for run in self.in_flight() if run is not apart_from and not run.end.done())

    def _still_waits(self, caller: Caller) -> bool:
        in_time = self.loop.time() < caller.arrived_at + self.timeout - MOMENT
        return caller.arrived is not None and in_time and not caller.cancelled and not caller.task.done()

    # Checks

    def _expect(self, condition: bool, message: str) -> None:
        """Record a violation: an error raised in a callback would not reach the test."""
        if not condition:
            self.broken.append(message)

    def _check_cancelled(self, run: Run) -> None:
        """It was of no use any more; or it was late, the second oldest, and in the way of another."""
        answers = {each for each in self.runs if each.outcome == "answered"}
        wanted = any(
            self._still_waits(caller)
            and caller.arrived < run.started  # type: ignore[operator]
            and not any(answer.started > caller.arrived for answer in answers)  # type: ignore[operator]
            for caller in self.callers
        )
        if wanted:
            in_flight = self.in_flight()
            # The oldest may have ended in the very tick in which this one made room.
            evicted = len(in_flight) >= self.limit - 1 and run in in_flight[:2]
            self._expect(evicted and self.limit > 1, "cancelled too early")
            since = max(in_flight[-1].started_at, self.answered_at(before=self.loop.time()))
            self._expect(self.loop.time() > since + self.patience - MOMENT, "nobody was late")

    def check(self) -> None:
        """Check what holds at any time, and what holds once everything possible at this time has happened."""
        assert not self.broken, self.broken
        assert not self.loop.complaints, self.loop.complaints
        if self.loop.busy:
            return
        now, in_flight, waiting = self.loop.time(), self.in_flight(), self.waiting()
        for caller in waiting:
            assert now < caller.arrived_at + self.timeout - MOMENT, "a caller waits beyond its time"
            for run in self.runs:
                assert run.outcome != "answered" or run.started < (caller.arrived or 0), "an answer was withheld"
        for run in in_flight:
            assert any(run.started > (caller.arrived or 0) for caller in waiting), "a run goes on that nobody waits for"
        self._check_starts(now, in_flight, [caller for caller in waiting if not self._can_be_answered(caller)])

    def _check_starts(self, now: float, in_flight: list[Run], unserved: list[Caller]) -> None:
        """That no run is overdue."""
        full = len(in_flight) == self.limit
        ends = [run.ended for run in self.runs if run.ended is not None]
        failed = [run for run in self.runs if isinstance(run.error, Transient)]
        repeats = bool(failed) and now < failed[-1].ended_at + TROUBLE_WINDOW
        for caller in unserved if not repeats else []:
            assert in_flight, "a caller waits for nothing"
            assert full or now < caller.arrived_at + ADDED_DELAY - MOMENT, "a caller waits longer than promised"
            assert max(ends, default=-1) < (caller.arrived or 0), "no run was started when one ended"
        if in_flight and not full:
            since = max(in_flight[-1].started_at, self.answered_at())
            late = [run for run in self.runs if run.started_at > self.answered_at() and run is not in_flight[0]]
            longest = max((run.ended_at - run.started_at for run in self.runs if run.outcome == "answered"), default=0)
            wait = max(
                min(self.patience * 2 ** len(late), max(LONGEST_WAIT, self.patience)), 5 * longest * 2 ** len(late)
            )
            if not self.long_trouble():
                assert now < since + wait + MOMENT, "a late run got no company"

    def long_trouble(self) -> bool:
        started = [run.started_at for run in self.runs if run.started_at > self.answered_at()]
        return self.loop.time() > min(started, default=self.loop.time()) + TROUBLE_WINDOW

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

    def arrive(self) -> Caller:
        """A caller asks, in the next iteration of the event loop."""
        caller = Caller()
        self.callers.append(caller)
        context = contextvars.Context()
        caller.task = self.loop.create_task(self._ask(caller), context=context)
        return caller

    def arrived(self, number: int = 1) -> list[Caller]:
        """This many callers ask, and everything that follows happens."""
        callers = [self.arrive() for _ in range(number)]
        self.settle()
        return callers

    def cancel(self, caller: Caller) -> None:
        caller.cancelled = True
        caller.task.cancel()

    def answer(self, run: Run) -> None:
        run.end.set_result(run)

    def fail(self, run: Run, error: Exception | None = None) -> None:
        run.end.set_exception(error or LookupError("the run's error"))

    def finish(self) -> None:
        """Answer all waiting callers; then nothing may be left over, and the next caller must be served at once."""
        self.settle()
        while self.waiting():
            if runs := self.unfinished():
                self.answer(runs[0])
                self.settle()
            else:  # a repeat is planned
                self.sleep(ADDED_DELAY)
        self.arrived()
        (run,) = self.unfinished()
        self.answer(run)
        self.settle()
        assert not asyncio.all_tasks(self.loop), "a task is left over"
        self.sleep(max(self.timeout, LONGEST_WAIT) + 2 * MOMENT)  # a timer may be left that finds nothing to do
        assert all(timer.cancelled() or timer.when() <= self.loop.now for timer in self.loop.timers), "a timer is left"
        self.loop.timers.clear()
        left = sum(caller.cancelled for caller in self.callers)  # some of them when their answer was there
        for run in self.runs:
            ((settled, outcome),) = run.observed
            assert outcome == run.outcome
            assert run.settled <= settled <= run.settled + run.perhaps_settled + left, "not what was observed of a run"
        for caller in self.callers:
            if not caller.task.cancelled():
                caller.task.exception()  # retrieved here: any other exception never retrieved is the coalescer's

    def unfinished(self) -> list[Run]:
        """Runs that the test has not ended yet."""
        return [run for run in self.in_flight() if not run.end.done()]

    def cancellable(self) -> list[Caller]:
        return [caller for caller in self.callers if not caller.task.done() and not caller.cancelled]


@pytest.fixture
def loop() -> Iterator[ManualLoop]:
    """An event loop, checked for leftovers at the end."""
    loop = ManualLoop()
    yield loop
    gc.collect()
    assert not loop.complaints, loop.complaints
    loop.close()


# ---- every order of events -----------------------------------------------------------------------------------


def arrive(world: World) -> bool:
    world.arrive()
    return True


def first_leaves(world: World) -> bool:
    callers = world.cancellable()
    if callers:
        world.cancel(callers[0])
    return bool(callers)


def last_leaves(world: World) -> bool:
    callers = world.cancellable()
    if len(callers) > 1:
        world.cancel(callers[-1])
    return len(callers) > 1


def first_run_answers(world: World) -> bool:
    runs = world.unfinished()
    if runs:
        world.answer(runs[0])
    return bool(runs)


def last_run_answers(world: World) -> bool:
    runs = world.unfinished()
    if len(runs) > 1:
        world.answer(runs[-1])
    return len(runs) > 1


def first_run_fails(world: World) -> bool:
    runs = world.unfinished()
    if runs:
        world.fail(runs[0], Transient())
    return bool(runs)


def last_run_fails(world: World) -> bool:
    runs = world.unfinished()
    if runs:
        world.fail(runs[-1])
    return bool(runs)


def tick(world: World) -> bool:
    busy = world.loop.busy
    if busy:
        world.tick()
    return busy


def some_time_passes(world: World) -> bool:
    world.advance(0.6 * ADDED_DELAY)
    return True


def patience_ends(world: World) -> bool:
    world.advance(PATIENCE)
    return True


def much_time_passes(world: World) -> bool:
    world.advance(TIMEOUT)
    return True


Event = Callable[[World], bool]  # False: it cannot happen now

EVENTS: list[Event] = [
    arrive,
    first_leaves,
    last_leaves,
    first_run_answers,
    last_run_answers,
    first_run_fails,
    last_run_fails,
    tick,
    some_time_passes,
    patience_ends,
    much_time_passes,
]


A_RUN = (arrive, tick, tick)  # it is in flight
A_RUN_AND_A_BATCH = (*A_RUN, arrive, tick)  # which waits for the run's end
TWO_RUNS = (*A_RUN_AND_A_BATCH, some_time_passes, some_time_passes, tick, tick)
TWO_RUNS_AND_A_BATCH = (*TWO_RUNS, arrive, tick)
LATE = (*A_RUN, patience_ends, tick, tick)  # it has company
LATE_AT_THE_LIMIT = (*TWO_RUNS_AND_A_BATCH, patience_ends)
FAILED = (*A_RUN, first_run_fails, tick)  # its repeat is planned


def explore(loop: ManualLoop, limit: int, prefix: tuple[Event, ...], depth: int) -> int:
    """Play `prefix` and each sequence of up to `depth` events that can follow it; return the number of histories."""
    world = World(loop, limit)
    try:
        happened = [event(world) for event in prefix]
        world.finish()
    except AssertionError as fault:
        raise AssertionError(f"{[event.__name__ for event in prefix]}: {fault}") from fault
    if not happened[-1]:
        return 0
    return 1 + sum(explore(loop, limit, (*prefix, event), depth - 1) for event in EVENTS if depth)


@pytest.mark.parametrize(
    ("limit", "situation", "depth"),
    [
        (1, (arrive,), 3),
        (1, A_RUN_AND_A_BATCH, 3),
        (1, FAILED, 3),
        (2, (arrive,), 3),
        (2, A_RUN_AND_A_BATCH, 3),
        (2, TWO_RUNS_AND_A_BATCH, 3),
        (2, LATE, 3),
        (2, LATE_AT_THE_LIMIT, 3),
        (2, FAILED, 3),
        pytest.param(3, TWO_RUNS_AND_A_BATCH, 3, marks=pytest.mark.matrix),
        pytest.param(3, LATE, 3, marks=pytest.mark.matrix),
        pytest.param(4, LATE_AT_THE_LIMIT, 3, marks=pytest.mark.matrix),
    ],
)
def test_every_short_history_keeps_the_guarantees(
    loop: ManualLoop, limit: int, situation: tuple[Event, ...], depth: int
) -> None:
    """Whatever follows, in any order, callers get fresh answers in time, and nothing is left over."""
    assert explore(loop, limit, situation, depth) > 200


@settings(
    max_examples=1000,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(limit=st.integers(1, 4), events=st.lists(st.sampled_from([arrive, tick, *EVENTS]), max_size=60))
def test_long_histories_keep_the_guarantees(loop: ManualLoop, limit: int, events: list[Event]) -> None:
    """The same for random histories that are long enough for several batches."""
    world = World(loop, limit)
    for event in events:
        event(world)
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

    coalescer = Coalescer(function, limit=1, timeout=5, patience=10)
    first = loop.create_task(coalescer())
    loop.settle()
    second = loop.create_task(coalescer())
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
        assert isinstance(outcome(callers[number]), RunTimeoutError)
    world.answer(world.runs[2])
    world.settle()
    assert outcome(callers[2]) is world.runs[2]


def test_a_timeout_names_the_caller_whom_the_last_run_was_started_for(world: World) -> None:
    """In its name a call was made that has not been answered."""
    fill(world)
    (waiting,) = world.arrived()
    world.sleep(5)
    error = outcome(waiting)
    assert isinstance(error, RunTimeoutError)
    assert error.context[CALLER] in [run.opener for run in world.runs]


def test_a_run_acts_in_a_copy_of_its_openers_context(loop: ManualLoop) -> None:
    """It sees what its opener had set when it asked, and changes nothing for others."""
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")

    async def function() -> str:
        before = name.get()
        name.set("the run")
        return before

    coalescer = Coalescer(function, limit=1, timeout=5, patience=10)

    async def ask(own_name: str) -> tuple[str, str]:
        name.set(own_name)
        return await coalescer(), name.get()

    tasks = [loop.create_task(ask(own_name)) for own_name in ("first", "second")]
    loop.settle()
    assert [task.result() for task in tasks] == [("first", "first"), ("first", "second")]


def test_an_error_is_shared(world: World) -> None:
    """All callers of the run get the error that it raised, and those of the next run do not."""
    callers = world.arrived(3)
    (late,) = world.arrived()
    world.fail(world.runs[0])
    world.settle()
    assert {outcome(caller) for caller in callers} == {world.runs[0].error}
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
    assert isinstance(outcome(early), RunTimeoutError)
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

    coalescer = Coalescer(function, limit=1, timeout=5, patience=10)
    tasks = [loop.create_task(coalescer()) for _ in range(2)]
    loop.settle()
    assert {str(task.exception()) for task in tasks} == {"the run was cancelled"}
    cancels_itself = False
    task = loop.create_task(coalescer())
    loop.settle()
    assert task.result() == "answer"


def test_a_function_that_fails_before_it_returns_an_awaitable_is_an_error_too(loop: ManualLoop) -> None:
    """The function may be any callable; the next caller is served."""
    fails = True

    def function() -> Awaitable[str]:
        if fails:
            raise LookupError("no awaitable")
        return asyncio.sleep(0, "answer")

    coalescer = Coalescer(function, limit=1, timeout=5, patience=10)
    task = loop.create_task(coalescer())
    loop.settle()
    assert isinstance(task.exception(), LookupError)
    fails = False
    task = loop.create_task(coalescer())
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
        trouble.fail(trouble.runs[number], Transient())
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
    trouble.fail(trouble.runs[0], Transient())
    trouble.settle()
    trouble.sleep(0.002)
    (second,) = trouble.arrived()
    assert starts(trouble) == [0, 0.002]
    trouble.answer(trouble.runs[1])
    trouble.settle()
    assert {outcome(first), outcome(second)} == {trouble.runs[1]}


def test_runs_for_those_who_come_meanwhile_are_no_repeats(trouble: World) -> None:
    """However many of them fail in the first second, a failed run is still repeated afterwards."""
    callers = []
    for _ in range(100):
        callers += trouble.arrived()
        trouble.fail(trouble.unfinished()[0], Transient())
        trouble.live(0.01, step=0.005)
        for run in trouble.unfinished():
            trouble.fail(run, Transient())
            trouble.settle()
    trouble.live(0.7)
    trouble.answer(trouble.unfinished()[0])
    trouble.settle()
    assert {type(outcome(caller)) for caller in callers} == {Run}


def test_an_error_that_is_not_to_be_repeated_is_told_at_once(trouble: World) -> None:
    """Another try does not cure a defect."""
    (caller,) = trouble.arrived()
    trouble.fail(trouble.runs[0])
    trouble.settle()
    assert outcome(caller) is trouble.runs[0].error


@pytest.mark.parametrize("first", [0, 1])
def test_a_failure_is_not_told_while_another_run_can_answer(trouble: World, first: int) -> None:
    """Callers get neither the first run's error nor its company's, but that of the last run to fail."""
    (caller,) = trouble.arrived()
    trouble.live(0.05)
    for number in (first, 1 - first):
        assert not caller.task.done()
        trouble.fail(trouble.runs[number])
        trouble.settle()
    assert outcome(caller) is trouble.runs[1 - first].error


def test_after_two_seconds_of_failures_errors_are_told_at_once(trouble: World) -> None:
    """So a long outage costs no more runs than there are requests; an answer ends this."""
    began = trouble.loop.now
    (first,) = trouble.arrived()
    while not first.task.done():
        if runs := trouble.unfinished():
            trouble.fail(runs[0], Transient())
        trouble.sleep(0.001)
    assert 1 < trouble.loop.now - began < TROUBLE_WINDOW
    assert len(trouble.runs) == 8
    for number in range(20):
        (caller,) = trouble.arrived()
        trouble.fail(trouble.runs[-1], Transient())
        trouble.settle()
        trouble.sleep(0.1)
        if number >= 10:
            assert outcome(caller) is trouble.runs[-1].error
    assert len(trouble.runs) <= 8 + 20 + 8
    trouble.arrived()
    trouble.answer(trouble.runs[-1])
    trouble.settle()
    (caller,) = trouble.arrived()
    trouble.fail(trouble.runs[-1], Transient())
    trouble.settle()
    assert not caller.task.done()


def test_whose_time_is_up_gets_the_last_error(loop: ManualLoop) -> None:
    """Which says more than a time-out; but never the error of a run from before it came."""
    world = World(loop, limit=2, timeout=0.1, patience=10)
    (early,) = world.arrived()
    world.fail(world.runs[0], Transient())
    world.settle()
    world.sleep(0.05)
    (late,) = world.arrived()
    world.sleep(0.1)
    assert outcome(early) is world.runs[0].error
    assert isinstance(outcome(late), RunTimeoutError)
    world.finish()


@pytest.mark.parametrize("pause", [pytest.param(0.05, marks=pytest.mark.matrix), 0.3])
def test_the_load_of_a_long_silence_is_as_without_company(pause: float) -> None:
    """Callers that stay unanswered for some seconds cause no more runs than if none were ever late."""

    def runs(patience: float) -> int:
        loop = ManualLoop()
        world = World(loop, limit=4, timeout=5, patience=patience)
        began = loop.now
        while loop.now < began + 20:
            world.arrive()
            world.live(pause, step=0.01)
        loop.close()
        return len([run for run in world.runs if run.started_at > began + 5])

    assert runs(patience=0.1) <= runs(patience=1000)
