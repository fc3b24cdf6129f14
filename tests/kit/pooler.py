"""PgBouncer, between a service and PostgreSQL, which assigns a backend to each session or transaction."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from kit import reserve_port, wait_until
from kit.application import DATABASE
from kit.postgres import PASSWORD, USER, Cluster, Database

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


class Pooler:
    """A PgBouncer of our own in front of a cluster, on a port that it keeps while it is down.

    It asks its clients for a password (SCRAM), and logs in to PostgreSQL over the Unix socket.
    """

    def __init__(self, folder: Path, cluster: Cluster, **settings: object):
        """Write its files into `folder`, which belongs to PostgreSQL's user, and start it with these `settings`."""
        self.cluster = cluster
        self.reservation = reserve_port()
        self.port: int = self.reservation.getsockname()[1]
        self.file, self.log_file = folder / "pgbouncer.ini", folder / "pgbouncer.log"
        self.users = folder / "users"
        self.let_in("postgres", PASSWORD)
        lines = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": self.users,
        } | settings
        self.file.write_text(
            f"[databases]\n* = host={cluster.folder} port={cluster.port}\n[pgbouncer]\n"
            + "".join(f"{name} = {value}\n" for name, value in lines.items())
        )
        self.start()

    def let_in(self, user: str, password: str) -> None:
        """Allow another role to log in, from the next start on."""
        with self.users.open("a") as users:
            users.write(f'"{user}" "{password}"\n')

    def database(self, user: str = "postgres", password: str = PASSWORD) -> Database:
        """The cluster's database as a client of the pooler sees it."""
        return Database(DATABASE, user, password, "127.0.0.1", self.port)

    def start(self) -> None:
        """Start, and return when it listens."""
        assert PROGRAM
        with self.log_file.open("a") as log:
            self.process = subprocess.Popen(
                [PROGRAM, self.file], user=USER, stdout=log, stderr=log, cwd="/", start_new_session=True
            )
        wait_until(self._listens, within=15, fault=lambda: f"PgBouncer did not start: {self.log_file.read_text()}")

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log_file.read_text()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        return False

    def stop(self) -> None:
        """End it at once, with all its connections."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(10)

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def close(self) -> None:
        """End it, whatever state it is in."""
        if self.process.poll() is None:
            self.stop()
        self.reservation.close()
