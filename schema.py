"""What `--apply-schema` does: makes the table, and the role that may only read it.

Rules kept here: it waits for a database that is away; several at once are safe, also from several databases of one
cluster; it needs no more rights than to read where the table is there already. It blocks: it is a command of its own.
"""

import contextlib
import time
from pathlib import Path
from typing import Any, NamedTuple

import psycopg2
from psycopg2 import errors, sql
from psycopg2.extensions import encrypt_password

import logs

FILE = Path(__file__).with_name("schema.sql")
LOCK = sql.SQL("SELECT pg_advisory_xact_lock(7236832837)")  # the lock of schema.sql; other databases have their own
GRANT = sql.SQL("GRANT SELECT ON messages TO {role}")  # all that the services may do
WAIT = 60.0  # seconds
INTERVAL = 0.5  # seconds between two tries
# What waiting does not change. Only the text tells: psycopg2 has no code of what happens while it connects.
REFUSALS = ("authentication failed", "password", "not permitted", "permission", "pg_hba.conf", "does not exist")
REFUSALS += ("no such database", "no such user", "certificate", "not support SSL")
# Others make or change the role at the same moment: roles belong to the cluster, and the lock to a database.
RACES = (errors.DuplicateObject, errors.UniqueViolation, errors.InternalError_)


class Login(NamedTuple):
    """A role, and its password, "" for none."""

    user: str
    password: str


def apply(dsn: str, owner: Login, reader: Login) -> str:
    """Log in as `owner` and apply schema.sql; if `reader` is another role, make it, and let it read.

    It is enough if `reader` can read already. Returns what was done. Raises `psycopg2.Error`.
    """
    deadline = time.monotonic() + WAIT
    while True:
        try:
            _change(dsn, owner, reader)
            return "applied schema.sql"
        except psycopg2.Error as error:
            failure = error
        if time.monotonic() > deadline or not _passes(failure):
            break
        time.sleep(INTERVAL)
    try:
        with _connect(dsn, reader) as cursor:
            cursor.execute("SELECT content FROM messages LIMIT 1")
    except psycopg2.Error:
        raise failure from None
    return f"schema.sql is not applied, but {reader.user} can read the table: {logs.describe(failure)}"


def _passes(error: psycopg2.Error) -> bool:
    """Whether another try may succeed."""
    refused = any(refusal in str(error) for refusal in REFUSALS)
    return isinstance(error, RACES) or (isinstance(error, psycopg2.OperationalError) and not refused)


def _change(dsn: str, owner: Login, reader: Login) -> None:
    with _connect(dsn, owner) as cursor:
        cursor.execute(FILE.read_text("utf-8"))
        if reader.user == owner.user:
            return
        role = sql.Identifier(reader.user)
        cursor.execute("SELECT FROM pg_roles WHERE rolname = %s", (reader.user,))
        create = [] if cursor.rowcount else [sql.SQL("CREATE ROLE {} LOGIN").format(role)]
        _execute(cursor, LOCK, *create, GRANT.format(role=role))
        if reader.password:  # hashed here, so that it never gets into a log of the server's
            verifier = encrypt_password(reader.password, reader.user, cursor.connection, "scram-sha-256")
            _execute(cursor, LOCK, sql.SQL("ALTER ROLE {} PASSWORD {}").format(role, sql.Literal(verifier)))


@contextlib.contextmanager
def _connect(dsn, login):
    with contextlib.closing(psycopg2.connect(dsn, **login._asdict())) as connection:
        connection.autocommit = True  # nothing begins a transaction but what is executed
        with connection.cursor() as cursor:
            yield cursor


def _execute(cursor: Any, *statements: sql.Composable) -> None:
    """Execute statements that are sent together: PostgreSQL makes them one transaction."""
    cursor.execute(sql.SQL("; ").join(statements))
