"""The service behind a server: what is sent to it, and what clients see when it is away, silent, or lies."""

import asyncio
import gzip
import json
import re
from typing import Any

import pytest
from conftest import MakePeer, MakeProxy, Start, System
from kit import eventually, memory, open_sockets, reserve_port
from kit.application import PAIR, Pair
from kit.client import Answer, get
from kit.faults import Chain, IPTables, MakeChain, RowOf, StartObserved
from kit.network import reset, response, says_nothing, unanswered_port
from kit.postgres import Database

PROBLEM = "application/problem+json"
MAX_CALLS = 4  # to the service at a time, whatever happens


def row(fault: str, sees: str) -> pytest.MarkDecorator:
    return pytest.mark.fault("Network and downstream", fault, sees)


# ---- all is well ----------------------------------------------------------------------------------------------

TRACE = {
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "tracestate": "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE",
}


async def test_what_goes_downstream(start: Start, make_peer: MakePeer) -> None:
    """The request id always, and the trace context unchanged if there is one."""
    peer = await make_peer(response(PAIR.good))
    gateway = await start(PAIR.gateway, DOWNSTREAM_URL=peer.url)
    for given in ({}, {"X-Request-ID": "mine"}, TRACE):
        answer = await get(gateway.url + PAIR.read_path, headers=given)
        assert answer.status == 200
        lines = peer.requests[-1].strip().split("\r\n")
        assert lines[0] == f"GET {PAIR.service_path} HTTP/1.1"
        fields = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines[1:])}
        assert fields["x-request-id"] == given.get("X-Request-ID", answer.request_id) == answer.request_id
        assert {name: fields[name] for name in TRACE if name in fields} == {n: given[n] for n in TRACE if n in given}


async def test_a_base_url_may_have_a_path(start: Start, make_peer: MakePeer) -> None:
    """With or without a slash at the end."""
    peer = await make_peer(response(PAIR.good))
    for base in ("/base", "/base/"):
        gateway = await start(PAIR.gateway, DOWNSTREAM_URL=peer.url + base)
        assert (await get(gateway.url + PAIR.read_path)).status == 200
        assert peer.requests[-1].startswith(f"GET /base{PAIR.service_path} ")


# ---- it violates its contract ----------------------------------------------------------------------------------


def problem(status: int, kind: str, **more: str) -> bytes:
    """A problem as the service sends it."""
    body = {"type": f"urn:problem-type:{kind}", "title": "t", "status": status, "detail": "d", **more}
    return response(json.dumps(body), f"{status} T", PROBLEM)


async def endless_body(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
        await writer.drain()


async def endless_header(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def resets(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    reset(writer)


def answers(pair: Pair) -> dict[int, dict[str, Any]]:
    """What the service sends, by the status that the gateway's client gets."""
    good = response(pair.good)
    bomb = gzip.compress(pair.body("0" * 50_000_000).encode(), 1)
    bad = {
        "no HTTP": b"garbage\r\n\r\n",
        "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
        "invalid JSON": response(pair.good[:-1]),
        "empty body": response(""),
        "invalid UTF-8": response(b'{"%b": "\xff"}' % pair.service_key.encode()),
        "nested too deeply": response("[" * 100_000),
        "wrong key": response('{"another": 1}'),
        "a list": response("[]"),
        "a string": response('"text"'),
        "HTML": response("<html>", content_type="text/html"),
        "JSON called text": response(pair.good, content_type="text/plain"),
        "204": b"HTTP/1.1 204 No Content\r\n\r\n",
        "206": response(pair.good, "206 Partial Content"),
        "304": b"HTTP/1.1 304 Not Modified\r\n\r\n",
        "404 of somebody else": response("<html>", "404 Not Found", "text/html"),
        "401": response("{}", "401 Unauthorized"),
        "500 in HTML": response("<html>", "500 Internal Server Error", "text/html"),
        "500 as a problem": problem(500, "other"),
        "problem that is a list": response("[]", "503 T", PROBLEM),
        "more than 1 MiB": response(pair.body("x" * 1024 * 1024)),
        "says more than 1 MiB": response(pair.good, Content_Length="9999999999") + b" " * 2_000_000,
        "endless body": endless_body,
        "endless header": endless_header,
        "compressed bomb": response(bomb, Content_Encoding="gzip"),
    }
    bad |= {f"the value {value!r}": response(pair.body(value)) for value in pair.wrong_values}
    return {
        404: {"what was asked for is not there": problem(404, pair.missing)},
        502: bad,
        503: {
            "it has no database": problem(503, "unavailable"),
            "closed with no answer": b"",
            "closed in the header": b"HTTP/1.1 200 OK\r\nContent-Le",
            "closed in the body": good[:-3],
            "reset": resets,
        },
        504: {"its database is slow": problem(504, "timeout"), "says nothing": says_nothing, "drips": drips},
    }


async def drips(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for byte in response("{}"):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.1)


@pytest.mark.every_pair
async def test_whatever_it_says_the_client_gets_a_clear_answer(pair: Pair, start: Start, make_peer: MakePeer) -> None:
    """The contract's status within the time limit; a good answer as soon as it sends one; and no leak."""
    kinds = {404: pair.missing, 502: "bad-downstream", 503: "unavailable", 504: "timeout"}

    async def check(status: int, cases: dict[str, Any]) -> None:
        peer = await make_peer(response(pair.good))
        # For an error, enough time for the first repeats: only then is the trouble long, and told at once.
        gateway = await start(pair.gateway, DOWNSTREAM_URL=peer.url, DOWNSTREAM_TIMEOUT=1 if status == 504 else 5)
        url = gateway.url + pair.read_path
        assert (await get(url)).json() == pair.result
        sockets = open_sockets(gateway.pid)
        for name, script in cases.items():
            peer.script = script
            answer = await get(url, within=6)
            found = answer.status, answer.json()["type"], "Retry-After" in answer.headers
            assert found == (status, f"urn:problem-type:{kinds[status]}", status == 503), name
        peer.script = response(pair.good)
        assert (await get(url)).json() == pair.result, f"after {status}"
        await eventually(lambda: open_sockets(gateway.pid) <= sockets)
        assert memory(gateway.pid) < 150 * 1024 * 1024

    await asyncio.gather(*(check(status, cases) for status, cases in answers(pair).items()))


async def test_its_problem_is_passed_on(pair: Pair, start: Start, make_peer: MakePeer) -> None:
    """Who failed, and what there is to do about it, is told as the service says it."""
    peer = await make_peer(b"")
    gateway = await start(pair.gateway, DOWNSTREAM_URL=peer.url)
    for status, kind in ((503, "unavailable"), (504, "timeout")):
        peer.script = problem(status, kind, detail="The disk is full.", part="disk")
        told = (await get(gateway.url + pair.read_path)).json()
        assert (told["status"], told["detail"], told["part"]) == (status, "The disk is full.", "disk")


async def test_a_redirect_is_not_followed(pair: Pair, start: Start, make_peer: MakePeer) -> None:
    """The service cannot send the gateway elsewhere."""
    elsewhere = await make_peer(response(pair.good))
    peer = await make_peer(response("", "302 Found", Location=elsewhere.url + pair.service_path))
    gateway = await start(pair.gateway, DOWNSTREAM_URL=peer.url)
    assert (await get(gateway.url + pair.read_path)).status == 502
    assert elsewhere.requests == []


# ---- it is away ------------------------------------------------------------------------------------------------


@pytest.mark.every_pair
async def test_it_is_away(pair: Pair, start: Start) -> None:
    """Refused or silent: a clear answer in time, which names the part and no host."""

    async def ask(url: str) -> Answer:
        # Less than the time in which failed calls are repeated: the last refusal is told all the same.
        gateway = await start(pair.gateway, DOWNSTREAM_URL=url, DOWNSTREAM_TIMEOUT=1)
        return await get(gateway.url + pair.read_path, within=2)

    with reserve_port() as refused, unanswered_port() as silent:
        ports = refused.getsockname()[1], silent
        answers = await asyncio.gather(*(ask(f"http://127.0.0.1:{port}") for port in ports))
    assert [answer.status for answer in answers] == [503, 504]
    for answer in answers:
        assert answer.json()["part"] == pair.part
        assert "127.0.0.1" not in answer.body.decode()


async def test_a_connection_that_died_silently_costs_nobody_a_request(
    pair: Pair, start: Start, make_peer: MakePeer, make_proxy: MakeProxy
) -> None:
    """As when a firewall has dropped its state, or one of two replicas stands still: another connection is tried."""
    peer = await make_peer(response(pair.good), keep_alive=True)
    proxy = await make_proxy(peer.port)
    gateway = await start(pair.gateway, DOWNSTREAM_URL=proxy.url)
    url = gateway.url + pair.read_path
    assert (await get(url)).status == 200
    proxy.freeze(new=False)
    for answer in await asyncio.gather(*(get(url) for _ in range(20))):
        assert (answer.status, answer.seconds < 1.5) == (200, True)
    assert proxy.accepted >= 2  # more if the machine is busy, and the new one late


async def test_a_stuck_call_holds_up_nobody(pair: Pair, start: Start, make_peer: MakePeer) -> None:
    """While one call is stuck, later requests are answered, and their answer also settles the stuck one."""
    peer = await make_peer(says_nothing)
    gateway = await start(pair.gateway, DOWNSTREAM_URL=peer.url)
    stuck = asyncio.create_task(get(gateway.url + pair.read_path))
    await eventually(lambda: peer.requests)
    peer.script = response(pair.good)
    for _ in range(5):
        assert (await get(gateway.url + pair.read_path)).status == 200
    assert (await stuck).status == 200


async def test_a_connection_is_not_kept_for_ever(pair: Pair, observed: StartObserved, make_peer: MakePeer) -> None:
    """So that replicas share the calls again, some time after one of them was away."""
    peer = await make_peer(response(pair.good), keep_alive=True)
    sooner = "from chassis import client; client.REBALANCE_INTERVAL = 0.5"
    gateway = await observed(pair.gateway, sooner, DOWNSTREAM_URL=peer.url)

    async def connected_anew() -> bool:
        assert (await get(gateway.url + pair.read_path)).status == 200
        return peer.accepted >= 3

    await eventually(connected_anew)
    assert len(peer.requests) > 10


async def test_a_long_outage_costs_no_more_calls_than_there_are_requests(
    pair: Pair, start: Start, make_peer: MakePeer
) -> None:
    """A call is repeated some eight times in two seconds; then errors come at once, until there is an answer."""
    peer = await make_peer(problem(503, "unavailable"))
    gateway = await start(pair.gateway, DOWNSTREAM_URL=peer.url)
    url = gateway.url + pair.read_path
    first = await get(url)
    metrics = (await get(gateway.url + "/metrics")).body.decode()
    late = re.findall(r'^coalescing_run_callers_count{.*reason="late"} (.*)', metrics, re.MULTILINE)
    assert first.status == 503
    assert 8 <= len(peer.requests) <= 9 + sum(map(float, late))  # on a busy machine, some calls get company
    assert 1 < first.seconds < 4
    await eventually(lambda: fails_at_once(url))
    before = len(peer.requests)
    for _ in range(20):
        assert (await get(url)).status == 503
    assert len(peer.requests) == before + 20
    peer.script = response(pair.good)
    assert (await get(url)).status == 200


async def fails_at_once(url: str) -> bool:
    return (await get(url)).seconds < 0.01


@row("many connections go stale at once", "200")
async def test_stale_connections(system: System, start: Start, make_proxy: MakeProxy, note: RowOf) -> None:
    """Kept connections that were reset while idle cost no request."""
    proxy = await make_proxy(system.service.port)
    gateway = await start(PAIR.gateway, DOWNSTREAM_URL=proxy.url)
    for _ in range(5):
        answers = await asyncio.gather(*(get(gateway.url + PAIR.read_path) for _ in range(50)))
        assert {answer.status for answer in answers} == {200}
        proxy.cut()
    note("at once")


# ---- it breaks while clients keep asking, and is repaired ------------------------------------------------------


@pytest.mark.matrix
@row("service SIGKILLed and started again", "503 while away")
async def test_it_restarts(pair: Pair, database: Database, make_chain: MakeChain, observed: StartObserved) -> None:
    """Requests while it is away get 503; none waits longer than it is away."""
    with reserve_port() as reserved:
        settings = {**database.settings(), "PORT": reserved.getsockname()[1]}
        chain = await make_chain(**settings)
        service = chain.servers.pop()
        async with chain.endures(503) as clients:
            await asyncio.to_thread(service.kill)
            await clients.see(503)
            await observed(pair.service, **settings)


@pytest.mark.matrix
@row("service SIGSTOPped, then SIGCONT", "504")
async def test_it_is_frozen(database: Database, make_chain: MakeChain) -> None:
    """The most calls that may be in flight are stuck when it resumes."""
    chain = await make_chain(**database.settings())
    async with chain.endures(504) as clients:
        chain.service.freeze()
        await clients.see(504)
        chain.service.resume()


@pytest.mark.matrix
@row("packets between the two dropped silently, no FIN", "504")
async def test_silence(
    pair: Pair, own_network: IPTables, observed: StartObserved, make_peer: MakePeer, note: RowOf
) -> None:
    """With the default time limit: once packets pass, no request waits for a TCP retransmission or a dead connection.

    All calls that may be in flight are stuck at that moment.
    """
    peer = await make_peer(response(pair.good), keep_alive=True)
    gateway = await observed(pair.gateway, DOWNSTREAM_URL=peer.url)
    chain = Chain(pair, gateway, gateway, 5, note)
    drop = [("INPUT", "-p", "tcp", f"--{side}", str(peer.port), "-j", "DROP") for side in ("sport", "dport")]
    async with chain.endures(504) as clients:
        for rule in drop:
            own_network("-A", *rule)
        await clients.see(504)
        await asyncio.sleep(1.1)  # past TCP's first retransmission of a SYN, so that the second would be next
        for rule in drop:
            own_network("-D", *rule)


@pytest.mark.matrix
@row("its host vanishes with all calls in flight, another takes over", "503")
async def test_a_host_that_is_gone(
    pair: Pair, own_network: IPTables, observed: StartObserved, make_peer: MakePeer, note: RowOf
) -> None:
    """Requests that it has acknowledged do not wait for it: the kernel gives up, on their repeats, too."""
    peer = await make_peer(says_nothing, keep_alive=True)
    gateway = await observed(pair.gateway, DOWNSTREAM_URL=peer.url, DOWNSTREAM_TIMEOUT=20)
    waiting = []

    async def call() -> None:
        waiting.append(asyncio.create_task(get(gateway.url + pair.read_path)))
        await eventually(lambda: len(peer.requests) == len(waiting))

    for _ in range(4):
        await call()
    # Its connections are forgotten, as if another host now had its address; new ones are accepted, but get no data.
    own_network("-A", "INPUT", "-p", "tcp", "--dport", str(peer.port), "-m", "state", "--state", "NEW", "-j", "ACCEPT")
    own_network("-A", "INPUT", "-p", "tcp", "--dport", str(peer.port), "-j", "DROP")
    answers = await asyncio.wait_for(asyncio.gather(*waiting), 10)
    assert {answer.status for answer in answers} == {503}
    note(f"given up after {max(answer.seconds for answer in answers):.1f} s")
