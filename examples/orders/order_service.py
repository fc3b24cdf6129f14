"""The order service: stores orders and the stock that they are taken from, in PostgreSQL.

Here are its settings, its routes and its statements. Whatever fails, the stock plus the orders of an item stays what it
was: an order and what it takes change in one transaction. Tests: tests/examples/.
"""

import dataclasses
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Annotated

import msgspec
from aiohttp import web
from psycopg2 import errors

from chassis import database, lifecycle, metrics, requests, schema, server, settings
from chassis.database import Rows
from chassis.responses import Problem, Representation, RepresentationResponse, json_representation
from chassis.settings import setting

DATABASE = web.AppKey("database", database.Database)
ID = "{id:[1-9][0-9]{0,17}}"  # in a path: digits, few enough for the database's type
KEY = "[!-~]{1,200}"  # an Idempotency-Key: printable, without spaces

STOCK = "SELECT item, quantity FROM stock WHERE item = %s"
ANY_STOCK = "SELECT item, quantity FROM stock ORDER BY item LIMIT 1"
ORDER = "SELECT id, customer, item, quantity FROM orders WHERE id = %s"
ORDERS = "SELECT id, customer, item, quantity FROM orders WHERE id > %s ORDER BY id LIMIT %s"
CUSTOMERS_ORDERS = (
    "SELECT id, customer, item, quantity FROM orders WHERE customer = %s AND id > %s ORDER BY id LIMIT %s"
)
ADD = (
    "INSERT INTO orders (customer, item, quantity, idempotency_key) VALUES (%s, %s, %s, %s)"
    " ON CONFLICT (idempotency_key) DO NOTHING RETURNING id, customer, item, quantity"
)
ADDED = "SELECT id, customer, item, quantity FROM orders WHERE idempotency_key = %s"
TAKE = "UPDATE stock SET quantity = quantity - %s WHERE item = %s"
DELETE = "DELETE FROM orders WHERE id = %s RETURNING item, quantity"
GIVE_BACK = "UPDATE stock SET quantity = quantity + %s WHERE item = %s"

SCHEMA = schema.Schema(
    Path(__file__).with_name("schema.sql"),
    grants={"orders": "SELECT, INSERT, DELETE", "stock": "SELECT, UPDATE"},
    statements=[STOCK, ANY_STOCK, ORDER, ORDERS, CUSTOMERS_ORDERS, ADD, ADDED, TAKE, DELETE, GIVE_BACK],
)


@dataclasses.dataclass(frozen=True)
class Settings(database.Settings, lifecycle.Settings):
    port: int = setting(8001, settings.PORT, "port to listen on")
    db_name: str = setting("mydb", settings.TEXT, "database")


class NewOrder(msgspec.Struct, forbid_unknown_fields=True):
    customer: Annotated[str, requests.text(1, 200)]
    item: Annotated[str, requests.text(1, 200)]
    quantity: Annotated[int, msgspec.Meta(ge=1, le=1000)]


class Order(msgspec.Struct):
    id: int
    customer: str
    item: str
    quantity: int


class Page(msgspec.Struct, forbid_unknown_fields=True):
    customer: Annotated[str, requests.text(1, 200)] | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20
    after: Annotated[int, msgspec.Meta(ge=0, lt=10**18)] = 0


async def add(request: web.Request) -> web.StreamResponse:
    """`POST /api/orders`: store an order, and take its quantity from the stock. With a key, once for this key."""
    new = await requests.body(request, NewOrder)
    key = requests.header(request, "Idempotency-Key", KEY)
    try:
        async with request.app[DATABASE].transaction() as transaction:
            rows: list[database.Row] = []
            while not rows:  # if the key's order is deleted between the two, the key is free
                rows = await transaction.execute(ADD, new.customer, new.item, new.quantity, key)
                if rows:
                    await transaction.execute(TAKE, new.quantity, new.item)
                else:
                    rows = await transaction.execute(ADDED, key)
    except errors.ForeignKeyViolation:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "There is no such `$.item`.", kind="unknown-item") from None
    except errors.CheckViolation:
        raise Problem(HTTPStatus.CONFLICT, "There is too little of this item.", kind="too-little-stock") from None
    if [row[1:] for row in rows] != [(new.customer, new.item, new.quantity)]:
        raise Problem(HTTPStatus.CONFLICT, "This Idempotency-Key belongs to another order.", kind="key-reused")
    order = Order(*rows[0])
    location = {"Location": f"/api/orders/{order.id}"}
    return RepresentationResponse(request, json_representation(order, location, HTTPStatus.CREATED))


async def get(request: web.Request) -> web.StreamResponse:
    """`GET /api/orders/{id}`: an order."""
    found = await request.app[DATABASE].fetch(ORDER, int(request.match_info["id"]), read=read_order)
    if found is None:
        raise no_such_order()
    return RepresentationResponse(request, found)


async def list_orders(request: web.Request) -> web.StreamResponse:
    """`GET /api/orders?customer=&limit=&after=`: orders by id, at most `limit` of those that follow the id `after`."""
    page = requests.query(request, Page)
    statement, args = (CUSTOMERS_ORDERS, [page.customer]) if page.customer else (ORDERS, [])
    # One more than asked for, to know whether any follow.
    rows = await request.app[DATABASE].fetch(statement, *args, page.after, page.limit + 1, read=list)
    orders = [Order(*row) for row in rows[: page.limit]]
    following = orders[-1].id if len(rows) > page.limit else None
    return RepresentationResponse(request, json_representation({"orders": orders, "next": following}))


async def delete(request: web.Request) -> web.StreamResponse:
    """`DELETE /api/orders/{id}`: delete an order, and give its quantity back to the stock."""
    async with request.app[DATABASE].transaction() as transaction:
        rows = await transaction.execute(DELETE, int(request.match_info["id"]))
        for item, quantity in rows:
            await transaction.execute(GIVE_BACK, quantity, item)
    if not rows:
        raise no_such_order()
    return web.Response(status=HTTPStatus.NO_CONTENT)


async def stock(request: web.Request) -> web.StreamResponse:
    """`GET /api/stock/{item}`: how much there is of an item. Requests for the same item share queries."""
    found = await request.app[DATABASE].shared(STOCK, request.match_info["item"], read=read_stock)
    if found is None:
        raise Problem(HTTPStatus.NOT_FOUND, "There is no such item.", kind="no-such-item")
    return RepresentationResponse(request, found)


def read_order(rows: Rows) -> Representation | None:
    """The order as this service sends it; None if there is none."""
    return json_representation(Order(*rows[0]), rows.timing) if rows else None


def read_stock(rows: Rows) -> Representation | None:
    """The stock as this service sends it; None if there is no such item. Raises `ValueError` if it is no number."""
    if not rows:
        return None
    ((item, quantity),) = rows
    if not isinstance(quantity, int):
        raise ValueError(f"quantity is a {type(quantity).__name__}")
    return json_representation({"item": item, "quantity": quantity}, rows.timing)


def no_such_order() -> Problem:
    return Problem(HTTPStatus.NOT_FOUND, "There is no such order.", kind="no-such-order")


async def check(request: web.Request) -> None:
    """For `/readyz`: the database answers a query like the one that requests share, be it with no item."""
    await request.app[DATABASE].shared(ANY_STOCK, read=read_stock)


def application(options: Settings) -> web.Application:
    app = web.Application()

    async def connections(app: web.Application) -> AsyncIterator[None]:
        async with database.Database(options, f"order_service/{server.VERSION}") as app[DATABASE]:
            yield

    app[server.CHECK] = check
    app.cleanup_ctx.append(connections)
    app.on_response_prepare.append(server.end_failed_connection)
    app.add_routes(
        [
            web.post("/api/orders", add),
            web.get("/api/orders", list_orders),
            web.get(f"/api/orders/{ID}", get),
            web.delete(f"/api/orders/{ID}", delete),
            web.get("/api/stock/{item}", stock),
            web.get("/healthz", server.alive),
            web.get("/readyz", server.ready),
            web.get("/metrics", metrics.metrics),
        ]
    )
    return app


if __name__ == "__main__":
    lifecycle.main(
        "examples.orders.order_service",
        "Stores orders and the stock that they are taken from, in PostgreSQL.",
        Settings,
        application,
        max_files=database.SELECT_LIMIT,
        actions=SCHEMA.actions,
    )
