"""The orders' API, through both servers: what each request does, and what is refused.

What a client learns when something fails is in test_writes.py.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openapi_spec_validator
import pytest
import yaml
from conftest import close_all
from kit import ROOT, eventually, reserve_port
from kit.client import get as http_get
from kit.postgres import Database, Provider
from kit.processes import Server, run, wait_listening
from orders import PROBLEM, Orders

from chassis import settings
from examples.orders import gateway

FILE = ROOT / "examples/orders/openapi.yaml"


@pytest.fixture(scope="module")
def servers(provider: Provider) -> Iterator[Orders]:
    database = provider.create()
    service = Server("order_service", "-m", "examples.orders.order_service", **database.settings())
    gateway = Server("gateway", "-m", "examples.orders.gateway", DOWNSTREAM_URL=wait_listening(service).url)
    yield Orders(wait_listening(gateway), service, database)
    close_all([service, gateway])
    provider.take_back(database)


@pytest.fixture
def orders(servers: Orders) -> Orders:
    """Both servers, with no order and the sample stock."""
    servers.forget()
    return servers


@pytest.fixture(params=["gateway", "service"])
def each(request: pytest.FixtureRequest, orders: Orders) -> Server:
    """Each of the two servers."""
    server: Server = getattr(orders, request.param)
    return server


async def test_an_order_and_its_stock(orders: Orders) -> None:
    """What is ordered is taken from the stock, and goes back when the order is deleted."""
    added = await orders.order("tea", 3)
    order = added.json()
    assert (added.status, added.headers["Location"]) == (201, f"/api/orders/{order['id']}")
    assert order == {"id": order["id"], "customer": "Ada", "item": "tea", "quantity": 3}
    assert (await orders.ask("GET", added.headers["Location"])).json() == order
    assert (await orders.ask("GET", "/api/stock/tea")).json() == {"item": "tea", "quantity": 997}
    assert (await orders.ask("DELETE", added.headers["Location"])).status == 204
    for method in ("GET", "DELETE"):
        gone = await orders.ask(method, added.headers["Location"])
        assert (gone.status, gone.json()["type"]) == (404, PROBLEM + "no-such-order")
    assert (await orders.ask("GET", "/api/stock/tea")).json() == {"item": "tea", "quantity": 1000}


async def test_what_is_not_there_is_not_sold(orders: Orders) -> None:
    """A 409 if there is too little; a 422 that names the place if there is no such item; and nothing is changed."""
    too_little = await orders.order("cup", 21)
    assert (too_little.status, too_little.json()["type"]) == (409, PROBLEM + "too-little-stock")
    unknown = await orders.order("unicorn")
    assert (unknown.status, unknown.json()["type"]) == (422, PROBLEM + "unknown-item")
    assert "$.item" in unknown.json()["detail"]
    missing = await orders.ask("GET", "/api/stock/unicorn")
    assert (missing.status, missing.json()["type"]) == (404, PROBLEM + "no-such-item")
    assert orders.rows() == 0
    assert (orders.in_all("cup"), (await orders.ask("GET", "/api/stock/cup")).json()["quantity"]) == (20, 20)


async def test_orders_cannot_take_more_than_there_is(orders: Orders) -> None:
    """Of thirty at once for a stock of twenty, twenty are accepted."""
    answers = await asyncio.gather(*(orders.order("cup", 1) for _ in range(30)))
    assert sorted(answer.status for answer in answers) == [201] * 20 + [409] * 10
    assert orders.in_all("cup") == 20
    for answer in answers:
        if answer.status == 201:
            assert (await orders.ask("DELETE", answer.headers["Location"])).status == 204
    assert orders.in_all("cup") == 20


async def test_a_key_gives_one_order(orders: Orders, each: Server) -> None:
    """However often it is sent, one after another or all at once; with other contents, it is refused."""
    answers = [await orders.order(server=each, Idempotency_Key="a") for _ in range(2)]
    answers += await asyncio.gather(*(orders.order(server=each, Idempotency_Key="a") for _ in range(10)))
    assert {(answer.status, answer.body) for answer in answers} == {(201, answers[0].body)}
    other = await orders.order(quantity=3, server=each, Idempotency_Key="a")
    assert (other.status, other.json()["type"]) == (409, PROBLEM + "key-reused")
    assert (await orders.order(server=each, Idempotency_Key="b")).json()["id"] != answers[0].json()["id"]
    assert (await orders.ask("GET", "/api/stock/tea")).json()["quantity"] == 1000 - 2 * 2
    for wrong in ("", "a b", "x" * 201, "é"):
        refused = await orders.order(server=each, Idempotency_Key=wrong)
        assert (refused.status, "Idempotency-Key" in refused.json()["detail"]) == (422, True), wrong


SLOW_INSERTS = """
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END';
CREATE TRIGGER slow AFTER INSERT ON orders FOR EACH STATEMENT EXECUTE FUNCTION wait()
"""


async def test_a_key_is_free_when_its_order_is_deleted(orders: Orders) -> None:
    """Even while a repeat is looking for that order: it makes a new one."""
    first = await orders.order(Idempotency_Key="a")
    orders.database.sql(SLOW_INSERTS)
    try:
        repeat = asyncio.create_task(orders.order(Idempotency_Key="a"))
        sleeping = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        await eventually(lambda: bool(orders.database.sql(sleeping)))
        assert (await orders.ask("DELETE", first.headers["Location"])).status == 204
        again = await repeat
    finally:
        orders.database.sql("DROP FUNCTION wait CASCADE")
    assert again.status == 201
    assert again.json()["id"] != first.json()["id"]
    assert (await orders.ask("GET", "/api/stock/tea")).json()["quantity"] == 1000 - 2


async def test_a_list_comes_in_pages(orders: Orders) -> None:
    """Each order once, in the order of the ids; only a customer's if one is named."""
    for quantity in range(1, 6):
        await orders.order("tea", quantity)
    orders.database.sql("INSERT INTO orders (customer, item, quantity) VALUES ('Bob & Co', 'tea', 6)")
    path, pages = "/api/orders?limit=2", []
    while True:
        page = (await orders.ask("GET", path)).json()
        pages.append([order["quantity"] for order in page["orders"]])
        if page["next"] is None:
            break
        path = f"/api/orders?limit=2&after={page['next']}"
    assert pages == [[1, 2], [3, 4], [5, 6]]
    of_one = (await orders.ask("GET", "/api/orders?customer=Bob%20%26%20Co")).json()
    assert ([order["quantity"] for order in of_one["orders"]], of_one["next"]) == ([6], None)
    assert (await orders.ask("GET", "/api/orders?customer=Eve")).json() == {"orders": [], "next": None}


GOOD = {"customer": "Ada", "item": "tea", "quantity": 2}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"quantity": 0}, "$.quantity"),
        ({"quantity": 1001}, "$.quantity"),
        ({"quantity": "2"}, "$.quantity"),
        ({"quantity": 1.5}, "$.quantity"),
        ({"customer": ""}, "$.customer"),
        ({"customer": "x" * 201}, "$.customer"),
        ({"customer": "a\0b"}, "$.customer"),
        ({"item": None}, "$.item"),
        ({"more": 1}, "more"),
    ],
    ids=str,
)
async def test_a_wrong_order_is_refused_with_the_place(
    orders: Orders, each: Server, change: dict[str, Any], place: str
) -> None:
    """By both servers; nothing is stored."""
    answer = await orders.ask("POST", "/api/orders", GOOD | change, each)
    assert (answer.status, place in answer.json()["detail"]) == (422, True), answer.body
    assert orders.rows() == 0


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=x", "after=-1", f"after={10**18}", "customer=", "limit=1&limit=2", "x=1"]
)
async def test_a_wrong_page_is_refused_with_the_place(orders: Orders, each: Server, query: str) -> None:
    """By both servers."""
    answer = await orders.ask("GET", f"/api/orders?{query}", server=each)
    assert (answer.status, query.partition("=")[0] in answer.json()["detail"]) == (422, True), answer.body


@pytest.mark.parametrize(
    "name", ["0", "-1", "x", "1.0", "01", "%D9%A3", "9" * 19, "9" * 5000, "..", "1%2F..", "%2e%2e"]
)
async def test_what_is_no_id_names_no_order(orders: Orders, each: Server, name: str) -> None:
    """404, whatever the method."""
    for method in ("GET", "DELETE"):
        answer = await orders.ask(method, f"/api/orders/{name}", server=each)
        assert answer.status in ((404, 405) if name in ("..", "%2e%2e") else (404,)), (method, answer.body)


@pytest.mark.parametrize("item", ["..", ".", "a/b", "../../readyz", "a?b", "a#b", "%2F", "50%", "ü+ ;,", "\\", "tea "])
async def test_an_item_is_only_ever_itself(orders: Orders, each: Server, item: str) -> None:
    """Whatever it is called, its own stock is the answer, or that there is nothing there; never another path's."""
    orders.database.sql("INSERT INTO stock VALUES (%s, 7) ON CONFLICT DO NOTHING", item)
    escaped = "".join(f"%{byte:02X}" for byte in item.encode())
    answer = await orders.ask("GET", f"/api/stock/{escaped}", server=each)
    if answer.status == 200:
        assert answer.json() == {"item": item, "quantity": 7}
    else:
        assert (answer.status, each is orders.gateway or item in ("..", ".")) == (404, True), answer.body


async def test_an_item_without_a_name_is_nothing(orders: Orders, each: Server) -> None:
    """An empty one is not there; one with a NUL character cannot be."""
    assert (await orders.ask("GET", "/api/stock/", server=each)).status == 404
    assert (await orders.ask("GET", "/api/stock/a%00b", server=each)).status == 422


async def test_a_locked_table_leaves_room_for_another(orders: Orders) -> None:
    """While a hundred clients wait for the stock, orders are read as ever."""
    path = (await orders.order()).headers["Location"]
    holder = orders.database.connect()
    holder.cursor().execute("LOCK TABLE stock")
    waiting = [asyncio.create_task(orders.ask("GET", f"/api/stock/item{number % 20}")) for number in range(100)]
    await eventually(lambda: orders.database.sql("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
    while not any(task.done() for task in waiting):
        assert (await orders.ask("GET", path)).status == 200
    holder.close()
    assert {answer.status for answer in await asyncio.gather(*waiting)} <= {404, 504}


# ---- its description -------------------------------------------------------------------------------------------


def test_the_description_is_valid_and_complete() -> None:
    """Tools that read OpenAPI 3.1 can read it, and it lists the gateway's routes."""
    description = yaml.safe_load(FILE.read_text())
    openapi_spec_validator.validate(description)
    app = gateway.application(settings.read(gateway.Settings, {}))
    assert description["paths"].keys() == {resource.canonical for resource in app.router.resources()}


async def test_the_gateway_serves_its_description(orders: Orders) -> None:
    """Unchanged."""
    assert (await orders.ask("GET", "/openapi.yaml")).body == FILE.read_bytes()


def test_schemathesis_finds_nothing(orders: Orders, tmp_path: Path) -> None:
    """Whatever it sends, the answers match the description."""
    program = Path(sys.executable).with_name("schemathesis")
    options = ["--url", orders.gateway.url, "--max-examples=4", "--generation-deterministic", "--no-color"]
    # An item that there is not cannot be told by the schema, and is a 422.
    excluded = ["--exclude-checks", "positive_data_acceptance"]
    ended = subprocess.run(
        [program, "run", FILE, *options, *excluded],
        cwd=tmp_path,  # it leaves files behind
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Operations:       9 selected / 9 total" in ended.stdout
    assert orders.in_all() == 1000


# ---- make run --------------------------------------------------------------------------------------------------


async def test_make_run_starts_the_example(empty_database: Database) -> None:
    """With EXAMPLE=orders, both URLs that it prints work, on tables that it has made."""
    with reserve_port() as first, reserve_port() as second:
        ports = {"GATEWAY_PORT": first.getsockname()[1], "MESSAGE_SERVICE_PORT": second.getsockname()[1]}
    settings: dict[str, Any] = {"EXAMPLE": "orders", "PORT": None, **ports, **empty_database.settings()}
    stack = Server("local_stack", "-u", "-m", "tools.local_stack", **settings)
    try:
        await eventually(lambda: "Ctrl-C" in "".join(stack.noise), within=30)
        urls = [word for word in "".join(stack.noise).split() if word.startswith("http://")]
        assert [(await http_get(url)).json() for url in urls] == [
            {"orders": [], "next": None},
            {"item": "tea", "quantity": 1000},
        ]
        os.killpg(stack.pid, signal.SIGINT)
        assert await stack.exit_status() == 0
    finally:
        stack.noise.clear()
        stack.close()


async def test_an_example_that_there_is_not_is_one_clear_line() -> None:
    """It names those that there are."""
    done = await asyncio.to_thread(run, "-m", "tools.local_stack", EXAMPLE="order")
    assert (done.returncode, done.stderr) == (1, "EXAMPLE: 'order' is not one of orders\n")
