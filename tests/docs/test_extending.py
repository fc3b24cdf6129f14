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
from kit.client import get

# A block's place in its file, before the text that the pattern matches; its indentation; and the text after it.
PLACES = {
    "above `application`": (r"(?=^def application)", "", "\n\n\n"),
    "in `Settings`": (r"(?=^    port:)", " " * 4, "\n"),
    "in `description`": (r"(?<=description of this API.\"\"\"\n)(?=    return)", " " * 4, "\n"),
    "in `application`": (r"(?=^    return app)", " " * 4, "\n"),
    "in its imports": (r"(?=^from chassis)", "", "\n"),
}


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A copy of the project with every block of the page inserted."""
    for pattern in ("*.py", "*.sql", "*.html", "openapi.yaml", "pyproject.toml"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, tmp_path)
    shutil.copytree(ROOT / "chassis", tmp_path / "chassis", ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs/extending.md").read_text()
    blocks = re.findall(r"```python\n# (\S+), ([^\n]+)\n(.*?)\n```", page, re.DOTALL)
    assert len(blocks) == page.count("```python") > 5
    for name, place, code in blocks:
        file, (pattern, indent, end) = tmp_path / name, PLACES[place]
        before, after = re.split(pattern, file.read_text(), maxsplit=1, flags=re.MULTILINE)
        file.write_text(before + textwrap.indent(code, indent) + end + after)
    return tmp_path


async def test_the_page_is_right(extended: Path, start: Start) -> None:
    """A setting, a metric and a middleware work as the page says."""
    gateway = await start(
        "gateway", cwd=extended, DOWNSTREAM_URL="http://127.0.0.1:1", CORS_ORIGIN="https://example.org"
    )
    for path, status in {"/openapi.yaml": 200, "/healthz": 200, "/nowhere": 404, "/api/string": 503}.items():
        answer = await get(gateway.url + path)
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (status, "https://example.org")
    assert "\ndescription_readers_total 1.0\n" in (await get(gateway.url + "/metrics")).body.decode()


def test_the_page_is_typed(extended: Path) -> None:
    """mypy finds no error in the project with the page's code."""
    pytest.importorskip("mypy", reason="the extra `check` is not installed: make .venv/.check")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "gateway.py"], cwd=extended, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
