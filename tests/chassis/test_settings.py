"""Settings and command line: wrong settings are reported together, before the server listens, and correctly."""

import importlib
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import Start
from kit import ROOT, reserve_port
from kit.application import PAIR
from kit.client import get
from kit.processes import run

from chassis import settings

WRONG = {
    "HOST": ["0.0.0.0\n", "e\x7f", "any\tone"],
    "PORT": ["x", "-1", "65536", "1.5", "80 ", "80_00", "+80"],
    "LOG_LEVEL": ["loud"],
    "LOG_FORMAT": ["xml"],
    "ACCESS_LOG": ["some"],
    "DRAIN_SECONDS": ["-1", "soon", "nan"],
    "SHUTDOWN_SECONDS": ["-1", "inf", "1e9"],
}
WRONG_GATEWAY = WRONG | {
    "DOWNSTREAM_URL": [
        "nonsense",
        "ftp://host",
        "http://",
        "http://host:port",
        "http://h?q=1",
        "//host",
        "http://a..b",
        "http://h:0",
    ],
    "DOWNSTREAM_TIMEOUT": ["0", "-1", "nan", "long"],
}
WRONG_SERVICE = WRONG | {
    "DB_HOST": ["db\n", "db:5432", "[::1]", '"db"', "http://db", "a,b", "a..b"],
    "DB_PORT": ["x", "65536", "0", "54_32", "5432 ", "\u0665"],
    "DB_NAME": ["a\nb", "name ", "\x7f"],
    "DB_USER": ["me\n", "\tme", " "],
    "DB_OWNER": ["me\n", "\x85me"],
    "DB_PASSWORD_FILE": ["/nowhere", "/"],
    "DB_SSLMODE": ["maybe"],
    "DB_SSLROOTCERT": ["/nowhere", "/dev/null"],
    "DB_POOL_SIZE": ["0", "1.5", "-4", "many"],
    "DB_TIMEOUT": ["0", "-1", "nan"],
}
SERVERS = {PAIR.gateway: WRONG_GATEWAY, PAIR.service: WRONG_SERVICE}
DECLARATIONS = {name: importlib.import_module(name).Settings for name in SERVERS}
BOTH = pytest.mark.parametrize("name", SERVERS)


@BOTH
def test_wrong_settings_are_told_all_at_once(name: str) -> None:
    """One line for each, with its name, its value and what is expected; exit status 2."""
    wrong = SERVERS[name]
    for round_ in range(max(map(len, wrong.values()))):
        chosen: dict[str, Any] = {variable: values[round_ % len(values)] for variable, values in wrong.items()}
        if round_:
            with pytest.raises(settings.SettingsError) as error:
                settings.read(DECLARATIONS[name], {variable: str(value) for variable, value in chosen.items()})
            lines = error.value.problems
        else:
            ended = run("-m", name, **chosen)
            assert (ended.returncode, ended.stdout) == (2, "")
            lines = ended.stderr.splitlines()
        assert len(lines) == len(chosen), lines
        for variable, value in chosen.items():
            (line,) = [line for line in lines if re.search(rf"\b{variable}\b", line)]
            assert repr(value) in line
            assert len(line) > len(variable) + len(value) + 20  # and what is expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"DB_PASSWORD": "gr\udcfcn-Pa55", "DB_HOST": "postgres://me:Pa55@db/name"},  # in Latin-1: the byte FC
        {"DB_PASSWORD": "\udcff\udcfePa55", "DB_HOST": "host=db password=Pa55"},
        {"DB_PASSWORD": "Pa55\n", "DB_OWNER_PASSWORD": "gr\udcfcn-Pa55"},
    ],
)
def test_a_secret_that_is_wrong_is_hidden(wrong: dict[str, Any]) -> None:
    """One line for each, which holds nothing of it; exit status 2."""
    ended = run("-m", PAIR.service, **wrong)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, len(wrong))
    for variable in wrong:
        assert f"{variable}: (hidden)" in ended.stderr
    assert "Pa55" not in ended.stderr


@pytest.mark.parametrize("user", ["me@", "me:Pa55@", ":Pa55@", ":@", "@"])
def test_a_url_with_a_user_is_wrong(user: str) -> None:
    """Of any kind, an empty one included; what may be a secret is hidden."""
    with pytest.raises(settings.SettingsError) as error:
        settings.read(DECLARATIONS[PAIR.gateway], {"DOWNSTREAM_URL": f"http://{user}host:8001"})
    (line,) = error.value.problems
    assert line.startswith("DOWNSTREAM_URL: (hidden) is not a URL such as")


@pytest.mark.parametrize("variable", ["DB_PASSWORD_FILE", "DB_SSLROOTCERT"])
def test_a_pipe_is_no_file(variable: str, tmp_path: Path) -> None:
    """It is a wrong setting at once: nobody need write to it, and it cannot be read again for each connection."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    variables: dict[str, Any] = {variable: pipe}
    ended = run("-m", PAIR.service, **variables)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert f"{variable}: {str(pipe)!r} is not the path of a regular file" in ended.stderr


@pytest.mark.parametrize(
    "host",
    ["localhost", "db.example.com.", "my_db", "10.0.0.1", "::1", "fe80::1%eth0", "/run/postgresql", "bücher.example"],
)
def test_a_host_that_can_be_right_is_taken(host: str) -> None:
    """Names, including Compose's and international ones, addresses, and folders."""
    assert settings.read(DECLARATIONS[PAIR.service], {"DB_HOST": host}).db_host == host


@BOTH
def test_wrong_settings_are_told_before_a_port_in_use(name: str) -> None:
    """The server listens only once all settings are right."""
    with reserve_port() as taken:
        taken.listen()
        ended = run("-m", name, PORT=taken.getsockname()[1], LOG_LEVEL="loud")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)


@BOTH
async def test_an_empty_variable_is_not_set(start: Start, name: str) -> None:
    """As Compose and Kubernetes pass omitted values."""
    server = await start(name, **dict.fromkeys(set(SERVERS[name]) - {"PORT", "LOG_FORMAT"}, ""))
    assert (await get(server.url + "/healthz")).status == 200


@BOTH
def test_help_tells_every_setting(name: str) -> None:
    """Every variable of this server and of no other, with its default."""
    ended = run("-m", name, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    other = SERVERS[PAIR.service if name == PAIR.gateway else PAIR.gateway]
    for variable in SERVERS[name].keys() | other.keys() | {"HOST"}:
        told = re.search(rf"^\s+{variable}\b", ended.stdout, re.MULTILINE)
        assert bool(told) == (variable in SERVERS[name] or variable == "HOST"), variable
    table = ended.stdout.split("environment variables:\n")[1].splitlines()
    assert {len(re.split(r" {2,}", line.strip())) for line in table} == {3}  # columns that do not overlap
    assert re.search(rf"^\s+PORT\s+{DECLARATIONS[name].port}\b", ended.stdout, re.MULTILINE)


NARROW = (  # what makes Python write in an encoding with few characters
    {"LC_ALL": "en_US.ISO-8859-1"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "ascii:strict"},
)


@pytest.mark.parametrize("environment", NARROW, ids=str)
def test_help_works_in_every_locale(environment: dict[str, Any]) -> None:
    """It is ASCII."""
    for name in SERVERS:
        ended = run("-m", name, "--help", **environment)
        assert (ended.returncode, ended.stderr, ended.stdout.isascii()) == (0, "", True)
        assert "environment variables:" in ended.stdout


@BOTH
def test_an_unknown_argument_is_an_error(name: str) -> None:
    """With a usage hint, and exit status 2."""
    ended = run("-m", name, "--nonsense")
    assert ended.returncode == 2
    assert "usage" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_version_is_the_projects() -> None:
    """`--version` prints it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name in SERVERS:
        ended = run("-m", name, "--version")
        assert (ended.returncode, ended.stdout.strip()) == (0, f"{name} {version}")
