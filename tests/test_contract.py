"""The HTTP contract of both servers, request by request, while everything works."""

import re
from http import HTTPStatus

import pytest
from conftest import MakePeer, Start, System
from kit.client import Answer, connection, exchange, get
from kit.network import response
from multidict import CIMultiDict

CONTENTS = {
    "plain": "Hello from PostgreSQL!",
    "empty": "",
    "emoji": "👋🏽 🏴‍☠️ 𝄞",
    "quotes": """it's "quoted" \\ {"result": "no"} <b>&amp;</b>""",
    "newlines": "one\ntwo\r\nthree\tend\n",
    "right to left": "\u202eمرحبا بالعالم\u202c שלום",  # noqa: RUF001
    "controls": "\x01\x1f\x7f\x85\u2028\u2029\ufeff\uffff",
    "combining": "e\u0301 \u1112\u1161\u11ab",
    "500 kB": "0123456789" * 50_000,
    "500 kB of emoji": "👋" * 125_000,
}
ROUTES = pytest.mark.parametrize(
    ("part", "path"), [("gateway", "/api/string"), ("service", "/api/message")], ids=["gateway", "service"]
)
KEY = {"gateway": "result", "service": "message"}
PARTS = pytest.mark.parametrize("part", ["gateway", "service"])
NEW_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def url(system: System, part: str) -> str:
    """Base URL of one of the servers."""
    return str(getattr(system, part).url)


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


@ROUTES
@pytest.mark.parametrize("name", CONTENTS)
async def test_any_unicode_arrives_as_it_is_stored(system: System, part: str, path: str, name: str) -> None:
    """A client reads exactly what PostgreSQL stores."""
    system.database.set_message(CONTENTS[name])
    answer = await get(url(system, part) + path)
    assert (answer.status, answer.json()) == (200, {KEY[part]: CONTENTS[name]})
    assert answer.headers["Content-Type"].split(";")[0] == "application/json"


@ROUTES
async def test_json_is_utf_8_and_not_escaped(system: System, part: str, path: str) -> None:
    """A person who reads the body sees characters, not escape sequences."""
    system.database.set_message("naïve 👋")
    assert "naïve 👋".encode() in (await get(url(system, part) + path)).body


@ROUTES
async def test_the_message_is_the_row_with_the_lowest_id(system: System, part: str, path: str) -> None:
    """Not the row that was written first or last."""
    system.database.sql("INSERT INTO messages (id, content) OVERRIDING SYSTEM VALUE VALUES (-7, 'lowest')")
    try:
        assert (await get(url(system, part) + path)).json() == {KEY[part]: "lowest"}
    finally:
        system.database.sql("DELETE FROM messages WHERE id = -7")


@PARTS
@pytest.mark.parametrize("path", ["API", "/healthz", "/readyz"])
async def test_head_is_get_without_the_body(system: System, part: str, path: str) -> None:
    """Same status and header fields, no body, and the connection stays open."""
    path = path.replace("API", {"gateway": "/api/string", "service": "/api/message"}[part])
    async with connection(url(system, part)) as client:
        head = await client.get(path, "HEAD")
        whole = await client.get(path)
    assert (head.status, head.body, whole.status) == (200, b"", 200)
    assert head.headers.keys() == whole.headers.keys()
    assert head.headers["Content-Type"] == whole.headers["Content-Type"]
    assert head.headers["Content-Length"] == whole.headers["Content-Length"]


@PARTS
async def test_probes_answer(system: System, part: str) -> None:
    """Both are 200 while all is well."""
    assert (await get(url(system, part) + "/healthz")).status == 200
    assert (await get(url(system, part) + "/readyz")).status == 200


@ROUTES
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_who_has_the_message_gets_304(system: System, part: str, path: str, method: str) -> None:
    """The ETag is strong and changes with the message; If-None-Match is a list, compared weakly (RFC 9110, 13.1.2)."""
    async with connection(url(system, part)) as client:  # the same one, which a body after a 304 would break
        first = await client.get(path, method)
        etag = first.headers["ETag"]
        assert first.headers["Cache-Control"] == "no-cache"
        assert re.fullmatch(r'"[\x21\x23-\x7e]+"', etag)
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            again = await client.get(path, method, {"If-None-Match": known})
            assert again.status == 304, known
            assert (again.headers["ETag"], again.headers["Cache-Control"]) == (etag, "no-cache")
            assert again.request_id
        system.database.set_message("changed")
        for known in (etag, '"other"', "nonsense"):
            changed = await client.get(path, method, {"If-None-Match": known})
            assert (changed.status, changed.headers["ETag"] != etag) == (200, True), known


@PARTS
@pytest.mark.parametrize("given", ["7", "a.B_c-9", "x" * 128])
async def test_a_clients_request_id_is_kept(system: System, part: str, given: str) -> None:
    """Good answers and errors both return it."""
    for path in ("/healthz", "/api/string", "/api/message", "/nowhere"):
        answer = await get(url(system, part) + path, headers={"X-Request-ID": given})
        assert answer.request_id == given


@PARTS
@pytest.mark.parametrize("given", ["", "x" * 129, "two words", "a/b", "a,b", "é", "a;b", "<script>"])
async def test_a_bad_request_id_is_replaced(system: System, part: str, given: str) -> None:
    """Each answer carries a new one."""
    answers = [await get(url(system, part) + "/healthz", headers={"X-Request-ID": given}) for _ in range(2)]
    ids = {answer.request_id for answer in answers}
    assert len(ids) == 2
    assert given not in ids
    assert all(NEW_REQUEST_ID.fullmatch(each) for each in ids)


TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def test_what_goes_downstream(start: Start, make_peer: MakePeer) -> None:
    """The request id always, a valid traceparent unchanged, an invalid one not at all."""
    peer = await make_peer(response('{"message": "ok"}'))
    gateway = await start("gateway", DOWNSTREAM_URL=peer.url)

    async def downstream(headers: dict[str, str]) -> dict[str, str]:
        answer = await get(gateway.url + "/api/string", headers=headers)
        assert answer.status == 200
        lines = peer.requests[-1].strip().split("\r\n")
        assert lines[0] == "GET /api/message HTTP/1.1"
        fields = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines[1:])}
        assert fields["x-request-id"] == answer.request_id
        return fields

    assert (await downstream({"X-Request-ID": "mine"}))["x-request-id"] == "mine"
    assert (await downstream({"traceparent": TRACE}))["traceparent"] == TRACE
    for invalid in (
        "",
        "nonsense",
        TRACE.upper(),
        TRACE + "-more",
        TRACE[:-1],
        "ff" + TRACE[2:],
        TRACE.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
        TRACE.replace("00f067aa0ba902b7", "0" * 16),
    ):
        assert "traceparent" not in await downstream({"traceparent": invalid}), invalid


async def test_a_base_url_may_have_a_path(start: Start, make_peer: MakePeer) -> None:
    """With or without a slash at the end."""
    peer = await make_peer(response('{"message": "ok"}'))
    for base in ("/base", "/base/"):
        gateway = await start("gateway", DOWNSTREAM_URL=peer.url + base)
        assert (await get(gateway.url + "/api/string")).status == 200
        assert peer.requests[-1].startswith("GET /base/api/message ")


@PARTS
@pytest.mark.parametrize("path", ["/nowhere", "/api", "/api/string/", "//api/string", "/api/message/", "/%0a"])
async def test_an_unknown_path_is_404(system: System, part: str, path: str) -> None:
    """The answer is a problem document."""
    assert_problem(await get(url(system, part) + path), 404)


@PARTS
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND"])
async def test_a_wrong_method_is_405(system: System, part: str, method: str) -> None:
    """The answer is a problem document, and `Allow` lists the methods."""
    path = {"gateway": "/api/string", "service": "/api/message"}[part]
    for each in (path, "/healthz"):
        answer = await get(url(system, part) + each, method)
        assert_problem(answer, 405)
        assert {name.strip() for name in answer.headers["Allow"].split(",")} == {"GET", "HEAD"}


@PARTS
async def test_options_names_the_methods(system: System, part: str) -> None:
    """As health checkers use it: 204 with `Allow`, and 404 for an unknown path."""
    async with connection(url(system, part)) as client:
        answer = await client.get("/readyz", "OPTIONS")
        assert (answer.status, answer.headers["Allow"], answer.body) == (204, "GET,HEAD", b"")
        assert answer.request_id
        assert (await client.get("/nowhere", "OPTIONS")).status == 404


MALFORMED = {
    "no HTTP": b"nonsense\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64 + b"\r\n\r\n",
    "bad header": b"GET /healthz HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
    "bad length": b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
    "two lengths": b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "HTTP/0.9": b"GET /healthz\r\n\r\n",
    "NUL": b"GET /healthz HTTP/1.1\r\nHost: x\0y\r\n\r\n",
}


GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
SIZES = {
    "target of 9 kB": (b"GET /healthz?" + b"x" * 9000 + GET[12:] + b"\r\n", 200),
    "target of 17 kB": (b"GET /" + b"x" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
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


@PARTS
@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_http_is_400(system: System, part: str, name: str) -> None:
    """A problem document with a request id and without the server's name; then the connection closes."""
    assert_problem(await answer_to(url(system, part), MALFORMED[name]), 400)


@PARTS
@pytest.mark.parametrize("name", SIZES)
async def test_what_is_too_long_is_called_so(system: System, part: str, name: str) -> None:
    """A length that a load balancer passes is accepted; beyond it, status and text say what is too long."""
    request, status = SIZES[name]
    answer = await answer_to(url(system, part), request)
    if status == 200:
        assert answer.status == 200
    else:
        assert_problem(answer, status)
        assert {414: "target", 431: "header field"}[status] in answer.json()["detail"]


@PARTS
async def test_a_target_may_be_a_whole_url(system: System, part: str) -> None:
    """As proxies send it (RFC 9112, 3.2.2); without a path, it means `/`."""
    for target, status in (("http://x/healthz", 200), ("http://x", 200 if part == "gateway" else 404)):
        request = GET.replace(b"/healthz", target.encode(), 1)
        assert (await answer_to(url(system, part), request + b"\r\n")).status == status


@PARTS
async def test_no_answer_names_the_software(system: System, part: str) -> None:
    """Neither its name nor its version."""
    for path in ("/healthz", "/readyz", "/api/string", "/api/message", "/nowhere"):
        answer = await get(url(system, part) + path)
        assert not answer.headers.get("Server")
        assert "aiohttp" not in str(answer.headers).lower()


async def test_server_timing_tells_where_the_time_went(system: System) -> None:
    """Milliseconds for gateway, message service and database, each part of the one before it."""
    answer = await get(system.gateway.url + "/api/string")
    entries = {part.split(";")[0].strip(): part for part in answer.headers["Server-Timing"].split(",")}
    durations = [
        float(re.search(r"dur=([0-9.]+)", entries[name])[1])  # type: ignore[index]
        for name in ("gateway", "service", "database")
    ]
    assert durations[0] >= durations[1] >= durations[2] > 0
    answer = await get(system.service.url + "/api/message")
    assert "gateway" not in answer.headers["Server-Timing"]


async def test_by_default_it_listens_on_ipv4_and_ipv6(start: Start) -> None:
    """On the same port."""
    gateway = await start("gateway", HOST=None)
    for host in ("127.0.0.1", "[::1]"):
        assert (await get(f"http://{host}:{gateway.port}/healthz")).status == 200
