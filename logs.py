"""Logs: one line for each event on stderr, as JSON or as text for people, that never holds up the event loop.

Rules kept here: every line a process writes comes through here, warnings of libraries included; a reader of stderr
that has stopped reading costs lines, never time; the first of equal failures is logged at once, others are counted.
"""

import asyncio
import contextlib
import json
import logging
import os
import queue
import sys
import threading
from datetime import UTC, datetime
from typing import Any

MAX_QUEUED_LINES = 10_000  # some megabytes; what is over that while nobody reads stderr is dropped and counted
REPEAT_INTERVAL = 1.0  # seconds between two lines about equal failures


def log(level: int, message: str, *, exception: BaseException | None = None, **fields: object) -> None:
    """Write one line with these fields; those that are None are left out."""
    logging.getLogger("messages").log(level, message, exc_info=exception, extra={"fields": fields})


def describe(error: BaseException) -> str:
    """An error's type and message in one line. Never its repr: a UnicodeError's holds its input, maybe a secret."""
    text = error.reason if isinstance(error, UnicodeDecodeError | UnicodeEncodeError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"


class JSONFormatter(logging.Formatter):
    """One JSON object a line; what a client sent cannot forge a line, since JSON escapes line ends."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self.fields(record), default=str)

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1]:
            fields["exception"] = self.formatException(record.exc_info)
        return {name: value for name, value in fields.items() if value is not None}


class TextFormatter(JSONFormatter):
    """For a terminal: time, level, service, message, then name=value, quoted as JSON where that is needed."""

    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        exception = fields.pop("exception", None)
        moment, level, service, message = (fields.pop(name) for name in ("time", "level", "service", "message"))
        line = f"{moment[11:23]} {level.upper():7} {service}: {message.splitlines()[0] if message else ''}"
        for name, value in fields.items():
            text = str(value)
            plain = text.isprintable() and text and not set(text) & set(' "=')
            line += f" {name}={text if plain else json.dumps(text)}"
        return f"{line}\n{exception}" if exception else line


class _QueuedHandler(logging.Handler):
    """Writes to stderr from a daemon thread behind a bounded queue."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_QUEUED_LINES)
        self._dropped = 0
        self._writer = threading.Thread(target=self._write, name="log writer", daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                log(logging.WARNING, "log lines were dropped: nobody read stderr", dropped=dropped)
            # Not `print`: Python flushes its own buffer when it ends, waits there for a reader that is stuck, and
            # ends with status 120 where nothing can be written.
            with contextlib.suppress(OSError):  # nobody is left to tell
                if sys.stderr is not None:  # closed from the start: its number may belong to a client's socket now
                    os.write(sys.stderr.fileno(), f"{line}\n".encode(errors="backslashreplace"))

    def close(self) -> None:
        """Write what is queued, for a second at most: a reader that is stuck must not keep the process from ending."""
        try:
            self._lines.put_nowait(None)
            self._writer.join(1)
        except queue.Full:
            pass
        super().close()


def configure(service: str, level: str, form: str | None) -> None:
    """Send all logs and warnings of the process to stderr, in `form` "json" or "text" (None: as the terminal asks)."""
    text = form == "text" or (form is None and sys.stderr is not None and sys.stderr.isatty())
    handler = _QueuedHandler()
    handler.setFormatter(TextFormatter(service) if text else JSONFormatter(service))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(True)
    sys.unraisablehook = lambda error: _log_lost(error.exc_value)
    threading.excepthook = lambda error: _log_lost(error.exc_value)


def _log_lost(error: BaseException | None) -> None:
    log(logging.ERROR, "an error where nobody waits for it", cause=error and describe(error), exception=error)


class RepeatLog:
    """Writes the first of equal lines at once, then at most one in `REPEAT_INTERVAL` with how many more there were."""

    def __init__(self) -> None:
        self._repeats: dict[object, int] = {}

    def write(self, key: object, level: int, message: str, **fields: Any) -> None:
        """Write a line; lines with an equal `key` are equal."""
        if key in self._repeats:
            self._repeats[key] += 1
            return
        log(level, message, **fields)
        fields.pop("exception", None)
        self._repeats[key] = 0
        asyncio.get_running_loop().call_later(REPEAT_INTERVAL, self._summarise, key, level, message, fields)

    def _summarise(self, key: object, level: int, message: str, fields: dict[str, Any]) -> None:
        if repeats := self._repeats.pop(key):
            self.write(key, level, message, **fields | {"repeats": repeats})
