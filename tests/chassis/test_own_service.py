"""`client.Service` as a copy uses it: a gateway and a service of the test's own, in this process."""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from kit import eventually
from kit.client import get
from pytest_aiohttp.plugin import AiohttpServer
from yarl import URL

from chassis import client, metrics
from chassis.server import Server

StartGateway = Callable[[web.Application, dict[str, str]], Awaitable[str]]
KEY = web.AppKey("service", client.Service)


@pytest.fixture
async def start_gateway(aiohttp_server: AiohttpServer) -> AsyncIterator[StartGateway]:
    """Starts a service, and a gateway whose paths are answered with the text at these paths of the service."""
    servers: list[tuple[Server, asyncio.Server]] = []

    async def start(service: web.Application, routes: dict[str, str]) -> str:
        behind = await aiohttp_server(service)
        app = web.Application()

        async def connected(app: web.Application) -> AsyncIterator[None]:
            options = client.Settings(downstream_url=URL(str(behind.make_url("/"))), downstream_timeout=5)
            async with client.Service("other_service", options, "test") as app[KEY]:
                yield

        async def ask(request: web.Request) -> web.Response:
            path = routes[request.match_info.route.resource.canonical]  # type: ignore[union-attr]
            text = await request.app[KEY].shared(request, path.format(**request.match_info), read_text)
            return web.Response(text=text)

        app.cleanup_ctx.append(connected)
        app.add_routes([web.get(path, ask) for path in routes])
        app.add_routes([web.get("/metrics", metrics.metrics)])
        server = Server(app)
        await server.__aenter__()
        acceptor = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        servers.append((server, acceptor))
        return f"http://127.0.0.1:{acceptor.sockets[0].getsockname()[1]}"

    yield start
    for server, acceptor in servers:
        acceptor.close()
        await server.__aexit__()


def read_text(answer: client.Answer) -> str:
    if answer.media_type != "text/plain":
        raise ValueError(answer.media_type)
    return answer.body.decode()


async def good(_request: web.Request) -> web.Response:
    return web.Response(text="good")


async def nonsense(_request: web.Request) -> web.Response:
    return web.json_response([])


async def test_a_broken_route_does_not_say_that_the_service_is_back(
    start_gateway: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """While one route always fails and another always works, nothing "answers again"; when the first works, it does."""
    behaviour = [nonsense]

    async def mended(request: web.Request) -> web.Response:
        return await behaviour[0](request)

    service = web.Application()
    service.add_routes([web.get("/good", good), web.get("/bad", mended)])
    url = await start_gateway(service, {"/good": "good", "/bad": "bad"})
    caplog.set_level("INFO")
    for _ in range(3):
        assert (await get(url + "/bad")).status == 502
        assert (await get(url + "/good")).status == 200
    assert "answers again" not in caplog.text
    behaviour[0] = good
    assert (await get(url + "/bad")).status == 200
    assert caplog.text.count("the other service answers again") == 1


@pytest.mark.parametrize("clients", [pytest.param(1, marks=pytest.mark.matrix), 100])
@pytest.mark.parametrize(("bad", "of"), [(1, 10), (1, 2), (9, 10)])
async def test_a_partial_outage_costs_few_calls(start_gateway: StartGateway, bad: int, of: int, clients: int) -> None:
    """While every second call fails, nobody notices; while nine of ten do, the calls are not many more."""
    calls = itertools.count()

    async def fails_sometimes(_request: web.Request) -> web.Response:
        if (next(calls) * 7) % of < bad:
            problem = {"type": "urn:problem-type:unavailable", "detail": "Not now."}
            return web.json_response(problem, status=503, content_type="application/problem+json")
        return web.Response(text="good")

    service = web.Application()
    service.add_routes([web.get("/{any}", fails_sometimes)])
    url = await start_gateway(service, {"/{each}": "{each}"})

    async def ask(client: int) -> list[int]:
        # With few paths, a call is short on a slow machine, too, and its repeats fit into the time that they have.
        path = client % 20 if bad / of <= 0.5 else client
        return [(await get(f"{url}/{path}")).status for _ in range(6 if clients > 1 else 60)]

    statuses = list(itertools.chain(*await asyncio.gather(*(ask(client) for client in range(clients)))))
    asked = next(calls)
    if bad / of <= 0.5:
        assert [status for status in statuses if status != 200] == []
    else:
        assert asked < 1.5 * len(statuses) + 20
        assert statuses.count(503) > 0


async def test_each_failed_run_is_counted_once(start_gateway: StartGateway) -> None:
    """Twenty requests that share failed calls count as these calls."""
    calls = 0

    async def slow_nonsense(_request: web.Request) -> web.Response:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)
        return web.json_response([])

    async def counted() -> float:
        text = (await get(url + "/metrics")).body.decode()
        found = re.findall(r'^dependency_errors_total{error_type="bad-downstream",.*} (.*)', text, re.MULTILINE)
        return sum(map(float, found))

    service = web.Application()
    service.add_routes([web.get("/bad", slow_nonsense)])
    url = await start_gateway(service, {"/bad": "bad"})
    before = await counted()
    answers = await asyncio.gather(*(get(url + "/bad") for _ in range(20)))
    assert {answer.status for answer in answers} == {502}
    await eventually(lambda: counted_is(counted, before + calls))


async def counted_is(counted: Callable[[], Awaitable[float]], number: float) -> bool:
    return await counted() == number


@pytest.mark.parametrize("item", ["..", "%2e%2e", "a%2Fb", "%2Freadyz", "..%2F..%2Fsecret"])
async def test_a_parameter_leads_to_no_other_path(start_gateway: StartGateway, item: str) -> None:
    """A client's `..` or escaped slash is refused, before the service is asked for anything."""
    asked = []

    async def tell(request: web.Request) -> web.Response:
        asked.append(request.raw_path)
        return web.Response(text=request.raw_path)

    service = web.Application()
    service.add_routes([web.get("/{path:.*}", tell)])
    url = await start_gateway(service, {"/items/{item}": "items/{item}"})
    assert (await get(f"{url}/items/{item}")).status == 404
    assert asked == []


@pytest.mark.parametrize(
    "item", ["a%3Fb=c", "a%23b", "%252e%252e", "a%20b", "%C3%A4", "a%00b", "a%0D%0Ab", "a;b", "a+b"]
)
async def test_a_parameter_stays_what_the_client_sent(start_gateway: StartGateway, item: str) -> None:
    """Characters that mean something in a URL reach the service as characters."""
    asked = []

    async def tell(request: web.Request) -> web.Response:
        asked.append(request.match_info["item"])
        return web.Response(text="good")

    service = web.Application()
    service.add_routes([web.get("/items/{item}", tell)])
    url = await start_gateway(service, {"/items/{item}": "items/{item}"})
    assert (await get(f"{url}/items/{item}")).status == 200
    assert set(asked) == {URL(f"http://x/{item}", encoded=True).path.removeprefix("/")}
