"""`Coalescer` alone, by a clock that the test moves: every order of events that can matter, and the corners by name.

`World` surrounds a coalescer with callers and runs, and checks its guarantees at each event: it numbers all arrivals,
starts and ends, so that "the first run that started after this caller arrived" is a fact and no matter of luck.
"""

import asyncio
import contextvars
import gc
import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVarTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coalescing import Coalescer, RunTimeoutError

ADDED_DELAY = 0.005  # seconds; what is promised, whatever the module's constant says
TIMEOUT = 0.01  # seconds; twice the delay, so that few steps reach every combination of the two
MOMENT = 1e-6  # seconds

Args = TypeVarTuple("Args")


class ManualLoop(asyncio.SelectorEventLoop):
    """An event loop that runs one iteration when it is told to, by a clock that stands still otherwise."""

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
        """Run one iteration: what is ready, and the timers that are due."""
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

    def __init__(self, started: int, opener: "Caller", loop: asyncio.AbstractEventLoop) -> None:
        self.started = started
        self.opener = opener
        self.ended: int | None = None
        self.end: asyncio.Future[Run] = loop.create_future()
        self.outcome = ""
        self.observed = 0


class Caller:
    """One who asks: when it came, and what it got."""

    def __init__(self) -> None:
        self.task: asyncio.Task[Run]
        self.arrived: int | None = None  # not yet
        self.arrived_at = 0.0
        self.cancelled = False


CALLER: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller")


class World:
    """A coalescer with its callers and runs; `AssertionError` out of any step when a guarantee is broken."""

    def __init__(self, loop: ManualLoop, limit: int = 2, timeout: float = TIMEOUT) -> None:
        self.loop, self.limit, self.timeout = loop, limit, timeout
        self.order = itertools.count(1)
        self.callers: list[Caller] = []
        self.runs: list[Run] = []
        self.broken: list[str] = []
        self.unobserved: list[Run] = []
        self.observations: list[tuple[int, str]] = []
        self.coalescer = Coalescer(self._function, limit=limit, timeout=timeout, observe=self._observe)

    # What the coalescer calls

    async def _function(self) -> Run:
        run = Run(next(self.order), CALLER.get(), self.loop)
        self._check_start(run)
        self.runs.append(run)
        try:
            answer = await run.end
            run.outcome = "answered"
            return answer
        except asyncio.CancelledError:
            run.outcome = "abandoned"
            self._expect(not any(self._still_waits(caller) for caller in self.callers_of(run)), "cancelled too early")
            raise
        except Exception:
            run.outcome = "failed"
            raise
        finally:
            run.ended = next(self.order)
            self.unobserved.append(run)

    def _observe(self, callers: int, outcome: str) -> None:
        self.observations.append((callers, outcome))
        if not self.unobserved:
            self._expect(outcome == "abandoned", f"{outcome} was observed of a run that never started")
            return
        run = self.unobserved.pop()
        run.observed += 1
        self._expect((callers, outcome) == (len(self.callers_of(run)), run.outcome), f"observed {callers}, {outcome}")

    async def _ask(self, caller: Caller) -> Run:
        CALLER.set(caller)
        caller.arrived, caller.arrived_at = next(self.order), self.loop.time()
        try:
            answer = await self.coalescer()
            run = self.run_of(caller)
            self._expect(answer is run, "an answer of another run than the first that started after the question")
        except asyncio.CancelledError:
            self._expect(caller.cancelled, "cancelled by nobody")
            raise
        except RunTimeoutError as error:
            opener = error.context[CALLER]
            run = self.run_of(caller)
            self._expect(self.loop.time() > caller.arrived_at + self.timeout - MOMENT, "timed out too early")
            self._expect(run is None or run.opener is opener, "timed out in the name of another run")
            raise
        except Exception as error:
            run = self.run_of(caller)
            self._expect(run is not None and error is run.end.exception(), f"not its run's error: {error!r}")
            raise
        return answer

    # What is known about them

    def run_of(self, caller: Caller) -> Run | None:
        """The first run that started after this caller arrived: the one that has to answer it."""
        assert caller.arrived is not None
        return next((run for run in self.runs if run.started > caller.arrived), None)

    def callers_of(self, run: Run) -> list[Caller]:
        """All who joined its batch, those included who have given up since."""
        first = run.opener.arrived
        assert first is not None
        return [caller for caller in self.callers if caller.arrived and first <= caller.arrived < run.started]

    def in_flight(self) -> list[Run]:
        return [run for run in self.runs if run.ended is None]

    def waiting(self) -> list[Caller]:
        return [caller for caller in self.callers if caller.arrived is not None and not caller.task.done()]

    def _still_waits(self, caller: Caller) -> bool:
        in_time = self.loop.time() < caller.arrived_at + self.timeout - MOMENT
        return in_time and not caller.cancelled and not caller.task.done()

    # Checks

    def _expect(self, condition: bool, message: str) -> None:
        """Remember what is wrong: an error raised in a callback would not reach the test."""
        if not condition:
            self.broken.append(message)

    def _check_start(self, run: Run) -> None:
        opened = run.opener.arrived
        assert opened is not None
        others = self.in_flight()
        self._expect(len(others) < self.limit, "more runs than the limit")
        self._expect(not self.runs or opened > self.runs[-1].started, "the context of a caller of another run")
        late = self.loop.time() > run.opener.arrived_at + ADDED_DELAY - MOMENT
        room = any(other.ended is not None and other.ended > opened for other in self.runs)
        self._expect(not others or late or room, "a run was started for no reason")

    def check(self) -> None:
        """Check what holds at any time; and what holds when all that can happen at this time has happened."""
        assert not self.broken, self.broken
        assert not self.loop.complaints, self.loop.complaints
        if self.loop.busy:
            return
        now, in_flight, waiting = self.loop.time(), self.in_flight(), self.waiting()
        for caller in waiting:
            assert now < caller.arrived_at + self.timeout - MOMENT, "a caller waits beyond its time"
        for run in in_flight:
            assert any(self.run_of(caller) is run for caller in waiting), "a run goes on that nobody waits for"
        for caller in waiting:
            if self.run_of(caller) is None:
                assert in_flight, "a caller waits for nothing"
                full = len(in_flight) == self.limit
                assert full or now < caller.arrived_at + ADDED_DELAY - MOMENT, "a caller waits longer than promised"
                ended = [run.ended for run in self.runs if run.ended is not None]
                assert max(ended, default=-1) < (caller.arrived or 0), "no run was started when one ended"

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
        """Let time pass, and all that is due happen."""
        self.advance(seconds)
        self.settle()

    def arrive(self) -> Caller:
        """Somebody asks, in the next iteration of the event loop."""
        caller = Caller()
        self.callers.append(caller)
        context = contextvars.Context()
        caller.task = self.loop.create_task(self._ask(caller), context=context)
        return caller

    def arrived(self, number: int = 1) -> list[Caller]:
        """So many ask, and all that follows happens."""
        callers = [self.arrive() for _ in range(number)]
        self.settle()
        return callers

    def cancel(self, caller: Caller) -> None:
        caller.cancelled = True
        caller.task.cancel()

    def answer(self, run: Run) -> None:
        run.end.set_result(run)

    def fail(self, run: Run) -> None:
        run.end.set_exception(LookupError("the run's error"))

    def finish(self) -> None:
        """Answer whoever waits; then nothing may be left over, and the next caller be served at once."""
        self.settle()
        while runs := self.unfinished():
            self.answer(runs[0])
            self.settle()
        assert not self.waiting()
        self.arrived()
        (run,) = self.unfinished()
        self.answer(run)
        self.settle()
        assert not asyncio.all_tasks(self.loop), "a task is left over"
        assert all(timer.cancelled() or timer.when() <= self.loop.now for timer in self.loop.timers), "a timer is left"
        self.loop.timers.clear()
        assert {run.observed for run in self.runs} == {1}
        for caller in self.callers:
            if not caller.task.cancelled():
                caller.task.exception()  # retrieved here: what else is never retrieved is the coalescer's

    def unfinished(self) -> list[Run]:
        """Runs whose end the test has not told yet."""
        return [run for run in self.in_flight() if not run.end.done()]

    def cancellable(self) -> list[Caller]:
        return [caller for caller in self.callers if not caller.task.done() and not caller.cancelled]


@pytest.fixture
def loop() -> Iterator[ManualLoop]:
    """An event loop that nothing was left over in."""
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


def much_time_passes(world: World) -> bool:
    world.advance(TIMEOUT)
    return True


Event = Callable[[World], bool]  # False: it can not happen now

EVENTS: list[Event] = [
    arrive,
    first_leaves,
    last_leaves,
    first_run_answers,
    last_run_fails,
    tick,
    some_time_passes,
    much_time_passes,
]


A_RUN = (arrive, tick, tick)  # it is in flight
A_RUN_AND_A_BATCH = (*A_RUN, arrive, tick)  # which waits for the run's end
TWO_RUNS_AND_A_BATCH = (*A_RUN_AND_A_BATCH, some_time_passes, some_time_passes, tick, tick, arrive, tick)


def explore(loop: ManualLoop, limit: int, prefix: tuple[Event, ...], depth: int) -> int:
    """Live through `prefix` and each way that up to `depth` events can follow it; how many histories that were."""
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
        (1, (arrive,), 4),
        (2, (arrive,), 4),
        (2, A_RUN, 4),
        (1, A_RUN_AND_A_BATCH, 4),
        (2, A_RUN_AND_A_BATCH, 4),
        (2, TWO_RUNS_AND_A_BATCH, 4),
    ],
)
def test_every_short_history_keeps_the_guarantees(
    loop: ManualLoop, limit: int, situation: tuple[Event, ...], depth: int
) -> None:
    """Whatever follows in whichever order, callers are answered freshly, in time, and nothing is left over."""
    assert explore(loop, limit, situation, depth) > 500


@settings(
    max_examples=500,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(limit=st.integers(1, 4), events=st.lists(st.sampled_from([arrive, tick, *EVENTS]), max_size=60))
def test_long_histories_keep_the_guarantees(loop: ManualLoop, limit: int, events: list[Event]) -> None:
    """The same of histories that are long enough for several batches, and taken at random."""
    world = World(loop, limit)
    for event in events:
        event(world)
    world.finish()


# ---- the corners, by name ------------------------------------------------------------------------------------


@pytest.fixture
def world(loop: ManualLoop) -> Iterator[World]:
    """A world with a limit of two runs, which may take seconds."""
    world = World(loop, timeout=5)
    yield world
    world.finish()


def outcome(caller: Caller) -> Any:
    """What a caller got: its answer, or its error."""
    assert caller.task.done()
    return caller.task.exception() or caller.task.result()


def fill(world: World) -> None:
    """Start as many runs as the limit allows."""
    while len(world.runs) < world.limit:
        world.arrived()
        world.sleep(ADDED_DELAY)


def test_callers_share_a_run_until_its_first_step(world: World) -> None:
    """Those who come in the tick in which the run's task is made are served by it; those who come later are not."""
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
    """Counted from the batch's first caller, to the moment."""
    world.arrived()
    world.sleep(2)
    world.arrived()
    world.sleep(0.003)
    world.arrived()
    world.sleep(0.002 - 3 * MOMENT)
    assert len(world.runs) == 1
    world.sleep(3 * MOMENT)
    assert [len(world.callers_of(run)) for run in world.runs] == [1, 2]


def test_at_the_limit_a_batch_waits_for_the_end_of_a_run(world: World) -> None:
    """However long that takes; and then it starts at once, with all who have come meanwhile."""
    fill(world)
    for _ in range(5):
        world.arrived(2)
        world.sleep(0.5)
    assert len(world.runs) == 2
    world.fail(world.runs[1])
    world.settle()
    assert len(world.callers_of(world.runs[2])) == 10


def test_a_run_counts_until_it_has_ended(loop: ManualLoop) -> None:
    """One that takes its time to clean up when it is cancelled still takes the room of one."""
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

    coalescer = Coalescer(function, limit=1, timeout=5)
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
    """From its arrival, also where it only waits; who came later can still be answered."""
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


def test_a_timeout_names_the_caller_that_opened_the_batch(world: World) -> None:
    """Whether the batch's run has started or not."""
    callers = world.arrived(2)
    world.sleep(ADDED_DELAY)
    fill(world)
    waiting = [*world.arrived(), *world.arrived()]
    world.cancel(waiting[0])
    world.sleep(5)
    for caller, opener in ((callers[1], callers[0]), (waiting[1], waiting[0])):
        error = outcome(caller)
        assert isinstance(error, RunTimeoutError)
        assert error.context[CALLER] is opener


def test_a_run_acts_in_a_copy_of_its_openers_context(loop: ManualLoop) -> None:
    """It sees what its opener had set when it asked, and changes nothing for anybody."""
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")

    async def function() -> str:
        before = name.get()
        name.set("the run")
        return before

    coalescer = Coalescer(function, limit=1, timeout=5)

    async def ask(own_name: str) -> tuple[str, str]:
        name.set(own_name)
        return await coalescer(), name.get()

    tasks = [loop.create_task(ask(own_name)) for own_name in ("first", "second")]
    loop.settle()
    assert [task.result() for task in tasks] == [("first", "first"), ("first", "second")]


def test_an_error_is_shared(world: World) -> None:
    """All callers of the run get the very error that it raised, those of the next run do not."""
    callers = world.arrived(3)
    (late,) = world.arrived()
    world.fail(world.runs[0])
    world.settle()
    assert {outcome(caller) for caller in callers} == {world.runs[0].end.exception()}
    world.answer(world.runs[1])
    world.settle()
    assert outcome(late) is world.runs[1]


@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_a_caller_that_leaves_disturbs_nobody(world: World, leaver: int) -> None:
    """Be it the one that opened the batch, or another, before or after the run's start."""
    for callers in (world.arrived(3), world.arrived(3)):
        world.cancel(callers[leaver])
        world.settle()
        assert callers[leaver].task.cancelled()
        assert [caller.task.done() for caller in callers].count(False) == 2
    for number in range(2):
        world.answer(world.runs[number])
        world.settle()
        assert world.observations[number] == (3, "answered")


def test_a_caller_that_leaves_when_its_time_is_up_is_counted_once(world: World) -> None:
    """The run goes on for the one that came later and has time left."""
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
    """Without a run, and without a timer for the caller that came later and has left."""
    world = World(loop, limit=1, timeout=5)
    world.arrived()
    (early,) = world.arrived()
    world.sleep(1)
    (late,) = world.arrived()
    world.cancel(late)
    world.sleep(4)
    assert isinstance(outcome(early), RunTimeoutError)
    assert len(world.runs) == 1
    world.finish()


def test_when_all_have_left_the_run_is_cancelled(world: World) -> None:
    """And a batch that still waits is dropped."""
    callers = world.arrived(3) + world.arrived(2)
    for caller in reversed(callers):
        world.cancel(caller)
        world.settle()
    assert world.observations == [(3, "abandoned")]
    assert len(world.runs) == 1


def test_a_run_that_is_abandoned_before_its_first_step_never_starts(world: World) -> None:
    """Its task is there already, since the run before it has just ended; the next caller gets a run of its own."""
    world.arrived()
    (leaving,) = world.arrived()
    world.answer(world.runs[0])
    world.cancel(leaving)
    world.tick()
    world.arrived()
    assert world.observations == [(1, "answered"), (1, "abandoned")]
    assert [run.opener for run in world.runs] == [world.callers[0], world.callers[2]]


def test_a_run_that_is_cancelled_by_others_is_an_error(loop: ManualLoop) -> None:
    """Nobody is left waiting, nor cancelled without having been cancelled; the next caller is served."""
    cancels_itself = True

    async def function() -> str:
        if cancels_itself:
            raise asyncio.CancelledError
        return "answer"

    coalescer = Coalescer(function, limit=1, timeout=5)
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

    coalescer = Coalescer(function, limit=1, timeout=5)
    task = loop.create_task(coalescer())
    loop.settle()
    assert isinstance(task.exception(), LookupError)
    fails = False
    task = loop.create_task(coalescer())
    loop.settle()
    assert task.result() == "answer"


def test_a_caller_costs_neither_a_task_nor_a_timer(world: World) -> None:
    """A thousand callers of one batch need one task and two timers."""
    world.arrived()
    timers = len(world.loop.timers)
    world.arrived(1000)
    world.answer(world.runs[0])
    world.settle()
    assert len(asyncio.all_tasks(world.loop)) == 1000 + 1
    assert len(world.loop.timers) == timers + 2
    assert len(world.callers_of(world.runs[1])) == 1000
