"""benchmarks/scaling_model.py: its law against the real coalescer, its arithmetic, and the page made from it."""

import asyncio
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Coroutine, Sequence
from random import Random
from typing import Any

import pytest
from kit import ROOT
from kit.loops import JumpingLoop

import message_service
from chassis.client import MAX_CALLS
from chassis.coalescing import KEY_LIMIT, MAX_ADDED_DELAY, Coalescer

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


Ask = Callable[[], Coroutine[Any, Any, None]]


async def ask_at_random(rate: float, ask: Sequence[Ask], callers: int = 1500) -> None:
    """Call `rate` times a second, at random, one of these."""
    random = Random(1)
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            await asyncio.sleep(random.expovariate(rate))
            group.create_task(random.choice(ask)())


def simulate(rate: float, gateways: int, services: int, call: float, query: float) -> tuple[float, float]:
    """Calls and queries per second of real coalescers, one in each replica.

    `query` is how long a query takes, `call` how long a call takes without it.
    """
    calls = queries = 0
    loop = JumpingLoop()

    async def run_query() -> None:
        nonlocal queries
        queries += 1
        await asyncio.sleep(query)

    def coalesced(run: Ask, limit: int) -> Ask:
        return functools.partial(Coalescer(limit=limit, timeout=60, patience=60), "the message", run)

    def gateway(service: Ask) -> Ask:
        async def run_call() -> None:
            nonlocal calls
            calls += 1
            await asyncio.sleep(call)
            await service()

        return coalesced(run_call, MAX_CALLS)

    asked = [coalesced(run_query, message_service.Settings().db_pool_size) for _ in range(services)]
    asking = [gateway(asked[number % services]) for number in range(gateways)]
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(ask_at_random(rate, asking))
        return calls / loop.now, queries / loop.now


@pytest.mark.parametrize("seconds", [0.0005, 0.002, 0.008, 0.05])
@pytest.mark.parametrize("rate", [30, 300, 3000])
def test_law(rate: float, seconds: float) -> None:
    """The model predicts how often a coalescer runs, less exactly if runs overlap."""
    error = 0.05 if seconds < MAX_ADDED_DELAY else 0.25
    calls, _ = simulate(rate, gateways=1, services=1, call=seconds, query=0)
    assert model.runs(rate, seconds, work=0) == pytest.approx(calls, rel=error)


@pytest.mark.parametrize(("gateways", "services"), [(1, 1), (2, 1), (4, 1), (4, 2), (20, 1)])
def test_chain(gateways: int, services: int) -> None:
    """The model predicts how many calls and queries several gateways and message services make."""
    rate = 1000 * gateways
    ideal = dataclasses.replace(CONSTANTS, gateway_request=0, service_call=0)  # no process is busy with anything
    load = model.load(ideal, rate, gateways, services)
    measured = simulate(rate, gateways, services, CONSTANTS.call - CONSTANTS.query, CONSTANTS.query)
    assert (load.calls, load.queries) == pytest.approx(measured, rel=0.1)


def test_same_limits() -> None:
    """The model uses the real limits of the servers and of k8s.yaml."""
    maxima = re.findall(r"maxReplicas: (\d+)", (ROOT / "k8s.yaml").read_text())
    assert tuple(map(int, maxima)) == scaling_report.MAX_REPLICAS
    assert model.MAX_ADDED_DELAY == MAX_ADDED_DELAY
    assert model.CALLS == KEY_LIMIT
    assert message_service.Settings().db_pool_size == model.CONNECTIONS


def test_busy_process() -> None:
    """A process that is half busy with requests makes half as many runs as one that only waits for runs."""
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
    """The planned replicas carry the load, at least two of each kind, and one gateway fewer would not."""
    plan = model.plan(CONSTANTS, requests)
    assert plan.gateway_cpu <= model.TARGET * plan.gateways
    assert plan.service_cpu <= model.TARGET * plan.services
    assert min(plan.gateways, plan.services) >= 2
    assert requests >= plan.calls >= plan.queries
    if plan.gateways > 2:
        fewer = model.load(CONSTANTS, requests, plan.gateways - 1, plan.services)
        assert fewer.gateway_cpu > model.TARGET * fewer.gateways


def test_fit() -> None:
    """Costs that explain every measurement are recovered."""
    points = [(1000.0, 800.0), (4000.0, 1000.0), (8000.0, 600.0)]
    assert model.fit_costs([(x, y, 70e-6 * x + 400e-6 * y) for x, y in points]) == pytest.approx((70e-6, 400e-6))
    seen = [(rate, model.runs(rate, 0.0007, 70e-6)) for rate in (1000.0, 4000.0, 8000.0)]
    assert model.fit_seconds(seen, 70e-6) == pytest.approx(0.0007, rel=0.01)


def test_page() -> None:
    """The numbers on the page match the results file."""
    page = scaling_report.PAGE.read_text()
    results = json.loads((scaling_report.RESULTS / "scaling.json").read_text())
    assert scaling_report.render(page, results) == page
