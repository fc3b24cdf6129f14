"""What Prometheus reads at /metrics of both servers, and the alerts based on it."""

import asyncio
import platform
import re
import shutil
import subprocess
from typing import Any

import pytest
from conftest import Start, System
from kit import ROOT, eventually
from kit.client import exchange, get
from kit.postgres import Database
from kit.processes import Server
from prometheus_client.parser import text_string_to_metric_families

from server import VERSION


async def scrape(url: str) -> dict[str, float]:
    """A server's samples, by name and labels as they appear in the text."""
    answer = await get(url + "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


@pytest.fixture
async def gateway(start: Start, system: System) -> Server:
    """A gateway whose counts are the test's own, in front of the shared message service."""
    return await start("gateway", DOWNSTREAM_URL=system.service.url)


@pytest.fixture
async def service(start: Start, system: System) -> Server:
    """A message service whose counts are the test's own."""
    return await start("message_service", **system.database.settings())


REQUESTS = (
    "http_server_request_duration_seconds_count http_request_method={} http_response_status_code={} http_route={}"
)


async def test_requests_are_counted_by_method_route_and_status(gateway: Server) -> None:
    """Each kind of request has its own count; nothing that a client makes up becomes a label."""
    url = gateway.url
    etag = (await get(url + "/api/string")).headers["ETag"]
    await get(url + "/api/string", "HEAD")
    await get(url + "/api/string", headers={"If-None-Match": etag})
    await get(url + "/api/string", "POST")
    await get(url + "/made-up")
    await get(url + "/api/string", "PROPFIND")
    await exchange(url, b"made-up\r\n\r\n")
    samples = await scrape(url)
    assert samples[REQUESTS.format("GET", 200, "/api/string")] == 1
    assert samples[REQUESTS.format("HEAD", 200, "/api/string")] == 1
    assert samples[REQUESTS.format("GET", 304, "/api/string")] == 1
    assert samples[REQUESTS.format("POST", 405, "/api/string")] == 1
    assert samples[REQUESTS.format("_OTHER", 405, "/api/string")] == 1
    assert samples[REQUESTS.format("GET", 404, "unmatched")] == 1
    assert samples[REQUESTS.format("_OTHER", 400, "unmatched")] == 1
    assert not [name for name in samples if "made-up" in name]
    assert samples[REQUESTS.replace("_count", "_sum").format("GET", 200, "/api/string")] > 0
    assert samples["http_server_active_requests"] == 1  # the one that asks


async def test_coalescing_and_connections_are_counted(start: Start, database: Database) -> None:
    """Runs by outcome, callers that shared them, and the connections that PostgreSQL sees, too."""
    service = await start("message_service", **database.settings())
    gateway = await start("gateway", DOWNSTREAM_URL=service.url)
    for _ in range(3):
        await get(gateway.url + "/api/string")
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
        asked = [asyncio.create_task(get(gateway.url + "/api/string")) for _ in range(20)]
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
    assert samples[f"messages_build_info python={platform.python_version()} version={VERSION}"] == 1


async def test_a_connection_is_idle_or_used(service: Server, system: System) -> None:
    """One that waits for a locked table is used; once its query has ended, it is idle again."""
    url = service.url

    async def shows(*, used: bool) -> bool:
        samples = await scrape(url)
        counts = [
            samples[f"db_client_connection_count db_client_connection_state={state}"] for state in ("used", "idle")
        ]
        return [count > 0 for count in counts] == [used, not used]  # several, if a late query got company

    await get(url + "/api/message")
    with system.database.locked():
        waiting = asyncio.create_task(get(url + "/api/message"))
        await eventually(lambda: shows(used=True))
    assert (await waiting).status == 200
    await eventually(lambda: shows(used=False))


async def test_failures_behind_a_server_are_counted_by_kind(start: Start) -> None:
    """A database that refuses connections shows at the message service, whose answer shows at the gateway."""

    def patient(name: str) -> dict[str, Any]:
        """However busy the machine is, nothing is asked once more because it is late."""
        main = f"lifecycle.main('{name}', '', {name}.Settings, {name}.application)"
        return {"name": name, "program": ("-c", f"import lifecycle, {name}; {name}.PATIENCE = 60; {main}")}

    service = await start(**patient("message_service"), DB_HOST="127.0.0.1", DB_PORT=1)
    gateway = await start(**patient("gateway"), DOWNSTREAM_URL=service.url)
    assert (await get(gateway.url + "/api/string")).status == 503
    samples = await scrape(gateway.url)
    repeats = samples["coalescing_run_callers_count outcome=failed reason=failed"]
    assert 3 <= repeats <= 7  # fewer if the machine is busy
    assert samples["dependency_errors_total error_type=unavailable seen_by=nobody"] == repeats
    assert samples["dependency_errors_total error_type=unavailable seen_by=clients"] == 1
    assert [line["level"] for line in gateway.log if "no client saw" in line["message"]] == ["warning"] * 2
    samples = await scrape(service.url)
    assert samples["db_client_connect_failures_total"] == repeats + 1
    assert samples["dependency_errors_total error_type=unavailable seen_by=clients"] == repeats + 1
    assert samples["coalescing_run_callers_count outcome=failed reason=asked"] == repeats + 1


async def test_a_failure_that_a_client_gets_when_its_time_is_up_is_counted(start: Start) -> None:
    """The call was about to be repeated: the log has the failure, and the metric says that a client saw it."""
    gateway = await start("gateway", DOWNSTREAM_URL="http://127.0.0.1:1", DOWNSTREAM_TIMEOUT=0.5)
    assert (await get(gateway.url + "/api/string")).status == 503
    samples = await scrape(gateway.url)
    assert samples["dependency_errors_total error_type=unavailable seen_by=clients"] == 1


async def test_each_metric_has_help_and_a_unit(system: System) -> None:
    """Names end in their unit, as Prometheus and OpenTelemetry require, and each metric has a description."""
    for server in (system.gateway, system.service):
        text = (await get(server.url + "/metrics")).body.decode()
        names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
        assert {"process_cpu_seconds_total", "event_loop_lag_seconds", "messages_build_info"} < set(names)
        own = [name for name in names if not name.startswith(("process_", "python_"))]
        units = ("_seconds", "_total", "_callers", "_info", "_requests", "_count", "_max")
        assert [name for name in own if not name.endswith(units)] == []
        assert re.findall(r"^# HELP (\S+) *$", text, re.MULTILINE) == []


PROMTOOL = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian: prometheus)")


@PROMTOOL
async def test_promtool_finds_no_fault_but_one_name(system: System) -> None:
    """Prometheus' linter objects only to the name that OpenTelemetry prescribes."""
    await get(system.gateway.url + "/api/string")
    found = []
    for server in (system.gateway, system.service):
        text = (await get(server.url + "/metrics")).body
        linted = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)  # noqa: ASYNC221
        found += [line.split()[0] for line in linted.stderr.decode().splitlines()]
    assert found == ["db_client_connection_count"]


@PROMTOOL
def test_alerts() -> None:
    """Each alert fires for its fault, and none when all is well."""
    command = ["promtool", "test", "rules", "alerts_test.yaml"]
    tried = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=False)
    assert tried.returncode == 0, tried.stdout + tried.stderr


async def test_alerts_and_docs_use_metrics_that_are_there(system: System) -> None:
    """Every metric in docs/alerts.yaml and docs/operating.md is one that a server has."""
    await get(system.gateway.url + "/api/string")
    there = set(await scrape(system.gateway.url)) | set(await scrape(system.service.url))
    names = {name.split()[0] for name in there}
    pattern = r"\b(?:http_server|coalescing|dependency|db_client|event_loop|process|messages_build)_[a-z_]+[a-z]"
    for file in ("docs/alerts.yaml", "docs/operating.md"):
        used = set(re.findall(pattern, (ROOT / file).read_text()))
        labels = {label for name in there for label in re.findall(r" ([a-z_]+)=", name)}
        assert used - names - labels - {"dependency_errors_total"} == set()
