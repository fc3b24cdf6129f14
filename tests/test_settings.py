"""Settings and command line: wrong ones are told all at once before anything listens; what is told is true."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Start
from kit import ROOT, eventually, reserve_port
from kit.client import get
from kit.postgres import Database
from kit.processes import run

WRONG = {
    "PORT": ["x", "-1", "65536", "1.5"],
    "LOG_LEVEL": ["loud"],
    "LOG_FORMAT": ["xml"],
    "ACCESS_LOG": ["some"],
    "DRAIN_SECONDS": ["-1", "soon", "nan"],
    "SHUTDOWN_SECONDS": ["-1", "inf", "1e9"],
}
WRONG_GATEWAY = WRONG | {
    "DOWNSTREAM_URL": ["nonsense", "ftp://host", "http://", "http://host:port", "http://h?q=1", "//host"],
    "DOWNSTREAM_TIMEOUT": ["0", "-1", "nan", "long"],
}
WRONG_SERVICE = WRONG | {
    "DB_PORT": ["x", "65536"],
    "DB_PASSWORD_FILE": ["/nowhere"],
    "DB_SSLMODE": ["maybe"],
    "DB_SSLROOTCERT": ["/nowhere"],
    "DB_POOL_SIZE": ["0", "1.5", "-4", "many"],
    "DB_TIMEOUT": ["0", "-1", "nan"],
}
SERVERS = {"gateway": WRONG_GATEWAY, "message_service": WRONG_SERVICE}
BOTH = pytest.mark.parametrize("name", SERVERS)


@BOTH
def test_wrong_settings_are_told_all_at_once(name: str) -> None:
    """One line for each, with its name, what it holds and what is expected; exit status 2."""
    wrong = SERVERS[name]
    for round_ in range(max(map(len, wrong.values()))):
        settings: dict[str, Any] = {variable: values[round_ % len(values)] for variable, values in wrong.items()}
        ended = run("-m", name, **settings)
        assert (ended.returncode, ended.stdout) == (2, "")
        lines = ended.stderr.splitlines()
        assert len(lines) == len(settings), ended.stderr
        for variable, value in settings.items():
            (line,) = [line for line in lines if re.search(rf"\b{variable}\b", line)]
            assert value in line
            assert len(line) > len(variable) + len(value) + 20  # and what is expected


@BOTH
def test_wrong_settings_are_told_before_a_port_in_use(name: str) -> None:
    """Nothing listens until all settings are right."""
    with reserve_port() as taken:
        taken.listen()
        ended = run("-m", name, PORT=taken.getsockname()[1], LOG_LEVEL="loud")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)


@BOTH
async def test_an_empty_variable_is_not_set(start: Start, name: str) -> None:
    """As Compose and Kubernetes pass what somebody left out."""
    server = await start(name, **dict.fromkeys(set(SERVERS[name]) - {"PORT", "LOG_FORMAT"}, ""))
    assert (await get(server.url + "/healthz")).status == 200


@BOTH
def test_help_tells_every_setting(name: str) -> None:
    """Each variable of the server and of no other, with its default."""
    ended = run("-m", name, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    other = {"gateway": WRONG_SERVICE, "message_service": WRONG_GATEWAY}[name]
    for variable in SERVERS[name].keys() | other.keys() | {"HOST"}:
        told = re.search(rf"^\s+{variable}\b", ended.stdout, re.MULTILINE)
        assert bool(told) == (variable in SERVERS[name] or variable == "HOST"), variable
    for default in {"gateway": ["http://localhost:8001", "8000"], "message_service": ["5432", "mydb", "8001"]}[name]:
        assert default in ended.stdout


@BOTH
def test_an_unknown_argument_is_an_error(name: str) -> None:
    """With a hint at what there is, and exit status 2."""
    ended = run("-m", name, "--nonsense")
    assert ended.returncode == 2
    assert "usage" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_the_schema_is_applied_once_by_ten_at_a_time(empty_database: Database) -> None:
    """All exit with 0, the samples are there once; a message that was changed since is kept."""

    def apply() -> int:
        ended = run("-m", "message_service", "--apply-schema", **empty_database.settings(), within=60)
        assert "Traceback" not in ended.stderr
        return ended.returncode

    # Each is held where it is about to create the table, so that all ten would, if they did not wait for each other.
    together = empty_database.connect()
    together.cursor().execute("LOCK TABLE pg_class IN SHARE MODE")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with ThreadPoolExecutor(10) as threads:
        applying = [threads.submit(apply) for _ in range(10)]
        try:
            await eventually(lambda: empty_database.sql(waiting) == [(10,)], within=30)
        finally:
            together.close()
    assert [each.result() for each in applying] == [0] * 10
    (first,) = empty_database.sql("SELECT content FROM messages ORDER BY id LIMIT 1")[0]
    assert first.startswith("Hello from PostgreSQL!")
    assert empty_database.sql("SELECT count(*) FROM messages") == [(3,)]
    empty_database.set_message("mine")
    assert apply() == 0
    assert empty_database.sql("SELECT content FROM messages ORDER BY id LIMIT 1") == [("mine",)]


async def test_a_schema_that_can_not_be_applied_is_one_line(empty_database: Database) -> None:
    """And exit status 1: here there is no such database."""
    settings = empty_database.settings(DB_NAME="nowhere")
    ended = run("-m", "message_service", "--apply-schema", **settings)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1), ended.stderr
    assert "nowhere" in ended.stderr


def test_the_version_is_the_projects() -> None:
    """`--version` prints it."""
    version = re.search(r'VERSION = "(.+)"', (ROOT / "server.py").read_text())
    assert version
    for name in SERVERS:
        ended = run("-m", name, "--version")
        assert (ended.returncode, ended.stdout.strip()) == (0, f"{name} {version[1]}")
