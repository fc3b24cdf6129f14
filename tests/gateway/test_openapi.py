"""openapi.yaml describes what the gateway does, completely, and nothing else.

Schemathesis compares the running system's answers with the description: status, header fields, body, and the refusal of
other methods. It cannot cause failures, so the tests here do.
"""

import asyncio
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import openapi_spec_validator
import pytest
import schemathesis
import yaml
from conftest import Start, System
from kit import ROOT, eventually
from kit.application import PAIR
from kit.client import get
from kit.postgres import Database
from schemathesis.checks import not_a_server_error

import gateway

FILE = ROOT / "openapi.yaml"
TRANSPORT = {"Content-Type", "Content-Length", "Connection"}  # of HTTP itself, not described


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return content


def test_it_is_valid(description: dict[str, Any]) -> None:
    """Tools that read OpenAPI 3.1 can read it."""
    openapi_spec_validator.validate(description)


def test_client_generators_keep_every_body() -> None:
    """They merge `enum` with a problem's fields, but drop the whole body if they find `const`."""
    assert "const:" not in FILE.read_text()


async def test_it_lists_the_routes_that_there_are(description: dict[str, Any]) -> None:
    """No route is missing in it, and none is made up."""
    there_are = {resource.canonical for resource in gateway.application(gateway.Settings()).router.resources()}
    assert description["paths"].keys() == there_are
    for path, operations in description["paths"].items():
        assert operations.keys() == {"get", "head", "options"}, path


async def test_the_gateway_serves_it(system: System) -> None:
    """Unchanged, at the path that the page links to."""
    answer = await get(system.gateway.url + "/openapi.yaml")
    assert (answer.status, answer.body) == (200, FILE.read_bytes())
    assert answer.headers["Content-Type"] == "application/yaml"  # RFC 9512


def test_schemathesis_finds_nothing(system: System, description: dict[str, Any], tmp_path: Path) -> None:
    """Whatever it sends, the answers match the description."""
    program = Path(sys.executable).with_name("schemathesis")
    options = ["--url", system.gateway.url, "--max-examples=10", "--generation-deterministic", "--no-color"]
    ended = subprocess.run(
        [program, "run", FILE, *options],
        cwd=tmp_path,  # it leaves files behind
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    operations = sum(map(len, description["paths"].values()))
    assert f"Operations:       {operations} selected / {operations} total" in ended.stdout


@functools.cache  # half a second each time
def operations_of(file: Path) -> Any:
    return schemathesis.openapi.from_path(file)


async def check(url: str, path: str, *expected: object, **request: Any) -> None:
    """The answers to GET and HEAD are `expected` (status, type's last part, failed part) and as described."""
    operations = operations_of(FILE)[path]

    def ask(method: str) -> Any:
        return operations[method].Case(**request).call_and_validate(base_url=url, excluded_checks=[not_a_server_error])

    methods = ("GET", "HEAD")
    answers = await asyncio.gather(*(asyncio.to_thread(ask, method) for method in methods))
    for method, answer in zip(methods, answers, strict=True):
        status = answer.status_code
        if method == "GET":
            problem = answer.json()
            assert (status, problem["type"].rpartition(":")[2], problem.get("part")) == expected
            assert problem["request_id"] == answer.headers["x-request-id"][0]
        described = operations[method].definition.raw["responses"][str(status)]
        if "$ref" in described:
            described = yaml.safe_load(FILE.read_text())["components"]["responses"][described["$ref"].split("/")[-1]]
        fields = {name.lower() for name in answer.headers} - {name.lower() for name in TRANSPORT}
        assert fields == {name.lower() for name in described["headers"]}, (method, status)


async def test_every_failure_is_as_described(start: Start, database: Database) -> None:
    """Status, header fields, type, and which part failed."""
    service = await start(PAIR.service, **database.settings(), DB_TIMEOUT=0.5)
    url = (await start("gateway", DOWNSTREAM_URL=service.url, DOWNSTREAM_TIMEOUT=3)).url
    assert (await get(url + PAIR.read_path)).status == 200
    with database.locked():
        await check(url, PAIR.read_path, 504, "timeout", "database")
    database.sql(f"DELETE FROM {PAIR.table}")
    await check(url, PAIR.read_path, 404, PAIR.missing, None)
    assert f"detail: {(await get(url + PAIR.read_path)).json()['detail']}\n" in FILE.read_text()  # as its example says
    database.sql(f"DROP TABLE {PAIR.table}")
    await check(url, PAIR.read_path, 503, "unavailable", "database")
    service.freeze()
    await check(url, PAIR.read_path, 504, "timeout", PAIR.part)
    service.kill()
    await check(url, PAIR.read_path, 503, "unavailable", PAIR.part)
    lost = await start("gateway", DOWNSTREAM_URL=f"{url}/elsewhere")  # where nothing is
    await check(lost.url, PAIR.read_path, 502, "bad-downstream", PAIR.part)


async def test_what_no_route_sees_is_as_described(system: System) -> None:
    """A target and a header field that are too long, and an expectation that no server can meet."""
    url = system.gateway.url
    await check(url, "/healthz", 414, "blank", None, query={"q": "x" * 17_000})
    await check(url, "/healthz", 431, "blank", None, headers={"Cookie": "x" * 17_000})
    await check(url, "/healthz", 417, "blank", None, headers={"Expect": "magic"})


async def test_a_server_that_is_about_to_stop_is_as_described(start: Start) -> None:
    """It is alive, and not ready."""
    stopping = await start("gateway", DRAIN_SECONDS=20)
    stopping.terminate()
    await eventually(lambda: stopping.logged(message="draining"))
    await check(stopping.url, "/readyz", 503, "not-ready", None)
    stopping.terminate()
    assert await stopping.exit_status() == 0
