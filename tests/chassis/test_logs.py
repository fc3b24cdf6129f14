"""The operator's view: one JSON object per line, each failure once with its cause, and no flood."""

import asyncio
import contextlib
import json
import os
import re
import resource
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import ANY

from conftest import MakePeer, Start
from kit import eventually, reserve_port
from kit.application import PAIR
from kit.client import exchange, get
from kit.network import response
from kit.postgres import Cluster, Database
from kit.processes import run


async def test_a_request_is_one_line_in_both_servers(start: Start, database: Database) -> None:
    """With ACCESS_LOG=all: the request, its outcome, and the same request id."""
    service = await start(PAIR.service, **database.settings(), ACCESS_LOG="all")
    gateway = await start(PAIR.gateway, DOWNSTREAM_URL=service.url, ACCESS_LOG="all")
    await get(gateway.url + PAIR.read_path, headers={"X-Request-ID": "mine"})
    for server, path in ((gateway, PAIR.read_path), (service, PAIR.service_path)):
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

    async def logged(setting: str) -> list[int]:
        gateway = await start(PAIR.gateway, DOWNSTREAM_URL=peer.url, ACCESS_LOG=setting)
        for path in ("/healthz", "/nowhere", PAIR.read_path):
            await get(gateway.url + path)
        await gateway.wait_for_log(status=502)
        return [line["status"] for line in gateway.log if "status" in line]

    expected = {"all": [200, 404, 502], "errors": [404, 502], "off": [502]}
    assert await asyncio.gather(*map(logged, expected)) == list(expected.values())


async def test_a_failure_is_told_once_with_its_cause(start: Start, cluster: Cluster) -> None:
    """One line per server, with the cause, and one more when it is over."""
    service = await start(PAIR.service, **cluster.database().settings())
    gateway = await start(PAIR.gateway, DOWNSTREAM_URL=service.url)
    cluster.stop()
    began = time.monotonic()
    answer = await get(gateway.url + PAIR.read_path, headers={"X-Request-ID": "mine"})
    assert answer.status == 503
    for server, cause in ((service, "refused"), (gateway, "it said")):
        line = await server.wait_for_log(request_id="mine")
        assert (line["level"], line["status"], cause in line["cause"]) == ("error", 503, True)
    cluster.start()
    assert (await get(gateway.url + PAIR.read_path)).status == 200
    for server in (service, gateway):
        await server.wait_for_log(level="info", outage_s=ANY)
        errors = [line for line in server.logged(level="error") if "repeats" not in line]
        # The gateway asks again and again. On a busy machine, more than a second can lie between two of its calls.
        assert 1 <= len(errors) <= (1 if server is gateway else 1 + time.monotonic() - began)


async def test_a_broken_database_does_not_flood_the_log(start: Start, cluster: Cluster) -> None:
    """Many failed requests a second are one line at once, then one a second that counts the others."""
    service = await start(PAIR.service, **cluster.database().settings())
    gateway = await start(PAIR.gateway, DOWNSTREAM_URL=service.url)
    cluster.stop()
    begin, asked = time.monotonic(), 0
    while time.monotonic() < begin + 2:
        urls = [gateway.url + PAIR.read_path, service.url + "/readyz"] * 5
        answers = await asyncio.gather(*(get(url) for url in urls))
        assert {answer.status for answer in answers} == {503}
        asked += len(answers) // 2
    told = [(gateway, PAIR.read_path), (service, "/readyz")]
    for server, path in told:
        await eventually(lambda: sum(line.get("repeats", 1) for line in server.logged(path=path)) == asked)  # noqa: B023
    seconds = time.monotonic() - begin
    for server, path in [*told, (service, PAIR.service_path)]:
        lines = server.logged(path=path)
        assert 2 <= len(lines) <= 1 + seconds
        assert "repeats" not in lines[0]
    for server in (gateway, service):
        assert len(server.log) <= 1 + 3 * (1 + seconds)


async def test_a_client_can_not_forge_a_line(start: Start) -> None:
    """Neither as JSON nor as text, whatever the path or the request id contains."""
    paths = ["/%0a%7B%22level%22:%22forged%22%7D", "/%1b%5b31mred", "/%0d%0aforged", "/caf%C3%A9%E2%80%AE", "/%ff"]
    gateway = await start(PAIR.gateway, ACCESS_LOG="all")
    for path in paths:
        await get(gateway.url + path)
    await exchange(gateway.url, b"GET / HTTP/1.1\r\nX-Request-ID: a\nforged\r\n\r\n")
    await eventually(lambda: len(gateway.log) == 1 + len(paths) + 1)

    with reserve_port() as port:
        number = port.getsockname()[1]
        gateway = await start(PAIR.gateway, PORT=number, LOG_FORMAT="text", ACCESS_LOG="all")
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
        gateway = await start(PAIR.gateway, PORT=number, DOWNSTREAM_URL=peer.url, LOG_LEVEL="error", ACCESS_LOG="all")
        assert (await get(f"http://127.0.0.1:{number}/healthz")).status == 200
        assert (await get(f"http://127.0.0.1:{number}{PAIR.read_path}")).status == 502
        await gateway.wait_for_log(status=502)
    assert {line["level"] for line in gateway.log} == {"error"}


async def test_a_shared_error_is_logged_with_a_request_that_was_sent(start: Start, make_peer: MakePeer) -> None:
    """Each caller's log line leads to the service's: by its own id, or by shared_with."""
    peer = await make_peer(response("nonsense"))
    gateway = await start(PAIR.gateway, DOWNSTREAM_URL=peer.url, ACCESS_LOG="all")
    url = gateway.url + PAIR.read_path
    answers = await asyncio.gather(*(get(url, headers={"X-Request-ID": f"number-{each}"}) for each in range(20)))
    sent = re.findall(r"(?i)^x-request-id: (\S+)\r", "".join(peer.requests), re.MULTILINE)
    assert len(set(sent)) < 10
    for answer in answers:
        assert answer.status == 502
        line = await gateway.wait_for_log(request_id=answer.request_id)
        assert line.get("shared_with", answer.request_id) in sent


async def test_repeats_are_logged_with_the_ids_of_ten_requests(start: Start, make_peer: MakePeer) -> None:
    """An operator finds a customer's failed request by its id, although equal failures share a line."""
    peer = await make_peer(response("nonsense"))
    gateway = await start(PAIR.gateway, DOWNSTREAM_URL=peer.url)
    for number in range(25):
        await get(gateway.url + PAIR.read_path, headers={"X-Request-ID": f"number-{number}"})
    await eventually(lambda: sum(line.get("repeats", 1) for line in gateway.logged(status=502)) == 25)
    ids = []
    lines = gateway.logged(status=502)
    for line in lines:
        assert line["request_id"].startswith("number-")
        if "repeats" in line:
            assert len(line["request_ids"]) == min(line["repeats"], 10)
            ids += line["request_ids"]
    assert lines[0]["request_id"] == "number-0"
    assert len(set(ids)) == len(ids) >= 10
    assert ids[0] == "number-1"


async def test_a_line_is_bounded(start: Start, make_peer: MakePeer) -> None:
    """Whatever a client or a service sends, a log line has some thousand characters."""
    peer = await make_peer(response(json.dumps({"type": "about:blank", "detail": "y" * 10**5}), "500 Failed"))
    gateway = await start(PAIR.gateway, DOWNSTREAM_URL=peer.url, ACCESS_LOG="all")
    await get(gateway.url + "/" + "x" * 15_000)
    await get(gateway.url + PAIR.read_path)
    for status in (404, 502):
        line = await gateway.wait_for_log(status=status)
        assert len(json.dumps(line)) < 2500
    assert (await gateway.wait_for_log(status=404))["path"].startswith("/xxx")

    script = """
from chassis import logs
logs.configure("any", "info", "json")
try:
    raise ValueError("z" * 10**6)
except ValueError as error:
    logs.log(40, "m" * 10**6, cause=logs.describe(error), other=["id"], exception=error)
"""
    written = run("-c", script).stderr
    assert len(written) < 15_000
    assert json.loads(written)["other"] == ["id"]


FORGERIES = [
    "x status=200 request_id=forged",
    'x" status=200 request_id=forged y="',
    "x\n12:00:00.000 INFO    any: request status=200 request_id=forged",
    "x\u2028request_id=forged\x1b[31m",
    "x\u00a0request_id=forged",
    " request_id=forged",
]


def test_no_text_can_pass_for_a_field() -> None:
    """With LOG_FORMAT=text, message, fields and traceback are quoted where they could be mistaken for other fields."""
    script = f"""
from chassis import logs
logs.configure("any", "info", "text")
for forgery in {FORGERIES!r}:
    try:
        raise ValueError(forgery)
    except ValueError as error:
        logs.log(40, forgery, path=forgery, cause=logs.describe(error), exception=error)
"""
    lines = run("-c", script).stderr.splitlines()
    events = [line for line in lines if not line.startswith("    ")]
    assert len(events) == len(FORGERIES)
    quoted = re.compile(r'"(?:[^"\\]|\\.)*"')
    for line in lines:
        assert line.isprintable()
    for line in events:
        assert " ERROR " in line
        assert "request_id=" not in quoted.sub("", line)
        assert "status=" not in quoted.sub("", line)


NON_BLOCKING = (
    "import fcntl, os, sys; fcntl.fcntl(2, fcntl.F_SETFL, os.O_NONBLOCK); os.execvp(sys.argv[1], sys.argv[1:])"
)


async def test_a_pipe_that_does_not_block(start: Start, tmp_path: Path) -> None:
    """As Node hands stderr on: each line arrives whole, although lines are longer than the pipe takes at once."""
    fifo = tmp_path / "stderr"
    os.mkfifo(fifo)
    pipe = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with reserve_port() as port:
        number = port.getsockname()[1]
        wrapper = ["sh", "-c", 'exec "$@" 2>"$0"', str(fifo), sys.executable, "-c", NON_BLOCKING]
        gateway = await start(PAIR.gateway, wrapper=wrapper, PORT=number, ACCESS_LOG="all")
        for _ in range(100):  # each line has 6 kB, the pipe holds 64
            await get(gateway.url + "/" + "%C3%A9" * 900)
        received = bytearray()

        def read() -> bool:
            with contextlib.suppress(BlockingIOError):
                received.extend(os.read(pipe, 2**20))
            return received.count(b"\n") > 100

        await eventually(read)
    os.close(pipe)
    lines = [json.loads(line) for line in received.splitlines()]
    assert len([line for line in lines if line.get("status") == 404]) == 100


async def test_lines_that_cannot_be_written_are_counted(start: Start, tmp_path: Path) -> None:
    """After a full disk has room again, the log says how many lines are missing."""
    file = tmp_path / "log"
    with reserve_port() as port:
        number = port.getsockname()[1]
        wrapper = ["sh", "-c", 'exec "$@" 2>>"$0"', str(file)]
        gateway = await start(PAIR.gateway, wrapper=wrapper, PORT=number, ACCESS_LOG="all")
        await eventually(lambda: file.stat().st_size)
        _, hard = resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, (file.stat().st_size, hard))
        for number in range(20):
            await get(gateway.url + f"/{number}")
        resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, (hard, hard))
        gateway.terminate()
        assert await gateway.exit_status() == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum(line.get("lost", "status" in line) for line in lines) == 20
