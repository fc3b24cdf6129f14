"""The message service in plain aiohttp and aiopg: each request makes one query; with SINGLE_FLIGHT, it shares one."""

import os
from collections.abc import AsyncIterator
from typing import Any

import aiopg
import uvloop
from aiohttp import web
from single_flight import shared

POOL = web.AppKey("pool", aiopg.Pool)


async def pool(app: web.Application) -> AsyncIterator[None]:
    async with aiopg.create_pool(
        host=os.environ["DB_HOST"],
        port=os.environ["DB_PORT"],
        user=os.environ["DB_USER"],
        dbname=os.environ["DB_NAME"],
        minsize=int(os.environ["DB_POOL_SIZE"]),
        maxsize=int(os.environ["DB_POOL_SIZE"]),
        enable_hstore=False,
        enable_json=False,
        enable_uuid=False,
    ) as app[POOL]:
        yield


async def value(request: web.Request, statement: str, *arguments: Any) -> Any:
    async def query() -> Any:
        async with request.app[POOL].acquire() as connection, connection.cursor() as cursor:
            await cursor.execute(statement, arguments)
            return await cursor.fetchone()

    row = await shared((statement, arguments), query)
    if row is None:
        raise web.HTTPNotFound
    return row[0]


async def get_message(request: web.Request) -> web.Response:
    return web.json_response({"message": await value(request, "SELECT content FROM messages ORDER BY id LIMIT 1")})


async def get_stock(request: web.Request) -> web.Response:
    item = request.match_info["item"]
    quantity = await value(request, "SELECT quantity FROM stock WHERE item = %s", item)
    return web.json_response({"item": item, "quantity": quantity})


app = web.Application()
app.cleanup_ctx.append(pool)
app.router.add_get("/api/message", get_message)
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
