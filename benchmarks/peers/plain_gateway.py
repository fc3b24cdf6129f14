"""The gateway in plain aiohttp: each request makes one downstream call."""

import os
from collections.abc import AsyncIterator

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

SESSION = web.AppKey("session", ClientSession)


async def session(app: web.Application) -> AsyncIterator[None]:
    connector = TCPConnector(limit=int(os.environ["DOWNSTREAM_CONNECTIONS"]))
    async with ClientSession(
        os.environ["DOWNSTREAM_URL"], connector=connector, timeout=ClientTimeout(total=5)
    ) as client:
        app[SESSION] = client
        yield


async def get_string(request: web.Request) -> web.Response:
    try:
        async with request.app[SESSION].get("/api/message", raise_for_status=True) as response:
            body = await response.json()
    except (ClientError, TimeoutError) as error:
        raise web.HTTPServiceUnavailable from error
    return web.json_response({"result": body["message"]})


app = web.Application()
app.cleanup_ctx.append(session)
app.router.add_get("/api/string", get_string)

if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(os.environ["PORT"]), access_log=None, print=None, backlog=4096)
