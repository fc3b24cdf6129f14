"""The gateway in plain aiohttp: each request makes one downstream call; with SINGLE_FLIGHT, it shares one."""

import os
from collections.abc import AsyncIterator
from typing import Any

import uvloop
from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web
from single_flight import shared

SESSION = web.AppKey("session", ClientSession)


async def session(app: web.Application) -> AsyncIterator[None]:
    connector = TCPConnector(limit=int(os.environ["DOWNSTREAM_CONNECTIONS"]))
    async with ClientSession(
        os.environ["DOWNSTREAM_URL"], connector=connector, timeout=ClientTimeout(total=5)
    ) as client:
        app[SESSION] = client
        yield


async def get(request: web.Request, path: str) -> Any:
    async def call() -> Any:
        async with request.app[SESSION].get(path, raise_for_status=True) as response:
            return await response.json()

    try:
        return await shared(path, call)
    except (ClientError, TimeoutError) as error:
        raise web.HTTPServiceUnavailable from error


async def get_string(request: web.Request) -> web.Response:
    return web.json_response({"result": (await get(request, "/api/message"))["message"]})


async def get_stock(request: web.Request) -> web.Response:
    return web.json_response(await get(request, f"/api/stock/{request.match_info['item']}"))


app = web.Application()
app.cleanup_ctx.append(session)
app.router.add_get("/api/string", get_string)
app.router.add_get("/api/stock/{item}", get_stock)

if __name__ == "__main__":
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        access_log=None,
        print=None,
        backlog=4096,
        loop=uvloop.new_event_loop(),
    )
