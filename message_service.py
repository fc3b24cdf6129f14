"""Service 2, the message service: answers `/api/message` with the string stored in PostgreSQL.

Here are its settings, its routes and its query. How it reaches the database is in chassis/database.py; what applies to
every request is in chassis/server.py. Tests: tests/message_service/.
"""

import dataclasses
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path

from aiohttp import web

from chassis import database, lifecycle, metrics, schema, server, settings
from chassis.database import Rows
from chassis.responses import Problem, Representation, RepresentationResponse, json_representation
from chassis.settings import setting

DATABASE = web.AppKey("database", database.Database)

QUERY = "SELECT content FROM messages ORDER BY id LIMIT 1"
SCHEMA = schema.Schema(Path(__file__).with_name("schema.sql"), grants={"messages": "SELECT"}, statements=[QUERY])


@dataclasses.dataclass(frozen=True)
class Settings(database.Settings, lifecycle.Settings):
    port: int = setting(8001, settings.PORT, "port to listen on")
    db_name: str = setting("mydb", settings.TEXT, "database")


async def message(request: web.Request) -> web.StreamResponse:
    """`GET /api/message`: the string that the database holds."""
    found = await request.app[DATABASE].shared(QUERY, read=read_message)
    if found is None:
        raise Problem(HTTPStatus.NOT_FOUND, "There is no message at the moment.", kind="no-message")
    return RepresentationResponse(request, found)


def read_message(rows: Rows) -> Representation | None:
    """The message as this service sends it; None if there is none. Raises `ValueError` if it is no text."""
    if not rows:
        return None
    ((content,),) = rows
    if not isinstance(content, str):
        raise ValueError(f"content is a {type(content).__name__}")
    return json_representation({"message": content}, rows.timing)


async def check(request: web.Request) -> None:
    """For `/readyz`: the database answers the query that requests share, be it with no message."""
    await request.app[DATABASE].shared(QUERY, read=read_message)


def application(options: Settings) -> web.Application:
    app = web.Application()

    async def connections(app: web.Application) -> AsyncIterator[None]:
        async with database.Database(options, f"message_service/{server.VERSION}") as app[DATABASE]:
            yield

    app[server.CHECK] = check
    app.cleanup_ctx.append(connections)
    app.on_response_prepare.append(server.end_failed_connection)
    app.add_routes(
        [
            web.get("/api/message", message),
            web.get("/healthz", server.alive),
            web.get("/readyz", server.ready),
            web.get("/metrics", metrics.metrics),
        ]
    )
    return app


if __name__ == "__main__":
    lifecycle.main(
        "message_service",
        "Answers /api/message with the string stored in PostgreSQL.",
        Settings,
        application,
        max_files=database.SELECT_LIMIT,
        actions=SCHEMA.actions,
    )
