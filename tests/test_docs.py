"""README and docs/ say what is so, where a program can tell."""

import dataclasses
import re
from pathlib import Path

import pytest
from kit import ROOT

import gateway
import message_service
import server

README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS = [field for service in (gateway, message_service) for field in dataclasses.fields(service.Settings)]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize("name", sorted({field.name.upper() for field in SETTINGS}))
def test_each_setting_is_in_the_table(name: str) -> None:
    """A setting that a server reads can be found in the README, with its default."""
    (row,) = [line for line in README.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]]
    cell = row.split("|")[2]
    for field in SETTINGS:
        if field.name.upper() == name and not field.metadata["shown"] and field.default is not None:
            default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert default in cell


@pytest.mark.parametrize("file", ["Dockerfile", "k8s.yaml", "openapi.yaml", "docs/aws.md", "docs/kubernetes.md"])
def test_the_version_is_the_servers(file: str) -> None:
    """What cannot read the version in server.py repeats it."""
    repeated = r"(?:image\.version=\"|^  version: |\bmessages:)(\d+\.\d+\.\d+)"
    assert set(re.findall(repeated, (ROOT / file).read_text(), re.MULTILINE)) == {server.VERSION}


def test_ci_runs_targets_that_there_are() -> None:
    """And those that .ci/run has, but the faults."""
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    local = (ROOT / ".ci/run").read_text()
    assert set(re.findall(r"run: make (\w+)", workflow)) == set(re.findall(r"^make (\w+)", local, re.MULTILINE)) - {
        "faults"
    }


def anchors(page: Path) -> set[str]:
    """Where a link can lead to in a page, as GitHub names its headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    """Every file that a page links to is there, and every section."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@each_page
def test_each_target_of_make_is_explained(page: Path) -> None:
    """What a page says to type, make knows."""
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z]+)", page.read_text(), re.MULTILINE)) <= targets
