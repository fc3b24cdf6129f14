"""The commands `--apply-schema` and `--print-schema`: bring the database to this release's schema.

Rules kept here: what was applied is recorded in the transaction that applies it; where all is well, nothing is locked
or written; several at once are safe; nothing waits long for a lock, since whatever comes after it would wait, too; it
succeeds only if the service's role can log in and execute the service's statements. It blocks: no server calls it.
Tests: tests/chassis/test_schema.py.
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2 import errors
from psycopg2.extensions import encrypt_password

from chassis import database, logs

NAME = "public"  # of the schema that everything is in, whatever the roles' search path begins with
GIVE_UP = 60.0  # seconds of trying; PgBouncer refuses for 15 a login that has failed once
PAUSE = 0.5  # seconds between two tries, for whatever has waited meanwhile
# Requests wait for a lock that is waited for, and for one that is held.
LIMITS = "SET LOCAL lock_timeout = '200ms'; SET LOCAL statement_timeout = '1s';\n"
# The lock's number is of our own choice: it lets in one transaction at a time.
BEGIN_CHANGE = f"""{LIMITS}SET LOCAL search_path = {NAME}; SELECT pg_advisory_xact_lock(7236832837);
CREATE TABLE IF NOT EXISTS applied_schemas (sha256 text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now());
"""
RECORD = "INSERT INTO applied_schemas VALUES ('{}') ON CONFLICT DO NOTHING;\n"
RECORDED = f"SELECT FROM {NAME}.applied_schemas WHERE sha256 = %s"

Login = tuple[str, str]
"""A role and its password, "" for none."""


@dataclasses.dataclass(frozen=True)
class Schema:
    """A service's schema: the file, which is idempotent; the rights that the service's role needs on each table; and
    the statements that it executes.
    """

    path: Path
    grants: Mapping[str, str]
    statements: Sequence[str]

    @property
    def actions(self) -> Mapping[str, tuple[Callable[[database.Settings], str], str]]:
        """The options of the command line, for `lifecycle.main`."""
        return {
            "--apply-schema": (self.apply, "bring the database to this release's schema, and exit"),
            "--print-schema": (self.script, "print that as SQL for psql, and exit"),
        }

    def apply(self, options: database.Settings) -> str:
        """Apply the file as `DB_OWNER`, if that is necessary, and check that `DB_USER` can do its work.

        Returns what was done. Raises `psycopg2.Error` or `OSError`.
        """
        dsn, reader = options.dsn("apply_schema"), (options.db_user, options.password())
        owner = (options.db_owner, options.db_owner_password or "") if options.db_owner else reader
        check = partial(self._check, dsn, reader)
        try:
            _retry(check, errors.LockNotAvailable)
            return f"{self.path.name} had been applied"
        except psycopg2.Error as error:
            fault, locked_out = logs.describe(error), isinstance(error, psycopg2.OperationalError)
            if locked_out and owner == reader:
                raise
        try:
            _retry(partial(self._change, dsn, owner, reader, locked_out=locked_out), errors.LockNotAvailable)
        except psycopg2.Error as error:
            hint = "" if options.db_owner else "; DB_OWNER names a role that can"
            reason = f"{fault}; {owner[0]} cannot change that: {logs.describe(error)}{hint}"
            raise psycopg2.OperationalError(reason) from error
        _retry(check, psycopg2.OperationalError)
        return f"applied {self.path.name} in the schema {NAME}"

    def script(self, options: database.Settings) -> str:
        """What `apply` does, as SQL for psql and a role that may do it. `DB_USER` has to exist."""
        change = f"{BEGIN_CHANGE}{self._file_and_record()}{self._grants(options.db_user)}"
        return f"BEGIN; SET LOCAL client_encoding = 'UTF8'; {change}COMMIT;"

    def _check(self, dsn: str, reader: Login) -> None:
        """Raise `psycopg2.Error` unless the file was applied, and the service's role can execute every statement."""
        with _transaction(dsn, reader) as cursor:
            cursor.execute(LIMITS)
            cursor.execute(RECORDED, (self._sha256(),))
            if not cursor.rowcount:
                raise psycopg2.ProgrammingError(f"{self.path.name} of this release has not been applied")
            for statement in self.statements:  # planned, with a NULL for each argument
                cursor.execute("EXPLAIN " + statement, [None] * statement.replace("%%", "").count("%s") or None)

    def _change(self, dsn: str, owner: Login, reader: Login, *, locked_out: bool) -> None:
        """Apply the file, unless others have done so meanwhile, and let the service's role do its work."""
        with _transaction(dsn, owner) as cursor:
            cursor.execute(BEGIN_CHANGE)
            cursor.execute(RECORDED, (self._sha256(),))
            recorded = cursor.rowcount
            cursor.execute("SELECT to_regclass(name) FROM unnest(%s) AS name", (list(self.grants),))
            if not recorded or (None,) in cursor.fetchall():  # a table has been dropped since
                cursor.execute(self._file_and_record())
            if locked_out:
                _let_in(cursor, *reader)
            if owner != reader:
                cursor.execute(self._grants(reader[0]))

    def _sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def _file_and_record(self) -> str:
        return f"{self.path.read_text('utf-8')}\n; {RECORD.format(self._sha256())}"

    def _grants(self, user: str) -> str:
        tables = {"applied_schemas": "SELECT", **self.grants}.items()
        grants = [f"{rights} ON TABLE {table}" for table, rights in tables]
        return "".join(f"GRANT {grant} TO {_quoted(user)};\n" for grant in (f"USAGE ON SCHEMA {NAME}", *grants))


def _let_in(cursor: Any, user: str, password: str) -> None:
    """Make the service's role one that can log in, with this password."""
    name, database_name = _quoted(user), _quoted(cursor.connection.info.dbname)
    cursor.execute("SELECT FROM pg_roles WHERE rolname = %s", (user,))
    if not cursor.rowcount:
        cursor.execute(f"CREATE ROLE {name}")
    cursor.execute(f"ALTER ROLE {name} LOGIN VALID UNTIL 'infinity'")
    if password:  # hashed here, so that the database server's log cannot contain it
        verifier = encrypt_password(password, user, cursor.connection, "scram-sha-256")
        cursor.execute(f"ALTER ROLE {name} PASSWORD '{verifier}'")
    cursor.execute(f"GRANT CONNECT ON DATABASE {database_name} TO {name}")


def _quoted(name: str) -> str:
    return '"{}"'.format(name.replace('"', '""'))


def _retry(action: Callable[[], None], *retried: type[Exception]) -> None:
    deadline = time.monotonic() + GIVE_UP
    while True:
        try:
            return action()
        except retried:
            if time.monotonic() > deadline:
                raise
        time.sleep(PAUSE)


@contextlib.contextmanager
def _transaction(dsn: str, login: Login) -> Iterator[Any]:
    """A cursor in a transaction on a connection of its own. Raises `psycopg2.Error`."""
    try:
        connection = psycopg2.connect(dsn, user=login[0], password=login[1])
    except UnicodeDecodeError as error:  # before it knows the client's encoding, the server writes in its own
        raise psycopg2.OperationalError(error.object.decode(errors="replace")) from None
    with contextlib.closing(connection), connection:
        yield connection.cursor()
