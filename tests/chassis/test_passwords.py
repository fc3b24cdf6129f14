"""The database's password: changed without a restart, with any characters, and never disclosed."""

import json
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Start
from kit.application import PAIR
from kit.client import get
from kit.postgres import PASSWORD, Database, Provider
from kit.processes import run

from chassis import logs


@pytest.fixture
def role(provider: Provider, database: Database) -> Iterator[str]:
    """A role of the test's own, which may read the table."""
    name = f"reader_{uuid.uuid4().hex[:12]}"
    database.sql(f"CREATE ROLE {name} LOGIN PASSWORD 'first'")
    database.sql(f"GRANT SELECT ON {PAIR.table} TO {name}")
    yield name
    provider.take_back(database)
    provider.maintenance.sql(f"DROP ROLE {name}")


async def test_a_rotated_password_needs_no_restart(database: Database, role: str, start: Start, tmp_path: Path) -> None:
    """After a change in the database and in the file, with all connections ended, the next request succeeds."""
    file = tmp_path / "password"
    file.write_text("first\n")
    settings = database.settings(DB_USER=role, DB_PASSWORD=None, DB_PASSWORD_FILE=file)
    service = await start(PAIR.service, **settings)
    for password in ("second", 'it\'s \\ "a" 100% pass=word ünd 🔑', " spaces "):
        assert (await get(service.url + PAIR.service_path)).status == 200
        database.sql(f"ALTER ROLE {role} PASSWORD %s", password)
        file.write_text(f"{password}\n")
        database.terminate_backends()
    assert (await get(service.url + PAIR.service_path)).status == 200
    file.rename(tmp_path / "gone")
    assert (await get(service.url + PAIR.service_path)).status == 200  # connections that are up stay up
    database.terminate_backends()
    assert (await get(service.url + PAIR.service_path)).status == 503
    (tmp_path / "gone").rename(file)
    assert (await get(service.url + PAIR.service_path)).status == 200


SECRET = "s3cret-Pa55word"


async def test_a_secret_is_in_no_log_and_no_answer(database: Database, role: str, start: Start) -> None:
    """Whether it is right or wrong, at any log level."""
    settings = {"DB_USER": role, "DB_PASSWORD": SECRET, "LOG_LEVEL": "debug", "ACCESS_LOG": "all"}
    database.sql(f"ALTER ROLE {role} PASSWORD %s", SECRET)
    service = await start(PAIR.service, **database.settings(**settings))
    answers = [await get(service.url + PAIR.service_path)]
    database.sql(f"ALTER ROLE {role} PASSWORD 'another'")
    database.terminate_backends()
    answers.append(await get(service.url + PAIR.service_path))
    answers.append(await get(service.url + PAIR.service_path))
    answers.append(await get(service.url + "/readyz"))
    assert [answer.status for answer in answers] == [200, 503, 503, 503]
    await service.wait_for_log(status=503)
    service.terminate()
    assert await service.exit_status() == 0
    for text in (service.log, [(answer.headers, answer.body) for answer in answers]):
        assert SECRET not in str(text)
        assert PASSWORD not in str(text)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(f"grün-{SECRET}".encode("latin-1"), id="Latin-1"),
        pytest.param(SECRET.encode("utf-16"), id="UTF-16", marks=pytest.mark.matrix),
        pytest.param(SECRET.encode("utf-16-le"), id="UTF-16 without a mark", marks=pytest.mark.matrix),
        pytest.param(SECRET[:4].encode() + b"\0" + SECRET[4:].encode(), id="NUL"),
    ],
)
async def test_a_file_that_holds_no_password_is_an_outage(
    database: Database, role: str, start: Start, tmp_path: Path, content: bytes
) -> None:
    """503 from the service and its probe, and one log line without the content; once it is fixed, requests succeed."""
    file = tmp_path / "password"
    file.write_bytes(content)
    settings = database.settings(DB_USER=role, DB_PASSWORD=None, DB_PASSWORD_FILE=file, LOG_LEVEL="debug")
    service = await start(PAIR.service, **settings)
    assert [(await get(service.url + PAIR.service_path)).status for _ in range(3)] == [503, 503, 503]
    assert (await get(service.url + "/readyz")).status == 503
    outage = await service.wait_for_log(status=503, path=PAIR.service_path)
    assert "DB_PASSWORD_FILE" in outage["cause"]
    file.write_text("first")
    assert (await get(service.url + PAIR.service_path)).status == 200
    service.terminate()
    assert await service.exit_status() == 0
    lines = [line for line in service.logged(level="error", path=PAIR.service_path) if "repeats" not in line]
    assert lines == [outage]
    for part in (SECRET[:4], SECRET[4:], "\\x", "0x"):
        assert part not in str(service.log)


@pytest.mark.parametrize("secret", [SECRET.encode("utf-16"), "\ud800" + SECRET], ids=["bytes", "text"])
def test_an_error_that_holds_its_input_is_logged_without_it(secret: bytes | str) -> None:
    """Unlike its repr, neither cause nor traceback has any of what could not be decoded or encoded."""
    with pytest.raises(UnicodeError) as caught:
        secret.decode() if isinstance(secret, bytes) else secret.encode()
    record = logging.LogRecord("any", logging.ERROR, "", 0, "failed", None, caught._excinfo)
    line = logs.QueuedHandler(PAIR.service, json.dumps).format(record) + logs.describe(caught.value)
    assert "UnicodeDecodeError" in line or "UnicodeEncodeError" in line
    assert not [part for part in (SECRET[:4], SECRET[4:], "\\x00") if part in line]


def test_a_secret_is_in_no_message_of_the_command_line(database: Database, tmp_path: Path) -> None:
    """Not in the help, not among wrong settings, not when the schema cannot be applied."""
    good = database.settings(DB_PASSWORD=SECRET)
    file = tmp_path / "password"
    file.write_text(SECRET)
    both = {"DB_PASSWORD_FILE": file}
    url = {"DOWNSTREAM_URL": f"http://user:{SECRET}@host"}
    for arguments, settings, status in (
        ([PAIR.service, "--help"], good, 0),
        ([PAIR.service], good | {"DB_PORT": "none"}, 2),
        ([PAIR.service], good | both, 2),
        ([PAIR.service, "--apply-schema"], good, 1),
        ([PAIR.gateway], url, 2),
    ):
        ended = run("-m", *arguments, **settings)
        assert ended.returncode == status
        assert SECRET not in ended.stdout + ended.stderr, arguments
        assert "Traceback" not in ended.stderr
