"""The application that the tests start: every name of it that they need outside its own folders.

A copy of the project changes this file, and keeps the rest of the kit and tests/chassis as they are.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kit import ROOT

DATABASE = "mydb"  # in a cluster of the tests' own


@dataclass(frozen=True)
class Pair:
    """A gateway, the service behind it, and the read that clients share."""

    name: str
    gateway: str  # its module, as in `python -m MODULE`
    service: str  # the same of the service behind it
    read_path: str  # of the shared read, at the gateway
    service_path: str  # the same at the service
    result_key: str  # of the value in the gateway's JSON answer
    service_key: str  # the same in the service's
    part: str  # the service in a problem's `part`
    called: str  # the service in a sentence
    schema: str  # SQL that makes its tables
    table: str  # that the read needs
    column: str  # that it reads
    identity: str  # the other columns that it needs, first the one by which it finds its row
    other_type: str  # another type that holds the column's values
    statement: str  # SQL that finds the value alone
    write: str  # SQL that makes its %s what the read finds
    increase: str  # SQL that adds 1 to it, where it is a number, and returns it
    sample: Any  # what it finds once `schema` was applied
    other: Any  # another value that it can find
    wrong_values: tuple[Any, ...]  # that the gateway takes for a mistake of the service
    missing: str  # type of the 404 while the table is empty
    beside: Mapping[str, Any] = field(default_factory=dict)  # what both answers hold beside the value

    @property
    def servers(self) -> tuple[str, str]:
        """Both modules."""
        return self.gateway, self.service

    def path(self, server: str) -> str:
        """Of the shared read, at the server with this module."""
        return {self.gateway: self.read_path, self.service: self.service_path}[server]

    def key(self, server: str) -> str:
        """Of the value, in the answers of the server with this module."""
        return {self.gateway: self.result_key, self.service: self.service_key}[server]

    def body(self, value: Any) -> str:
        """The service's JSON answer with this value."""
        return json.dumps({**self.beside, self.service_key: value})

    @property
    def good(self) -> str:
        """A valid JSON answer of the service."""
        return self.body(self.sample)

    @property
    def result(self) -> dict[str, Any]:
        """What the gateway makes of it."""
        return {**self.beside, self.result_key: self.sample}

    @property
    def words(self) -> set[str]:
        """Words that only this application uses."""
        names = {self.service, self.part, self.called.removeprefix("the "), self.table, self.missing, DATABASE}
        return {*names, self.read_path, self.service_path}


PAIRS: tuple[Pair, ...] = (
    Pair(
        name="messages",
        gateway="gateway",
        service="message_service",
        read_path="/api/string",
        service_path="/api/message",
        result_key="result",
        service_key="message",
        part="message_service",
        called="the message service",
        schema=(ROOT / "schema.sql").read_text(),
        table="messages",
        column="content",
        identity="id",
        other_type="varchar(5000)",
        statement="SELECT content FROM messages ORDER BY id LIMIT 1",
        write="UPDATE messages SET content = %s WHERE id = (SELECT min(id) FROM messages)",
        increase="UPDATE messages SET content = content::int + 1"
        " WHERE id = (SELECT min(id) FROM messages) RETURNING content::int",
        sample="Hello from PostgreSQL! This message was read from the database.",
        other="Another message.",
        wrong_values=(1, None, ["text"], "\ud800"),  # the last is valid in JSON, but no text
        missing="no-message",
    ),
    Pair(
        name="orders",
        gateway="examples.orders.gateway",
        service="examples.orders.order_service",
        read_path="/api/stock/coffee",
        service_path="/api/stock/coffee",
        result_key="quantity",
        service_key="quantity",
        part="order_service",
        called="the order service",
        schema=(ROOT / "examples/orders/schema.sql").read_text(),
        table="stock",
        column="quantity",
        identity="item",
        other_type="bigint",
        statement="SELECT quantity FROM stock WHERE item = 'coffee'",
        write="UPDATE stock SET quantity = %s WHERE item = 'coffee'",
        increase="UPDATE stock SET quantity = quantity + 1 WHERE item = 'coffee' RETURNING quantity",
        sample=500,
        other=42,
        wrong_values=("text", None, 1.5, [1]),
        missing="no-such-item",
        beside={"item": "coffee"},
    ),
)
PAIR = PAIRS[0]  # for tests for which one is enough
SCHEMA = "\n".join(pair.schema for pair in PAIRS)
