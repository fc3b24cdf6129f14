"""TLS to the database: the service connects wherever libpq does with the same DB_SSLMODE, and says why where it cannot.

The server is a real PostgreSQL with TLS; its rules in pg_hba.conf decide which connections it takes.
"""

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from conftest import Start
from kit.client import get
from kit.postgres import PASSWORD, USER, Cluster, make_folder, programs_with_tls
from kit.processes import run

MODES = (None, "disable", "allow", "prefer", "require")  # None: DB_SSLMODE is not set
RULES = ("host", "hostssl", "hostnossl", "reject")


class Certificates:
    """A certificate authority; one that nobody knows; and a server's certificate of each, for `localhost` only."""

    def __init__(self, folder: Path):
        self.folder = folder
        for authority in ("known", "unknown"):
            self._openssl("req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=CA", authority, authority)
            options = f"-CA {authority}.crt -CAkey {authority}.key -addext subjectAltName=DNS:localhost"
            name = f"{authority}-server"
            self._openssl(f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost {options}", name, name)

    def _openssl(self, command: str, key: str, crt: str) -> None:
        files = ["-keyout", f"{key}.key", "-out", f"{crt}.crt"]
        subprocess.run(["openssl", *command.split(), *files], cwd=self.folder, check=True, capture_output=True)

    @property
    def authority(self) -> Path:
        """What a client checks the server's certificate against."""
        return self.folder / "known.crt"


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make certificates")
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def tls_cluster(session_folder: Path, certificates: Certificates) -> Iterator[Cluster]:
    """A cluster that speaks TLS, with the known authority's certificate; its log has every connection."""
    folder = programs_with_tls()
    if not folder:
        pytest.skip("needs a PostgreSQL with TLS (Debian: apt-get install postgresql)")
    cluster = Cluster(make_folder("tls-", session_folder), session_folder, folder, log_connections="on")
    use_tls(cluster, certificates, "known")
    yield cluster
    cluster.close()


def use_tls(cluster: Cluster, certificates: Certificates, authority: str) -> None:
    """Let the cluster speak TLS, with this authority's certificate."""
    for kind in ("key", "crt"):
        file = cluster.data / f"server.{kind}"
        shutil.copy(certificates.folder / f"{authority}-server.{kind}", file)
        file.chmod(0o600)
        if USER:
            shutil.chown(file, USER)
    cluster.settings["ssl"] = "on"
    cluster.restart()


def set_rule(cluster: Cluster, rule: str) -> None:
    """Let it take, over TCP, only connections of this kind."""
    method = "reject" if rule == "reject" else "scram-sha-256"
    kind = "host" if rule == "reject" else rule
    (cluster.data / "pg_hba.conf").write_text(f"local all all trust\n{kind} all all all {method}\n")
    cluster.restart()


def libpq(cluster: Cluster, mode: str | None) -> str | None:
    """Why libpq cannot connect with this mode; None when it can."""
    settings = {"host": "127.0.0.1", "port": cluster.port, "dbname": "mydb", "user": "postgres", "password": PASSWORD}
    try:
        psycopg2.connect(**settings, sslmode=mode, gssencmode="disable").close()
    except psycopg2.OperationalError as error:
        return str(error)
    return None


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tls", [True, False], ids=["TLS", "no TLS"])
async def test_it_connects_where_libpq_does(tls_cluster: Cluster, start: Start, tls: bool, rule: str) -> None:
    """With each mode: 200 where libpq connects; else 503 at once, and its reasons, all of them, in the log."""
    tls_cluster.settings["ssl"] = "on" if tls else "off"
    set_rule(tls_cluster, rule)
    settings = tls_cluster.database().settings(DB_TIMEOUT=10)
    services = await asyncio.gather(*(start("message_service", **settings, DB_SSLMODE=mode or "") for mode in MODES))
    connected = {}
    for mode, service in zip(MODES, services, strict=True):
        answer = await get(service.url + "/api/message")
        reasons = libpq(tls_cluster, mode)
        connected[mode] = answer.status == 200
        assert (answer.status == 503) == (reasons is not None), (mode, reasons)
        if reasons:
            assert answer.seconds < 3
            cause = (await service.wait_for_log(status=503))["cause"]
            for reason in reasons.splitlines():
                assert " ".join(reason.partition("failed: ")[2].split()) in cause, mode
    expected = {
        "host": {None, "disable", "allow", "prefer", *(["require"] if tls else [])},
        "hostssl": {None, "allow", "prefer", "require"} if tls else set(),
        "hostnossl": {None, "disable", "allow", "prefer"},
        "reject": set(),
    }[rule]
    assert {mode for mode in MODES if connected[mode]} == expected


@pytest.mark.parametrize("mode", MODES)
async def test_one_connection_is_enough(tls_cluster: Cluster, start: Start, mode: str | None) -> None:
    """Where the first thing that libpq tries succeeds, nothing else is tried; nor where nobody listens."""
    received = "connection received"
    service = await start("message_service", **tls_cluster.database().settings(), DB_SSLMODE=mode or "")
    log = tls_cluster.folder / "log"
    for tls in ("on", "off"):
        if (tls, mode) == ("off", "require"):
            continue
        tls_cluster.settings["ssl"] = tls
        tls_cluster.restart()
        before = log.read_text().count(received)
        assert (await get(service.url + "/api/message")).status == 200
        assert log.read_text().count(received) == before + 1
    tls_cluster.stop()
    assert (await get(service.url + "/api/message")).status == 503
    cause = (await service.wait_for_log(status=503))["cause"]
    assert cause.count("Connection refused") == 1


async def test_a_wrong_password_is_told_where_plain_text_is_refused(tls_cluster: Cluster, start: Start) -> None:
    """As RDS does by default: the reason of the try with TLS comes first, that of the one without it is no surprise."""
    set_rule(tls_cluster, "hostssl")
    service = await start("message_service", **tls_cluster.database().settings(DB_PASSWORD="wrong"))
    assert (await get(service.url + "/api/message")).status == 503
    cause = (await service.wait_for_log(status=503))["cause"]
    assert cause.index("password authentication failed") < cause.index("no encryption")


@pytest.mark.parametrize(
    ("authority", "mode", "host", "reason"),
    [
        ("known", "verify-full", "localhost", None),
        ("known", "verify-full", "127.0.0.1", "does not match host name"),
        ("known", "verify-ca", "127.0.0.1", None),
        ("unknown", "verify-full", "localhost", "certificate verify failed"),
        ("unknown", "verify-ca", "localhost", "certificate verify failed"),
        ("unknown", "require", "localhost", "certificate verify failed"),  # libpq's rule, since there is an authority
    ],
)
async def test_the_certificate_is_checked(
    tls_cluster: Cluster,
    certificates: Certificates,
    start: Start,
    authority: str,
    mode: str,
    host: str,
    reason: str | None,
) -> None:
    """A right one is taken; a wrong host or authority is 503 at once, with libpq's reason in the log."""
    use_tls(tls_cluster, certificates, authority)
    settings = tls_cluster.database().settings(DB_HOST=host, DB_TIMEOUT=10)
    service = await start(
        "message_service", **settings, DB_SSLMODE=mode, DB_SSLROOTCERT=certificates.authority
    )
    answer = await get(service.url + "/api/message")
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
async def test_variables_of_libpq_have_no_say(cluster: Cluster, start: Start, command: list[str]) -> None:
    """Whatever somebody has set for psql on this machine."""
    settings = cluster.database().settings(**ODD)
    if command:
        ended = await asyncio.to_thread(run, "-m", "message_service", *command, **settings)
        assert ended.returncode == 0, ended.stderr
    else:
        service = await start("message_service", **settings)
        assert (await get(service.url + "/api/message")).status == 200


@pytest.mark.parametrize(("mode", "status"), [(None, 200), ("require", 503)])
async def test_a_home_that_cannot_be_read(
    tls_cluster: Cluster, start: Start, tmp_path: Path, mode: str | None, status: int
) -> None:
    """libpq looks for certificates there: without them, it connects as it may without TLS, or says what it cannot read."""
    (tmp_path / ".postgresql").symlink_to(".postgresql")  # an endless link, which root cannot read either
    settings = tls_cluster.database().settings(DB_TIMEOUT=10, HOME=tmp_path)
    service = await start("message_service", **settings, DB_SSLMODE=mode or "")
    answer = await get(service.url + "/api/message")
    assert (answer.status, answer.seconds < 3) == (status, True)
    if status == 503:
        assert ".postgresql" in (await service.wait_for_log(status=503))["cause"]
