"""What Prometheus reads at `/metrics`.

Rules kept here: names follow Prometheus and OpenTelemetry's HTTP conventions, with their unit; no label comes from
what a client sends; what can be read when Prometheus asks is not counted at each request.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus

import prometheus_client
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, Histogram, Info, generate_latest

from answers import Answer

LAG_INTERVAL = 0.5  # seconds between two looks at the event loop

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the lines, and Prometheus does not need them

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

_REQUESTS = Histogram(
    "http_server_request_duration_seconds",
    "Time from a request's arrival to its answer",
    ("http_request_method", "http_route", "http_response_status_code"),
    buckets=_SECONDS,
)
_RUNS = Counter("coalescing_runs", "Runs that served the callers of a batch, by outcome", ("outcome",))
_BATCHES = Histogram(
    "coalescing_batch_size_callers", "Callers that shared a run", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
)
_LAG = Histogram("event_loop_lag_seconds", "How much later than due the event loop runs a timer", buckets=_SECONDS)
ACTIVE_REQUESTS = Gauge("http_server_active_requests", "Requests in flight")
DEPENDENCY_ERRORS = Counter("dependency_errors", "Calls of what is behind this server that failed", ("error_type",))
CONNECTIONS = Gauge("db_client_connection_count", "Connections to the database", ("db_client_connection_state",))
MAX_CONNECTIONS = Gauge("db_client_connection_max", "Connections to the database that there can be")
CONNECT_FAILURES = Counter("db_client_connect_failures", "Connections to the database that could not be made")
BUILD = Info("messages_build", "Version of this server, and of Python")

# Looked up by their labels once, which takes longer than counting.
_observers: dict[tuple[str, str, int], Callable[[float], None]] = {}
_count_run = {outcome: _RUNS.labels(outcome).inc for outcome in ("answered", "failed", "abandoned")}


def observe_request(method: str, route: str | None, status: int, seconds: float) -> None:
    """Count a request; `route` is None for a path that no route has."""
    observe = _observers.get((method, route or "", status))
    if observe is None:
        known_method = method if method in ("GET", "HEAD") else "_OTHER"
        observe = _REQUESTS.labels(known_method, route or "unmatched", status).observe
        if known_method == method:  # else every word that a client makes up would be kept
            _observers[method, route or "", status] = observe
    observe(seconds)


def observe_run(callers: int, outcome: str) -> None:
    _count_run[outcome]()
    _BATCHES.observe(callers)


async def watch_event_loop() -> None:
    """Measure for ever how late timers are: what blocks the event loop shows here first."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_INTERVAL
        await asyncio.sleep(LAG_INTERVAL)
        _LAG.observe(max(0, loop.time() - due))


async def answer() -> Answer:
    return Answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(REGISTRY))
