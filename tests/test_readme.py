"""The README says what is so, where a program can tell."""

import dataclasses
import re

import pytest
from kit import ROOT

import gateway
import message_service

README = (ROOT / "README.md").read_text()
SETTINGS = [field for service in (gateway, message_service) for field in dataclasses.fields(service.Settings)]


@pytest.mark.parametrize("name", sorted({field.name.upper() for field in SETTINGS}))
def test_each_setting_is_in_the_table(name: str) -> None:
    """A setting that a server reads can be found in the README, with its default."""
    (row,) = [line for line in README.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]]
    cell = row.split("|")[2]
    for field in SETTINGS:
        if field.name.upper() == name and not field.metadata["shown"] and field.default is not None:
            default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert default in cell


def test_links_lead_somewhere() -> None:
    """Every file that the README links to is there, and every section."""
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert [target for target in targets if target.startswith("#") and target[1:] not in anchors] == []
    files = [target for target in targets if not target.startswith(("#", "http"))]
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_each_target_of_make_is_explained() -> None:
    """What the README says to type, make knows."""
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z]+)", README, re.MULTILINE)) <= targets
