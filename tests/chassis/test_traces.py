"""What external instrumentation sees, as in docs/operating.md, "Traces without code"."""

from conftest import Start
from kit.application import PAIR
from kit.client import get

# As OpenTelemetry's zero-code instrumentation does: replace `web.Application` before the server starts.
INSTRUMENTED = f"""
import runpy
from aiohttp import web

@web.middleware
async def seen(request, handler):
    resource = request.match_info.route.resource
    route = resource.canonical if resource else ""
    try:
        response = await handler(request)
    except web.HTTPException as error:
        error.headers["X-Seen"] = f"{{route}} {{error.status_code}}"
        raise
    response.headers["X-Seen"] = f"{{route}} {{response.status}}"
    return response

application = web.Application
web.Application = lambda: application(middlewares=[seen])
runpy.run_module("{PAIR.gateway}", run_name="__main__", alter_sys=True)
"""


async def test_a_middleware_put_in_from_outside_sees_each_request(start: Start) -> None:
    """Its route, and the status that the client gets, on errors too."""
    gateway = await start(PAIR.gateway, program=("-c", INSTRUMENTED), DOWNSTREAM_URL="http://127.0.0.1:1")
    for path, seen in (("/healthz", "/healthz 200"), ("/nowhere", " 404"), (PAIR.read_path, f"{PAIR.read_path} 503")):
        answer = await get(gateway.url + path)
        assert answer.headers["X-Seen"] == seen.strip()
        assert answer.status == int(seen[-3:])
