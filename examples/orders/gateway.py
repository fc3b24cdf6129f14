"""The orders' gateway: the public API of the order service.

Here are its settings, its routes, what it takes from clients and what a valid answer of the order service is. It checks
what clients send, so that the order service sees no nonsense; what a right order is, the order service decides. Tests:
tests/examples/.
"""

import dataclasses
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Annotated

import msgspec
from aiohttp import web

from chassis import client, lifecycle, metrics, requests, server, settings
from chassis.responses import Representation, RepresentationResponse, json_representation
from chassis.settings import setting

SERVICE = web.AppKey("service", client.Service)
DESCRIPTION = Representation("application/yaml", Path(__file__).with_name("openapi.yaml").read_bytes())
ID = "{id:[1-9][0-9]{0,17}}"  # in a path
KEY = "[!-~]{1,200}"  # an Idempotency-Key: printable, without spaces


@dataclasses.dataclass(frozen=True)
class Settings(client.Settings, lifecycle.Settings):
    port: int = setting(8000, settings.PORT, "port to listen on")


class NewOrder(msgspec.Struct, forbid_unknown_fields=True):
    customer: Annotated[str, requests.text(1, 200)]
    item: Annotated[str, requests.text(1, 200)]
    quantity: Annotated[int, msgspec.Meta(ge=1, le=1000)]


class Order(msgspec.Struct):
    id: int
    customer: str
    item: str
    quantity: int


class Page(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    customer: Annotated[str, requests.text(1, 200)] | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20
    after: Annotated[int, msgspec.Meta(ge=0, lt=10**18)] = 0


class Orders(msgspec.Struct):
    orders: list[Order]
    next: int | None


class Stock(msgspec.Struct):
    item: str
    quantity: int


async def add(request: web.Request) -> web.StreamResponse:
    """`POST /api/orders`: a new order. With an `Idempotency-Key`, the same key gives the same order."""
    new = await requests.body(request, NewOrder)
    key = requests.header(request, "Idempotency-Key", KEY)
    headers = {"Idempotency-Key": key} if key else {}
    order = await request.app[SERVICE].call(
        request, "POST", "api/orders", read_order, json=msgspec.to_builtins(new), headers=headers
    )
    location = {"Location": f"/api/orders/{order.id}"}
    return RepresentationResponse(request, json_representation(order, location, HTTPStatus.CREATED))


async def get(request: web.Request) -> web.StreamResponse:
    """`GET /api/orders/{id}`: an order."""
    order = await request.app[SERVICE].call(request, "GET", f"api/orders/{request.match_info['id']}", read_order)
    return RepresentationResponse(request, json_representation(order))


async def list_orders(request: web.Request) -> web.StreamResponse:
    """`GET /api/orders?customer=&limit=&after=`: orders by id, a page at a time."""
    page = requests.query(request, Page)
    query = {name: str(value) for name, value in msgspec.to_builtins(page).items()}
    orders = await request.app[SERVICE].call(request, "GET", "api/orders", read_orders, query=query)
    return RepresentationResponse(request, json_representation(orders))


async def delete(request: web.Request) -> web.StreamResponse:
    """`DELETE /api/orders/{id}`: delete an order."""
    await request.app[SERVICE].call(request, "DELETE", f"api/orders/{request.match_info['id']}", read_nothing)
    return web.Response(status=HTTPStatus.NO_CONTENT)


async def stock(request: web.Request) -> web.StreamResponse:
    """`GET /api/stock/{item}`: how much there is of an item. Requests for the same item share calls."""
    path = f"api/stock/{request.match_info['item']}"
    return RepresentationResponse(request, await request.app[SERVICE].shared(request, path, read_stock))


def read_order(answer: client.Answer) -> Order:
    return answer.json(Order)


def read_orders(answer: client.Answer) -> Orders:
    return answer.json(Orders)


def read_nothing(_answer: client.Answer) -> None:
    """It is deleted: there is nothing more to know."""


def read_stock(answer: client.Answer) -> Representation:
    """The stock as the gateway sends it: made once for all requests that share the call."""
    return json_representation(answer.json(Stock), answer.timing)


async def description(request: web.Request) -> web.StreamResponse:
    """`GET /openapi.yaml`: the description of this API."""
    return RepresentationResponse(request, DESCRIPTION)


def application(options: Settings) -> web.Application:
    app = web.Application()

    async def service(app: web.Application) -> AsyncIterator[None]:
        async with client.Service("order_service", options, f"orders/{server.VERSION}") as app[SERVICE]:
            yield

    app.cleanup_ctx.append(service)
    app.add_routes(
        [
            web.get("/openapi.yaml", description),
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
    lifecycle.main("examples.orders.gateway", "The public API of the order service.", Settings, application)
