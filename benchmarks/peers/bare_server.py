"""aiohttp without its application: the low-level `web.Server`, whose `web.Response` has a ready body, on uvloop."""

import asyncio
import os

import uvloop
from aiohttp import web

BODY = b'{"result": "Hello from PostgreSQL! This message was read from the database."}'


async def answer(_request: web.BaseRequest) -> web.Response:
    return web.Response(body=BODY, content_type="application/json")


async def main() -> None:
    runner = web.ServerRunner(web.Server(answer, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(os.environ["PORT"]), backlog=4096).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
