"""Applications and the server around them, in this process: what an aiohttp user expects of them."""

import asyncio
import importlib
import re
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import ClientSession, WSCloseCode, WSMsgType, web
from aiohttp.typedefs import Handler
from conftest import Serve, Start
from kit import reserve_port
from kit.application import PAIR
from kit.client import connection, exchange, get
from kit.postgres import Database
from pytest_aiohttp.plugin import AiohttpClient, AiohttpServer

from chassis import server, settings
from chassis.server import Server


def application(name: str, **variables: object) -> web.Application:
    """The application of one of the servers, with these settings."""
    module = importlib.import_module(name)
    declared = settings.read(module.Settings, {variable: str(value) for variable, value in variables.items()})
    app: web.Application = module.application(declared)
    return app


async def test_handlers_answer_without_the_server(
    aiohttp_client: AiohttpClient, aiohttp_server: AiohttpServer, database: Database
) -> None:
    """As pytest-aiohttp tests any application: both, with their real parts behind them."""
    service = await aiohttp_server(application(PAIR.service, **database.settings()))
    client = await aiohttp_client(application(PAIR.gateway, DOWNSTREAM_URL=service.make_url("/")))
    async with client.get(PAIR.read_path) as response:
        assert (await response.json()) == PAIR.result
        assert response.headers["Cache-Control"] == "no-cache"
    async with client.get("/readyz") as response:
        assert response.status == 200


async def item(request: web.Request) -> web.Response:
    return web.json_response({"item": request.match_info["name"]})


async def add(request: web.Request) -> web.Response:
    return web.json_response(await request.json(), status=201)


@web.middleware
async def header(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Sets a header field and a cookie on whatever is answered."""
    try:
        response = await handler(request)
    except web.HTTPException as error:
        error.headers["X-Added"] = "yes"
        error.set_cookie("seen", "1")
        raise
    response.headers["X-Added"] = "yes"
    response.headers["Cache-Control"] = "private"
    response.headers["Date"] = "Sun, 06 Nov 1994 08:49:37 GMT"
    response.headers["X-Request-ID"] = "another"
    response.set_cookie("seen", "1")
    return response


@pytest.fixture
def extended() -> Iterator[web.Application]:
    """The gateway, with a middleware and two routes more; what is behind it says nothing."""
    with reserve_port() as silent:
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        app = application(PAIR.gateway, DOWNSTREAM_URL=url, DOWNSTREAM_TIMEOUT=0.1)
        app.middlewares.append(header)
        app.add_routes([web.get("/items/{name}", item), web.post("/items", add)])
        yield app


@pytest.mark.parametrize(
    ("method", "path", "status", "caching"),
    [
        ("GET", "/healthz", 200, "private"),
        ("GET", "/items/a", 200, "private"),
        ("GET", "/nowhere", 404, "no-store"),
        ("DELETE", "/items/a", 405, "no-store"),
        ("GET", PAIR.read_path, 504, "no-store"),
    ],
)
async def test_what_a_middleware_adds_reaches_the_client(
    serve: Serve, extended: web.Application, method: str, path: str, status: int, caching: str
) -> None:
    """Header fields and cookies, on errors too; it can replace a field, which is not then sent twice."""
    answer = await get(await serve(extended) + path, method)
    assert (answer.status, answer.headers["X-Added"]) == (status, "yes")
    assert answer.headers["Set-Cookie"].startswith("seen=1")
    assert answer.headers.getall("Cache-Control") == [caching]
    assert len(answer.headers.getall("Date")) == 1
    (request_id,) = answer.headers.getall("X-Request-ID")
    assert request_id not in ("", "another")  # the log has it


async def test_a_middleware_may_take_the_content_away(serve: Serve, extended: web.Application) -> None:
    """With the status 204, nothing follows the header fields that the next answer could be taken for."""

    @web.middleware
    async def empty(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        response.set_status(204)
        return response

    extended.middlewares.append(empty)
    raw = await exchange(await serve(extended), b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    head, _, content = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 204 ")
    assert (b"\r\nContent-Length:" in head, content) == (False, b"")


async def test_other_methods_and_parameters_work(serve: Serve, extended: web.Application) -> None:
    """A path with a parameter, and a POST with a body, with their errors."""
    async with connection(await serve(extended)) as client:
        assert (await client.get("/items/x%20y")).json() == {"item": "x y"}
        added = await client.get("/items", "POST", body=b'{"a": 1}')
        assert (added.status, added.json()) == (201, {"a": 1})
        wrong = await client.get("/items", "PUT")
        assert (wrong.status, wrong.headers["Allow"], wrong.json()["status"]) == (405, "POST", 405)
        metrics = (await client.get("/metrics")).body.decode()
        assert 'http_request_method="GET",http_response_status_code="200",http_route="/items/{name}"' in metrics
        large = await client.get("/items", "POST", body=b'"' + b"x" * 1024 * 1024 + b'"')
        assert (large.status, large.headers["Content-Type"]) == (413, "application/problem+json")


async def raises_unauthorized(_request: web.Request) -> web.Response:
    raise web.HTTPUnauthorized(headers={"WWW-Authenticate": "Bearer"}, text="Who are you?")


async def raises_redirect(_request: web.Request) -> web.Response:
    raise web.HTTPSeeOther("/elsewhere")


async def raises_anything(_request: web.Request) -> web.Response:
    raise LookupError("the inside")


async def splits(_request: web.Request) -> web.StreamResponse:
    response = await server.alive(_request)
    response.headers["X-Split"] = "a\r\nX-Forged: b"
    return response


async def streams(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    await response.prepare(request)
    await response.write(b"streamed")
    await response.write_eof()
    return response


async def test_exceptions_of_others_are_problems(
    serve: Serve, extended: web.Application, caplog: pytest.LogCaptureFixture
) -> None:
    """They keep status, text and header fields; a redirect stays one; an unexpected error is a 500 without details."""
    routes = {"/401": raises_unauthorized, "/303": raises_redirect, "/500": raises_anything}
    extended.add_routes([web.get(path, handler) for path, handler in routes.items()])
    url = await serve(extended)
    refused = await get(url + "/401", headers={"X-Request-ID": "mine"})
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert refused.json() == {
        "type": "about:blank",
        "title": "Unauthorized",
        "status": 401,
        "detail": "Who are you?",
        "request_id": "mine",
    }
    moved = await get(url + "/303")
    assert (moved.status, moved.headers["Location"]) == (303, "/elsewhere")
    assert moved.request_id
    failed = await get(url + "/500")
    assert (failed.status, failed.json()["detail"]) == (500, "This server made a mistake.")
    assert "the inside" in caplog.text


async def test_a_handler_that_returns_nothing_is_a_mistake(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Its client gets a problem, and the log says what is missing."""

    async def forgets(_request: web.Request) -> web.StreamResponse:
        return None  # type: ignore[return-value]

    app = web.Application()
    app.add_routes([web.get("/none", forgets)])
    failed = await get(await serve(app) + "/none")
    assert (failed.status, failed.json()["detail"]) == (500, "This server made a mistake.")
    assert "the handler returned NoneType" in caplog.text


class OwnStatus(web.HTTPException):
    """A status that no registry knows."""

    status_code = 499


async def raises_own_status(_request: web.Request) -> web.Response:
    raise OwnStatus(reason="Client Closed Request")


async def test_a_status_of_ones_own_stays_what_it_is(serve: Serve, extended: web.Application) -> None:
    """A 499, as some proxies send it, reaches the client as a problem with its reason."""
    extended.add_routes([web.get("/499", raises_own_status)])
    answer = await get(await serve(extended) + "/499")
    assert answer.status == 499
    assert (answer.json()["title"], answer.json()["detail"]) == ("Client Closed Request", "Client Closed Request")


async def test_a_response_is_in_flight_until_it_has_been_sent(extended: web.Application, tmp_path: Path) -> None:
    """A file that a client still reads arrives whole, when connections become many and when the server stops."""
    size = 8 * 1024 * 1024
    large = tmp_path / "large"
    large.write_bytes(b"x" * size)

    async def send_file(_request: web.Request) -> web.StreamResponse:
        return web.FileResponse(large)

    extended.add_routes([web.get("/file", send_file)])
    loop = asyncio.get_running_loop()
    async with Server(extended, max_connections=3) as served:
        acceptor = await loop.create_server(served, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{acceptor.sockets[0].getsockname()[1]}"
        async with connection(url, buffer=65536) as client:
            await client.send("/file")
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert b"200 OK" in head
            async with AsyncExitStack() as others:
                for _ in range(6):
                    other = await others.enter_async_context(connection(url))
                    assert (await other.get("/healthz")).status == 200
            acceptor.close()
            finish = asyncio.create_task(served.finish(asyncio.Event(), 10))
            assert len(await client.reader.readexactly(size)) == size
            await finish


async def test_what_was_sent_is_what_counts(serve: Serve, extended: web.Application, tmp_path: Path) -> None:
    """A file that aiohttp does not find when it sends it counts as the 404 that the client got; how slowly a client
    reads one does not count.
    """
    size = 8 * 1024 * 1024
    (tmp_path / "large").write_bytes(b"x" * size)

    async def send_file(request: web.Request) -> web.StreamResponse:
        return web.FileResponse(tmp_path / request.match_info["name"])

    extended.add_routes([web.get("/{name}", send_file)])
    url = await serve(extended)
    assert (await get(url + "/missing")).status == 404
    async with connection(url, buffer=65536) as client:
        await client.send("/large")
        assert b"200 OK" in await client.reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(1)  # it reads nothing
        await client.reader.readexactly(size)
    metrics = (await get(url + "/metrics")).body.decode()
    labels = '{http_request_method="GET",http_response_status_code="%s",http_route="/{name}"}'
    assert f"http_server_request_duration_seconds_count{labels % 404} 1.0" in metrics
    (seconds,) = re.findall(re.escape(f"http_server_request_duration_seconds_sum{labels % 200} ") + "(.+)", metrics)
    assert float(seconds) < 1


async def test_a_header_field_cannot_become_two(serve: Serve, extended: web.Application) -> None:
    """A handler that copies a client's line breaks into a field sends nothing, as with aiohttp's own responses."""
    extended.add_routes([web.get("/split", splits)])
    assert await exchange(await serve(extended), b"GET /split HTTP/1.1\r\nHost: x\r\n\r\n") == b""


async def test_a_streamed_response_is_like_any_other(serve: Serve, extended: web.Application) -> None:
    """It has the request's id, and does not name the software."""
    extended.add_routes([web.get("/stream", streams)])
    async with connection(await serve(extended)) as client:
        await client.send("/stream")
        head = (await client.reader.readuntil(b"\r\n\r\n")).decode()
    assert "\r\nX-Request-ID: " in head
    assert "aiohttp" not in head


@pytest.mark.parametrize("error", [RuntimeError("halfway"), web.HTTPFound("/"), web.HTTPConflict()], ids=repr)
async def test_a_response_that_breaks_off_ends_its_connection(
    serve: Serve, extended: web.Application, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """No second response follows in its place, which a client would take for the rest of the first."""

    async def breaks(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = 1000
        await response.prepare(request)
        await response.write(b"begun")
        raise error

    extended.add_routes([web.get("/breaks", breaks)])
    raw = await exchange(await serve(extended), b"GET /breaks HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    assert raw.count(b"HTTP/1.1 ") == 1
    assert raw.endswith(b"\r\n\r\nbegun")
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["request failed"]


async def test_a_client_that_leaves_is_no_mistake(
    serve: Serve, extended: web.Application, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler finds out as it sends: the request is neither counted nor logged, as if it had been cancelled."""

    async def loses(request: web.Request) -> web.StreamResponse:
        assert request.transport
        request.transport.abort()
        return await streams(request)

    extended.add_routes([web.get("/loses", loses)])
    url = await serve(extended)
    assert await exchange(url, b"GET /loses HTTP/1.1\r\nHost: x\r\n\r\n") == b""
    metrics = (await get(url + "/metrics")).body.decode()
    assert 'http_route="/loses"' not in metrics
    assert not caplog.records


async def test_what_waits_is_told_of_the_end(extended: web.Application) -> None:
    """`on_shutdown` comes before the waiting: WebSockets that it closes end properly, and do not hold up the end."""
    sockets: list[web.WebSocketResponse] = []
    told: list[None] = []

    async def listens(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sockets.append(socket)
        async for _ in socket:
            pass
        return socket

    async def tell(_app: web.Application) -> None:
        for socket in sockets:
            await socket.close(code=WSCloseCode.GOING_AWAY)
        await asyncio.sleep(0.1)  # what else it has to do, when no request is in flight any more
        told.append(None)

    extended.add_routes([web.get("/socket", listens)])
    extended.on_shutdown.append(tell)
    async with Server(extended) as served, ClientSession() as session:
        acceptor = await asyncio.get_running_loop().create_server(served, "127.0.0.1", 0)
        port = acceptor.sockets[0].getsockname()[1]
        async with session.ws_connect(f"http://127.0.0.1:{port}/socket") as client:
            acceptor.close()
            finish = asyncio.create_task(served.finish(asyncio.Event(), 600))
            message = await client.receive(timeout=10)
            assert (message.type, message.data) == (WSMsgType.CLOSE, WSCloseCode.GOING_AWAY)
            await asyncio.wait_for(finish, 10)
    assert len(told) == 1


async def test_a_sub_applications_readiness_is_the_servers(extended: web.Application) -> None:
    """Wherever `/readyz` is mounted, it says 503 while the server drains."""
    inner = web.Application()
    inner.add_routes([web.get("/readyz", server.ready)])
    extended.add_subapp("/inner/", inner)
    async with Server(extended) as served:
        acceptor = await asyncio.get_running_loop().create_server(served, "127.0.0.1", 0)
        async with connection(f"http://127.0.0.1:{acceptor.sockets[0].getsockname()[1]}") as client:
            assert (await client.get("/inner/readyz")).status == 200
            served.draining.set()
            assert (await client.get("/inner/readyz")).status == 503
            acceptor.close()


async def test_signals_are_sent(serve: Serve, extended: web.Application) -> None:
    """`on_response_prepare` sees every response of the application, including those of a sub-application."""

    async def sign(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Signed"] = str(response.status)

    inner = web.Application()
    inner.add_routes([web.get("/items/{name}", item)])
    extended.on_response_prepare.append(sign)
    extended.add_subapp("/inner/", inner)
    url = await serve(extended)
    for path, status in (("/healthz", 200), ("/inner/items/a", 200), ("/inner/nowhere", 404), (PAIR.read_path, 504)):
        answer = await get(url + path)
        assert (answer.status, answer.headers["X-Signed"]) == (status, str(status))
        assert answer.request_id
    metrics = (await get(url + "/metrics")).body.decode()
    assert 'http_route="/inner/items/{name}"' in metrics


async def test_more_queries_than_connections_wait_for_one(serve: Serve, database: Database) -> None:
    """They run beside the shared query, whose runs may occupy all connections."""

    async def both(request: web.Request) -> web.Response:
        (fetch,) = [value.fetch for value in request.app.values() if hasattr(value, "fetch")]
        return web.json_response(await fetch("SELECT %s, pg_sleep(0.01)", 5, read=lambda rows: rows[0][0]))

    app = application(PAIR.service, **database.settings(DB_POOL_SIZE=2))
    app.add_routes([web.get("/both", both)])
    url = await serve(app)
    answers = await asyncio.gather(*(get(url + path) for path in ["/both", PAIR.service_path] * 20))
    assert {answer.status for answer in answers} == {200}
    assert len(database.backends()) <= 2


# Another program, as someone might write it who starts from this one.
PROGRAM = f"""
import sys
sys.path[:0] = ["tests", "tests/chassis"]
import {PAIR.gateway} as gateway, test_applications as more
from aiohttp import web
from chassis import lifecycle

def application(settings):
    app = gateway.application(settings)
    app.middlewares.append(more.header)
    app.add_routes([web.get("/items/{{name}}", more.item), web.get("/500", more.raises_anything)])
    return app

lifecycle.main("extended", "An extended gateway.", gateway.Settings, application)
"""


async def test_a_program_of_its_own_can_extend_the_gateway(start: Start) -> None:
    """Ids, problems, probes and draining work for its routes, too; a mistake is a 500, and its traceback is logged."""
    gateway = await start(PAIR.gateway, program=("-c", PROGRAM), DOWNSTREAM_URL="http://127.0.0.1:1", DRAIN_SECONDS=10)
    async with connection(gateway.url) as client:
        for path, status in (("/items/a", 200), ("/nowhere", 404), ("/readyz", 200)):
            answer = await client.get(path, headers={"X-Request-ID": "mine"})
            assert (answer.status, answer.headers["X-Added"], answer.request_id) == (status, "yes", "mine")
        failed = await client.get("/500", headers={"X-Request-ID": "mistake"})
        assert (failed.status, "the inside" in failed.body.decode()) == (500, False)
        line = await gateway.wait_for_log(request_id="mistake")
        assert (line["level"], line["status"], line["path"]) == ("error", 500, "/500")
        assert "LookupError: the inside" in line["exception"]
        gateway.expected_tracebacks = True
        gateway.terminate()
        await gateway.wait_for_log(message="draining")
        answer = await client.get("/items/a")
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
    assert (await get(gateway.url + "/readyz")).status == 503
    gateway.terminate()
    assert await gateway.exit_status(within=3) == 0
