"""What Prometheus reads at /metrics of both servers."""

import asyncio
import platform
import re
import shutil
import subprocess

import pytest
from conftest import Start, System
from kit import eventually
from kit.application import PAIR
from kit.client import exchange, get
from kit.faults import StartObserved
from kit.metrics import scrape
from kit.postgres import Database
from kit.processes import Server
from prometheus_client import REGISTRY

from chassis.metrics import Histogram
from chassis.server import VERSION


@pytest.fixture
async def gateway(start: Start, system: System) -> Server:
    """A gateway whose counts are the test's own, in front of the shared service."""
    return await start(PAIR.gateway, DOWNSTREAM_URL=system.service.url)


@pytest.fixture
async def service(start: Start, system: System) -> Server:
    """A service whose counts are the test's own."""
    return await start(PAIR.service, **system.database.settings())


REQUESTS = (
    "http_server_request_duration_seconds_count http_request_method={} http_response_status_code={} http_route={}"
)


async def test_requests_are_counted_by_method_route_and_status(gateway: Server) -> None:
    """Each kind of request has its own count; nothing that a client makes up becomes a label."""
    url = gateway.url
    etag = (await get(url + PAIR.read_path)).headers["ETag"]
    await get(url + PAIR.read_path, "HEAD")
    await get(url + PAIR.read_path, headers={"If-None-Match": etag})
    await get(url + PAIR.read_path, "POST")
    await get(url + "/made-up")
    await get(url + PAIR.read_path, "PROPFIND")
    await exchange(url, b"made-up\r\n\r\n")
    samples = await scrape(url)
    assert samples[REQUESTS.format("GET", 200, PAIR.read_path)] == 1
    assert samples[REQUESTS.format("HEAD", 200, PAIR.read_path)] == 1
    assert samples[REQUESTS.format("GET", 304, PAIR.read_path)] == 1
    assert samples[REQUESTS.format("POST", 405, "unmatched")] == 1
    assert samples[REQUESTS.format("_OTHER", 405, "unmatched")] == 1
    assert samples[REQUESTS.format("GET", 404, "unmatched")] == 1
    assert samples[REQUESTS.format("_OTHER", 400, "unmatched")] == 1
    assert not [name for name in samples if "made-up" in name]
    assert samples[REQUESTS.replace("_count", "_sum").format("GET", 200, PAIR.read_path)] > 0
    assert samples["http_server_active_requests"] == 1  # the one that asks


async def test_coalescing_and_connections_are_counted(start: Start, database: Database) -> None:
    """Runs by outcome, callers that shared them, and the connections that PostgreSQL sees, too."""
    service = await start(PAIR.service, **database.settings())
    gateway = await start(PAIR.gateway, DOWNSTREAM_URL=service.url)
    for _ in range(3):
        await get(gateway.url + PAIR.read_path)
    samples = await scrape(gateway.url)
    assert total(samples, "coalescing_run_callers_sum outcome=answered") == 3
    assert total(samples, "coalescing_run_callers_bucket le=1.0 outcome=answered") == 3
    runs = total(samples, "coalescing_run_callers_count")  # more than three if the machine is busy and one was late
    samples = await scrape(service.url)
    assert 3 <= total(samples, "coalescing_run_callers_sum outcome=answered") <= runs
    assert samples["db_client_connection_max"] == 4

    async def idle_ones_are_counted() -> bool:
        samples = await scrape(service.url)
        assert samples["db_client_connection_count db_client_connection_state=used"] == 0
        backends = len(await asyncio.to_thread(database.backends))
        return samples["db_client_connection_count db_client_connection_state=idle"] == backends > 0

    await eventually(idle_ones_are_counted)


async def test_callers_that_share_a_run_are_counted(gateway: Server, system: System) -> None:
    """Twenty at once are twenty callers in fewer runs; late runs and their second tries are counted separately."""
    with system.database.locked():
        asked = [asyncio.create_task(get(gateway.url + PAIR.read_path)) for _ in range(20)]
        await eventually(lambda: active(gateway.url, 20))
        await eventually(lambda: has(gateway.url, "coalescing_run_callers_count outcome=cancelled reason=late"))
    assert {(await each).status for each in asked} == {200}
    samples = await scrape(gateway.url)
    answered = {name: value for name, value in samples.items() if "outcome=answered" in name}
    assert sum(value for name, value in answered.items() if "_sum" in name) == 20
    assert 0 < sum(value for name, value in answered.items() if "_count" in name) < 20


def total(samples: dict[str, float], name: str) -> float:
    return sum(value for sample, value in samples.items() if sample.startswith(name))


async def has(url: str, sample: str) -> bool:
    return sample in await scrape(url)


async def active(url: str, count: int) -> bool:
    return (await scrape(url))["http_server_active_requests"] == count + 1  # the one that asks


async def test_what_holds_up_the_event_loop_shows(gateway: Server) -> None:
    """The lag of a server that stood still; also the versions of the server and of Python."""
    gateway.freeze()
    await asyncio.sleep(1)
    gateway.resume()

    async def lags() -> bool:
        return (await scrape(gateway.url))["event_loop_lag_seconds_sum"] > 0.4

    await eventually(lags)
    samples = await scrape(gateway.url)
    (build,) = [name for name in samples if name.startswith("build_info ")]
    assert {f"python={platform.python_version()}", f"version={VERSION}"} <= set(build.split())


async def test_a_connection_is_idle_or_used(service: Server, system: System) -> None:
    """One that waits for a locked table is used; once its query has ended, it is idle again."""
    url = service.url

    async def shows(*, used: bool) -> bool:
        samples = await scrape(url)
        counts = [
            samples[f"db_client_connection_count db_client_connection_state={state}"] for state in ("used", "idle")
        ]
        return [count > 0 for count in counts] == [used, not used]  # several, if a late query got company

    await get(url + PAIR.service_path)
    with system.database.locked():
        waiting = asyncio.create_task(get(url + PAIR.service_path))
        await eventually(lambda: shows(used=True))
    assert (await waiting).status == 200
    await eventually(lambda: shows(used=False))


async def test_failures_behind_a_server_are_counted_by_kind(observed: StartObserved) -> None:
    """A database that refuses connections shows at the service, and the service's answer at the gateway."""
    # However busy the machine is, nothing is asked once more because it is late.
    service = await observed(
        PAIR.service, "from chassis import database; database.PATIENCE = 60", DB_HOST="127.0.0.1", DB_PORT=1
    )
    gateway = await observed(
        PAIR.gateway, "from chassis import client; client.PATIENCE = 60", DOWNSTREAM_URL=service.url
    )
    assert (await get(gateway.url + PAIR.read_path)).status == 503
    samples = await scrape(gateway.url)
    calls = 1 + samples["coalescing_run_callers_count outcome=failed reason=failed"]
    assert 4 <= calls <= 9  # fewer if the machine is busy
    assert total(samples, "dependency_errors_total error_type=unavailable") == calls
    samples = await scrape(service.url)
    assert samples["db_client_connect_failures_total"] == calls
    assert total(samples, "dependency_errors_total error_type=unavailable") == calls
    assert samples["coalescing_run_callers_count outcome=failed reason=asked"] == calls


def test_a_histogram_without_labels_is_there_from_the_start() -> None:
    """With zeros, so that a query or an alert that asks for it finds it."""
    histogram = Histogram("early_seconds", "For this test", bounds=(1.0,))
    REGISTRY.unregister(histogram)
    ((family),) = histogram.collect()
    assert [sample.value for sample in family.samples] == [0, 0, 0, 0]


async def test_each_metric_has_help_and_a_unit(system: System) -> None:
    """Names end in their unit, as Prometheus and OpenTelemetry require, and each metric has a description."""
    for server in (system.gateway, system.service):
        text = (await get(server.url + "/metrics")).body.decode()
        names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
        assert {"process_cpu_seconds_total", "event_loop_lag_seconds", "build_info"} < set(names)
        own = [name for name in names if not name.startswith(("process_", "python_"))]
        units = ("_seconds", "_total", "_callers", "_info", "_requests", "_count", "_max")
        assert [name for name in own if not name.endswith(units)] == []
        assert re.findall(r"^# HELP (\S+) *$", text, re.MULTILINE) == []


PROMTOOL = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian: prometheus)")


@PROMTOOL
async def test_promtool_finds_no_fault_but_one_name(system: System) -> None:
    """Prometheus' linter objects only to the name that OpenTelemetry prescribes."""
    await get(system.gateway.url + PAIR.read_path)
    found = []
    for server in (system.gateway, system.service):
        text = (await get(server.url + "/metrics")).body
        linted = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)  # noqa: ASYNC221
        found += [line.split()[0] for line in linted.stderr.decode().splitlines()]
    assert found == ["db_client_connection_count"]
