"""A real Prometheus with docs/prometheus.yml reads the running system: alerts fire for their faults, and end with them.

Minutes of docs/alerts.yaml are half seconds here: see kit.prometheus.
"""

import asyncio
import functools
import json
import math
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MakeProxy, Start
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.cog.runtime import panelcfg_config
from grafana_foundation_sdk.models.dashboard import Dashboard
from kit import ROOT, eventually, reserve_port
from kit.application import PAIR, PAIRS, Pair
from kit.load import Clients
from kit.network import Proxy
from kit.postgres import Database
from kit.processes import Server
from kit.prometheus import Prometheus, prometheus


@dataclass
class Watched:
    """The system, what is between its parts, and a Prometheus that reads its servers."""

    gateway: Server
    service: Server
    before_service: Proxy
    before_database: Proxy
    prometheus: Prometheus


@pytest.fixture
def pair() -> Pair:
    """One is enough, except for what pages."""
    return PAIR


@pytest.fixture
async def watched(
    pair: Pair, start: Start, database: Database, make_proxy: MakeProxy, tmp_path: Path
) -> AsyncIterator[Watched]:
    """Clients ask all the time, so alerts about requests have requests."""
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    with reserve_port() as gateway_port, reserve_port() as service_port:
        before_database = await make_proxy(database.port)
        settings = database.settings(DB_PORT=before_database.port, DB_TIMEOUT=0.3)
        service = await start(pair.service, PORT=service_port.getsockname()[1], **settings)
        before_service = await make_proxy(service.port)
        number = gateway_port.getsockname()[1]
        gateway = await start(pair.gateway, PORT=number, DOWNSTREAM_URL=before_service.url, DOWNSTREAM_TIMEOUT=1)
        targets = [f"127.0.0.1:{server.port}" for server in (gateway, service)]
        async with (
            prometheus(tmp_path, *targets) as reader,
            Clients(gateway.url + pair.read_path, 4, pause=0.05),
        ):
            await eventually(lambda: reader.query("gateway:build_info"), within=10)
            yield Watched(gateway, service, before_service, before_database, reader)


@asynccontextmanager
async def again_and_again(change: Callable[[], Awaitable[None]], every: float) -> AsyncIterator[None]:
    """Inside, the change is made every so many seconds."""

    async def make() -> None:
        while True:
            await change()
            await asyncio.sleep(every)

    task = asyncio.create_task(make())
    yield
    task.cancel()


@pytest.mark.parametrize(
    "pair",
    [PAIR, *(pytest.param(other, marks=pytest.mark.matrix) for other in PAIRS[1:])],
    ids=lambda pair: pair.name,
)
async def test_what_pages(pair: Pair, watched: Watched, database: Database, start: Start) -> None:
    """No alert while all is well; then one each for a silent database, an empty table, and no gateway."""
    reader = watched.prometheus
    await reader.is_silent()

    watched.before_database.freeze()
    await reader.fires("DatabaseDown", "DatabaseUnreachable", "RequestsFail")
    watched.before_database.resume()
    await reader.is_silent()

    database.sql(f"CREATE TABLE saved AS SELECT * FROM {pair.table}")
    database.sql(f"DELETE FROM {pair.table}")
    await reader.fires("NothingFound")
    database.sql(f"INSERT INTO {pair.table} OVERRIDING SYSTEM VALUE SELECT * FROM saved")
    await reader.is_silent()

    await asyncio.to_thread(watched.gateway.kill)
    await reader.fires("GatewaysAbsent")
    await start(pair.gateway, PORT=watched.gateway.port, DOWNSTREAM_URL=watched.before_service.url)
    await reader.is_silent()


OPERATING = (ROOT / "docs/operating.md").read_text()
DASHBOARD = json.loads((ROOT / "docs/dashboard.json").read_text())


async def test_the_dashboard_has_data(watched: Watched) -> None:
    """No panel is empty once there was an outage; the queries in docs/operating.md find something, too."""
    watched.before_service.freeze()
    await watched.prometheus.fires("RequestsFail")
    watched.before_service.resume()
    queries = [(target["expr"], target["legendFormat"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
    queries += [
        (query, "") for query in re.findall(r"^(?:\|.*\| `|    )(.*\bby \(.*?)(?:` \|)?$", OPERATING, re.MULTILINE)
    ]
    assert len(queries) == 11 + 7
    for query, legend in queries:
        expression = query.replace("$job", ".*").replace("$__rate_interval", "10s").replace("[5m]", "[10s]")
        await eventually(lambda: shows(watched.prometheus, expression, legend))  # noqa: B023


async def shows(reader: Prometheus, expression: str, legend: str) -> bool:
    """Whether a query finds numbers, and each series has the labels that its legend needs."""
    found = await reader.query(expression)
    labels = set(re.findall(r"{{(\w+)}}", legend))
    assert all(labels <= series["metric"].keys() for series in found), found
    return any(math.isfinite(float(series["value"][1])) for series in found)


def test_grafana_knows_every_member_of_the_dashboard() -> None:
    """Grafana's own model keeps each of them, and knows each kind of panel."""
    register_default_plugins()
    loaded = json.loads(json.dumps(Dashboard.from_json(DASHBOARD), cls=JSONEncoder))
    assert_has(loaded, DASHBOARD)
    for panel in DASHBOARD["panels"]:
        assert panelcfg_config(panel["type"])
        assert panel["gridPos"]["y"] + panel["gridPos"]["h"] <= 20  # one screen
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


def assert_has(whole: Any, part: Any) -> None:
    """Fail unless each member of `part` is in `whole`."""
    if isinstance(part, dict):
        for name, value in part.items():
            assert name in whole, name
            assert_has(whole[name], value)
    elif isinstance(part, list):
        assert len(whole) == len(part)
        for one, other in zip(whole, part, strict=True):
            assert_has(one, other)
    else:
        assert whole == part


def test_the_operator_finds_the_pods() -> None:
    """The PodMonitor selects the pods of every Deployment, by labels and a port that they have."""
    monitor = yaml.safe_load((ROOT / "docs/podmonitor.yaml").read_text())
    objects = [item for item in yaml.safe_load_all((ROOT / "k8s.yaml").read_text()) if item]
    deployments = [item for item in objects if item["kind"] == "Deployment"]
    assert len(deployments) == 2
    for deployment in deployments:
        pod = deployment["spec"]["template"]
        assert deployment["metadata"]["namespace"] == monitor["metadata"]["namespace"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports


def test_the_operator_gets_the_rules() -> None:
    """The command in docs/operating.md makes a PrometheusRule of docs/alerts.yaml."""
    (block,) = re.findall(r"```sh\n([^`]*PrometheusRule.*?)```", OPERATING, re.DOTALL)
    script = block.replace("kubectl apply -f docs/podmonitor.yaml\n", "").replace("kubectl apply -f -", "cat")
    made = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rule = yaml.safe_load(made)
    assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((ROOT / "docs/alerts.yaml").read_text())


@pytest.mark.matrix
async def test_no_service(watched: Watched) -> None:
    """Its absence opens a ticket; what clients see pages."""
    watched.service.freeze()
    await watched.prometheus.fires("ServicesAbsent", "RequestsFail")
    watched.service.resume()
    await watched.prometheus.is_silent()


@pytest.mark.matrix
async def test_the_database_refuses(watched: Watched) -> None:
    """As when it is stopped."""
    watched.before_database.refuse()
    watched.before_database.cut()
    await watched.prometheus.fires("DatabaseDown", "DatabaseUnreachable", "RequestsFail")
    await watched.before_database.accept()
    await watched.prometheus.is_silent()


@pytest.mark.matrix
async def test_calls_are_repeated(watched: Watched) -> None:
    """Connections to the service break now and then, which clients do not notice: a ticket, no page."""

    watched.before_service.delay = 0.03  # so that calls are under way when their connection breaks

    async def cut() -> None:
        watched.before_service.cut()

    async with again_and_again(cut, 0.3):
        await watched.prometheus.fires("SecondTries")
        assert await watched.prometheus.firing() == {"SecondTries"}
    await watched.prometheus.is_silent()


@pytest.mark.matrix
async def test_a_slow_path(watched: Watched) -> None:
    """Answers that take more than half a second, without a failure."""
    watched.before_service.delay = 0.35  # each way
    await watched.prometheus.fires("RequestsSlow")
    assert "RequestsFail" not in await watched.prometheus.firing()
    watched.before_service.delay = 0
    await watched.prometheus.is_silent()


@pytest.mark.matrix
async def test_a_locked_table(pair: Pair, watched: Watched, database: Database, start: Start) -> None:
    """All the connections that one kind of query may have wait for the lock."""
    await asyncio.to_thread(watched.service.kill)
    await start(pair.service, PORT=watched.service.port, **database.settings(DB_POOL_SIZE=1))
    with database.locked():
        await watched.prometheus.fires("ConnectionsExhausted")
    await watched.prometheus.is_silent()


@pytest.mark.matrix
async def test_an_event_loop_that_stands_still(watched: Watched) -> None:
    """As with too little CPU."""

    async def stall() -> None:
        watched.gateway.freeze()
        await asyncio.sleep(0.7)
        watched.gateway.resume()

    async with again_and_again(stall, 0.2):
        await watched.prometheus.fires("EventLoopBlocked")
    watched.gateway.resume()
    await watched.prometheus.is_silent()


@pytest.mark.matrix
async def test_a_server_that_restarts(pair: Pair, watched: Watched, start: Start) -> None:
    """As one does that is killed for its memory."""
    server = watched.gateway
    for started in range(1, 4):
        await asyncio.to_thread(server.kill)
        server = await start(pair.gateway, PORT=server.port, DOWNSTREAM_URL=watched.before_service.url)
        await eventually(functools.partial(seen, watched.prometheus, started), within=10)
    await watched.prometheus.fires("ServerRestarts")
    await watched.prometheus.is_silent()


async def seen(reader: Prometheus, starts: int) -> bool:
    """Whether Prometheus has noticed so many starts."""
    found = await reader.query("changes(process_start_time_seconds[1h])")
    return any(float(series["value"][1]) >= starts for series in found)
