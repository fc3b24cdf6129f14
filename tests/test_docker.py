"""The image and the composition from outside: what a Docker user sees, types and relies on.

One build and one composition serve all tests; a test that breaks something repairs it, and waits until it works.
"""

import ast
import asyncio
import json
import os
import re
import secrets
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from kit import ROOT, eventually
from kit.client import Answer, get
from kit.processes import run

from lifecycle import CommonSettings
from server import VERSION

SERVERS = ["gateway", "message_service"]
SERVICES = ["gateway", "message-service", "postgres"]
BASE_IMAGE = "python:3.13-slim"
PASSWORD = """it's a \\ "pass" #1"""
OWNER_PASSWORD = f"{PASSWORD} of the owner"
GREETING = "Hello from PostgreSQL! This message was read from the database."

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
        self.url = f"http://{self('port', 'gateway', '8000').stdout.strip()}/api/string"

    def container(self, service: str) -> str:
        """The name of the service's container."""
        return f"{self.project}-{service}-1"

    def sql(self, statement: str) -> str:
        """What psql says, in the database's container."""
        psql = ["psql", "--username=postgres", "--dbname=mydb", "--quiet", "--tuples-only", "--no-align", "--command"]
        return docker("exec", self.container("postgres"), *psql, statement).stdout.strip()

    async def serves(self, content: str = GREETING) -> bool:
        """Whether a client on this machine gets this message."""
        answer = await get(self.url)
        return answer.status == 200 and answer.json() == {"result": content}


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
        shared_composition.sql(f"UPDATE messages SET content = '{GREETING}' WHERE id = 1")
    return shared_composition


def health(container: str) -> str:
    """The health check's result, as Docker reports it."""
    return str(inspect(container)["State"]["Health"]["Status"])


# ---- the image -------------------------------------------------------------------------------------------------


def product_files() -> set[str]:
    """The files that the servers need: the modules that they import, by the source, and the files they read."""
    found: set[str] = set()
    todo = ["__main__", *SERVERS]
    while todo:
        name = todo.pop()
        path = ROOT / f"{name}.py"
        if path.exists() and path.name not in found:
            found.add(path.name)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    todo += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    todo.append(node.module)
    return found | {"index.html", "openapi.yaml", "schema.sql"}


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
    assert "matches /app/server.py" in done.stderr
    assert not re.findall(r"^# code object from (/\S+\.py)$", done.stderr, re.MULTILINE)


def test_the_image_is_small(image: str) -> None:
    """It adds less than 45 MB to the base image."""
    assert inspect(image)["Size"] - inspect(BASE_IMAGE)["Size"] < 45_000_000


def test_the_image_says_what_it_is(image: str) -> None:
    """Its labels have the product's name and the version that the servers print."""
    labels = inspect(image)["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == "messages"
    assert labels["org.opencontainers.image.version"] == VERSION
    assert docker("run", "--rm", image, "gateway", "--version").stdout == f"gateway {VERSION}\n"


@pytest.mark.parametrize("arguments", [[], ["sh"]])
def test_the_image_says_what_to_pass(image: str, arguments: list[str]) -> None:
    """Without a server's name, or with an unknown one, stderr says what to pass; the exit status is 2."""
    done = docker("run", "--rm", image, *arguments, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "docker run IMAGE message_service" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["junk"], ["--apply-schema"], ["gateway", "junk"], ["gateway", "--apply-schema"]]
)
def test_wrong_arguments_are_told(arguments: list[str]) -> None:
    """`python FOLDER …`, which containers run, names the argument that it does not know."""
    done = run(".", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert arguments[-1] in done.stderr
    assert "Traceback" not in done.stderr


def test_the_folder_starts_as_the_image_does() -> None:
    """`python FOLDER …` works in a checkout, too, and has its own `--help`."""
    assert run(".", "message_service", "--version").stdout == f"message_service {VERSION}\n"
    assert "docker run IMAGE message_service" in run(".", "--help").stdout


@pytest.mark.parametrize("name", SERVERS)
async def test_a_server_is_process_1_and_stops_at_once(start: Run, name: str) -> None:
    """`docker stop` ends it in less than two seconds, with its own exit status, 0."""
    container = start(command=[name])
    await eventually(lambda: "listening" in docker("logs", container).stderr)
    assert docker("exec", container, "cat", "/proc/1/cmdline").stdout == f"python\0/app\0{name}\0"
    docker("stop", "--time", "2", container)  # kills after that, with status 137
    assert inspect(container)["State"]["ExitCode"] == 0


@pytest.mark.parametrize(
    ("command", "status"), [(["gateway"], 0), (["message_service", "--apply-schema"], 143)], ids=["server", "command"]
)
async def test_a_stop_counts_from_the_first_moment(start: Run, tmp_path: Path, command: list[str], status: int) -> None:
    """A server that is still loading exits 0; a command that has not finished exits with the signal's status."""
    slow = tmp_path / "settings.py"
    slow.write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    slow.chmod(0o644)
    container = start("--volume", f"{slow}:/app/settings.py:ro", command=command)
    await eventually(lambda: docker("logs", container).stdout == "loading\n")
    docker("stop", "--time", "2", container)
    assert inspect(container)["State"]["ExitCode"] == status


@pytest.mark.parametrize(
    ("name", "settings"),
    [("gateway", []), ("message_service", []), ("message_service", ["PORT=9000", "HOST=0.0.0.0"])],
    ids=["gateway", "message_service", "PORT and HOST"],
)
async def test_the_health_check_finds_the_server(start: Run, name: str, settings: list[str]) -> None:
    """Healthy while it answers, wherever it listens; unhealthy once it stops answering."""
    often = ["--health-interval=200ms", "--health-retries=1", "--health-start-period=0s"]
    container = start(*often, *(f"--env={setting}" for setting in settings), command=[name])
    await eventually(lambda: health(container) == "healthy", within=10)
    if name == "gateway":
        docker("kill", "--signal", "STOP", container)
        await eventually(lambda: health(container) == "unhealthy", within=10)


# ---- the composition -------------------------------------------------------------------------------------------


async def test_up_serves_the_message(composition: Composition) -> None:
    """When `docker compose up --wait` returns, a client gets the message."""
    assert await composition.serves()


def environment(composition: Composition, service: str) -> list[str]:
    """The environment of a container's processes."""
    found: list[str] = inspect(composition.container(service))["Config"]["Env"]
    return found


def test_the_passwords_are_those_of_the_env_file(composition: Composition) -> None:
    """The database requires them, whatever their characters; no server has the owner's."""
    command = ["exec", "--env=DB_PASSWORD=messages", composition.container("message-service")]
    done = docker(*command, "python", "/app", "message_service", "--apply-schema", check=False)
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
    assert GREETING in docker(*psql, "SELECT content FROM messages").stdout
    for statement in ("UPDATE messages SET content = ''", "DELETE FROM messages", "CREATE TABLE more ()"):
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
    defaults = {"DRAIN_SECONDS": CommonSettings.drain_seconds, "SHUTDOWN_SECONDS": CommonSettings.shutdown_seconds}
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


async def test_messages_outlive_the_containers(composition: Composition) -> None:
    """A changed message is still there after `down` and another `up`, even with a new password."""
    composition.sql("UPDATE messages SET content = 'changed' WHERE id = 1")
    composition("down")
    composition.up(DB_PASSWORD=f"{PASSWORD}, changed")
    assert await composition.serves("changed")


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

    def served(container: str, path: str) -> bool:
        return docker("exec", container, "python", "/app", "--healthcheck", path, check=False).returncode == 0

    await eventually(lambda: served(service, "/api/message"), within=10)
    await eventually(lambda: served(gateway, "/api/string"), within=10)
    assert docker("exec", gateway, "id", "-u").stdout == docker("exec", service, "id", "-u").stdout == "54321\n"


def test_the_image_applies_the_schema(composition: Composition) -> None:
    """`docker run … IMAGE message_service --apply-schema`, as the composition does it, fills an empty database."""
    composition.sql("DROP TABLE messages")
    assert "applied schema.sql" in composition("run", "--rm", "--no-deps", "--no-TTY", "schema").stdout
    assert composition.sql("SELECT content FROM messages ORDER BY id LIMIT 1") == GREETING


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
