"""Logs: one line on stderr for each event, as JSON or as text for people, without blocking the event loop.

Rules kept here: every line that the process writes goes through this module, warnings of libraries included; a reader
of stderr that stops reading costs lines, never time; the first of equal failures is logged at once, the others are
counted.
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

MAX_QUEUED_LINES = 10_000  # some megabytes; while nobody reads stderr, further lines are dropped and counted
REPEAT_INTERVAL = 1.0  # seconds between two lines about equal failures


def log(level: int, message: str, *, exception: BaseException | None = None, **fields: object) -> None:
    """Write one line with these fields, except those that are None."""
    logging.getLogger("messages").log(level, message, exc_info=exception, extra={"fields": fields})


def describe(error: BaseException) -> str:
    """An error's type and message in one line. Never its repr: a UnicodeError's contains its input, maybe a secret."""
    text = error.reason if isinstance(error, UnicodeDecodeError | UnicodeEncodeError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"


class JSONFormatter(logging.Formatter):
    """One JSON object per line; no client can forge a line, since JSON escapes line breaks."""

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
    """For a terminal: time, level, service, message, then name=value, quoted as JSON if necessary."""

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
            # Not `print`: when Python exits, it flushes its own buffer, waits there for a stuck reader, and exits with
            # status 120 if it cannot write.
            with contextlib.suppress(OSError):  # there is nowhere left to report it
                if sys.stderr is not None:  # None: closed from the start, and a client's socket may now have its number
                    os.write(sys.stderr.fileno(), f"{line}\n".encode(errors="backslashreplace"))

    def close(self) -> None:
        """Write the queued lines, for a second at most: a stuck reader must not keep the process from exiting."""
        try:
            self._lines.put_nowait(None)
            self._writer.join(1)
        except queue.Full:
            pass
        super().close()


def configure(service: str, level: str, form: str | None) -> None:
    """Send all logs and warnings to stderr, in `form` "json" or "text" (None: text on a terminal, else JSON)."""
    text = form == "text" or (form is None and sys.stderr is not None and sys.stderr.isatty())
    handler = _QueuedHandler()
    handler.setFormatter(TextFormatter(service) if text else JSONFormatter(service))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(True)
    sys.unraisablehook = lambda error: _log_lost(error.exc_value)
    threading.excepthook = lambda error: _log_lost(error.exc_value)


def _log_lost(error: BaseException | None) -> None:
    log(logging.ERROR, "an error that no request waits for", cause=error and describe(error), exception=error)


class RepeatLog:
    """Writes the first of equal lines at once, then at most one per `REPEAT_INTERVAL`, with the number of repeats."""

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
