"""The metrics that Prometheus reads at `/metrics`.

Rules kept here: names follow Prometheus and OpenTelemetry's HTTP conventions, with their units; no label value comes
from a client; a value that can be read when Prometheus asks is not counted at each request. Tests:
tests/chassis/test_metrics.py.
"""

import asyncio
import itertools
import logging
import time
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence

import prometheus_client
from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, Info, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from chassis import logs
from chassis.responses import TIMEOUT, Problem, Representation, RepresentationResponse

LAG_INTERVAL = 0.5  # seconds between two checks of the event loop

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the lines, and Prometheus does not need them

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_CALLERS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)


class Histogram(Collector):
    """A histogram that only the event loop's thread observes.

    Each request and each run is observed, and the library's own histogram takes two locks each time.
    """

    def __init__(self, name: str, meaning: str, labels: Sequence[str] = (), *, bounds: Sequence[float]) -> None:
        self._name, self._meaning, self._labels, self._bounds = name, meaning, labels, bounds
        self._zeros = [0.0] * (len(bounds) + 2)  # a new series: its observations by bucket, and their sum
        # By labels. Without any, there is one from the start, so that queries find it.
        self._series: dict[tuple[object, ...], list[float]] = {} if labels else {(): self._zeros.copy()}
        REGISTRY.register(self)

    def observe(self, value: float, *labels: object) -> None:
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = self._zeros.copy()
        series[bisect_left(self._bounds, value)] += 1
        series[-1] += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._meaning, labels=self._labels)
        names = [*map(str, self._bounds), "+Inf"]
        for labels, (*counts, total) in self._series.items():
            buckets = list(zip(names, itertools.accumulate(counts), strict=True))
            family.add_metric([str(label) for label in labels], buckets, total)
        yield family


_REQUESTS = Histogram(
    "http_server_request_duration_seconds",
    "Time from a request's arrival to its response",
    ("http_request_method", "http_route", "http_response_status_code"),
    bounds=_SECONDS,
)
_RUNS = Histogram(
    "coalescing_run_callers",
    "Callers that a run settled, by the run's outcome and the reason for it",
    ("outcome", "reason"),
    bounds=_CALLERS,
)
_LAG = Histogram("event_loop_lag_seconds", "How late the event loop runs a timer", bounds=_SECONDS)
ACTIVE_REQUESTS = Gauge("http_server_active_requests", "Requests in flight")
_DEPENDENCY_ERRORS = Counter(
    "dependency_errors",
    "Failures of this server's dependencies, by kind and by whether clients saw them",
    ("error_type", "seen_by"),
)
# OpenTelemetry's name, as its exporter for Prometheus writes it; promtool would reserve `_count` for histograms.
CONNECTIONS = Gauge("db_client_connection_count", "Connections to the database", ("db_client_connection_state",))
MAX_CONNECTIONS = Gauge("db_client_connection_max", "Most connections to the database that this server opens")
CONNECT_FAILURES = Counter("db_client_connect_failures", "Failed attempts to connect to the database")
BUILD = Info("build", "This server, its version, and that of Python")


def observe_request(method: str, route: str | None, status: int, seconds: float) -> None:
    """Count a request; `route` is None if no route has its path."""
    known_method = method if method in hdrs.METH_ALL else "_OTHER"
    _REQUESTS.observe(seconds, known_method, route or "unmatched", status)


class Dependency:
    """A part of the system behind this server: counts its failures, and logs its return after one that clients saw.

    The failed requests log its absence. One failure is counted for each run, and for each call or transaction that
    shares nothing.
    """

    def __init__(self, part: str) -> None:
        self._name = f"the {part.replace('_', ' ')}"
        self._away_since: dict[Hashable, float] = {}  # by kind of run: a route that is broken for ever says nothing
        self._lines = logs.RepeatLog()

    def observe_run(self, kind: Hashable, callers: int, outcome: str, reason: str, error: Exception | None) -> None:
        """Called by a `Coalescer` after each run."""
        _RUNS.observe(callers, outcome, reason)
        if outcome == "answered":
            self.answered(kind)
        elif outcome == "timed out":
            self.failed(kind, TIMEOUT)
        elif isinstance(error, Problem):
            self.failed(kind, error.kind, seen=callers > 0, cause=error.cause)

    def answered(self, kind: Hashable) -> None:
        since = self._away_since.pop(kind, None)
        if since is not None:
            seconds = round(time.monotonic() - since, 3)
            self._lines.write("back", logging.INFO, f"{self._name} answers again", outage_s=seconds)

    def failed(self, kind: Hashable, error_type: str, *, seen: bool = True, cause: str | None = None) -> None:
        """Count a failure; `seen` by a client or not."""
        _DEPENDENCY_ERRORS.labels(error_type, "clients" if seen else "nobody").inc()
        if seen:
            self._away_since.setdefault(kind, time.monotonic())
        else:
            self._lines.write("unseen", logging.WARNING, f"{self._name} failed, which no client saw", cause=cause)


async def watch_event_loop() -> None:
    """Measure for ever how late timers are: whatever blocks the event loop shows here first."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_INTERVAL
        await asyncio.sleep(LAG_INTERVAL)
        _LAG.observe(max(0, loop.time() - due))


async def metrics(request: web.Request) -> web.StreamResponse:
    """`/metrics`."""
    return RepresentationResponse(request, Representation(CONTENT_TYPE_LATEST, generate_latest(REGISTRY)))
