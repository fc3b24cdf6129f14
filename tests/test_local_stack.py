"""`make run`: the whole system on this machine, in a copy of the project's folder."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kit import ROOT, child_pids, eventually, reserve_port
from kit.client import get
from kit.postgres import Database
from kit.processes import Server

# Traps on a user's machine: variables that libpq reads, and a locale that is not installed.
ODD: dict[str, Any] = {
    "PGHOST": "elsewhere.invalid",
    "PGPORT": 1,
    "PGUSER": "x",
    "PGSSLMODE": "require",
    "LC_ALL": "xx_XX",
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A copy of the project's folder, without its data, which no other user can enter."""
    folder = tmp_path / "it's a clone"
    folder.mkdir(mode=0o700)
    for file in ROOT.iterdir():
        if file.suffix in (".py", ".sql", ".html", ".yaml") or file.name == "Makefile":
            shutil.copy(file, folder)
    for name in ("tools", "requirements"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    yield folder
    shutil.rmtree(folder)


class LocalStack:
    """`make run` in a folder, on its own ports."""

    def __init__(self, folder: Path, **settings: Any):
        with reserve_port() as gateway, reserve_port() as service:
            self.ports = gateway.getsockname()[1], service.getsockname()[1]
        ports = {"GATEWAY_PORT": self.ports[0], "MESSAGE_SERVICE_PORT": self.ports[1]}
        command = ("-u", "-m", "tools.local_stack")
        self.process = Server("local_stack", *command, cwd=folder, PORT=None, **(ODD | ports | settings))

    @property
    def said(self) -> str:
        """Everything that it has printed so far."""
        return "".join(self.process.noise)

    async def started(self) -> None:
        """Return when it reports that it is up."""
        await eventually(lambda: "Ctrl-C" in self.said or self.process.process.poll() is not None, within=60)
        assert "Ctrl-C" in self.said, (self.said, self.process.log)

    async def stop(self) -> None:
        """Press Ctrl-C, which signals every process of the terminal's foreground."""
        os.killpg(self.process.pid, signal.SIGINT)
        await self.ended()

    async def ended(self) -> None:
        """Return when it has exited 0."""
        assert await self.process.exit_status(within=20) == 0
        assert "Traceback" not in self.said
        self.process.noise.clear()
        self.process.close()


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_it_starts_answers_stops_and_keeps_its_data(folder: Path) -> None:
    """Both URLs that it prints work; a second one in the folder ends with a clear line; after Ctrl-C, or many signals,
    all is gone but the data.
    """
    stack = LocalStack(folder)
    await stack.started()
    urls = [word for word in stack.said.split() if word.startswith("http://")]
    assert [url.rsplit(":", 1)[1] for url in urls] == [
        f"{stack.ports[0]}/api/string",
        f"{stack.ports[1]}/api/message",
    ]
    assert (await get(urls[0])).json()["result"].startswith("Hello from PostgreSQL!")
    assert (await get(urls[1])).json()["message"].startswith("Hello from PostgreSQL!")
    second = LocalStack(folder)
    assert await second.process.exit_status(within=20) == 1
    assert "another `make run` uses the data in .data" in second.said
    second.process.noise.clear()
    lines = (folder / ".data/postmaster.pid").read_text().splitlines()
    Database("mydb", "postgres", None, lines[4], int(lines[3])).set_message("kept")
    await stack.stop()
    for url in urls:
        with pytest.raises(ConnectionError):
            await get(url)
    assert not (folder / ".data/postmaster.pid").exists()

    # Whoever asks impatiently gets what one signal does: every process ends.
    stack = LocalStack(folder)
    await stack.started()
    assert (await get(f"http://localhost:{stack.ports[0]}/api/string")).json() == {"result": "kept"}
    children = child_pids(stack.process.pid)
    assert len(children) == 3
    while not stack.process.logged(message="draining"):
        stack.process.terminate()
    await stack.ended()
    assert not [pid for pid in children if runs(pid)]


async def test_with_a_database_of_ones_own_it_starts_none(folder: Path, database: Database) -> None:
    """DB_HOST and the other variables name the database."""
    stack = LocalStack(folder, **database.settings())
    await stack.started()
    assert (await get(f"http://localhost:{stack.ports[0]}/api/string")).status == 200
    await stack.stop()
    assert not (folder / ".data").exists()


@pytest.mark.parametrize("part", ["GATEWAY_PORT", "MESSAGE_SERVICE_PORT"])
async def test_a_port_in_use_is_one_clear_line(folder: Path, part: str) -> None:
    """It names the variable for another port, announces nothing, starts nothing and exits with status 1."""
    with reserve_port() as taken:
        taken.listen()
        port = taken.getsockname()[1]
        stack = LocalStack(folder, **{part: port})
        assert await stack.process.exit_status(within=20) == 1
    assert stack.said == f"cannot listen on port {port}: Address already in use; set {part} to another port\n"
    assert not (folder / ".data").exists()
    stack.process.noise.clear()
    stack.process.close()


async def test_what_is_no_port_is_one_clear_line(folder: Path) -> None:
    """It names the variable and the ports that there are."""
    stack = LocalStack(folder, GATEWAY_PORT="abc")
    assert await stack.process.exit_status(within=20) == 1
    assert stack.said == "GATEWAY_PORT: 'abc' is not a port from 0 to 65535; 0 lets the system choose\n"
    stack.process.noise.clear()
    stack.process.close()


def make(folder: Path, *arguments: str) -> str:
    """The output of a `make` that fails, without a package index."""
    environment = {"PATH": os.environ["PATH"], "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    command = ["make", "run", *arguments]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode
    return result.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_a_python_that_is_too_old_is_one_clear_line(folder: Path) -> None:
    """It names the version that is needed, and how to choose another Python."""
    said = make(folder, f"PYTHON={shutil.which('false')}")
    assert said == "Python 3.11 or later is needed: PYTHON=/path/to/python3 names one\n"


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.matrix
def test_a_half_made_environment_is_made_again(folder: Path) -> None:
    """An interrupted first `make run` does not require `rm -rf .venv`."""
    programs = folder / ".venv/bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(sys.executable)
    assert make(folder, f"PYTHON={sys.executable}").startswith("making .venv\ninstalling requirements/local.txt\n")
    assert (programs / "activate").exists()
