"""The command `--apply-schema`: create the table, and the role that can only read it.

Rules kept here: it waits for an unreachable database; several at once are safe; if the table already exists, it needs
only the right to read. It blocks: no server calls it.
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
# Errors that waiting does not cure. Only their text identifies them: psycopg2 has no code for errors while it connects.
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

    If that fails, it is enough that `reader` can already read. Returns what it did. Raises `psycopg2.Error`.
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
        if reader.password:  # hashed here, so that the database server's log cannot contain it
            verifier = encrypt_password(reader.password, reader.user, cursor.connection, "scram-sha-256")
            cursor.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(role, sql.Literal(verifier)))
        cursor.execute("COMMIT")


@contextlib.contextmanager
def _connect(dsn: str, login: Login) -> Iterator[Any]:
    """A cursor with each statement in its own transaction, so that nothing stays set in the session."""
    with contextlib.closing(psycopg2.connect(dsn, **login._asdict())) as connection:
        connection.autocommit = True
        yield connection.cursor()
