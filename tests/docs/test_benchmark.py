"""What README and benchmarks/README.md say about measurements comes from benchmarks/results/bench.json."""

import json
import re
import sys
from pathlib import Path

import pytest
from kit import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import report

RESULTS = json.loads((ROOT / "benchmarks/results/bench.json").read_text())


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_sentences_are_those_of_the_results(page: Path) -> None:
    """Between the marks is exactly what the results say, and something is said."""
    text = page.read_text()
    assert report.render(text, RESULTS) == text
    assert re.search(r"<!-- benchmark -->\n(?:With|Against) ", text)


def test_no_other_sentence_compares() -> None:
    """A ratio or a rate is said only where the results say it."""
    for page in report.PAGES:
        text = re.sub(r"<!-- benchmark -->.*?<!-- /benchmark -->", "", page.read_text(), flags=re.DOTALL)
        assert re.findall(r"\d[\d,.]* (?:times|requests/s|µs|queries/s)", text) == []


def test_the_table_is_that_of_the_results() -> None:
    """bench.md holds what bench.json does."""
    assert (ROOT / "benchmarks/results/bench.md").read_text() == report.markdown(RESULTS)
