"""The model of benchmarks/scaling_model.py: its law against the real coalescer, its arithmetic, the page made of it."""

import asyncio
import json
import random
import selectors
import sys

import pytest
from kit import ROOT

import message_service
from coalescing import MAX_ADDED_DELAY, Coalescer
from gateway import MAX_CALLS

sys.path.append(str(ROOT / "benchmarks"))
import scaling_model as model
import scaling_report

CONSTANTS = model.Constants(
    gateway_request=50e-6,
    gateway_call=200e-6,
    call=0.001,
    service_call=50e-6,
    service_query=200e-6,
    query=0.0005,
    postgres_query=40e-6,
    connection_bytes=10_000,
    transfer_bytes=500,
)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop that does not wait: its clock jumps to the next timer, and nothing else takes any time."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = selectors.DefaultSelector()
        selector.select = self.skip  # type: ignore[method-assign]
        super().__init__(selector)

    def skip(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0
        return []

    def time(self) -> float:
        return self.now


def simulate(rate: float, seconds: float, callers: int = 2000) -> float:
    """Runs per second of a real coalescer whose callers come at random, and whose runs take so long."""
    arrivals, runs, loop = random.Random(1), 0, SimulatedLoop()

    async def run() -> None:
        nonlocal runs
        runs += 1
        await asyncio.sleep(seconds)

    async def simulation() -> float:
        coalescer = Coalescer(run, limit=model.LIMIT, timeout=60, patience=60)
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                await asyncio.sleep(arrivals.expovariate(rate))
                group.create_task(coalescer())
            return runs / loop.now

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(simulation())


@pytest.mark.parametrize("seconds", [0.0005, 0.002, 0.004, 0.008, 0.016, 0.05])
@pytest.mark.parametrize("rate", [10, 100, 300, 1000, 5000])
def test_law(rate: float, seconds: float) -> None:
    """The model knows how often a coalescer runs; less exactly where runs overlap."""
    error = 0.02 if seconds < MAX_ADDED_DELAY else 0.25
    assert model.runs(rate, seconds, work=0) == pytest.approx(simulate(rate, seconds), rel=error)


def test_same_constants() -> None:
    """The model counts with the limits of the servers as they are."""
    assert model.MAX_ADDED_DELAY == MAX_ADDED_DELAY
    assert model.LIMIT == MAX_CALLS == message_service.Settings().db_pool_size


def test_busy_process() -> None:
    """A process that is half busy with requests makes half as many runs as one that only they keep waiting."""
    assert model.runs(10_000, 0.001, work=50e-6) == pytest.approx(model.runs(10_000, 0.001, work=0) / 2, rel=0.01)


def test_load() -> None:
    """Costs add up: each request, call and query has its price."""
    load = model.load(CONSTANTS, requests=10, gateways=2, services=1)
    assert (load.calls, load.queries) == pytest.approx((10, 10), rel=0.01)
    assert load.gateway_cpu == pytest.approx(10 * (50e-6 + 200e-6), rel=0.01)
    assert load.service_cpu == pytest.approx(10 * (50e-6 + 200e-6), rel=0.01)
    assert load.postgres_cpu == pytest.approx(10 * 40e-6, rel=0.01)


@pytest.mark.parametrize("requests", [1, 1000, 100_000, 10_000_000])
def test_plan(requests: float) -> None:
    """What is planned carries the load, two of each kind at least, and one gateway less would not."""
    plan = model.plan(CONSTANTS, requests)
    assert plan.gateway_cpu <= model.TARGET * plan.gateways
    assert plan.service_cpu <= model.TARGET * plan.services
    assert min(plan.gateways, plan.services) >= 2
    if plan.gateways > 2:
        fewer = model.load(CONSTANTS, requests, plan.gateways - 1, plan.services)
        assert fewer.gateway_cpu > model.TARGET * fewer.gateways


def test_fit() -> None:
    """Costs that explain every measurement are found again."""
    points = [(1000.0, 800.0), (4000.0, 1000.0), (8000.0, 600.0)]
    assert model.fit_costs([(x, y, 70e-6 * x + 400e-6 * y) for x, y in points]) == pytest.approx((70e-6, 400e-6))
    seen = [(rate, model.runs(rate, 0.0007, 70e-6)) for rate in (1000.0, 4000.0, 8000.0)]
    assert model.fit_seconds(seen, 70e-6) == pytest.approx(0.0007, rel=0.01)


def test_page() -> None:
    """The numbers on the page are those of the results file."""
    page = scaling_report.PAGE.read_text()
    results = json.loads((scaling_report.RESULTS / "scaling.json").read_text())
    assert scaling_report.render(page, results) == page
