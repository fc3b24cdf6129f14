"""HTTP as every server on the chassis speaks it, request by request, while everything works.

The servers share what answers, so the gateway stands for both where no route matters.
"""

import re
from http import HTTPStatus

import pytest
from conftest import Start, System
from kit.application import PAIR
from kit.client import Answer, connection, exchange, get
from multidict import CIMultiDict

NEW_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def assert_problem(answer: Answer, status: int) -> None:
    """A problem of plain HTTP (RFC 9457): with `about:blank`, the title is the status phrase (4.2.1)."""
    assert answer.status == status
    assert answer.headers["Content-Type"].split(";")[0] == "application/problem+json"
    problem = answer.json()
    assert problem.keys() == {"type", "title", "status", "detail", "request_id"}
    assert (problem["type"], problem["status"]) == ("about:blank", status)
    assert problem["title"] == HTTPStatus(status).phrase
    assert problem["detail"]
    assert problem["request_id"] == answer.request_id
    assert NEW_REQUEST_ID.fullmatch(answer.request_id)
    assert not answer.headers.get("Server")


@pytest.mark.parametrize("given", ["7", "a.B_c-9", "x" * 128])
async def test_a_clients_request_id_is_kept(system: System, given: str) -> None:
    """Good answers and errors both return it."""
    for path in ("/healthz", PAIR.read_path, "/nowhere"):
        answer = await get(system.gateway.url + path, headers={"X-Request-ID": given})
        assert answer.request_id == given


@pytest.mark.parametrize("given", ["", "x" * 129, "two words", "a/b", "a,b", "é", "a;b", "<script>"])
async def test_a_bad_request_id_is_replaced(system: System, given: str) -> None:
    """Each answer carries a new one."""
    answers = [await get(system.gateway.url + "/healthz", headers={"X-Request-ID": given}) for _ in range(2)]
    ids = {answer.request_id for answer in answers}
    assert len(ids) == 2
    assert given not in ids
    assert all(NEW_REQUEST_ID.fullmatch(each) for each in ids)


@pytest.mark.parametrize("path", ["/nowhere", f"{PAIR.read_path}/", f"/{PAIR.read_path}", "/%0a"])
async def test_an_unknown_path_is_404(system: System, path: str) -> None:
    """The answer is a problem document."""
    assert_problem(await get(system.gateway.url + path), 404)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND"])
async def test_a_wrong_method_is_405(system: System, method: str) -> None:
    """The answer is a problem document, and `Allow` lists the methods."""
    for each in (PAIR.read_path, "/healthz"):
        answer = await get(system.gateway.url + each, method)
        assert_problem(answer, 405)
        assert {name.strip() for name in answer.headers["Allow"].split(",")} == {"GET", "HEAD"}


async def test_options_names_the_methods(system: System) -> None:
    """As health checkers use it: 204 with `Allow`, and 404 for an unknown path."""
    async with connection(system.gateway.url) as client:
        answer = await client.get("/readyz", "OPTIONS")
        assert (answer.status, answer.headers["Allow"], answer.body) == (204, "GET,HEAD", b"")
        assert answer.request_id
        assert (await client.get("/nowhere", "OPTIONS")).status == 404


GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
SIZES = {
    "target of 9 kB": (b"GET /healthz?" + b"x" * 9000 + GET[12:] + b"\r\n", 200),
    "target of 17 kB": (b"GET /" + b"x" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    # The rest is on its way when the answer comes, which must not be lost with it.
    "target of 300 kB": (b"GET /" + b"x" * 300_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    "cookie of 16,000 bytes": (GET + b"Cookie: " + b"x" * 16_000 + b"\r\n\r\n", 200),
    "cookie of 17 kB": (GET + b"Cookie: " + b"x" * 17_000 + b"\r\n\r\n", 431),
    "150 fields": (GET + b"".join(b"A%d: b\r\n" % number for number in range(150)) + b"\r\n", 200),
    "300 fields": (GET + b"".join(b"A%d: b\r\n" % number for number in range(300)) + b"\r\n", 431),
}


async def answer_to(url: str, request: bytes) -> Answer:
    """The response to these bytes, after which the connection is closed."""
    head, _, body = (await exchange(url, request)).partition(b"\r\n\r\n")
    status_line, *lines = head.decode().split("\r\n")
    assert status_line.startswith("HTTP/1.1 ")
    fields = {key.lower(): value.strip() for key, value in (line.split(":", 1) for line in lines)}
    return Answer(int(status_line.split()[1]), CIMultiDict(fields), body)


@pytest.mark.parametrize("name", SIZES)
async def test_what_is_too_long_is_called_so(system: System, name: str) -> None:
    """A length that a load balancer passes is accepted; beyond it, status and text say what is too long."""
    request, status = SIZES[name]
    answer = await answer_to(system.gateway.url, request)
    if status == 200:
        assert answer.status == 200
    else:
        assert_problem(answer, status)
        assert {414: "target", 431: "header field"}[status] in answer.json()["detail"]


async def test_a_target_may_be_a_whole_url(system: System) -> None:
    """As proxies send it (RFC 9112, 3.2.2)."""
    request = GET.replace(b"/healthz", b"http://x/healthz", 1)
    assert (await answer_to(system.gateway.url, request + b"\r\n")).status == 200


async def test_an_offer_of_another_protocol_costs_no_connection(system: System) -> None:
    """`curl --http2` and Java's HttpClient offer HTTP/2 with each request, and get each answer on one connection."""
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQCAAAAAAIAAAAA"}
    async with connection(system.gateway.url) as client:
        for path in ("/healthz", PAIR.read_path):
            answer = await client.get(path, headers=offer)
            assert (answer.status, answer.headers.get("Connection", "keep-alive")) == (200, "keep-alive")


async def test_what_follows_an_offer_is_not_left_waiting(system: System) -> None:
    """The connection of such an offer is closed if more has come with it: the client can send that again."""
    plain = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    offer = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n"
    for sent in (offer + plain, plain + offer + plain):
        raw = await exchange(system.gateway.url, sent)
        before, _, last = raw.rpartition(b"HTTP/1.1 200 OK")
        assert (before.count(b"Connection: close"), last.count(b"Connection: close")) == (0, 1)


async def test_no_answer_names_the_software(system: System) -> None:
    """Neither its name nor its version."""
    for path in ("/healthz", "/readyz", PAIR.read_path, "/nowhere"):
        answer = await get(system.gateway.url + path)
        assert not answer.headers.get("Server")
        assert "aiohttp" not in str(answer.headers).lower()


async def test_by_default_it_listens_on_ipv4_and_ipv6(start: Start) -> None:
    """On the same port."""
    gateway = await start(PAIR.gateway, HOST=None)
    for host in ("127.0.0.1", "[::1]"):
        assert (await get(f"http://{host}:{gateway.port}/healthz")).status == 200
