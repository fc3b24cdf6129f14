"""The model in benchmarks/scaling_model.py: its law against the real coalescer, its arithmetic, and the page made of it."""

import asyncio
import dataclasses
import json
import random
import selectors
import sys

import pytest
from kit import ROOT

from coalescing import MAX_ADDED_DELAY, Coalescer
from gateway import MAX_CALLS

sys.path.append(str(ROOT / "benchmarks"))
import scaling_model as model

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
    """The model knows how often a coalescer runs, whatever the load is and however long a run takes."""
    s = simulate(rate, seconds); m = model.runs(rate, seconds, work=0); print(rate, seconds, round(s), round(m), f"{m/s-1:+.0%}")
    assert model.runs(rate, seconds, work=0) == pytest.approx(simulate(rate, seconds), rel=0.12)
