"""The blocks of docs/extending.md, inserted where the page says, work and pass the type check."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import Start
from kit import ROOT
from kit.client import connection, get
from kit.postgres import Database

# A block's place in its file: before the text that this pattern matches.
PLACES = {
    "above `application`": r"(?=^def application)",
    "above `class Dependency`": r"(?=^class Dependency)",
    "in `add_routes`": r'(?= +web\.get\("/healthz")',
    "in `Settings`": r"(?=^    downstream_timeout:)",
    "in `application`": r"(?=^    return app)",
    "in its imports": r"(?=^from yarl)",
}


# A block's indentation there, and the text after it.
ENDS = {
    "in `add_routes`": (" " * 12, ",\n"),
    "in `Settings`": (" " * 4, "\n"),
    "in `application`": (" " * 4, "\n"),
    "in its imports": ("", "\n"),
}


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A copy of the project with every block of the page inserted."""
    for pattern in ("*.py", "*.sql", "*.html", "openapi.yaml", "pyproject.toml"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, tmp_path)
    page = (ROOT / "docs/extending.md").read_text()
    blocks = re.findall(r"```python\n# (\S+), ([^\n]+)\n(.*?)\n```", page, re.DOTALL)
    assert len(blocks) >= 9
    for name, place, code in blocks:
        file = tmp_path / name
        before, after = re.split(PLACES[place], file.read_text(), maxsplit=1, flags=re.MULTILINE)
        indent, end = ENDS.get(place, ("", "\n\n\n"))
        file.write_text(before + textwrap.indent(code, indent) + end + after)
    return tmp_path


async def test_the_page_is_right(extended: Path, start: Start, database: Database) -> None:
    """A list, a POST, a setting, a metric and a middleware work as the page says."""
    service = await start("message_service", cwd=extended, **database.settings())
    gateway = await start("gateway", cwd=extended, DOWNSTREAM_URL=service.url, CORS_ORIGIN="https://example.org")

    async with connection(service.url) as client:
        added = await client.get("/api/messages", "POST", body='{"content": "Grüße"}'.encode())
        assert (added.status, added.json()) == (201, {"id": 4})
        for wrong in (b"", b"[]", b"{", b'{"content": 5}', b'{"content": "\\u0000"}'):
            refused = await client.get("/api/messages", "POST", body=wrong)
            assert (refused.status, refused.json()["request_id"]) == (400, refused.request_id)
        wrong_method = await client.get("/api/messages", "DELETE")
        assert (wrong_method.status, wrong_method.headers["Allow"]) == (405, "GET,HEAD,POST")
    metrics = (await get(service.url + "/metrics")).body.decode()
    assert "\nmessages_added_total 1.0\n" in metrics
    assert 'http_request_method="POST",http_response_status_code="201",http_route="/api/messages"' in metrics

    listed = await get(gateway.url + "/api/strings?limit=100")
    assert (listed.status, len(listed.json()["results"])) == (200, 4)
    assert listed.json()["results"][3] == "Grüße"
    assert (await get(gateway.url + "/api/strings?limit=0")).json()["detail"].startswith("limit has to be")
    for path in ("/api/strings", "/api/string", "/healthz", "/nowhere", "/api/strings?limit=x"):
        answer = await get(gateway.url + path)
        assert answer.headers["Access-Control-Allow-Origin"] == "https://example.org"
    service.kill()
    away = await get(gateway.url + "/api/strings")
    assert (away.status, away.json()["part"]) == (503, "message_service")


def test_the_page_is_typed(extended: Path) -> None:
    """mypy finds no error in the project with the page's code."""
    pytest.importorskip("mypy", reason="the extra `check` is not installed: make .venv/.check")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "gateway.py", "message_service.py"],
        cwd=extended,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
