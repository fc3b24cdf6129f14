"""What Prometheus reads at `/metrics`.

Rules kept here: names follow Prometheus and OpenTelemetry's HTTP conventions, with their unit; no label comes from
what a client sends; what can be read when Prometheus asks is not counted at each request.
"""

import asyncio
import functools
import itertools
from bisect import bisect_left
from collections.abc import Iterator
from http import HTTPStatus

import prometheus_client
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, Info, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from responses import Answer

LAG_INTERVAL = 0.5  # seconds between two looks at the event loop

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the lines, and Prometheus does not need them

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_CALLERS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)


class _Histogram(Collector):
    """Prometheus' histogram for a single thread: without locks it takes a fifth of the time of the library's own, which
    came to 7 % of all that the gateway spends on a request.
    """

    def __init__(self, name: str, documentation: str, bounds: tuple[float, ...], labels: tuple[str, ...] = ()) -> None:
        self._family = functools.partial(HistogramMetricFamily, name, documentation, labels=labels)
        self._bounds = bounds
        self._nothing = (0.0,) * (len(bounds) + 2)
        # By labels: how many in each bucket, and the sum. What has no labels is there from the start.
        self._series: dict[tuple[object, ...], list[float]] = {} if labels else {(): [*self._nothing]}
        REGISTRY.register(self)

    def observe(self, value: float, *labels: object) -> None:
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = [*self._nothing]
        series[bisect_left(self._bounds, value)] += 1
        series[-1] += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What `generate_latest` asks for."""
        family = self._family()
        for labels, (*counts, total) in self._series.items():
            buckets = zip([*map(str, self._bounds), "+Inf"], itertools.accumulate(counts), strict=True)
            family.add_metric([*map(str, labels)], [*buckets], total)
        yield family


_REQUESTS = _Histogram(
    "http_server_request_duration_seconds",
    "Time from a request's arrival to its answer",
    _SECONDS,
    ("http_request_method", "http_route", "http_response_status_code"),
)
_RUNS = _Histogram("coalescing_run_callers", "Callers that shared a run, by the run's outcome", _CALLERS, ("outcome",))
_LAG = _Histogram("event_loop_lag_seconds", "How much later than due the event loop runs a timer", _SECONDS)
ACTIVE_REQUESTS = Gauge("http_server_active_requests", "Requests in flight")
DEPENDENCY_ERRORS = Counter("dependency_errors", "Calls of what is behind this server that failed", ("error_type",))
CONNECTIONS = Gauge("db_client_connection_count", "Connections to the database", ("db_client_connection_state",))
MAX_CONNECTIONS = Gauge("db_client_connection_max", "Connections to the database that there can be")
CONNECT_FAILURES = Counter("db_client_connect_failures", "Connections to the database that could not be made")
BUILD = Info("messages_build", "Version of this server, and of Python")


def observe_request(method: str, route: str | None, status: int, seconds: float) -> None:
    """Count a request; `route` is None for a path that no route has."""
    known_method = method if method in ("GET", "HEAD") else "_OTHER"
    _REQUESTS.observe(seconds, known_method, route or "unmatched", status)


def observe_run(callers: int, outcome: str) -> None:
    _RUNS.observe(callers, outcome)


async def watch_event_loop() -> None:
    """Measure for ever how late timers are: what blocks the event loop shows here first."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_INTERVAL
        await asyncio.sleep(LAG_INTERVAL)
        _LAG.observe(max(0, loop.time() - due))


async def answer() -> Answer:
    return Answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(REGISTRY))
