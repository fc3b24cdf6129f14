"""How cost grows with load: a model of few lines, whose constants `make scaling` measures.

The load on each part follows from one law, that of the coalescer, applied to the gateways and to the message services.
CPU time is linear in what a process does. Nothing here knows the number of clients: only requests cost anything.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

MAX_ADDED_DELAY = 0.005  # seconds, as in coalescing.py
CALLS = 4  # in flight for one key, in a gateway: KEY_LIMIT of coalescing.py
CONNECTIONS = 4  # of a message service: the default of DB_POOL_SIZE
QUERIES = CONNECTIONS - CONNECTIONS // 4  # in flight for one statement
TARGET = 0.7  # of one core, which is what one process is planned to use
LEAST = 2  # replicas, so that one may fail


@dataclass(frozen=True)
class Constants:
    """What one machine and one version cost, in seconds and bytes. CPU is in seconds of one core."""

    gateway_request: float  # CPU
    gateway_call: float  # CPU
    call: (
        float  # from the start of a call to that of the next when somebody waits, in a gateway with nothing else to do
    )
    service_call: float  # CPU
    service_query: float  # CPU
    query: float  # as `call`, for the message service's query
    postgres_query: float  # CPU
    connection_bytes: float  # memory of a gateway for a client's connection
    transfer_bytes: float  # a request and its answer


def runs(rate: float, seconds: float, work: float, limit: int = CALLS) -> float:
    """Runs per second of one coalescer that is asked for one key `rate` times a second, at random.

    `seconds` is the time from the start of a run to that of the next when somebody waits and the process has nothing
    else to do. Each request takes `work` seconds of its one core, which makes runs longer in proportion.

    A batch starts when a run ends, or MAX_ADDED_DELAY after its first caller, who comes 1/rate after the start before.
    So a run that takes long has that many others beside it. If nobody waits when it ends (with Poisson arrivals:
    probability e^-rate·time since the newest start), a run starts for the next caller: at once if none is in flight.
    """
    lasts = seconds / max(1 - rate * work, 0.1)
    timed = MAX_ADDED_DELAY + 1 / rate
    in_flight = min(math.ceil(lasts / timed), limit)
    nobody_waits = math.exp(-rate * (lasts - (in_flight - 1) * timed))
    return in_flight / (lasts + nobody_waits * (timed if in_flight > 1 else 1 / rate))


def runs_for(sources: float, rate: float, seconds: float, work: float) -> float:
    """`runs`, where few processes ask, each of which waits for its answer before it asks again.

    Then fewer than `runs` expects share a run: with one source nobody does. Each other source has asked by the end of a
    run with the same probability, and if none has, the next run has one caller.
    """
    lasts = seconds / max(1 - rate * work, 0.1)
    share = rate / sources * lasts  # of the time that a source waits for its own run
    has_asked = 1 - math.exp(-share / max(1 - share, 0.2))
    callers = (sources - 1) * has_asked + math.pow(1 - has_asked, sources - 1)
    return max(runs(rate, seconds, work, QUERIES), rate / max(callers, 1.0))


@dataclass(frozen=True)
class Load:
    """What so many requests per second ask of so many replicas. CPU is in cores, all replicas together."""

    requests: float
    gateways: int
    services: int
    calls: float
    queries: float
    gateway_cpu: float
    service_cpu: float
    postgres_cpu: float

    @property
    def cpu(self) -> float:
        return self.gateway_cpu + self.service_cpu + self.postgres_cpu


def load(it: Constants, requests: float, gateways: int, services: int, slower: float = 0.0) -> Load:
    """The load on each part, when calls and queries take `slower` seconds longer than where the constants come from."""
    calls = gateways * runs(requests / gateways, it.call + slower, it.gateway_request)
    sources = max(1.0, gateways / services)
    queries = services * runs_for(sources, calls / services, it.query + slower, it.service_call)
    return Load(
        requests,
        gateways,
        services,
        calls,
        queries,
        requests * it.gateway_request + calls * it.gateway_call,
        calls * it.service_call + queries * it.service_query,
        queries * it.postgres_query,
    )


def plan(it: Constants, requests: float, slower: float = 0.0) -> Load:
    """As few replicas as keep every process below `TARGET`, and no fewer than `LEAST` of a kind."""
    gateways, services = max(LEAST, math.ceil(requests * it.gateway_request / TARGET)), LEAST
    while load(it, requests, gateways, services, slower).gateway_cpu > TARGET * gateways:
        gateways += 1
    while load(it, requests, gateways, services, slower).service_cpu > TARGET * services:
        services += 1
    return load(it, requests, gateways, services, slower)


def requests_for(target: float, function: Callable[[float], float]) -> float:
    """The requests per second for which a function that grows with them reaches the target."""
    low, high = 1.0, 1e9
    while high > low * 1.0001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return low


def fit_costs(points: list[tuple[float, float, float]]) -> tuple[float, float]:
    """The costs a and b, neither below zero, for which a·x + b·y comes nearest to each z, by relative error."""
    xs, ys = [x / z for x, _, z in points], [y / z for _, y, z in points]
    xx, yy, xy = (sum(p * q for p, q in zip(*pair, strict=True)) for pair in ((xs, xs), (ys, ys), (xs, ys)))
    x, y = sum(xs), sum(ys)
    a, b = x * yy - y * xy, y * xx - x * xy
    if a <= 0 or b <= 0:
        return (0.0, y / yy) if a <= 0 else (x / xx, 0.0)
    return a / (xx * yy - xy * xy), b / (xx * yy - xy * xy)


def fit_seconds(points: list[tuple[float, float]], work: float) -> float:
    """The `seconds` for which `runs` comes nearest to each number of runs measured at each rate, by relative error."""
    candidates = [1e-5 * 1.005**step for step in range(2000)]  # 10 µs to 0.2 s
    return min(candidates, key=lambda it: sum((runs(rate, it, work) / seen - 1) ** 2 for rate, seen in points))
