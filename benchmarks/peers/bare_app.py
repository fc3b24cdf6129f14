"""The least that an aiohttp application does: a constant through `web.json_response`. On uvloop if UVLOOP is set."""

import os

import uvloop
from aiohttp import web


async def get_string(_request: web.Request) -> web.Response:
    return web.json_response({"result": "Hello from PostgreSQL! This message was read from the database."})


app = web.Application()
app.router.add_get("/api/string", get_string)

if __name__ == "__main__":
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        access_log=None,
        print=None,
        backlog=4096,
        loop=uvloop.new_event_loop() if os.environ.get("UVLOOP") else None,
    )
