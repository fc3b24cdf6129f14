"""Connections to PostgreSQL that are made when they are needed, and made again when they are no good.

Rules kept here: nothing blocks the event loop; address and password are read for each new connection, since both may
have changed; whatever stands in between may hand on its backends, so that nothing is set or prepared on one that is
not this connection's alone.
"""

import asyncio
import hashlib
import os
from collections.abc import Callable
from typing import Any

import aiopg
import psycopg2
from psycopg2.extensions import STATUS_READY, QueryCanceledError, make_dsn, parse_dsn
from psycopg2.extensions import connection as psycopg2_connection

import metrics
import threads

FAILURES = (psycopg2.Error, OSError, RuntimeError)  # by family: psycopg2's codes are missing where it matters
CLIENT_CHECK_INTERVAL = 0.1  # seconds in which PostgreSQL sees that nobody waits for a query any more, and ends it
# Limits a session in time, where the backend is its own: a pooler gives another number when a session begins.
LIMIT = (
    "SELECT set_config('statement_timeout', %s, false), set_config('client_connection_check_interval', %s, false)"
    " WHERE pg_backend_pid() = %s"
)
# What libpq would try on another socket; and, should that fail, what it has tried before, to learn why that failed.
SECOND_TRIES = {"prefer": ("disable", "require"), "allow": ("require", "disable")}

Row = tuple[Any, ...]


class Connection(psycopg2_connection):  # type: ignore[misc]  # psycopg2 has no types
    """What psycopg2 makes for aiopg: it fails where aiopg would wait for ever, or leave a request without an answer."""

    _inode: int | None = None  # of its socket

    def poll(self) -> int:
        """Raises `psycopg2.NotSupportedError` when libpq goes on connecting on another socket than aiopg watches."""
        try:
            state: int = super().poll()
        except QueryCanceledError as error:  # aiopg would raise CancelledError, as if the client had left
            raise psycopg2.OperationalError(str(error)) from None
        if self.status != STATUS_READY:
            watched, self._inode = self._inode, os.fstat(self.fileno()).st_ino
            if watched not in (None, self._inode):
                raise psycopg2.NotSupportedError("libpq went on on another socket")
        return state


class Slot:
    """One connection, kept while it is good: an aiopg pool of one.

    One for each, since aiopg holds a pool's lock while it connects: in a pool of several, one slow connect would
    hold up all others.
    """

    def __init__(self, dsn: str, password: Callable[[], str], timeout: float, resolver: threads.Resolver) -> None:
        """`password` reads it, and may block; `timeout` is for connecting, in seconds."""
        self._dsn = dsn
        self._password = password
        self._timeout = timeout
        self._resolver = resolver
        self._pool: aiopg.Pool
        self._connect_with: dict[str, str | None] = {}
        self._connection: aiopg.Connection | None = None
        self._cursor: aiopg.Cursor
        self._owns_backend = False  # whether each statement meets the same backend, and nobody else's do
        self._prepared: dict[str, str] = {}  # statements that the backend has prepared, and their names

    async def open(self) -> None:
        """Prepare; this connects to nothing yet."""
        self._pool = await aiopg.create_pool(
            self._dsn,
            minsize=0,
            maxsize=1,
            timeout=None,  # type: ignore[arg-type]  # a query ends when nobody waits for it any more, see `coalescing`
            enable_hstore=False,  # which would ask for its types
            connection_factory=lambda dsn, async_: Connection(make_dsn(dsn, **self._connect_with), async_),
        )

    def close(self) -> None:
        self._pool.terminate()  # not `wait_closed`, which waits for ever for a connection that is being made

    @property
    def connected(self) -> bool:
        return self._connection is not None and not self._connection.closed

    async def fetch(self, statement: str, args: tuple[object, ...] = (), *, once: bool = False) -> list[Row]:
        """Return the rows that a statement yields, on a new connection where there is none or the old one is no good.

        The statement may run twice, unless it is to run `once`. Raises `psycopg2.Error`, `OSError` or (aiopg's own)
        `RuntimeError`.
        """
        if once:
            await self.fetch("SELECT 1")  # finds out whether the connection is still good
        if self.connected:
            try:
                return await self._execute(statement, args)
            except FAILURES:
                # The connection died while idle, or the statement was prepared for a table that has changed since.
                if once or (self.connected and statement not in self._prepared):
                    raise
        await self._connect()
        return await self._execute(statement, args)

    async def _execute(self, statement: str, args: tuple[object, ...]) -> list[Row]:
        cursor = self._cursor
        try:
            if args or not self._owns_backend:
                await cursor.execute(statement, args or None)
            else:
                await self._execute_prepared(statement)
        except asyncio.CancelledError:
            # aiopg has closed the connection. This slot is taken until the server has noticed, lest the database work
            # on more queries than there are slots.
            await asyncio.sleep(CLIENT_CHECK_INTERVAL)
            raise
        return await cursor.fetchall() if cursor.description else []

    async def _execute_prepared(self, statement: str) -> None:
        """Planning takes a third of the time of a query as small as ours, so it is done once for each connection."""
        name = self._prepared.get(statement)
        if name is None:  # so late, since it needs the table
            # Named by its text, so that no other statement can ever be executed in its place.
            name = f"messages_{hashlib.sha256(statement.encode()).hexdigest()[:16]}"
            await self._cursor.execute(f"PREPARE {name} AS {statement}")
            self._prepared[statement] = name
        await self._cursor.execute(f"EXECUTE {name}")
        if not self._cursor.rowcount:
            # EXECUTE's snapshot is older than its lock: when it had to wait for a table that was rewritten or made
            # again, it sees none of the rows. A plain statement's snapshot is taken after the lock.
            await self._cursor.execute(statement)

    # ---- connecting --------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        """Try one address after the other. libpq would look them up in the event loop, and try them unwatched."""
        password = await threads.call(self._password)
        addresses = await self._addresses()
        causes = []
        for address in addresses:
            try:
                async with asyncio.timeout(self._timeout / len(addresses)):
                    await self._connect_to(hostaddr=address, password=password)
                return
            except FAILURES as error:
                self._drop()
                metrics.CONNECT_FAILURES.inc()
                causes.append(str(error).strip() or "no answer in time")
                if address == addresses[-1]:
                    raise type(error)("; ".join(causes)) from error

    async def _addresses(self) -> list[str | None]:
        target = parse_dsn(self._dsn)
        if target["host"].startswith("/"):
            return [None]  # a socket folder has none
        try:
            found = await self._resolver.resolve(target["host"], int(target["port"]))
        except OSError as error:
            raise OSError(f"could not look up {target['host']}: {error.strerror}") from error
        return [address["host"] for address in found]

    async def _connect_to(self, **target: str | None) -> None:
        """Connect as libpq does, with TLS or without; its try on another socket becomes a connection of its own."""
        try:
            return await self._acquire(**target)
        except psycopg2.NotSupportedError:
            causes: list[str] = []
        mode = parse_dsn(self._dsn)["sslmode"]
        for sslmode in SECOND_TRIES.get(mode, (mode,)):
            try:
                return await self._acquire(**target, sslmode=sslmode)
            except psycopg2.OperationalError as error:
                causes.insert(0, str(error).strip())
        raise psycopg2.OperationalError("; ".join(dict.fromkeys(causes)))

    async def _acquire(self, **connect_with: str | None) -> None:
        self._drop()
        self._connect_with = connect_with
        self._connection = await self._pool.acquire()
        self._cursor = await self._connection.cursor()
        # The server's limits are later than this side's, which have the better answer.
        limits = f"{self._timeout + 1}s", f"{CLIENT_CHECK_INTERVAL}s"
        await self._cursor.execute(LIMIT, (*limits, self._connection.raw.get_backend_pid()))
        self._owns_backend = self._cursor.rowcount == 1

    def _drop(self) -> None:
        self._prepared.clear()
        if self._connection:
            if not self._connection.closed:  # aiopg would stop watching a socket that others may have got since
                self._connection.close()
            self._pool.release(self._connection)
            self._connection = None
