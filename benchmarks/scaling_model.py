"""How cost grows with load: a model of few lines, with constants that `make scaling` measures.

The load on each part follows from one law, that of the coalescer, used for the gateways and for the message services.
CPU time is linear in what a process does. Nothing here knows how many clients there are: the law is about requests.
"""

import math
from dataclasses import dataclass

MAX_ADDED_DELAY = 0.005  # as in coalescing.py
LIMIT = 4  # runs in flight: MAX_CALLS of gateway.py, the default of DB_POOL_SIZE
TARGET = 0.7  # share of one core that a process is planned to use, the autoscalers' in k8s.yaml
LEAST = 2  # replicas, so that one may fail


@dataclass(frozen=True)
class Constants:
    """What one machine and one version cost. Times in seconds, CPU in seconds of one core."""

    gateway_request: float  # CPU
    gateway_run: float  # CPU
    service_call: float  # CPU
    service_query: float  # CPU
    postgres_query: float  # CPU
    call: float  # from the start of a call to its answer
    call_turn: float  # from its answer to the start of the next, when somebody waits
    query: float  # as `call`, for the message service's query
    query_turn: float
    connection_bytes: float  # memory of a gateway for a client's connection
    answer_bytes: float  # on the wire, of one answer and its request


def runs(rate: float, seconds: float, limit: int = LIMIT) -> float:
    """Runs per second of one coalescer that is asked `rate` times a second, at random, when runs take `seconds`.

    With one run in flight, a run starts when the one before it has ended and somebody waits; if nobody came meanwhile
    (for Poisson arrivals: with probability e^-rate·seconds), when the next caller comes, after 1/rate on average.
    Runs that take longer than MAX_ADDED_DELAY overlap, since no batch waits longer than that for its start.
    """
    interval = seconds / min(math.ceil(seconds / MAX_ADDED_DELAY), limit)
    return 1 / (interval + math.exp(-rate * interval) / rate)


def interval(rate: float, measured: float) -> float:
    """Seconds from one run to the next when somebody waits: what `runs` needs to give the measured runs per second."""
    low, high = 0.0, 1 / measured
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if middle + math.exp(-rate * middle) / rate > 1 / measured else (middle, high)
    return low


@dataclass(frozen=True)
class Load:
    """What so many requests per second ask of each part. CPU in cores, all replicas together."""

    requests: float
    gateways: int
    services: int
    calls: float
    queries: float
    gateway_cpu: float
    service_cpu: float
    postgres_cpu: float


def load(
    constants: Constants, requests: float, gateways: int, services: int, call: float = 0, query: float = 0
) -> Load:
    """The load on so many replicas; `call` and `query` replace the constants where they have been measured."""
    call_interval = (call or constants.call) + constants.call_turn
    query_interval = (query or constants.query) + constants.query_turn
    calls = gateways * runs(requests / gateways, call_interval)
    queries = services * runs(calls / services, query_interval)
    return Load(
        requests,
        gateways,
        services,
        calls,
        queries,
        requests * constants.gateway_request + calls * constants.gateway_run,
        calls * constants.service_call + queries * constants.service_query,
        queries * constants.postgres_query,
    )


def plan(constants: Constants, requests: float) -> Load:
    """As few replicas as keep every process below `TARGET`."""
    gateways = services = LEAST
    while (it := load(constants, requests, gateways, services)).gateway_cpu > TARGET * gateways:
        gateways = max(gateways + 1, math.ceil(requests * constants.gateway_request / TARGET))
    while (it := load(constants, requests, gateways, services)).service_cpu > TARGET * services:
        services += 1
    return it


def fit(points: list[tuple[float, float, float]]) -> tuple[float, float]:
    """The costs a and b, neither below zero, for which a·x + b·y is nearest to each z, by relative error."""
    xs, ys = [x / z for x, _, z in points], [y / z for _, y, z in points]
    xx, yy, xy = (sum(p * q for p, q in zip(*pair, strict=True)) for pair in ((xs, xs), (ys, ys), (xs, ys)))
    x1, y1 = sum(xs), sum(ys)
    determinant = xx * yy - xy * xy
    a, b = (x1 * yy - y1 * xy) / determinant, (y1 * xx - x1 * xy) / determinant
    if a < 0:
        return 0.0, y1 / yy
    return (x1 / xx, 0.0) if b < 0 else (a, b)
