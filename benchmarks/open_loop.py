"""Requests at random times, whatever became of those before (an open loop, Poisson arrivals), as from many users.

wrk's clients ask again as soon as they are answered, so they fall into step with the runs that answer them. A million
users do not. One thread with `select`, whose time limits are exact to some 50 µs; epoll's are whole milliseconds.
"""

import random
import select
import socket
import time

REQUEST = (
    b"GET /%s HTTP/1.1\r\nHost: example.com\r\nUser-Agent: open-loop\r\nAccept: application/json\r\n"
    b"X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: https\r\n\r\n"
)
CONNECTIONS = (
    500  # at most: `select` takes 1024, a message service 896; then requests wait, and the rate is not reached
)
LAST_ANSWER = 10.0  # seconds


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), LAST_ANSWER)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def receive(connection: socket.socket) -> int:
    """Take an answer; its bytes. Some servers send it in two pieces. Raises `OSError` unless it is a good one."""
    data = b""
    while b"\r\n\r\n" not in data or data.endswith(b"\r\n\r\n"):
        received = connection.recv(65536)
        data += received
        if not received or not data.startswith(b"HTTP/1.1 200"):
            raise OSError(f"not a good answer: {data[:200]!r}")
    return len(data)


def ask(
    ports: list[int], path: str, rate: float, seconds: float, latencies: list[float] | None = None
) -> tuple[int, float]:
    """Ask servers on these ports of the loopback, each as often as the others; how many requests, in how many seconds.

    `latencies` gets the seconds from the moment at which each request was due. Raises `OSError` for a bad answer.
    """
    request = REQUEST % path.encode()
    idle: dict[int, list[socket.socket]] = {port: [] for port in ports}
    port_of: dict[socket.socket, int] = {}
    busy: dict[socket.socket, float] = {}  # when the request was due
    count = 0
    start = due = now = time.perf_counter()
    end = start + seconds
    while due < end or busy:
        readable, _, _ = select.select(list(busy), [], [], max(0.0, due - now) if due < end else LAST_ANSWER)
        if not readable and due >= end:
            raise OSError(f"{len(busy)} requests were not answered in {LAST_ANSWER:.0f} s")
        now = time.perf_counter()
        for connection in readable:
            receive(connection)
            asked = busy.pop(connection)
            if latencies is not None:
                latencies.append(now - asked)
            idle[port_of[connection]].append(connection)
        while due <= now and due < end:
            port = random.choice(ports)
            if idle[port]:
                connection = idle[port].pop()
            elif len(port_of) == CONNECTIONS:
                break
            else:
                connection = connect(port)
                port_of[connection] = port
            connection.send(request)
            busy[connection] = due
            count += 1
            due += random.expovariate(rate)
    for connection in port_of:
        connection.close()
    return count, now - start
