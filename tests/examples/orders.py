"""The example's two servers as its tests see them: requests to them, and what their database holds."""

import json
from dataclasses import dataclass
from typing import Any

from kit.client import Answer, connection
from kit.postgres import Database
from kit.processes import Server

PROBLEM = "urn:problem-type:"


@dataclass
class Orders:
    """Both servers, and their database."""

    gateway: Server
    service: Server
    database: Database

    async def ask(
        self, method: str, path: str, body: Any = None, server: Server | None = None, **headers: str
    ) -> Answer:
        """One request to the gateway, or to the `server` given; `headers` with _ for -."""
        content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"Content-Type": "application/json"} if content else {}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        async with connection((server or self.gateway).url) as client:
            return await client.get(path, method, fields, content)

    async def order(self, item: str = "tea", quantity: int = 2, server: Server | None = None, **headers: str) -> Answer:
        """Order something."""
        body = {"customer": "Ada", "item": item, "quantity": quantity}
        return await self.ask("POST", "/api/orders", body, server, **headers)

    def rows(self) -> int:
        """How many orders are stored."""
        return int(self.database.sql("SELECT count(*) FROM orders")[0][0])

    def forget(self) -> None:
        """Go back to the sample stock, and no orders."""
        self.database.sql("TRUNCATE orders; UPDATE stock SET quantity = 1000 WHERE item = 'tea'")

    def in_all(self, item: str = "tea") -> int:
        """The stock plus the orders of an item."""
        return int(
            self.database.sql(
                "SELECT quantity + (SELECT coalesce(sum(quantity), 0) FROM orders WHERE item = %s)"
                " FROM stock WHERE item = %s",
                item,
                item,
            )[0][0]
        )
