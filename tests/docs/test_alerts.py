"""docs/alerts.yaml pages somebody when it should, and names metrics that there are."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import System
from kit import ROOT
from kit.application import PAIR, PAIRS
from kit.client import get
from kit.metrics import scrape


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian: prometheus)")
def test_alerts() -> None:
    """Each alert fires for its fault, and none when all is well."""
    command = ["promtool", "test", "rules", "alerts_test.yaml"]
    tried = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert tried.returncode == 0, tried.stdout + tried.stderr


def test_no_rule_knows_the_application() -> None:
    """A copy with other names of servers, routes and tables is watched as well; the simulation has other names, too."""
    for file in ("docs/alerts.yaml", "docs/dashboard.json", "tests/docs/alerts_test.yaml"):
        text = (ROOT / file).read_text()
        assert [word for pair in PAIRS for word in pair.words if word in text] == []


def test_each_alert_is_simulated() -> None:
    """With its fault, and without."""
    groups = yaml.safe_load((ROOT / "docs/alerts.yaml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    cases = yaml.safe_load((ROOT / "tests/docs/alerts_test.yaml").read_text())["tests"]
    tried = [case for test in cases for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in tried if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases[-1]["alert_rule_test"]} == alerts


async def test_alerts_and_docs_use_metrics_that_are_there(system: System) -> None:
    """Every metric in docs/alerts.yaml and docs/operating.md is one that a server has."""
    await get(system.gateway.url + PAIR.read_path)
    there = set(await scrape(system.gateway.url)) | set(await scrape(system.service.url))
    names = {name.split()[0] for name in there}
    pattern = r"\b(?:http_server|coalescing|dependency|db_client|event_loop|process|build)_[a-z_]+[a-z]"
    for file in ("docs/alerts.yaml", "docs/operating.md", "docs/dashboard.json", "docs/runbook.md"):
        used = set(re.findall(pattern, (ROOT / file).read_text()))
        labels = {label for name in there for label in re.findall(r" ([a-z_]+)=", name)}
        assert used - names - labels - {"dependency_errors_total"} == set()
