"""docs/copying.md: its commands make a copy that has another name throughout, and works.

The commands are read from the page and run in a temporary folder. The copy shares this checkout's environment.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kit import ROOT

PAGE = (ROOT / "docs/copying.md").read_text()
OLD = re.compile(r"(?<!log_min_)(?<!lc_)messages|message[\s#_-]*service", re.IGNORECASE)
AUTHOR = {f"GIT_{role}_{field}": "test@example.org" for role in ("AUTHOR", "COMMITTER") for field in ("NAME", "EMAIL")}


def steps(title: str) -> str:
    """The commands of the chapters whose titles begin so."""
    chapters = re.findall(rf"^## {title}.*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", "".join(chapters), re.MULTILINE | re.DOTALL)
    assert blocks, title
    return re.sub(r"^(?:make|curl) .*\n", "", "".join(blocks), flags=re.MULTILINE)  # these take longer


def run(folder: Path, commands: str, **environment: str) -> str:
    """What the commands print; AssertionError if one of them fails."""
    command = ["bash", "-euo", "pipefail", "-c", commands]
    variables = os.environ | AUTHOR | environment
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project as somebody publishes it, with a release."""
    folder = tmp_path_factory.mktemp("upstream")
    for name in run(ROOT, "git ls-files -z --cached --others --exclude-standard").split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    run(folder, "git init -qb main && git add -A && git commit -qm upstream && git tag v0.2.0")
    return folder


@pytest.fixture(scope="module")
def copy(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The copy after all chapters, with everything deleted that can be."""
    folder = tmp_path_factory.mktemp("copies")
    run(folder, steps("1"), URL=str(upstream))
    copy = folder / "prices"
    (copy / ".venv").symlink_to(Path(sys.executable).parents[1])
    for chapter in "23467":
        run(copy, steps(chapter))
    return copy


def test_no_trace_of_the_name_is_left(copy: Path) -> None:
    """Neither a path nor a line has the old names, but for the changelog; the chassis has never had them."""
    left = []
    for name in run(copy, "git ls-files ':!CHANGELOG.md' ':!chassis' ':!tests/chassis'").splitlines():
        text = (copy / name).read_text(errors="ignore")
        left += [f"{name}: {line}" for line in ["", *text.splitlines()] if OLD.search(f"{name}: {line}")]
    assert left == []


def test_a_later_chassis_is_taken_as_it_is(copy: Path) -> None:
    """That of the same release changes nothing: no step has changed a file that comes from upstream."""
    assert run(copy, "git status --porcelain") == ""


def test_the_copy_works(copy: Path) -> None:
    """Its code is clean, its pages and names are right, and its servers answer."""
    run(copy, ".venv/bin/ruff check --quiet . && .venv/bin/ruff format --quiet --check .")
    tests = "tests/docs/test_docs.py tests/gateway/test_string.py tests/price_service tests/chassis/test_imports.py"
    run(copy, f".venv/bin/python -m pytest -q -x -p no:cacheprovider {tests}")


@pytest.mark.matrix
def test_everything_in_the_copy_works(copy: Path) -> None:
    """`make check`, and every quick test."""
    for lock in (copy / "requirements").iterdir():
        os.utime(lock, (0, 0))  # older than the environment, so that nothing is installed into it
    run(copy, "make check")
    run(copy, ".venv/bin/python -m pytest -q -n 3 -p no:cacheprovider --deselect tests/deployment/test_docker.py")
