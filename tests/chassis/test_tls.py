"""TLS to the database: the service connects wherever libpq does with the same DB_SSLMODE; if it cannot, it says why.

The server is a real PostgreSQL with TLS; its rules in pg_hba.conf decide which connections it accepts.
"""

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from conftest import Start, close_all
from kit import eventually, open_sockets
from kit.application import DATABASE, PAIR
from kit.client import get
from kit.postgres import PASSWORD, USER, Cluster, Database, make_folder, programs_with_tls
from kit.processes import Server, run, wait_listening

MODES = (None, "disable", "allow", "prefer", "require")  # None: DB_SSLMODE is not set


class Certificates:
    """A certificate authority; an unknown one; and a server certificate from each, for `localhost` only."""

    def __init__(self, folder: Path):
        self.folder = folder
        for authority in ("known", "unknown"):
            self._openssl(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=CA",
                authority,
                authority,
            )
            options = f"-CA {authority}.crt -CAkey {authority}.key -addext subjectAltName=DNS:localhost"
            name = f"{authority}-server"
            self._openssl(
                f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost {options}",
                name,
                name,
            )

    def _openssl(self, command: str, key: str, crt: str) -> None:
        files = ["-keyout", f"{key}.key", "-out", f"{crt}.crt"]
        subprocess.run(["openssl", *command.split(), *files], cwd=self.folder, check=True, capture_output=True)

    @property
    def authority(self) -> Path:
        """The certificate against which a client checks the server's."""
        return self.folder / "known.crt"


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make certificates")
    return Certificates(tmp_path_factory.mktemp("certificates"))


class TLSCluster(Cluster):
    """A cluster with or without TLS that accepts only some kinds of connections; it logs every connection."""

    certificates: Certificates

    def configure(self, *, tls: bool = True, rule: str = "host", authority: str = "known") -> None:
        """Restart it: `rule` says which TCP connections it accepts, `authority` signs its certificate."""
        for kind in ("key", "crt"):
            file = self.data / f"server.{kind}"
            shutil.copy(self.certificates.folder / f"{authority}-server.{kind}", file)
            file.chmod(0o600)
            if USER:
                shutil.chown(file, USER)
        method = "reject" if rule == "reject" else "scram-sha-256"
        kind = "host" if rule == "reject" else rule
        (self.data / "pg_hba.conf").write_text(f"local all all trust\n{kind} all all all {method}\n")
        self.settings["ssl"] = "on" if tls else "off"
        if self.process.poll() is None:
            self.stop()
        self.start()

    def connections(self) -> int:
        """How many connections were made so far, successful or not."""
        return (self.folder / "log").read_text().count("connection received")


@pytest.fixture(scope="module")
def tls_cluster(session_folder: Path, certificates: Certificates) -> Iterator[TLSCluster]:
    """For all tests here; each configures it."""
    folder = programs_with_tls()
    if not folder:
        pytest.skip("needs a PostgreSQL with TLS (Debian: apt-get install postgresql)")
    cluster = TLSCluster(make_folder("tls-", session_folder), session_folder, folder, log_connections="on")
    cluster.certificates = certificates
    yield cluster
    cluster.close()


def libpq(cluster: Cluster, mode: str | None) -> str | None:
    """Why libpq cannot connect with this mode; None if it can."""
    settings = {"host": "127.0.0.1", "port": cluster.port, "dbname": DATABASE, "user": "postgres", "password": PASSWORD}
    try:
        psycopg2.connect(**settings, sslmode=mode, gssencmode="disable").close()
    except psycopg2.OperationalError as error:
        return str(error)
    return None


EXPECTED: dict[tuple[bool, str], set[str | None]] = {  # by TLS and rule: the modes that connect
    (True, "host"): {None, "disable", "allow", "prefer", "require"},
    (True, "hostssl"): {None, "allow", "prefer", "require"},
    (True, "hostnossl"): {None, "disable", "allow", "prefer"},
    (True, "reject"): set(),
    (False, "host"): {None, "disable", "allow", "prefer"},
    (False, "hostssl"): set(),
    (False, "hostnossl"): {None, "disable", "allow", "prefer"},
    (False, "reject"): set(),
}


Services = list[tuple[str | None, Server]]


@pytest.fixture(scope="module")
def services(tls_cluster: TLSCluster) -> Iterator[Services]:
    """A service for each mode, with one connection, and enough time to tell "at once" from "in time"."""
    settings = tls_cluster.database().settings(DB_TIMEOUT=10, DB_POOL_SIZE=1, ACCESS_LOG="all")
    command = "-m", PAIR.service
    started = [Server(PAIR.service, *command, **settings, DB_SSLMODE=mode or "") for mode in MODES]
    yield [(mode, wait_listening(service)) for mode, service in zip(MODES, started, strict=True)]
    close_all(started)


async def ask(service: Server) -> tuple[int, str]:
    """The status that a client gets, at once, and the log's cause for it."""
    answer = await get(service.url + PAIR.service_path)
    assert answer.seconds < 3
    line = await service.wait_for_log(request_id=answer.request_id)
    return answer.status, line.get("cause", "")


async def test_it_connects_where_libpq_does(tls_cluster: TLSCluster, services: Services) -> None:
    """With each mode and rule: 200 if libpq connects, else 503 at once, with all of libpq's reasons in the log."""
    for (tls, rule), expected in EXPECTED.items():
        tls_cluster.configure(tls=tls, rule=rule)
        connected = set()
        for mode, service in services:
            status, cause = await ask(service)
            reasons = libpq(tls_cluster, mode)
            assert status == (503 if reasons else 200), (tls, rule, mode, reasons)
            lines = [line.partition("failed: ")[2] for line in (reasons or "").splitlines()]
            found = [cause.find(" ".join(line.split())) for line in lines]
            assert -1 not in found, (tls, rule, mode, cause)
            assert found == sorted(found)  # in libpq's order
            if not reasons:
                connected.add(mode)
        assert connected == expected, (tls, rule)


async def test_one_connection_is_enough(tls_cluster: TLSCluster, services: Services) -> None:
    """If the first attempt succeeds, there is no second; nor if nothing listens."""
    for tls in (True, False):
        tls_cluster.configure(tls=tls)
        for mode, service in services:
            if tls or mode != "require":
                before = tls_cluster.connections()
                assert await ask(service) == (200, "")
                tries = 2 if mode in (None, "prefer") and not tls else 1  # with TLS first, then without
                assert tls_cluster.connections() == before + tries, (tls, mode)
    tls_cluster.stop()
    for _, service in services:
        status, cause = await ask(service)
        assert (status, cause.count("Connection refused")) == (503, 1)


async def test_a_refused_login_leaves_nothing_behind(tls_cluster: TLSCluster, start: Start) -> None:
    """However often it tries, on two sockets each time, none stays open."""
    tls_cluster.configure(rule="reject")
    service = await start(PAIR.service, **tls_cluster.database().settings())
    for _ in range(20):
        assert (await get(service.url + PAIR.service_path)).status == 503
    await eventually(lambda: open_sockets(service.pid) < 20)


async def test_a_wrong_password_is_told_where_plain_text_is_refused(tls_cluster: TLSCluster, start: Start) -> None:
    """RDS refuses it by default: the reason of the attempt with TLS comes first, since the other is no surprise."""
    tls_cluster.configure(rule="hostssl")
    service = await start(PAIR.service, **tls_cluster.database().settings(DB_PASSWORD="wrong"))
    assert (await get(service.url + PAIR.service_path)).status == 503
    cause = (await service.wait_for_log(status=503))["cause"]
    assert cause.index("password authentication failed") < cause.index("no encryption")


@pytest.mark.parametrize(
    ("authority", "mode", "host", "reason"),
    [
        ("known", "verify-full", "localhost", None),
        ("known", "verify-full", "127.0.0.1", "does not match host name"),
        ("unknown", "verify-full", "localhost", "certificate verify failed"),
        pytest.param("known", "verify-ca", "127.0.0.1", None, marks=pytest.mark.matrix),
        pytest.param("unknown", "verify-ca", "localhost", "certificate verify failed", marks=pytest.mark.matrix),
        # libpq's rule, since there is an authority
        pytest.param("unknown", "require", "localhost", "certificate verify failed", marks=pytest.mark.matrix),
    ],
)
async def test_the_certificate_is_checked(
    tls_cluster: TLSCluster,
    certificates: Certificates,
    start: Start,
    authority: str,
    mode: str,
    host: str,
    reason: str | None,
) -> None:
    """A correct one is accepted; a wrong host or authority is 503 at once, with libpq's reason in the log."""
    tls_cluster.configure(authority=authority)
    settings = tls_cluster.database().settings(DB_HOST=host, DB_TIMEOUT=10)
    service = await start(PAIR.service, **settings, DB_SSLMODE=mode, DB_SSLROOTCERT=certificates.authority)
    answer = await get(service.url + PAIR.service_path)
    assert (answer.status == 503, answer.seconds < 3) == (bool(reason), True)
    if reason:
        assert reason in (await service.wait_for_log(status=503))["cause"]


ODD = {
    "PGTARGETSESSIONATTRS": "standby",
    "PGSSLMODE": "verify-full",
    "PGSSLNEGOTIATION": "direct",
    "PGSSLCERT": "/nowhere",
    "PGHOSTADDR": "192.0.2.1",
    "PGPORT": "1",
    "PGUSER": "nobody",
    "PGDATABASE": "nowhere",
    "PGPASSWORD": "wrong",
    "PGSERVICE": "nowhere",
    "PGREQUIREAUTH": "none",
    "PGCHANNELBINDING": "require",
    "PGGSSENCMODE": "require",
    "PGLOADBALANCEHOSTS": "random",
    "PGCLIENTENCODING": "LATIN1",
    "PGOPTIONS": "-c default_transaction_isolation=nonsense",
    "PGAPPNAME": "theirs",
}


@pytest.mark.parametrize("command", [[], ["--apply-schema"]], ids=["the service", "--apply-schema"])
async def test_variables_of_libpq_have_no_say(database: Database, start: Start, command: list[str]) -> None:
    """Whatever a user has set for psql on this machine."""
    settings = database.settings(**ODD)
    if command:
        ended = await asyncio.to_thread(run, "-m", PAIR.service, *command, **settings)
        assert ended.returncode == 0, ended.stderr
    else:
        service = await start(PAIR.service, **settings)
        assert (await get(service.url + PAIR.service_path)).status == 200


@pytest.mark.parametrize(("mode", "status"), [(None, 200), ("require", 503)])
async def test_a_home_that_cannot_be_read(
    tls_cluster: TLSCluster, start: Start, tmp_path: Path, mode: str | None, status: int
) -> None:
    """libpq looks for certificates there. It connects without TLS if it may; else the log says what it cannot read."""
    tls_cluster.configure()
    (tmp_path / ".postgresql").symlink_to(".postgresql")  # a link to itself, which not even root can read
    settings = tls_cluster.database().settings(DB_TIMEOUT=10, HOME=tmp_path)
    service = await start(PAIR.service, **settings, DB_SSLMODE=mode or "")
    answer = await get(service.url + PAIR.service_path)
    assert (answer.status, answer.seconds < 3) == (status, True)
    if status == 503:
        assert ".postgresql" in (await service.wait_for_log(status=503))["cause"]
