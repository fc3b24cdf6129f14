"""The image and the composition from outside: what a Docker user sees, types and relies on.

One build and one composition serve all tests; a test that breaks something repairs it, and waits until it works.
"""

import asyncio
import json
import os
import re
import secrets
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from kit import ROOT, eventually
from kit.application import PAIR
from kit.client import Answer, get
from kit.load import OpenLoop

from chassis import lifecycle
from chassis.server import VERSION

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
SERVERS = ["gateway", "message_service"]
SERVICES = ["gateway", "message-service", "postgres"]
BASE_IMAGE = "python:3.13-slim"
PASSWORD = """it's a \\ "pass" #1"""
OWNER_PASSWORD = f"{PASSWORD} of the owner"

Run = Callable[..., str]


def docker(
    *arguments: str, check: bool = True, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `docker …` to its end, without the user's own settings in its environment."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_HOST", "DOCKER_CONTEXT") if name in os.environ}
    done = subprocess.run(
        ["docker", *arguments],
        env={**kept, **(environment or {})},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0 or not check, f"docker {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done


def inspect(name: str) -> dict[str, Any]:
    """Docker's description of a container, an image or a network."""
    found: dict[str, Any] = json.loads(docker("inspect", name).stdout)[0]
    return found


def engine_answers() -> bool:
    """Whether there is a Docker engine, and a client with Compose v2."""
    try:
        return all(docker(*command, check=False).returncode == 0 for command in (["version"], ["compose", "version"]))
    except FileNotFoundError:
        return False


if not engine_answers():
    pytest.skip("the containers are not tested: no Docker engine with Compose v2 answers", allow_module_level=True)


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    """The name of the image, built from the checkout."""
    tag = f"messages-test:{secrets.token_hex(4)}"
    docker("compose", "--env-file", os.devnull, "build", environment={"IMAGE": tag})
    yield tag
    docker("image", "rm", "--force", tag)


@pytest.fixture
def start(image: str) -> Iterator[Run]:
    """Starts a container of the image: `start(*options, command=[…])` returns its name."""
    names = []

    def start(*options: str, command: list[str]) -> str:
        names.append(docker("run", "--detach", *options, image, *command).stdout.strip())
        return names[-1]

    yield start
    for name in names:
        docker("rm", "--force", "--volumes", name)


class Composition:
    """`docker compose …` in a project of its own, published on a free port."""

    def __init__(self, image: str, env_file: Path) -> None:
        self.project = f"messages-test-{secrets.token_hex(4)}"
        self.url = ""
        self._environment = {"IMAGE": image, "PUBLISH_PORT": "0"}  # overrides .env
        self._env_file = env_file

    @property
    def password(self) -> str:
        """What the message service logs in with."""
        return self._environment.get("DB_PASSWORD", PASSWORD)

    def __call__(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of Compose."""
        options = ["--project-name", self.project, "--env-file", str(self._env_file)]
        return docker("compose", *options, *arguments, check=check, environment=self._environment)

    def up(self, **settings: str) -> None:
        """Start what is not running, and wait until all are healthy; `settings` apply from now on."""
        self._environment |= settings
        done = self("up", "--detach", "--wait", "--wait-timeout", "60", check=False)
        assert done.returncode == 0, done.stderr + self("logs", "--no-color").stdout
        self.url = f"http://{self('port', 'gateway', '8000').stdout.strip()}{PAIR.read_path}"

    def container(self, service: str) -> str:
        """The name of the service's container."""
        return f"{self.project}-{service}-1"

    def sql(self, statement: str) -> str:
        """What psql says, in the database's container."""
        psql = ["psql", "--username=postgres", "--dbname=mydb", "--quiet", "--tuples-only", "--no-align", "--command"]
        return docker("exec", self.container("postgres"), *psql, statement).stdout.strip()

    def store(self, value: object) -> None:
        """Make this the value that clients get."""
        self.sql(PAIR.write.replace("%s", f"'{value}'"))

    async def serves(self, value: object = PAIR.sample) -> bool:
        """Whether a client on this machine gets this value."""
        answer = await get(self.url)
        return answer.status == 200 and answer.json() == {**PAIR.beside, PAIR.result_key: value}


@pytest.fixture(scope="session")
def shared_composition(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composition]:
    env_file = tmp_path_factory.mktemp("compose") / ".env"
    env_file.write_text((ROOT / ".env.example").read_text())
    with env_file.open("a") as file:
        for name, password in (("DB_PASSWORD", PASSWORD), ("DB_OWNER_PASSWORD", OWNER_PASSWORD)):
            escaped = password.replace("'", "\\'")
            file.write(f"\n{name}='{escaped}'\n")
    composition = Composition(image, env_file)
    try:
        composition.up()
        yield composition
    finally:
        composition("down", "--volumes", "--timeout", "5")


@pytest.fixture
async def composition(shared_composition: Composition) -> Composition:
    """The whole system, with the sample strings; restarted if the previous test left it in another state."""
    try:
        well = await shared_composition.serves()
    except OSError:
        well = False
    if not well:
        shared_composition.up()
        shared_composition.store(PAIR.sample)
    return shared_composition


def health(container: str) -> str:
    """The health check's result, as Docker reports it."""
    return str(inspect(container)["State"]["Health"]["Status"])


# ---- the image -------------------------------------------------------------------------------------------------


def product_files() -> set[str]:
    """The files that the servers need: their own modules, the chassis as a whole, and the files they read."""
    chassis = {f"chassis/{path.name}" for path in (ROOT / "chassis").glob("*.py")}
    return chassis | {f"{name}.py" for name in SERVERS} | {"index.html", "openapi.yaml", "pyproject.toml", "schema.sql"}


def files(image: str) -> set[str]:
    """All files in an image, as root sees them."""
    command = ["find", "/", "-xdev", "-path", "/proc", "-prune", "-o", "-type", "f", "-print"]
    return set(docker("run", "--rm", "--user", "0", "--entrypoint", command[0], image, *command[1:]).stdout.split("\n"))


def test_only_the_product_is_in_the_image(image: str) -> None:
    """The servers' own files, the locked packages, and bytecode: no tests, no tools, no leftovers of the build."""
    added = files(image) - files(BASE_IMAGE)
    sources = {path for path in added if not path.endswith(".pyc")}
    assert {path for path in sources if path.startswith("/app/")} == {f"/app/{name}" for name in product_files()}
    site_packages = re.compile(r"/usr/local/lib/python3\.\d+/site-packages/")
    assert not [path for path in sources if not path.startswith("/app/") and not site_packages.match(path)]
    distributions = {found[1].lower() for path in sources if (found := re.search(r"/([^/]+)-[^-/]+\.dist-info/", path))}
    locked = re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements/runtime.txt").read_text(), re.MULTILINE)
    assert distributions == {name.replace("-", "_") for name in locked}


@pytest.mark.parametrize(("name", "setting"), [("gateway", "DOWNSTREAM_URL"), ("message_service", "DB_PASSWORD_FILE")])
def test_the_servers_are_compiled(image: str, name: str, setting: str) -> None:
    """`docker run IMAGE SERVER --help` lists the settings, and loads only modules that are already compiled."""
    done = docker("run", "--rm", "--env", "PYTHONVERBOSE=1", image, name, "--help")
    assert setting in done.stdout
    assert "matches /app/chassis/server.py" in done.stderr
    assert not re.findall(r"^# code object from (/\S+\.py)$", done.stderr, re.MULTILINE)


def test_the_image_is_small(image: str) -> None:
    """It adds less than 45 MB to the base image."""
    assert inspect(image)["Size"] - inspect(BASE_IMAGE)["Size"] < 45_000_000


def test_the_image_says_what_it_is(image: str) -> None:
    """Its labels have the product's name and the version that the servers print."""
    labels = inspect(image)["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == PROJECT
    assert labels["org.opencontainers.image.version"] == VERSION
    assert docker("run", "--rm", image, "gateway", "--version").stdout == f"gateway {VERSION}\n"


@pytest.mark.parametrize("name", SERVERS)
async def test_a_server_is_process_1_and_stops_at_once(start: Run, name: str) -> None:
    """`docker stop` ends it in less than two seconds, with its own exit status, 0."""
    container = start(command=[name])
    await eventually(lambda: "listening" in docker("logs", container).stderr)
    assert docker("exec", container, "cat", "/proc/1/cmdline").stdout == f"python\0-m\0{name}\0"
    docker("stop", "--time", "2", container)  # kills after that, with status 137
    assert inspect(container)["State"]["ExitCode"] == 0


async def test_a_stop_counts_from_the_first_moment(start: Run, tmp_path: Path) -> None:
    """A server that is still loading ends within `docker stop`'s time, too."""
    slow = tmp_path / "settings.py"
    slow.write_text("import signal\nprint('loading', flush=True)\nsignal.pause()\n")
    slow.chmod(0o644)
    container = start("--volume", f"{slow}:/app/chassis/settings.py:ro", command=["gateway"])
    await eventually(lambda: docker("logs", container).stdout == "loading\n")
    docker("stop", "--time", "2", container)
    assert inspect(container)["State"]["ExitCode"] == 130  # that of Ctrl-C; a container that is killed has 137


# ---- the composition -------------------------------------------------------------------------------------------


async def test_up_serves_the_message(composition: Composition) -> None:
    """When `docker compose up --wait` returns, a client gets the message."""
    assert await composition.serves()


@pytest.mark.parametrize("service", ["gateway", "message-service"])
async def test_the_health_check_finds_the_server(composition: Composition, service: str) -> None:
    """Healthy while it answers; unhealthy once it does not."""
    container = composition.container(service)
    await eventually(lambda: health(container) == "healthy", within=10)
    check = inspect(container)["Config"]["Healthcheck"]["Test"][1:]
    docker("exec", container, *check)
    docker("kill", "--signal", "STOP", container)
    assert docker("exec", container, "timeout", "5", *check, check=False).returncode != 0
    docker("kill", "--signal", "CONT", container)


def environment(composition: Composition, service: str) -> list[str]:
    """The environment of a container's processes."""
    found: list[str] = inspect(composition.container(service))["Config"]["Env"]
    return found


def test_the_passwords_are_those_of_the_env_file(composition: Composition) -> None:
    """The database requires them, whatever their characters; no server has the owner's."""
    command = ["exec", "--env=DB_PASSWORD=messages", composition.container("message-service")]
    done = docker(*command, "python", "-m", "message_service", "--apply-schema", check=False)
    assert done.returncode == 1
    assert "password authentication failed" in done.stderr
    assert f"DB_PASSWORD={composition.password}" in environment(composition, "message-service")
    assert f"DB_OWNER_PASSWORD={OWNER_PASSWORD}" in environment(composition, "schema")
    for service in ("gateway", "message-service"):
        assert not [line for line in environment(composition, service) if "OWNER" in line or OWNER_PASSWORD in line]


def test_the_message_service_may_only_read(composition: Composition) -> None:
    """It logs in as a role that can change nothing."""
    assert "DB_USER=messages" in environment(composition, "message-service")
    psql = ["exec", composition.container("postgres"), "psql", "--username=messages", "--dbname=mydb", "--command"]
    assert str(PAIR.sample) in docker(*psql, PAIR.statement).stdout
    for statement in (PAIR.write.replace("%s", "NULL"), f"DELETE FROM {PAIR.table}", "CREATE TABLE more ()"):
        assert "permission denied" in docker(*psql, statement, check=False).stderr


def test_the_schema_step_has_ended(composition: Composition) -> None:
    """It has exited 0 for good; while it ran, it was confined like the servers."""
    container = inspect(composition.container("schema"))
    assert (container["State"]["Status"], container["State"]["ExitCode"]) == ("exited", 0)
    host = container["HostConfig"]
    assert host["RestartPolicy"]["Name"] == "no"
    assert (host["CapDrop"], host["ReadonlyRootfs"]) == (["ALL"], True)
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert min(host[limit] or 0 for limit in ("Memory", "NanoCpus", "PidsLimit")) > 0


def test_only_the_gateway_is_published(composition: Composition) -> None:
    """On port 8000 of the loopback; neither the message service nor the database is."""
    published = {
        (service, port, binding["HostIp"])
        for service in (*SERVICES, "schema")
        for port, bindings in inspect(composition.container(service))["HostConfig"]["PortBindings"].items()
        for binding in bindings
    }
    assert published == {("gateway", "8000/tcp", "127.0.0.1")}


def test_only_neighbours_reach_each_other(composition: Composition) -> None:
    """Gateway to message service to database, nothing else; and only the gateway can reach the outside."""
    connect = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 0.5)"

    def reaches(service: str, host: str, port: int) -> bool:
        command = ["exec", composition.container(service), "python", "-c", connect, host, str(port)]
        return docker(*command, check=False).returncode == 0

    (database,) = inspect(composition.container("postgres"))["NetworkSettings"]["Networks"].values()
    assert reaches("gateway", "message-service", 8001)
    assert reaches("message-service", "postgres", 5432)
    assert not reaches("gateway", "postgres", 5432)
    assert not reaches("gateway", database["IPAddress"], 5432)
    for service in ("message-service", "postgres"):
        routes = docker("exec", composition.container(service), "cat", "/proc/net/route").stdout.splitlines()[1:]
        assert routes
        assert not [route for route in routes if route.split()[1] == "00000000"]


@pytest.mark.parametrize("service", SERVICES)
def test_containers_are_confined(composition: Composition, service: str) -> None:
    """No root, capabilities or new privileges; only declared paths are writable; resources are limited; it restarts."""
    container = composition.container(service)
    lines = docker("exec", container, "cat", "/proc/1/status").stdout.splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert "0" not in status["Uid"].split()
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert docker("exec", "--user", "0", container, "touch", "/usr/written", check=False).returncode != 0
    host = inspect(container)["HostConfig"]
    assert min(host[limit] or 0 for limit in ("Memory", "NanoCpus", "PidsLimit")) > 0
    assert host["RestartPolicy"]["Name"] == "unless-stopped"


def test_the_user_is_a_number(image: str) -> None:
    """So that Kubernetes' runAsNonRoot can verify that it is not root."""
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", inspect(image)["Config"]["User"])


def test_the_stop_grace_is_long_enough(composition: Composition) -> None:
    """Docker does not kill a server that is still within its time to drain and finish."""
    defaults = {
        "DRAIN_SECONDS": lifecycle.Settings.drain_seconds,
        "SHUTDOWN_SECONDS": lifecycle.Settings.shutdown_seconds,
    }
    for service in ("gateway", "message-service"):
        config = inspect(composition.container(service))["Config"]
        environment = dict(line.split("=", 1) for line in config["Env"])
        assert config.get("StopTimeout", 10) > sum(float(environment.get(name) or defaults[name]) for name in defaults)


@pytest.mark.matrix
async def test_a_killed_database_heals(composition: Composition) -> None:
    """Clients are told to retry while it is away, and get the message once it is back."""
    composition("kill", "--signal", "SIGKILL", "postgres")
    first = await get(composition.url)
    assert first.status in (503, 504)  # 504: for a connection that lost its other end silently
    answer = await get(composition.url)
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0
    composition("start", "postgres")
    await eventually(composition.serves, within=30)


@pytest.mark.matrix
async def test_a_restart_of_the_message_service_is_survived(composition: Composition) -> None:
    """Under load, clients get the message, or are told to retry if it takes long; then the message again."""
    seen: list[Answer] = []

    async def load() -> None:
        while True:
            seen.append(await get(composition.url))
            await asyncio.sleep(0.02)

    clients = [asyncio.create_task(load()) for _ in range(4)]
    await asyncio.to_thread(composition, "restart", "message-service")
    restarted = len(seen)
    await eventually(lambda: any(answer.status == 200 for answer in seen[restarted:]), within=10)
    for client in clients:
        client.cancel()
    ends = await asyncio.gather(*clients, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
    assert {answer.status for answer in seen} <= {200, 503}
    assert all("Retry-After" in answer.headers for answer in seen if answer.status == 503)


async def test_data_outlives_the_containers(composition: Composition) -> None:
    """A changed value is still there after `down` and another `up`, even with a new password."""
    composition.store(PAIR.other)
    composition("down")
    composition.up(DB_PASSWORD=f"{PASSWORD}, changed")
    assert await composition.serves(PAIR.other)


async def test_any_user_number_will_do(composition: Composition, start: Run) -> None:
    """Each server answers as an unknown user number, without rights, and on its own network alone."""
    confined = ["--user", "54321:54321", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    database = [
        "--network",
        f"{composition.project}_database",
        "--env",
        "DB_HOST=postgres",
        "--env",
        "DB_USER=messages",
        "--env",
        f"DB_PASSWORD={composition.password}",
    ]
    service = start(*confined, *database, command=["message_service"])
    services = ["--network", f"{composition.project}_services", "--env", "DOWNSTREAM_URL=http://message-service:8001"]
    gateway = start(*confined, *services, command=["gateway"])

    def served(container: str, url: str) -> bool:
        ask = f"import urllib.request; urllib.request.urlopen('http://localhost:{url}', timeout=2)"
        return docker("exec", container, "python", "-c", ask, check=False).returncode == 0

    await eventually(lambda: served(service, f"8001{PAIR.service_path}"), within=10)
    await eventually(lambda: served(gateway, f"8000{PAIR.read_path}"), within=10)
    assert docker("exec", gateway, "id", "-u").stdout == docker("exec", service, "id", "-u").stdout == "54321\n"


def test_the_image_applies_the_schema(composition: Composition) -> None:
    """`docker run … IMAGE message_service --apply-schema`, as the composition does it, fills an empty database."""
    composition.sql(f"DROP TABLE {PAIR.table}, applied_schemas")
    assert "applied schema.sql" in composition("run", "--rm", "--no-deps", "--no-TTY", "schema").stdout
    assert composition.sql(PAIR.statement) == str(PAIR.sample)


# ---- a second release ------------------------------------------------------------------------------------------

ROWS = 3_000_000
COLUMN = "ALTER TABLE messages ADD COLUMN IF NOT EXISTS language text NOT NULL DEFAULT 'en';"


@pytest.fixture
def next_image(image: str, tmp_path: Path) -> Iterator[str]:
    """The image of a release whose schema has one more column, which its query needs."""
    service = (ROOT / "message_service.py").read_text()
    (tmp_path / "message_service.py").write_text(
        service.replace(" FROM messages ", " FROM messages WHERE language = 'en' ")
    )
    (tmp_path / "schema.sql").write_text(f"{(ROOT / 'schema.sql').read_text()}{COLUMN}\n")
    (tmp_path / "Dockerfile").write_text(f"FROM {image}\nCOPY --chmod=644 *.py schema.sql /app/\n")
    docker("build", "--quiet", "--tag", f"{image}-next", str(tmp_path))
    yield f"{image}-next"
    docker("image", "rm", "--force", f"{image}-next")


@pytest.fixture
def busy_composition(image: str, tmp_path: Path) -> Iterator[Composition]:
    """A composition of the test's own, with the default settings and a large table."""
    (tmp_path / ".env").touch()
    composition = Composition(image, tmp_path / ".env")
    try:
        composition.up()
        composition.sql(f"INSERT INTO messages (content) SELECT n FROM generate_series(4, {ROWS}) AS n")
        yield composition
    finally:
        composition("down", "--volumes", "--timeout", "5")


def page_commands() -> str:
    """How docs/containers.md replaces the message service, without the build."""
    page = (ROOT / "docs/containers.md").read_text()
    *_, block = re.findall(r"^```sh\ndocker compose build\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert "--scale message-service=2" in block
    return str(block)


@pytest.mark.matrix
async def test_a_second_release_costs_no_request(busy_composition: Composition, next_image: str) -> None:
    """Under 50 requests/s, while a report of 6 s holds a lock, and also if the owner's password is not there.

    Without it, the page's commands stop at the schema, and the old release goes on; with it, they add a column to a
    table of three million rows and replace the message service.
    """
    composition = busy_composition

    def release(**settings: str) -> subprocess.CompletedProcess[str]:
        variables = {"COMPOSE_PROJECT_NAME": composition.project, "COMPOSE_ENV_FILES": os.devnull, "PUBLISH_PORT": "0"}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_HOST") if name in os.environ}
        return subprocess.run(
            ["bash", "-euc", page_commands()],
            env={**kept, **variables, "IMAGE": next_image, **settings},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def replicas() -> list[str]:
        return composition("ps", "--quiet", "message-service").stdout.split()

    (old,) = replicas()
    async with OpenLoop(composition.url, rate=50) as load:
        without = await asyncio.to_thread(release, DB_OWNER_PASSWORD="not the owner's")
        assert without.returncode == 1
        assert "has not been applied" in without.stderr
        assert replicas() == [old]
        psql = ["exec", composition.container("postgres"), "psql", "--username=postgres", "mydb", "--command"]
        query = "BEGIN; SELECT count(*) FROM messages; SELECT pg_sleep(120)"
        report = asyncio.create_task(asyncio.to_thread(docker, *psql, query, check=False))
        await eventually(lambda: composition.sql(f"SELECT 1 FROM pg_stat_activity WHERE query = '{query}'"))
        releasing = asyncio.create_task(asyncio.to_thread(release))
        waits = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'apply_schema' AND wait_event_type = 'Lock'"
        await eventually(lambda: composition.sql(waits), within=60)
        await asyncio.sleep(6)  # the time that the report takes from then on
        composition.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = '{query}'")
        await report
        done = await releasing
        assert done.returncode == 0, done.stderr
        assert "applied schema.sql" in done.stdout
    (new,) = replicas()
    assert new != old
    assert inspect(new)["Config"]["Image"] == next_image
    assert composition.sql("SELECT count(*), min(language) FROM messages") == f"{ROWS}|en"
    assert load.failed() == []
    assert load.slowest() < 1.5


# ---- what may be set -------------------------------------------------------------------------------------------


def services(**environment: str) -> dict[str, Any]:
    """The services of docker-compose.yml as Compose sees them, with these settings."""
    text = docker("compose", "--env-file", os.devnull, "config", "--format", "json", environment=environment).stdout
    found: dict[str, Any] = json.loads(text)["services"]
    return found


def publication(**environment: str) -> tuple[str, str]:
    """The address and port that the composition publishes, with these settings."""
    (port,) = services(**environment)["gateway"]["ports"]
    return port["host_ip"], port["published"]


def test_there_is_one_image() -> None:
    """It is built once, and not pulled for the others: separate builds would make separate images."""
    found = services()
    assert "build" in found["message-service"]
    for name in ("gateway", "schema"):
        assert found[name]["image"] == found["message-service"]["image"]
        assert "build" not in found[name]
        assert found[name]["pull_policy"] == "never"


def test_the_publication_can_be_chosen() -> None:
    """Port 8000 of the loopback by default."""
    assert publication() == ("127.0.0.1", "8000")
    assert publication(PUBLISH="0.0.0.0") == ("0.0.0.0", "8000")
    assert publication(PUBLISH_PORT="80") == ("127.0.0.1", "80")


def test_the_example_has_all_that_can_be_set() -> None:
    """.env.example lists every variable of docker-compose.yml with its default, so copying it changes nothing."""
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    assert set(re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)) == used
    without = docker("compose", "--env-file", os.devnull, "config").stdout
    assert docker("compose", "--env-file", ".env.example", "config").stdout == without
