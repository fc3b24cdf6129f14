"""What `--apply-schema` does: make the table, and the role that may only read it.

Rules kept here: it waits for a database that is away; several at once are safe; where the table is there already, it
needs no more rights than to read. It blocks: it is no part of a server.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import encrypt_password

import logs

WAIT = 60.0  # seconds
INTERVAL = 0.5  # seconds between two attempts
# What waiting does not change. Only the text says which: there is no code for what happens while psycopg2 connects.
REFUSALS = (
    *("authentication failed", "no password supplied", "not permitted", "permission denied", "pg_hba.conf"),
    *("does not exist", "no such database", "no such user", " certificate", "does not support SSL"),
)


class Login(NamedTuple):
    """A role and its password, "" for none."""

    user: str
    password: str


def apply(dsn: str, owner: Login, reader: Login) -> str:
    """Apply schema.sql as `owner`, and let `reader`, if that is another role, log in and read.

    It is enough if `reader` can read already. Returns what was done. Raises `psycopg2.Error`.
    """
    deadline = time.monotonic() + WAIT
    while True:
        try:
            _change(dsn, owner, reader)
            return "applied schema.sql"
        except psycopg2.Error as error:
            failure = error
        if not _is_away(failure) or time.monotonic() > deadline:
            break
        time.sleep(INTERVAL)
    try:
        with _connect(dsn, reader) as cursor:
            cursor.execute("SELECT content FROM messages LIMIT 1")
    except psycopg2.Error:
        raise failure from None
    return f"left the database as it is, since {reader.user} can read the table: {logs.describe(failure)}"


def _is_away(error: psycopg2.Error) -> bool:
    return isinstance(error, psycopg2.OperationalError) and not any(text in str(error) for text in REFUSALS)


def _change(dsn: str, owner: Login, reader: Login) -> None:
    with _connect(dsn, owner) as cursor:
        cursor.execute(Path(__file__).with_name("schema.sql").read_text("utf-8"))
        if owner.user == reader.user:
            return
        role = sql.Identifier(reader.user)
        cursor.execute("BEGIN; SELECT pg_advisory_xact_lock(7236832837)")  # schema.sql's
        cursor.execute("SELECT FROM pg_roles WHERE rolname = %s", (reader.user,))
        if not cursor.rowcount:
            cursor.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
        cursor.execute(sql.SQL("GRANT SELECT ON messages TO {}").format(role))
        if reader.password:  # hashed here, so that no log of the server's can hold it
            verifier = encrypt_password(reader.password, reader.user, cursor.connection, "scram-sha-256")
            cursor.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(role, sql.Literal(verifier)))
        cursor.execute("COMMIT")


@contextlib.contextmanager
def _connect(dsn: str, login: Login) -> Iterator[Any]:
    """A cursor whose statements are transactions of their own, and leave nothing set in the session."""
    with contextlib.closing(psycopg2.connect(dsn, **login._asdict())) as connection:
        connection.autocommit = True
        yield connection.cursor()
