"""Logs: one line on stderr for each event, as JSON or as text for people, without blocking the event loop.

Rules kept here: every line of the process goes through this module; it is bounded in length, and no text in it can pass
for another field or line; a reader of stderr that stops reading costs lines, which are counted, never time; of equal
failures, the first is logged at once, the others are counted. Tests: tests/chassis/test_logs.py.
"""

import asyncio
import contextlib
import json
import logging
import os
import queue
import select
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

MAX_TEXT = 1000  # characters of a field, which may be a client's
MAX_QUEUED_LINES = 1000  # while nobody reads stderr, further ones are dropped and counted
REPEAT_INTERVAL = 1.0  # seconds between two lines about equal failures
MAX_IDS = 10  # of requests that one line stands for


def log(level: int, message: str, *, exception: BaseException | None = None, **fields: object) -> None:
    """Write one line with these fields, except those that are None."""
    logging.getLogger("chassis").log(level, message, exc_info=exception, extra={"fields": fields})


def shorten(text: str, limit: int = MAX_TEXT) -> str:
    """Cut a long text in its middle."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def describe(error: BaseException) -> str:
    """An error's type and message in one line. Never its repr: a UnicodeError's contains its input, maybe a secret."""
    text = error.reason if isinstance(error, UnicodeDecodeError | UnicodeEncodeError) else str(error)
    return f"{type(error).__name__}: {' '.join(shorten(text).split())}"


def _text(fields: dict[str, Any]) -> str:
    """For a terminal: time, level, service, message, then name=value. What could pass for more is quoted as JSON."""
    traceback = fields.pop("exception", "").splitlines()
    moment, level, service, message = (fields.pop(name) for name in ("time", "level", "service", "message"))
    line = f"{moment[11:23]} {level.upper():7} {service}: {_quote(' '.join(message.split()), '=')}"
    for name, value in fields.items():
        line += f" {name}={_quote(','.join(value) if isinstance(value, list) else str(value), '= ')}"
    return "\n    ".join([line, *(_quote(line, "") for line in traceback)])


def _quote(text: str, special: str) -> str:
    return text if text and text.isprintable() and not set(text) & {'"', *special} else json.dumps(text)


class QueuedHandler(logging.Handler):
    """Writes to stderr from a daemon thread behind a bounded queue."""

    def __init__(self, service: str, form: Callable[[dict[str, Any]], str]) -> None:
        super().__init__()
        self._service, self._form = service, form
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_QUEUED_LINES)
        self._dropped = 0
        self._writer = threading.Thread(target=self._write, name="log writer", daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = {"time": time, "level": record.levelname.lower(), "service": self._service}
        for name, value in {"message": record.getMessage(), **getattr(record, "fields", {})}.items():
            if value is not None:
                fields[name] = value if isinstance(value, int | float | list) else shorten(str(value))
        if record.exc_info and record.exc_info[1]:
            fields["exception"] = shorten(logging.Formatter().formatException(record.exc_info), 10 * MAX_TEXT)
        return self._form(fields)

    def _write(self) -> None:
        unwritten = reported = 0
        while (line := self._lines.get()) is not None:
            if lost := self._dropped + unwritten - reported:
                record = {"levelname": "WARNING", "msg": "log lines were lost", "fields": {"lost": lost}}
                reported += lost * _write_whole(self.format(logging.makeLogRecord(record)))
            unwritten += not _write_whole(line)

    def close(self) -> None:
        """Write the queued lines, for a second at most: a stuck reader must not keep the process from exiting."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
            self._writer.join(1)
        super().close()


def _write_whole(line: str) -> bool:
    """Whether all of it was written. A pipe may take a part of it, or nothing yet if another process made it so."""
    # Not `print`, which leaves a part in Python's buffer: at exit, Python would wait there for a stuck reader.
    rest = f"{line}\n".encode(errors="backslashreplace")
    while rest and sys.stderr is not None:  # None: closed from the start, and a client's socket may now have its number
        try:
            rest = rest[os.write(sys.stderr.fileno(), rest) :]
        except BlockingIOError:  # O_NONBLOCK
            select.select([], [sys.stderr], [])
        except OSError:  # there is nowhere left to report it
            break
    return not rest


def configure(service: str, level: str, form: str | None) -> None:
    """Send all logs and warnings to stderr, in `form` "json" or "text" (None: text on a terminal, else JSON)."""
    text = form == "text" or (form is None and sys.stderr is not None and sys.stderr.isatty())
    handler = QueuedHandler(service, _text if text else json.dumps)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(True)
    sys.unraisablehook = threading.excepthook = _log_lost


def _log_lost(lost: Any) -> None:
    error = lost.exc_value
    log(logging.ERROR, "an error that no request waits for", cause=error and describe(error), exception=error)


class RepeatLog:
    """Writes the first of equal lines at once, then the latest at most once per `REPEAT_INTERVAL`, for all since."""

    def __init__(self) -> None:
        self._repeats: dict[object, dict[str, Any]] = {}  # the next line's fields

    def write(self, key: object, level: int, message: str, **fields: Any) -> None:
        """Write a line; lines with an equal `key` are equal. Keys are few: none may hold a client's text."""
        if (before := self._repeats.get(key)) is not None:
            self._repeats[key] = fields | {"repeats": before.get("repeats", 0) + 1, "exception": None}
            if "request_id" in fields:
                self._repeats[key]["request_ids"] = [*before.get("request_ids", []), fields["request_id"]][:MAX_IDS]
            return
        log(level, message, **fields)
        self._repeats[key] = {}
        asyncio.get_running_loop().call_later(REPEAT_INTERVAL, self._summarise, key, level, message)

    def _summarise(self, key: object, level: int, message: str) -> None:
        if fields := self._repeats.pop(key):
            self.write(key, level, message, **fields)
