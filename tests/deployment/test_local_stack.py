"""`make run`: the whole system on this machine, in a copy of the project's folder."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from kit import ROOT, child_pids, eventually, reserve_port
from kit.application import PAIR
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
        if file.suffix in (".py", ".sql", ".html", ".yaml") or file.name in ("Makefile", "pyproject.toml"):
            shutil.copy(file, folder)
    for name in ("chassis", "tools", "requirements"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def installed(folder: Path) -> Path:
    """A copy with an environment that shares the packages of the tests' own, so that `make run` installs nothing."""
    programs = folder / ".venv/bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(sys.executable)
    (programs / "activate").touch()
    shutil.copy(Path(sys.prefix, "pyvenv.cfg"), folder / ".venv")
    (folder / ".venv/lib").symlink_to(Path(sys.prefix, "lib"))
    (folder / ".venv/.local").touch()
    return folder


MAKE = ("sh", "-c", "exec make run")  # what follows it is not used


class LocalStack:
    """`make run` in a folder, on its own ports; by default without `make`, as it is executed there."""

    def __init__(self, folder: Path, wrapper: Sequence[str] = (), **settings: Any):
        with reserve_port() as gateway, reserve_port() as service:
            self.ports = gateway.getsockname()[1], service.getsockname()[1]
        ports = {"GATEWAY_PORT": self.ports[0], "MESSAGE_SERVICE_PORT": self.ports[1]}
        command = ("-u", "-m", "tools.local_stack")
        settings = {"HOST": None, "PORT": None} | ODD | ports | settings
        self.process = Server("local_stack", *command, wrapper=wrapper, cwd=folder, **settings)

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

    @property
    def urls(self) -> list[str]:
        """What it says where the gateway and the service are."""
        return [word for word in self.said.split() if word.startswith("http://")]

    async def ended(self, status: int = 0) -> None:
        """Return when it has exited."""
        assert await self.process.exit_status(within=20) == status
        assert "Traceback" not in self.said
        self.process.noise.clear()
        self.process.close()


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def works(stack: LocalStack) -> None:
    """Assert that both URLs that it prints answer."""
    await stack.started()
    assert [(await get(url)).status for url in stack.urls] == [200, 200]


async def test_it_starts_answers_stops_and_keeps_its_data(folder: Path, tmp_path: Path) -> None:
    """Both URLs that it prints work; a second one in the folder ends with a clear line; after Ctrl-C, or many signals,
    all is gone but the data.
    """
    stack = LocalStack(folder)
    await stack.started()
    urls = stack.urls
    assert [url.rsplit(":", 1)[1] for url in urls] == [
        f"{stack.ports[0]}{PAIR.read_path}",
        f"{stack.ports[1]}{PAIR.service_path}",
    ]
    assert (await get(urls[0])).json() == PAIR.result
    assert (await get(urls[1])).json()[PAIR.service_key] == PAIR.sample
    second = LocalStack(folder)
    assert await second.process.exit_status(within=20) == 1
    assert "another `make run` uses the data in .data" in second.said
    second.process.noise.clear()
    lines = (folder / ".data/postmaster.pid").read_text().splitlines()
    Database("mydb", "postgres", None, lines[4], int(lines[3])).store(PAIR.other)
    await stack.stop()
    for url in urls:
        with pytest.raises(ConnectionError):
            await get(url)
    assert not (folder / ".data/postmaster.pid").exists()

    # Whoever asks impatiently gets what one signal does: every process ends. So does whoever kills it. By the way, the
    # usual folder for temporary files belongs to root alone, and its path is too long for a socket.
    stack = LocalStack(folder, TMPDIR=make_long(tmp_path))
    await stack.started()
    assert (await get(f"http://localhost:{stack.ports[0]}{PAIR.read_path}")).json()[PAIR.result_key] == PAIR.other
    children = child_pids(stack.process.pid)
    assert len(children) == 3
    while not stack.process.logged(message="draining"):
        stack.process.terminate()
    await stack.ended()
    assert not [pid for pid in children if runs(pid)]
    stack = LocalStack(folder)
    await stack.started()
    children = child_pids(stack.process.pid)
    assert len(children) == 3
    stack.process.kill()
    await eventually(lambda: not [pid for pid in children if runs(pid)], within=20)


def make_long(folder: Path) -> Path:
    """A folder in it whose path has 110 characters."""
    long = Path(str(folder / "x").ljust(110, "x"))
    long.mkdir()
    return long


async def test_it_ends_with_make(installed: Path, database: Database) -> None:
    """If `make` is killed, every process ends."""
    stack = LocalStack(installed, MAKE, **database.settings())
    await stack.started()
    (main,) = child_pids(stack.process.pid)
    children = child_pids(main)
    assert len(children) == 2
    os.kill(stack.process.pid, signal.SIGKILL)
    await eventually(lambda: not [pid for pid in (main, *children) if runs(pid)], within=20)
    await stack.ended(-signal.SIGKILL)


async def test_a_second_ctrl_c_skips_the_waiting(folder: Path, database: Database) -> None:
    """However long DRAIN_SECONDS and SHUTDOWN_SECONDS are."""
    stack = LocalStack(folder, **database.settings(), DRAIN_SECONDS=600, SHUTDOWN_SECONDS=600)
    await stack.started()
    os.killpg(stack.process.pid, signal.SIGINT)
    await stack.process.wait_for_log(message="draining", service="gateway")
    assert not stack.process.logged(message="draining", service="message_service")
    await stack.stop()


@pytest.mark.parametrize("host", ["::1", *(pytest.param(host, marks=pytest.mark.matrix) for host in ("::", "0.0.0.0"))])
async def test_an_address_to_listen_on(folder: Path, database: Database, host: str) -> None:
    """HOST may be any of this machine; the gateway calls the service there, and the URLs work."""
    stack = LocalStack(folder, **database.settings(), HOST=host)
    await works(stack)
    for url in stack.urls:
        assert url.startswith(f"http://[{host}]:" if ":" in host else f"http://{host}:")
    await stack.stop()


PYTHON = {  # what Python reads from a user's environment, with values that are not meant for this project
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHOME": "/nowhere",
    "PYTHONINSPECT": "1",
    "PYTHONIOENCODING": "ascii",
    "PYTHONNOUSERSITE": "1",
    "PYTHONOPTIMIZE": "2",
    "PYTHONPLATLIBDIR": "nowhere",
    "PYTHONSAFEPATH": "1",
    "PYTHONSTARTUP": "/nowhere",
    "PYTHONUNBUFFERED": "1",
    "PYTHONUSERBASE": "/nowhere",
    "PYTHONUTF8": "0",
    "PYTHONWARNINGS": "error",
}


async def test_whatever_python_is_told(installed: Path, database: Database, tmp_path: Path) -> None:
    """Variables that are meant for other programs of the user have no say."""
    for name in ("aiohttp", "chassis", "tools", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not this one')")
    stack = LocalStack(installed, MAKE, **database.settings(), **PYTHON, PYTHONPATH=tmp_path)
    await works(stack)
    stack.process.terminate(signal.SIGINT)
    (main,) = child_pids(stack.process.pid)
    os.kill(main, signal.SIGINT)
    assert await stack.process.exit_status(within=20) in (0, 2, -signal.SIGINT)
    stack.process.noise.clear()


PIP = {  # what moves an installation, changes what it is, or makes of it something else
    "PIP_ABI": "none",
    "PIP_BREAK_SYSTEM_PACKAGES": "1",
    "PIP_CONSTRAINT": "wheels/constraints",
    "PIP_DRY_RUN": "1",
    "PIP_EDITABLE": ".",
    "PIP_FORCE_REINSTALL": "1",
    "PIP_HELP": "1",
    "PIP_IGNORE_INSTALLED": "1",
    "PIP_IMPLEMENTATION": "pp",
    "PIP_NO_BINARY": ":all:",
    "PIP_NO_COMPILE": "1",
    "PIP_NO_DEPS": "1",
    "PIP_PLATFORM": "any",
    "PIP_PREFIX": "elsewhere",
    "PIP_PRE": "1",
    "PIP_PYTHON": "/usr/bin/python3",
    "PIP_PYTHON_VERSION": "3.1",
    "PIP_REPORT": "report",
    "PIP_REQUIRE_VIRTUALENV": "1",
    "PIP_REQUIREMENT": "wheels/others",
    "PIP_ROOT": "elsewhere",
    "PIP_SRC": "elsewhere",
    "PIP_TARGET": "elsewhere",
    "PIP_UPGRADE": "1",
    "PIP_USER": "1",
    "PIP_VERSION": "1",
}
PIP_CONF = """
[global]
dry-run = true
[install]
user = true
prefix = elsewhere
root = elsewhere
target = elsewhere
"""


def lock_a_wheel(folder: Path) -> None:
    """Let `make run` install only a package of our own, which is in the folder `wheels`."""
    wheels, information = folder / "wheels", "tiny_package-1.0.dist-info"
    wheels.mkdir()
    (wheels / "constraints").write_text("tiny-package==2.0\n")
    (wheels / "others").write_text("another-package\n")
    wheel = wheels / "tiny_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_package.py", "")
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (folder / "requirements/local.txt").write_text(f"tiny-package==1.0 \\\n    --hash=sha256:{digest}\n")


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.matrix
def test_whatever_pip_is_told(folder: Path) -> None:
    """A user's settings decide where packages come from, and nothing else: `.venv` gets what is locked.

    It is up to date only if that can be imported.
    """
    lock_a_wheel(folder)
    (folder / "pip.conf").write_text(PIP_CONF)
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "wheels", "PIP_CONFIG_FILE": "pip.conf"}
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)} | index

    def make(**variables: str) -> subprocess.CompletedProcess[str]:
        command = ["make", ".venv/.local", f"PYTHON={sys.executable}"]
        return subprocess.run(
            command, cwd=folder, env=environment | variables, capture_output=True, text=True, timeout=120, check=False
        )

    made = make(**PIP)
    assert made.returncode == 0, made.stdout + made.stderr
    python, program = folder / ".venv/bin/python", "import tiny_package as t; print(t.__file__)"
    found = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(folder / ".venv"))
    assert not (folder / "elsewhere").exists()
    (folder / ".venv/.local").unlink()
    lock = folder / "requirements/local.txt"
    lock.write_text(lock.read_text().replace("tiny-package==1.0", "tiny-package==1.0 ; python_version < '3'"))
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "tiny-package"], check=True)
    made = make()
    assert made.returncode
    assert "pip has not installed into .venv what requirements/local.txt lists" in made.stdout
    assert not (folder / ".venv/.local").exists()


async def test_with_a_database_of_ones_own_it_starts_none(folder: Path, database: Database) -> None:
    """DB_HOST and the other variables name the database."""
    stack = LocalStack(folder, **database.settings())
    await stack.started()
    assert (await get(f"http://localhost:{stack.ports[0]}{PAIR.read_path}")).status == 200
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
