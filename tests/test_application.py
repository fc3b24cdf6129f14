"""Applications and the server around them, in this process: what an aiohttp user expects of them."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
import uvloop
from aiohttp import web
from aiohttp.typedefs import Handler
from conftest import Start
from kit.client import connection, exchange, get
from kit.postgres import Database
from pytest_aiohttp.plugin import AiohttpClient, AiohttpServer
from yarl import URL

import gateway
import lifecycle
import message_service
from server import Server

Serve = Callable[[web.Application], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serves an application as `lifecycle.main` does, and returns its URL."""
    async with AsyncExitStack() as stack:

        async def serve(app: web.Application) -> str:
            server = await stack.enter_async_context(Server(app))
            acceptor = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            stack.callback(acceptor.close)
            return f"http://127.0.0.1:{acceptor.sockets[0].getsockname()[1]}"

        yield serve


def message_service_settings(database: Database, **changes: int) -> message_service.Settings:
    return message_service.Settings(**{name.lower(): value for name, value in database.settings(**changes).items()})


async def test_handlers_answer_without_the_server(
    aiohttp_client: AiohttpClient, aiohttp_server: AiohttpServer, database: Database
) -> None:
    """As pytest-aiohttp tests any application: both, with their real parts behind them."""
    service = await aiohttp_server(message_service.application(message_service_settings(database)))
    client = await aiohttp_client(gateway.application(gateway.Settings(downstream_url=service.make_url("/"))))
    async with client.get("/api/string") as response:
        assert (await response.json())["result"].startswith("Hello from PostgreSQL!")
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
    response.set_cookie("seen", "1")
    return response


def extended_gateway() -> web.Application:
    """The gateway, with a middleware and two routes more; nothing is behind it."""
    app = gateway.application(gateway.Settings(downstream_url=URL("http://127.0.0.1:1"), downstream_timeout=0.1))
    app.middlewares.append(header)
    app.add_routes([web.get("/items/{name}", item), web.post("/items", add)])
    return app


@pytest.mark.parametrize(
    ("method", "path", "status", "caching"),
    [
        ("GET", "/healthz", 200, "private"),
        ("GET", "/items/a", 200, "private"),
        ("GET", "/nowhere", 404, "no-store"),
        ("DELETE", "/items/a", 405, "no-store"),
        ("GET", "/api/string", 503, "no-store"),
    ],
)
async def test_what_a_middleware_adds_reaches_the_client(
    serve: Serve, method: str, path: str, status: int, caching: str
) -> None:
    """Header fields and cookies, on errors too; it can replace a field, which is not then sent twice."""
    answer = await get(await serve(extended_gateway()) + path, method)
    assert (answer.status, answer.headers["X-Added"]) == (status, "yes")
    assert answer.headers["Set-Cookie"].startswith("seen=1")
    assert answer.headers.getall("Cache-Control") == [caching]
    assert answer.request_id
    assert len(answer.headers.getall("X-Request-ID")) == 1


async def test_other_methods_and_parameters_work(serve: Serve) -> None:
    """A path with a parameter, and a POST with a body, with their errors."""
    async with connection(await serve(extended_gateway())) as client:
        assert (await client.get("/items/x%20y")).json() == {"item": "x y"}
        added = await client.get("/items", "POST", body=b'{"a": 1}')
        assert (added.status, added.json()) == (201, {"a": 1})
        wrong = await client.get("/items", "PUT")
        assert (wrong.status, wrong.headers["Allow"], wrong.json()["status"]) == (405, "POST", 405)
        metrics = (await client.get("/metrics")).body.decode()
        assert 'http_request_method="GET",http_response_status_code="200",http_route="/items/{name}"' in metrics
        assert 'http_request_method="PUT",http_response_status_code="405",http_route="/items"' in metrics
        large = await client.get("/items", "POST", body=b'"' + b"x" * 1024 * 1024 + b'"')
        assert (large.status, large.headers["Content-Type"]) == (413, "application/problem+json")


async def raises_unauthorized(_request: web.Request) -> web.Response:
    raise web.HTTPUnauthorized(headers={"WWW-Authenticate": "Bearer"}, text="Who are you?")


async def raises_redirect(_request: web.Request) -> web.Response:
    raise web.HTTPSeeOther("/elsewhere")


async def raises_anything(_request: web.Request) -> web.Response:
    raise LookupError("the inside")


async def splits(_request: web.Request) -> web.StreamResponse:
    response = await gateway.page(_request)
    response.headers["X-Split"] = "a\r\nX-Forged: b"
    return response


async def streams(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    await response.prepare(request)
    await response.write(b"streamed")
    await response.write_eof()
    return response


async def test_exceptions_of_others_are_problems(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """They keep status, text and header fields; a redirect stays one; an unexpected error is a 500 without details."""
    app = extended_gateway()
    routes = {"/401": raises_unauthorized, "/303": raises_redirect, "/500": raises_anything}
    app.add_routes([web.get(path, handler) for path, handler in routes.items()])
    url = await serve(app)
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


async def test_a_header_field_cannot_become_two(serve: Serve) -> None:
    """A handler that copies a client's line breaks into a field sends nothing, as with aiohttp's own responses."""
    app = extended_gateway()
    app.add_routes([web.get("/split", splits)])
    assert await exchange(await serve(app), b"GET /split HTTP/1.1\r\nHost: x\r\n\r\n") == b""


async def test_a_streamed_response_is_like_any_other(serve: Serve) -> None:
    """It has the request's id, and does not name the software."""
    app = extended_gateway()
    app.add_routes([web.get("/stream", streams)])
    async with connection(await serve(app)) as client:
        await client.send("/stream")
        head = (await client.reader.readuntil(b"\r\n\r\n")).decode()
    assert "\r\nX-Request-ID: " in head
    assert "aiohttp" not in head


async def test_signals_are_sent(serve: Serve) -> None:
    """`on_response_prepare` sees every response of the application, including those of a sub-application."""

    async def sign(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Signed"] = str(response.status)

    inner = web.Application()
    inner.add_routes([web.get("/items/{name}", item)])
    app = extended_gateway()
    app.on_response_prepare.append(sign)
    app.add_subapp("/inner/", inner)
    url = await serve(app)
    for path, status in (("/healthz", 200), ("/inner/items/a", 200), ("/inner/nowhere", 404), ("/api/string", 503)):
        answer = await get(url + path)
        assert (answer.status, answer.headers["X-Signed"]) == (status, str(status))
        assert answer.request_id
    metrics = (await get(url + "/metrics")).body.decode()
    assert 'http_route="/inner/items/{name}"' in metrics


async def test_more_queries_than_connections_wait_for_one(serve: Serve, database: Database) -> None:
    """They run beside the shared query, whose runs may occupy all connections."""

    async def both(request: web.Request) -> web.Response:
        rows = await request.app[message_service.DATABASE_KEY].fetch("SELECT %s, pg_sleep(0.01)", 5)
        return web.json_response(rows[0][0])

    app = message_service.application(message_service_settings(database, DB_POOL_SIZE=2))
    app.add_routes([web.get("/both", both)])
    url = await serve(app)
    answers = await asyncio.gather(*(get(url + path) for path in ["/both", "/api/message"] * 20))
    assert {answer.status for answer in answers} == {200}
    assert len(database.backends()) <= 2


# Another program, as someone might write it who starts from this one.
PROGRAM = """
import sys
sys.path.insert(0, "tests")
import gateway, lifecycle, test_application

def application(settings):
    app = gateway.application(settings)
    app.middlewares.append(test_application.header)
    app.add_routes([test_application.web.get("/items/{name}", test_application.item)])
    return app

lifecycle.main("gateway", "An extended gateway.", gateway.Settings, application)
"""


async def test_a_program_of_its_own_can_extend_the_gateway(start: Start) -> None:
    """Ids, problems, probes and draining work for its routes, too."""
    gateway = await start("gateway", program=("-c", PROGRAM), DOWNSTREAM_URL="http://127.0.0.1:1", DRAIN_SECONDS=10)
    async with connection(gateway.url) as client:
        for path, status in (("/items/a", 200), ("/nowhere", 404), ("/readyz", 200)):
            answer = await client.get(path, headers={"X-Request-ID": "mine"})
            assert (answer.status, answer.headers["X-Added"], answer.request_id) == (status, "yes", "mine")
        gateway.terminate()
        await gateway.wait_for_log(message="draining")
        answer = await client.get("/items/a")
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
    assert (await get(gateway.url + "/readyz")).status == 503
    gateway.terminate()
    assert await gateway.exit_status(within=3) == 0


async def accept_at_once(clients: int) -> None:
    """Let that many clients connect to a server, and give it a few turns of the event loop to notice."""
    with lifecycle.listen("127.0.0.1", 0) as listener:
        async with Server(web.Application()) as server:
            accepting = asyncio.create_task(lifecycle.accept_connections(listener, server))
            with contextlib.ExitStack() as stack:
                for _ in range(clients):
                    stack.enter_context(socket.create_connection(listener.getsockname()))
                for _ in range(10):
                    await asyncio.sleep(0)
                assert len(server.connections) == clients
            accepting.cancel()


def test_many_clients_connect_at_once() -> None:
    """New clients need not wait until each one before them has had a turn of a busy server's event loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(accept_at_once(50))
