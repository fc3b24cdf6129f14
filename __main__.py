"""The entry point of a container: `python FOLDER gateway` or `python FOLDER message_service` runs that server.

Rules kept here: the server takes over this process, so that process 1 of a container is the server itself, with no
shell or parent between it and its signals; any other arguments print the usage, and the exit status is 2.
"""

import os
import signal
import socket
import sys

DEFAULT_PORTS = {"gateway": 8000, "message_service": 8001}
HEALTH_CHECK_TIMEOUT = 2.0  # seconds

USAGE = """\
pass the server to run:
  docker run IMAGE gateway             answers /api/string on port 8000; needs DOWNSTREAM_URL
  docker run IMAGE message_service     answers /api/message on port 8001; needs DB_HOST and DB_PASSWORD
  docker run IMAGE message_service --apply-schema
Settings are environment variables; `gateway --help` and `message_service --help` list them."""


def main() -> None:
    match sys.argv[1:]:
        case [name, *_] if name in DEFAULT_PORTS:
            run(name)
        case ["--healthcheck"]:
            sys.exit(check_health("/healthz"))
        case ["--healthcheck", path]:
            sys.exit(check_health(path))
        case ["--help"]:
            print(USAGE)
        case arguments:
            problem = f"{' '.join(arguments)}: there is no such server; " if arguments else ""
            print(problem + USAGE, file=sys.stderr)
            sys.exit(2)


def run(name: str) -> None:
    """Continue as `python -m NAME` with the remaining arguments."""
    del sys.argv[1]

    def stop(number: int, _frame: object) -> None:
        # A server that has not started leaves nothing undone; a command such as --apply-schema does.
        sys.exit(128 + number if sys.argv[1:] else 0)

    # The kernel drops signals that process 1 does not handle, and importing a server takes a while: without this, a
    # signal in the meantime would be lost.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    import runpy  # here, so that the health check stays quick

    runpy.run_module(name, run_name="__main__", alter_sys=True)


def check_health(path: str) -> str | None:
    """Return what is wrong with this container's server, or None. A minimal HTTP client, with few imports.

    It runs every few seconds, and importing an HTTP library would cost more than the rest of it.
    """
    try:
        with connect() as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            with connection.makefile("rb") as answer:
                status_line = answer.readline(1000).decode("latin-1")
    except OSError as error:
        return str(error)
    return None if status_line.startswith("HTTP/1.1 200 ") else status_line.strip() or "it closed the connection"


def connect() -> socket.socket:
    """Connect to this container's server. Raises `OSError`."""
    host, port = os.environ.get("HOST") or "localhost", os.environ.get("PORT")
    try:
        return socket.create_connection((host, int(port or DEFAULT_PORTS["gateway"])), HEALTH_CHECK_TIMEOUT)
    except ConnectionRefusedError:
        if port:
            raise
        return socket.create_connection((host, DEFAULT_PORTS["message_service"]), HEALTH_CHECK_TIMEOUT)


if __name__ == "__main__":
    main()
