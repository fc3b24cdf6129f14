"""`make run`: the whole system on this machine, in a copy of the project's folder of its own."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kit import ROOT, eventually, reserve_port
from kit.client import get
from kit.postgres import Database, make_folder
from kit.processes import Server


@pytest.fixture
def folder(session_folder: Path) -> Iterator[Path]:
    """A copy of what the project's folder holds, without its data."""
    folder = make_folder("clone-", session_folder)
    for file in ROOT.iterdir():
        if file.suffix in (".py", ".sql", ".html", ".yaml"):
            shutil.copy(file, folder)
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    yield folder
    shutil.rmtree(folder)


class LocalStack:
    """`make run` in a folder, on ports of its own."""

    def __init__(self, folder: Path, **settings: Any):
        with reserve_port() as gateway, reserve_port() as service:
            self.ports = gateway.getsockname()[1], service.getsockname()[1]
        ports = {"GATEWAY_PORT": self.ports[0], "MESSAGE_SERVICE_PORT": self.ports[1]}
        self.process = Server("local_stack", "tools/local_stack.py", cwd=folder, PORT=None, **(ports | settings))

    @property
    def said(self) -> str:
        """All that it told the user so far."""
        return "".join(self.process.noise)

    async def started(self) -> None:
        """Return when it says that it is up."""
        await eventually(lambda: "Ctrl-C" in self.said or self.process.process.poll() is not None, within=60)
        assert "Ctrl-C" in self.said, (self.said, self.process.log)

    async def stop(self) -> None:
        """Press Ctrl-C, which signals every process of the terminal's foreground."""
        os.killpg(self.process.pid, signal.SIGINT)
        assert await self.process.exit_status(within=20) == 0
        assert "Traceback" not in self.said
        self.process.noise.clear()
        self.process.close()


async def test_it_starts_answers_stops_and_keeps_its_data(folder: Path) -> None:
    """Both URLs that it prints work; after Ctrl-C all is gone but the data."""
    stack = LocalStack(folder)
    await stack.started()
    urls = [word for word in stack.said.split() if word.startswith("http://")]
    assert [url.rsplit(":", 1)[1] for url in urls] == [
        f"{stack.ports[0]}/api/string",
        f"{stack.ports[1]}/api/message",
    ]
    assert (await get(urls[0])).json()["result"].startswith("Hello from PostgreSQL!")
    assert (await get(urls[1])).json()["message"].startswith("Hello from PostgreSQL!")
    lines = (folder / ".data/postmaster.pid").read_text().splitlines()
    Database("mydb", "postgres", None, lines[4], int(lines[3])).set_message("kept")
    await stack.stop()
    for url in urls:
        with pytest.raises(ConnectionError):
            await get(url)
    assert not (folder / ".data/postmaster.pid").exists()

    stack = LocalStack(folder)
    await stack.started()
    assert (await get(f"http://localhost:{stack.ports[0]}/api/string")).json() == {"result": "kept"}
    await stack.stop()


async def test_with_a_database_of_ones_own_it_starts_none(folder: Path, database: Database) -> None:
    """DB_HOST and the others name it."""
    stack = LocalStack(folder, **database.settings())
    await stack.started()
    assert (await get(f"http://localhost:{stack.ports[0]}/api/string")).status == 200
    await stack.stop()
    assert not (folder / ".data").exists()


@pytest.mark.parametrize("part", ["GATEWAY_PORT", "MESSAGE_SERVICE_PORT"])
async def test_a_port_in_use_is_one_clear_line(folder: Path, database: Database, part: str) -> None:
    """It stops what it has started and ends with status 1."""
    with reserve_port() as taken:
        taken.listen()
        port = taken.getsockname()[1]
        stack = LocalStack(folder, **database.settings(), **{part: port})
        assert await stack.process.exit_status(within=20) == 1
    assert len([line for line in stack.process.noise if str(port) in line]) == 1
    assert "Traceback" not in stack.said
    stack.process.noise.clear()
    stack.process.close()
