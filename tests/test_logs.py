"""The operator's view: one JSON object per line, each failure once with its cause, and no flood."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from unittest.mock import ANY

from conftest import MakePeer, Start
from kit import eventually, reserve_port
from kit.client import exchange, get
from kit.network import response
from kit.postgres import Cluster, Database


async def test_a_request_is_one_line_in_both_services(start: Start, database: Database) -> None:
    """With ACCESS_LOG=all: the request, its outcome, and the same request id."""
    service = await start("message_service", **database.settings(), ACCESS_LOG="all")
    gateway = await start("gateway", DOWNSTREAM_URL=service.url, ACCESS_LOG="all")
    await get(gateway.url + "/api/string", headers={"X-Request-ID": "mine"})
    for server, path in ((gateway, "/api/string"), (service, "/api/message")):
        line = await server.wait_for_log(request_id="mine")
        assert line.keys() == {
            *("time", "level", "service", "message", "request_id", "method", "path", "status", "duration_ms")
        }
        assert (line["level"], line["service"]) == ("info", server.name)
        assert (line["method"], line["path"], line["status"]) == ("GET", path, 200)
        assert 0 < line["duration_ms"] < 20_000
        age = datetime.now(UTC) - datetime.fromisoformat(line["time"])
        assert timedelta(0) <= age < timedelta(seconds=20)


async def test_access_log(start: Start, make_peer: MakePeer) -> None:
    """`all` logs every request, `errors` (the default) the failed ones, `off` only the server's own failures."""
    peer = await make_peer(b"nonsense\r\n\r\n")
    told = {}
    for setting in ("all", "errors", "off"):
        gateway = await start("gateway", DOWNSTREAM_URL=peer.url, ACCESS_LOG=setting)
        for path in ("/healthz", "/nowhere", "/api/string"):
            await get(gateway.url + path)
        await gateway.wait_for_log(status=502)
        told[setting] = [line["status"] for line in gateway.log if "status" in line]
    assert told == {"all": [200, 404, 502], "errors": [404, 502], "off": [502]}


async def test_a_failure_is_told_once_with_its_cause(start: Start, cluster: Cluster) -> None:
    """One line per service, with the cause; one more when it is over; a failure that no client saw is a warning."""
    service = await start("message_service", **cluster.database().settings())
    gateway = await start("gateway", DOWNSTREAM_URL=service.url)
    cluster.stop()
    answer = await get(gateway.url + "/api/string", headers={"X-Request-ID": "mine"})
    assert answer.status == 503
    for server, cause in ((service, "refused"), (gateway, "it said")):
        line = await server.wait_for_log(request_id="mine")
        assert (line["level"], line["status"], cause in line["cause"]) == ("error", 503, True)
    cluster.start()
    assert (await get(gateway.url + "/api/string")).status == 200
    for server in (service, gateway):
        await server.wait_for_log(level="info", outage_s=ANY)
        errors = [line for line in server.logged(level="error") if "repeats" not in line]
        assert len(errors) == 1
    (warning, *_) = gateway.logged(level="warning")
    assert "no client saw" in warning["message"]
    assert "it said" in warning["cause"]


async def test_a_broken_database_does_not_flood_the_log(start: Start, cluster: Cluster) -> None:
    """Many failed requests a second are one line at once, then one a second that counts the others."""
    service = await start("message_service", **cluster.database().settings())
    gateway = await start("gateway", DOWNSTREAM_URL=service.url)
    cluster.stop()
    begin, asked = time.monotonic(), 0
    while time.monotonic() < begin + 2.5:
        urls = [gateway.url + "/api/string", service.url + "/readyz"] * 5
        answers = await asyncio.gather(*(get(url) for url in urls))
        assert {answer.status for answer in answers} == {503}
        asked += len(answers) // 2
    await asyncio.sleep(1.1)
    seconds = time.monotonic() - begin
    for server, kinds in ((gateway, ["/api/string"]), (service, ["/api/message", "/readyz"])):
        for path in kinds:
            lines = server.logged(path=path)
            assert 2 <= len(lines) <= 1 + seconds
            assert "repeats" not in lines[0]
            if path != "/api/message":  # the gateway decides how many of those there are
                assert sum(line.get("repeats", 1) for line in lines) == asked
        assert len(server.log) <= 1 + (len(kinds) + 1) * (1 + seconds)  # and the warnings


async def test_a_client_can_not_forge_a_line(start: Start) -> None:
    """Neither as JSON nor as text, whatever the path or the request id contains."""
    paths = ["/%0a%7B%22level%22:%22forged%22%7D", "/%1b%5b31mred", "/%0d%0aforged", "/caf%C3%A9%E2%80%AE", "/%ff"]
    gateway = await start("gateway", ACCESS_LOG="all")
    for path in paths:
        await get(gateway.url + path)
    await exchange(gateway.url, b"GET / HTTP/1.1\r\nX-Request-ID: a\nforged\r\n\r\n")
    await eventually(lambda: len(gateway.log) == 1 + len(paths) + 1)

    with reserve_port() as port:
        number = port.getsockname()[1]
        gateway = await start("gateway", PORT=number, LOG_FORMAT="text", ACCESS_LOG="all")
        for path in paths:
            await get(gateway.url + path)
        gateway.terminate()
        assert await gateway.exit_status() == 0
    assert len(gateway.noise) == 1 + len(paths) + 2  # the first and the last two are about the server's life
    for line in gateway.noise:
        assert line.rstrip("\n").isprintable()
        assert " INFO " in line
    gateway.noise.clear()


async def test_the_level_is_the_least_that_is_told(start: Start, make_peer: MakePeer) -> None:
    """LOG_LEVEL=error logs only errors."""
    with reserve_port() as port:
        peer = await make_peer(response("", "500 Internal Server Error"))
        number = port.getsockname()[1]
        gateway = await start("gateway", PORT=number, DOWNSTREAM_URL=peer.url, LOG_LEVEL="error", ACCESS_LOG="all")
        assert (await get(f"http://127.0.0.1:{number}/healthz")).status == 200
        assert (await get(f"http://127.0.0.1:{number}/api/string")).status == 502
        await gateway.wait_for_log(status=502)
    assert {line["level"] for line in gateway.log} == {"error"}
