"""The message service in plain aiohttp and aiopg: each request makes one query."""

import os
from collections.abc import AsyncIterator

import aiopg
from aiohttp import web

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


async def get_message(request: web.Request) -> web.Response:
    async with request.app[POOL].acquire() as connection, connection.cursor() as cursor:
        await cursor.execute("SELECT content FROM messages ORDER BY id LIMIT 1")
        row = await cursor.fetchone()
    if row is None:
        raise web.HTTPNotFound
    return web.json_response({"message": row[0]})


app = web.Application()
app.cleanup_ctx.append(pool)
app.router.add_get("/api/message", get_message)

if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(os.environ["PORT"]), access_log=None, print=None, backlog=4096)
