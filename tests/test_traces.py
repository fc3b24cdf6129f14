"""What instrumentation from outside sees; docs/operating.md, "Traces without code", is what it is for."""

from conftest import Start
from kit.client import get

# As OpenTelemetry's zero-code instrumentation does: replace `web.Application` before the server starts.
INSTRUMENTED = """
import runpy
from aiohttp import web

@web.middleware
async def seen(request, handler):
    response = await handler(request)
    return web.Response(text=f"seen {request.path} {response.status}")

application = web.Application
web.Application = lambda: application(middlewares=[seen])
runpy.run_module("gateway", run_name="__main__", alter_sys=True)
"""


async def test_a_middleware_put_in_from_outside_sees_each_request(start: Start) -> None:
    """It is called, with the server's own handler inside."""
    gateway = await start("gateway", program=("-c", INSTRUMENTED), DOWNSTREAM_URL="http://127.0.0.1:1")
    for path, status in (("/healthz", 200), ("/nowhere", 404), ("/api/string", 503)):
        assert (await get(gateway.url + path)).body.decode() == f"seen {path} {status}"
