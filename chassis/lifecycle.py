"""The life of a server: its command line, its settings, its startup, and its shutdown step by step.

Rules kept here: wrong settings and an address in use are reported before anything starts; a server listens at
once, whatever the state of its dependencies; and it exits by itself in time, whatever its clients do. Tests:
tests/chassis/test_lifecycle.py.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import platform
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import uvloop
from aiohttp import web

from chassis import logs, metrics, settings
from chassis.server import VERSION, Server, wait_for_event
from chassis.settings import setting

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Open files, fewer where the system allows fewer. A client's connection takes one, and less than 16 kB: all of them,
# beside the process and unfinished requests, fit into the 256 MiB of k8s.yaml.
MAX_FILES = 10_368
SPARE_FILES = 128  # of them, not for clients: for connections to dependencies, name look-ups
MAX_ACCEPTS = 100  # connections accepted at a time, so that others are served, too
SEND_TIMEOUT = 10_000  # milliseconds in which a client must take something of what it has been sent
BUFFER = 32_768  # bytes, of which the kernel keeps twice as many for a client: unread answers, unread requests
ACCEPT_PAUSE = 0.01  # seconds without accepting after a failure, which the next attempt would meet, too
BACKLOG = 4096  # connections that wait to be accepted; the kernel's own limit is usually the same


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of every server."""

    host: str = setting("", settings.TEXT, "address to listen on", shown="all, IPv4 and IPv6")
    port: int = setting(0, settings.PORT, "port to listen on")
    log_level: str = setting("info", settings.one_of("debug", "info", "warning", "error"), "lowest level to log")
    log_format: str | None = setting(
        None, settings.one_of("json", "text"), "format of log lines", shown="text on a terminal, else json"
    )
    access_log: str = setting("errors", settings.one_of("all", "errors", "off"), "requests to log")
    drain_seconds: float = setting(0.0, settings.seconds(zero=True), "after SIGTERM: unready but still accepting")
    shutdown_seconds: float = setting(10.0, settings.seconds(zero=True), "then: time for requests in flight")


MakeApplication = Callable[[Any], web.Application]
"""Makes an application from its settings. Its cleanup contexts must not wait for a dependency."""


async def serve(
    name: str, application: MakeApplication, options: Settings, listener: socket.socket, max_connections: int
) -> None:
    """Serve until SIGTERM or SIGINT, then shut down step by step; a second signal skips the waiting."""
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()
    # Not `loop.add_signal_handler`: while such a handler is being removed, a signal can kill the process.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(lambda: (hurry if stop.is_set() else stop).set()))
    loop.set_exception_handler(_stray_error_log())
    metrics.BUILD.info({"service": name, "version": VERSION, "python": platform.python_version()})
    lag = loop.create_task(metrics.watch_event_loop())

    async with Server(application(options), options.access_log, max_connections) as server:
        accept_connections(listener, server)
        host, port = listener.getsockname()[:2]
        logs.log(logging.INFO, "listening", host=host, port=port, version=VERSION)
        await stop.wait()
        # 1. Unready, but still accepting: load balancers need time to stop sending requests.
        server.draining.set()
        logs.log(logging.INFO, "draining", drain_s=options.drain_seconds)
        await wait_for_event(hurry, options.drain_seconds)
        # 2. No new connections.
        loop.remove_reader(listener)
        listener.close()
        # 3. Finish requests in flight.
        await server.finish(hurry, options.shutdown_seconds)
        # 4. Close the session or the pool: leaving the context ends the application's cleanup contexts.
    lag.cancel()
    logs.log(logging.INFO, "stopped")
    # 5. Ignore further signals: there is nothing left to hurry.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def accept_connections(listener: socket.socket, server: Server) -> None:
    """Accept connections whenever there are some, until the event loop no longer reads the listener.

    uvloop's `create_server` accepts one in a turn of the event loop (libuv #3696), so new clients of a busy server
    would wait for seconds.
    """
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    # What is accepted inherits these.
    for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        listener.setsockopt(socket.SOL_SOCKET, buffer, BUFFER)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SEND_TIMEOUT)
    connecting: set[asyncio.Task[Any]] = set()

    def accept() -> None:
        try:
            for _ in range(MAX_ACCEPTS):
                connection, _address = listener.accept()
                connection.setblocking(False)
                task = loop.create_task(loop.connect_accepted_socket(server, connection))
                connecting.add(task)
                task.add_done_callback(connecting.discard)
        except BlockingIOError:
            return
        except (OSError, MemoryError) as error:  # such as no open files left
            loop.call_exception_handler({"message": "a connection was not accepted", "exception": error})
            loop.remove_reader(listener)
            loop.call_later(ACCEPT_PAUSE, resume)

    def resume() -> None:
        if listener.fileno() >= 0:  # not closed meanwhile
            loop.add_reader(listener, accept)

    resume()


def allow_connections(max_files: int) -> int:
    """Raise this process's limit on open files, as far as the system allows. Return how many connections it allows.

    The usual soft limit, 1024, exists for programs that call `select`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = max_files if hard == resource.RLIM_INFINITY else min(max_files, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return files - min(SPARE_FILES, files // 2)


def _stray_error_log() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """Return a handler that logs errors that no request waits for: a library's own, or a defect of ours.

    When no open files are left, asyncio reports this some thousand times at once. Errors of one type are equal, since
    a message may hold an address in memory.
    """
    lines = logs.RepeatLog()

    def write(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        message, error = context["message"], context.get("exception")
        cause = logs.describe(error) if error else None
        lines.write(type(error) if error else message, logging.ERROR, message, cause=cause, exception=error)

    return write


def listen(host: str, port: int) -> socket.socket:
    """Bind at once, so that an address in use is reported before anything starts. Raises `OSError`."""
    if host:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    with contextlib.suppress(OSError, ValueError):  # there is no IPv6, or the port is in use: the last line finds out
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    return socket.create_server(("", port), backlog=BACKLOG)


# ---- the command line ----------------------------------------------------------------------------------------


def main(
    name: str,
    description: str,
    declaration: type[Settings],
    application: MakeApplication,
    *,
    actions: Mapping[str, tuple[Callable[[Any], str], str]] | None = None,
    max_files: int = MAX_FILES,
) -> None:
    """Run a server, or one of `actions` (option → function of the settings, help text)."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        epilog=f"Settings are environment variables:\n{settings.table(declaration)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{name} {VERSION}")
    for option, (function, meaning) in (actions or {}).items():
        parser.add_argument(option, action="store_const", const=function, dest="action", help=meaning)
    action = getattr(parser.parse_args(), "action", None)
    try:
        options = settings.read(declaration, os.environ)
    except settings.SettingsError as error:
        _exit(name, 2, *error.problems)
    if action:
        try:
            print(action(options))
        except Exception as error:
            _exit(name, 1, " ".join(str(error).split()))
        return
    try:
        listener = listen(options.host, options.port)
    except (OSError, UnicodeError) as error:  # UnicodeError: the text cannot be a host name
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
        _exit(name, 1, f"cannot listen on {options.host or 'any address'}, port {options.port}: {reason}")
    logs.configure(name, options.log_level, options.log_format)
    gc.freeze()  # what the imports made: a full collection walks through it for 20 ms, in which nobody is answered
    # Less CPU for each request than with asyncio's own event loop: see benchmarks/results.
    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(serve(name, application, options, listener, allow_connections(max_files)))
        except Exception as error:  # of the application, as it starts or ends
            logs.log(logging.ERROR, "stopped by an error", cause=logs.describe(error), exception=error)
            sys.exit(1)


def _exit(name: str, status: int, *lines: str) -> NoReturn:
    for line in lines:
        print(f"{name}: {line}", file=sys.stderr)
    sys.exit(status)
