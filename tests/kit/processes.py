"""The servers as a user starts them: `python -m SERVER` with settings in the environment.

Threads read a server's log all the time, so a server lives as long as its fixture, whatever event loop each test runs
in. A log line that is not a JSON object, output on stdout, a traceback or a Python warning fails the test, unless the
test expects it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from kit import ROOT, eventually, wait_until

DEFAULTS = {
    "HOST": "127.0.0.1",
    "PORT": "0",
    "LOG_FORMAT": "json",
    # aiohttp reads the system's certificate authorities when it is imported, a sixth of a start; no test needs them.
    "SSL_CERT_FILE": os.devnull,
}


def environment(settings: dict[str, Any]) -> dict[str, str]:
    """A server's environment: the path and the settings (None: not even its default), nothing else of ours."""
    kept = {name: os.environ[name] for name in ("PATH", "PYENV_VERSION", "TMPDIR") if name in os.environ}
    return kept | {name: str(value) for name, value in (DEFAULTS | settings).items() if value is not None}


def run(*command: str, within: float = 20, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run `python …` to its end, as with `--help`; TimeoutExpired after `within` seconds."""
    return subprocess.run(
        [sys.executable, *command],
        env=environment(settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=within,
        check=False,
    )


class Server:
    """One running server."""

    def __init__(self, name: str, *command: str, wrapper: Sequence[str] = (), cwd: Path = ROOT, **settings: Any):
        """Start `python COMMAND`; `wrapper` is a command that executes its arguments, as unshare does."""
        self.name = name
        self._port = int(settings.get("PORT") or 0)
        self.log: list[dict[str, Any]] = []
        self.noise: list[str] = []
        self.expected_tracebacks = False
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, *command],
            env=environment(settings),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout
        assert self.process.stderr
        self._readers = [
            threading.Thread(target=self._read, args=(stream, parse), daemon=True)
            for stream, parse in ((self.process.stdout, False), (self.process.stderr, True))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str], parse: bool) -> None:
        with stream:
            for line in stream:
                try:
                    entry = json.loads(line) if parse else None
                except ValueError:
                    entry = None
                if isinstance(entry, dict):
                    self.log.append(entry)
                else:
                    self.noise.append(line)

    async def listening(self) -> "Server":
        """Return when it listens; AssertionError with its output if it exits instead."""
        await eventually(self.listens, within=15)
        return self

    def listens(self) -> bool:
        """Whether it already listens; fails the test if it has exited."""
        if self.process.poll() is not None:
            self.finish()
            pytest.fail(f"{self.name} ended: {self.noise} {self.log}")
        if not self._port:
            return bool(self.logged(message="listening"))
        try:  # its log may be for people, or silent
            socket.create_connection(("127.0.0.1", self._port), 1).close()
        except OSError:
            return False
        return True

    @property
    def port(self) -> int:
        """The port on which it listens."""
        return self._port or int(self.logged(message="listening")[0]["port"])

    @property
    def url(self) -> str:
        """Base URL without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process number."""
        return self.process.pid

    def logged(self, **fields: Any) -> list[dict[str, Any]]:
        """Log lines that have these fields."""
        return [line for line in list(self.log) if fields.items() <= line.items()]

    async def wait_for_log(self, within: float = 5, **fields: Any) -> dict[str, Any]:
        """The first log line with these fields, as soon as it is there."""

        def look() -> list[dict[str, Any]]:
            ended = self.process.poll()
            lines = self.logged(**fields)
            if ended is not None and not lines:
                self.finish()
                if not (lines := self.logged(**fields)):
                    pytest.fail(f"{self.name} ended with {ended}: {self.noise} {self.log}")
            return lines

        lines: list[dict[str, Any]] = await eventually(look, within)
        return lines[0]

    def freeze(self) -> None:
        """SIGSTOP: its sockets stay open, it does nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """End the freeze."""
        self.process.send_signal(signal.SIGCONT)

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.process.kill()
        self.finish()

    async def exit_status(self, within: float = 15) -> int:
        """Its exit status, as soon as it has exited."""
        await eventually(lambda: self.process.poll() is not None, within)
        return self.finish()

    def finish(self) -> int:
        """Wait for the end of a process that is ending, and of its output."""
        status = self.process.wait(10)
        for reader in self._readers:
            reader.join(5)
        return status

    def stop(self) -> None:
        """Ask it to stop, whatever its state, and do not wait; asked again, it stops at once."""
        if self.process.poll() is None:
            self.resume()
            self.terminate()

    def close(self) -> None:
        """End it; AssertionError if its output has what no server should print."""
        self.stop()
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.finish()
        assert not self.noise, f"{self.name} wrote more than log lines: {''.join(self.noise)}"
        tracebacks = [line["exception"] for line in self.log if "exception" in line]
        assert self.expected_tracebacks or not tracebacks, f"{self.name}: {tracebacks[0]}"
        warnings = [line["message"] for line in self.log if "Warning: " in line["message"]]
        assert not warnings, f"{self.name}: {warnings[0]}"


def wait_listening(server: Server) -> Server:
    """As `Server.listening`, for fixtures outside an event loop."""
    wait_until(server.listens, within=15, fault=lambda: f"{server.name} does not listen: {server.noise} {server.log}")
    return server
