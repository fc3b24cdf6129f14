"""The chassis can be taken as it is: it knows nothing of the application, and imports run one way."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from kit import ROOT
from kit.application import PAIRS, Pair

CHASSIS = {file.stem: file for file in sorted((ROOT / "chassis").glob("*.py"))}
TESTS = sorted((ROOT / "tests/chassis").glob("*.py"))
OF_THE_PROJECT = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}


def imports(file: Path) -> set[str]:
    """The modules that a file imports, wherever in it; `from a import b` may be `a` or `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{file.name} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("name", CHASSIS)
def test_the_chassis_imports_nothing_of_the_project_outside_itself(name: str) -> None:
    """Whoever takes the folder needs nothing else."""
    assert {module.split(".")[0] for module in imports(CHASSIS[name])} & OF_THE_PROJECT <= {"chassis"}


def test_imports_inside_the_chassis_run_one_way() -> None:
    """No module imports, directly or through others, one that imports it."""
    inside = {name: {other for other in CHASSIS if f"chassis.{other}" in imports(CHASSIS[name])} for name in CHASSIS}
    assert {"server", "responses"} <= set(TopologicalSorter(inside).static_order())  # CycleError if there is a cycle


@pytest.mark.every_pair
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_two_servers_meet_over_http_only(pair: Pair) -> None:
    """Neither imports the other."""
    for name, other in (pair.servers, reversed(pair.servers)):
        file = ROOT / f"{name.replace('.', '/')}.py"
        assert other not in imports(file)


@pytest.mark.parametrize("file", [*CHASSIS.values(), *TESTS], ids=lambda file: str(file.relative_to(ROOT)))
def test_no_word_of_the_application(file: Path) -> None:
    """Neither the chassis nor its tests say what the servers are called, and what they serve and store."""
    words = sorted(set().union(*(pair.words for pair in PAIRS)))
    spelled = "|".join(re.escape(word).replace("_", "[_ -]").replace(r"\ ", "[_ -]") for word in words)
    named = re.compile(rf"(?<![a-z])(?:{spelled})(?![a-z])", re.IGNORECASE)
    text = file.read_text().replace("self._messages", "").replace("lc_messages", "")  # aiohttp's, PostgreSQL's
    assert [line for line in text.splitlines() if named.search(line)] == []
