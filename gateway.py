"""Service 1, the gateway: answers `/api/string` with what the message service says.

Here are its settings, its routes, and what a valid answer of the message service is. How it calls the message service
is in chassis/client.py; what applies to every request is in chassis/server.py. Tests: tests/gateway/.
"""

import base64
import dataclasses
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from aiohttp import web

from chassis import client, lifecycle, metrics, server, settings
from chassis.responses import Representation, RepresentationResponse, json_representation
from chassis.settings import setting

SERVICE = web.AppKey("service", client.Service)
DESCRIPTION = Representation("application/yaml", Path(__file__).with_name("openapi.yaml").read_bytes())


@dataclasses.dataclass(frozen=True)
class Settings(client.Settings, lifecycle.Settings):
    port: int = setting(8000, settings.PORT, "port to listen on")


class Message(msgspec.Struct):
    """A valid answer of the message service."""

    message: str


async def string(request: web.Request) -> web.StreamResponse:
    """`GET /api/string`: the message."""
    return RepresentationResponse(request, await request.app[SERVICE].shared(request, "api/message", read_message))


def read_message(answer: client.Answer) -> Representation:
    """The message service's answer as the gateway sends it. Raises an error if it is not valid."""
    return json_representation({"result": answer.json(Message).message}, answer.timing)


async def page(request: web.Request) -> web.StreamResponse:
    """`GET /`: a page that shows the system at work."""
    return RepresentationResponse(request, PAGE)


async def description(request: web.Request) -> web.StreamResponse:
    """`GET /openapi.yaml`: the description of this API."""
    return RepresentationResponse(request, DESCRIPTION)


def make_page() -> Representation:
    """index.html; it may use only its own inline script and style, by hash, and requests to its own origin."""
    page = Path(__file__).with_name("index.html").read_text("utf-8").encode()  # without CR, as browsers hash it
    allowed = {b"script": "", b"style": ""}
    for element, content in re.findall(rb"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        allowed[element] += f" 'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
    policy = (
        f"default-src 'none'; script-src{allowed[b'script']}; style-src{allowed[b'style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return Representation("text/html; charset=utf-8", page, headers)


PAGE = make_page()


def application(options: Settings) -> web.Application:
    app = web.Application()

    async def service(app: web.Application) -> AsyncIterator[None]:
        async with client.Service("message_service", options, f"gateway/{server.VERSION}") as app[SERVICE]:
            yield

    app.cleanup_ctx.append(service)
    app.add_routes(
        [
            web.get("/", page),
            web.get("/openapi.yaml", description),
            web.get("/api/string", string),
            web.get("/healthz", server.alive),
            web.get("/readyz", server.ready),
            web.get("/metrics", metrics.metrics),
        ]
    )
    return app


if __name__ == "__main__":
    lifecycle.main("gateway", "Answers /api/string with what the message service says.", Settings, application)
