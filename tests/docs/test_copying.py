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

pytest.importorskip("ruff", reason="the extra `check` is not installed: make .venv/.check")

PAGE = (ROOT / "docs/copying.md").read_text()
OLD = re.compile(r"(?<!log_min_)messages|message[\s#_-]*service|mydb|api/(string|message)", re.IGNORECASE)
AUTHOR = {f"GIT_{role}_{field}": "test@example.org" for role in ("AUTHOR", "COMMITTER") for field in ("NAME", "EMAIL")}


def steps(title: str) -> str:
    """The commands of the chapters whose titles begin so."""
    chapters = re.findall(rf"^## {title}.*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", "".join(chapters), re.MULTILINE | re.DOTALL)
    assert blocks, title
    return re.sub(r"^(?:make|curl) .*\n", "", "".join(blocks), flags=re.MULTILINE)  # these take longer


def run(folder: Path, commands: str, timeout: int = 60, **environment: str) -> str:
    """What the commands print, typed into a shell; AssertionError if one of them fails."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-o", "history", "-o", "histexpand"],  # as where a person types
        input=commands,
        cwd=folder,
        env=os.environ | AUTHOR | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0 and "event not found" not in done.stderr, done.stdout + done.stderr  # noqa: PT018
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
    for chapter in "2356":
        run(copy, steps(chapter))
    return copy


@pytest.mark.matrix
@pytest.mark.parametrize("part", re.findall(r"^\*\*(.*?)\*\*", PAGE, re.MULTILINE))
def test_each_part_can_be_deleted_alone(upstream: Path, tmp_path: Path, part: str) -> None:
    """What remains is clean code, and no page leads to what is gone."""
    run(tmp_path, f"git clone -q '{upstream}' copy")
    copy = tmp_path / "copy"
    (copy / ".venv").symlink_to(Path(sys.executable).parents[1])
    (block,) = re.findall(rf"^\*\*{re.escape(part)}\*\*.*?```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    run(copy, block)
    run(copy, ".venv/bin/ruff check --quiet . && .venv/bin/ruff format --quiet --check .")
    run(copy, ".venv/bin/python -m pytest -q -x -p no:cacheprovider tests/docs/test_docs.py", timeout=250)


def test_no_trace_of_the_name_is_left(copy: Path) -> None:
    """Neither a path nor a text has the old names, but for the changelog; the chassis has never had them."""
    left = []
    for name in run(copy, "git ls-files ':^CHANGELOG.md' ':^chassis' ':^tests/chassis'").splitlines():
        left += [(name, found[0]) for found in OLD.finditer(f"{name}\n{(copy / name).read_text(errors='ignore')}")]
    assert left == []


def test_the_page_says_what_is_left(copy: Path) -> None:
    """Its search for old names finds a setting of PostgreSQL's, and nothing else."""
    search = steps("3").splitlines()[-1]
    assert re.fullmatch(r"tools/local_stack\.py:\d+:.*log_min_messages.*\n", run(copy, search))


def test_a_later_chassis_is_taken_as_it_is(copy: Path) -> None:
    """That of the same release changes nothing: no step has changed a file that comes from upstream."""
    assert run(copy, "git status --porcelain") == ""


def test_the_copy_works(copy: Path) -> None:
    """Its code is clean, its pages and names are right, and its servers answer."""
    run(copy, ".venv/bin/ruff check --quiet . && .venv/bin/ruff format --quiet --check .")
    tests = "tests/docs/test_docs.py tests/gateway/test_string.py tests/price_service tests/chassis/test_imports.py"
    run(copy, f".venv/bin/python -m pytest -q -x -p no:cacheprovider {tests}", timeout=250)


@pytest.mark.matrix
def test_everything_in_the_copy_works(copy: Path) -> None:
    """`make check`, and every quick test."""
    for lock in (copy / "requirements").iterdir():
        os.utime(lock, (0, 0))  # older than the environment, so that nothing is installed into it
    run(copy, "make check", timeout=250)
    tests = "pytest -q -n 3 -p no:cacheprovider --deselect tests/deployment/test_docker.py"
    run(copy, f".venv/bin/python -m {tests}", timeout=1500)  # as many minutes as all of this project's
