"""What the measurements say: medians, ratios against the peers, the targets. `python report.py FOLDER` writes it anew.

Rules: every number is the median over the rounds; a ratio is one of medians; what is wanted is shown whether it is
reached or not; sentences with numbers on the pages are written here (`sentences`), so that they come from one run.
"""

import functools
import json
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import plot

SUBJECT = "this"
Results = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """Medians of one kind of measurement, by system and connections."""

    rows: dict[tuple[str, int], dict[str, float | None]]

    def value(self, system: str, connections: int, *names: str) -> float:
        """The sum of the named measures. KeyError when that was not measured."""
        row = self.rows[system, connections]
        return sum(row[name] or 0 for name in names)

    def ratio(self, other: str, connections: int, *names: str) -> float:
        return self.value(SUBJECT, connections, *names) / self.value(other, connections, *names)


def summarise(measurements: list[dict[str, Any]]) -> Summary:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for each in measurements:
        groups.setdefault((each["system"], each["connections"]), []).append(each)
    rows: dict[tuple[str, int], dict[str, float | None]] = {}
    for key, group in groups.items():
        row: dict[str, float | None] = {}
        for name, value in group[0].items():
            if name not in ("system", "connections"):
                middle = None if value is None else median(each[name] for each in group)
                # Below zero is PostgreSQL's CPU if a backend ended while it was read: it is not known then.
                row[name] = None if middle is not None and middle < 0 else middle
        speeds = [each["requests_per_second"] for each in group]
        row["slowest"], row["fastest"] = min(speeds), max(speeds)
        row["failures"] = sum(each["bad_status"] + each["socket_errors"] for each in group)
        rows[key] = row
    return Summary(rows)


# What is wanted, and why

RATE, WAIT, CPU = "requests_per_second", "p50_ms", ("cpu_gateway", "cpu_service", "cpu_postgres")
Wanted = tuple[str, str, float, Callable[[], float], str]


def growth(flatness: Summary) -> float:
    """The most queries per second with more than 64 clients against those with 64."""
    more = [row["queries_per_second"] or 0 for (_, clients), row in flatness.rows.items() if clients > 64]
    return max(more) / flatness.value(SUBJECT, 64, "queries_per_second")


def by_keys(results: Results) -> Summary:
    """Of the reads by key; the number of keys stands where that of connections does."""
    return summarise([{**each, "connections": each["keys"]} for each in results.get("keyed", [])])


def staleness(results: Results, system: str) -> tuple[int, int]:
    """Stale answers, and all answers. KeyError when that was not measured."""
    for each in results.get("stale", []):
        if each["system"] == system:
            return each["stale"], each["asked"]
    raise KeyError(system)


def wanted(results: Results) -> list[tuple[str, str, float, float | None, str]]:
    """Each wish as text, comparison, limit, what was measured (None: it was not), and why."""
    summary, flatness, keyed = summarise(results["measurements"]), summarise(results["flatness"]), by_keys(results)
    most = max((keys for _, keys in keyed.rows), default=0)
    constant, floor = "bare-json-uvloop", "bare-bytes"
    wishes: list[Wanted] = [
        ("stale answers", "≤", 0, lambda: staleness(results, SUBJECT)[0], "the promise"),
        (
            "failures, up to 1,024 clients",
            "≤",
            0,
            lambda: sum(row["failures"] or 0 for (name, _), row in summary.rows.items() if name == SUBJECT),
            "the promise",
        ),
        (
            "queries/s with more clients than 64, against those with 64",
            "≤",
            1.2,
            lambda: growth(flatness),
            "PostgreSQL's load must not grow with the clients",
        ),
        (
            "requests/s at 256 against a constant from aiohttp on uvloop",
            "≥",
            1,
            lambda: summary.ratio(constant, 256, RATE),
            "sharing has to pay for the second hop and for the database",
        ),
        *(
            (
                f"gateway CPU at {clients} against web.Server on uvloop",
                "≤",
                1.15,
                functools.partial(summary.ratio, floor, clients, "cpu_gateway"),
                "what the project adds to its library has to be little",
            )
            for clients in (64, 256)
        ),
        (
            "requests/s at 64 against aiohttp + aiopg",
            "≥",
            3,
            lambda: summary.ratio("plain", 64, RATE),
            "users of these libraries have to gain by it",
        ),
        (
            "p50 at 1 against aiohttp + aiopg",
            "≤",
            1.1,
            lambda: summary.ratio("plain", 1, WAIT),
            "a client that cannot share must not pay for sharing",
        ),
        (
            f"CPU for each request at {most:,} keys against aiohttp + aiopg",
            "≤",
            1.1,
            lambda: keyed.ratio("plain", most, "cpu_gateway", "cpu_service"),
            "the same, where hardly two clients ask for the same",
        ),
    ]
    judged = []
    for text, comparison, limit, measure, reason in wishes:
        try:
            value = measure()
        except (KeyError, ValueError, ZeroDivisionError):  # it was not measured
            value = None
        judged.append((text, comparison, limit, value, reason))
    return judged


# Markdown


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def system_rows(results: Results, summary: Summary, connections: int) -> list[list[str]]:
    rows = []
    for name, title in results["systems"].items():
        row = summary.rows[name, connections]
        bold = "**" if name == SUBJECT else ""
        low, high = row["slowest"], row["fastest"]
        rows.append(
            [
                f"{bold}{title}{bold}",
                {True: "yes", False: "no"}.get(results.get("fresh", {}).get(name), "-"),
                bold + number(row["requests_per_second"]) + bold,
                f"{number(low)} to {number(high)}",
                number(row["p50_ms"], 2),
                number(row["p99_ms"], 2),
                number(row["cpu_gateway"]),
                number(row["cpu_service"] if row["memory_service"] else None),
                number(row["cpu_postgres"] if row["memory_service"] else None),
                number(row["queries_per_request"], 3) if row["memory_service"] else "-",
                number(row["memory_gateway"]) + " + " + number(row["memory_service"]),
                number(row["failures"]),
            ]
        )
    return rows


NOTES = """\
CPU is µs per request, user and system together. Queries count SELECTs of the message. Memory is resident, in 10^6
bytes, gateway + message service, after each measurement. Failures are answers other than 2xx and socket errors, summed
over the rounds; they are not counted as requests. Work on requests that are still unanswered when a measurement ends is
in the CPU time, but they are not among the requests. The load of the open loop is a share of the requests/s at 64
clients; its latency counts from when a request was due, and includes that of the client, one Python process. Where that
could not ask so often, no latency is given.
"""


OPEN = ("p50_ms", "p99_ms", "p999_ms")


def kept_up(measured: dict[str, float]) -> bool:
    """Whether requests were sent when they were due; if not, their latency is the client's."""
    return measured["reached"] >= 0.95 * measured["rate"]


def markdown(results: Results) -> str:
    summary, flatness = summarise(results["measurements"]), summarise(results["flatness"])
    # Not below zero, which is what the kernel's accounting in ticks can come to where nobody else was there.
    others = max(0, median(each["cpu_others"] for each in results["measurements"]))
    parts = ["# Benchmark\n"]
    parts.append(
        f"Medians of {results['rounds']} interleaved rounds of {results['seconds']} s, each after a warm-up. "
        "wrk, PostgreSQL and the systems share one machine and its loopback; every service is one process. "
        f"Command: `{results['command']}`. Other processes used {others:.0%} of the processors meanwhile.\n"
    )
    parts.append(table(["machine", ""], [[k, v] for k, v in results["machine"].items()]).replace("---:", "---"))
    parts.append("## What is wanted, and why\n")
    rows = [
        [text, f"{sign} {limit:g}", number(value, 2), reason] for text, sign, limit, value, reason in wanted(results)
    ]
    parts.append(table(["measure", "wanted", "measured", "why"], rows))
    header = [
        "system",
        "fresh",
        "requests/s",
        "in the rounds",
        "p50 ms",
        "p99 ms",
        "CPU µs gateway",
        "service",
        "PostgreSQL",
    ]
    header += ["queries/request", "memory MB", "failures"]
    for connections in sorted({connections for _, connections in summary.rows}):
        parts.append(f"## {connections} client{'s' if connections > 1 else ''}\n")
        parts.append(table(header, system_rows(results, summary, connections)))
    if results.get("stale"):
        parts.append("## Stale answers beside a writer, while queries take 5 ms\n")
        rows = [
            [results["systems"][it["system"]], *map(number, (it["asked"], it["writes"], it["stale"]))]
            for it in results["stale"]
        ]
        parts.append(table(["system", "answers", "commits", "stale"], rows))
    if results.get("keyed"):
        parts.append("## Reads by key, 64 clients\n")
        rows = [
            [results["systems"].get(title, title), number(keys)]
            + [number(row[it]) for it in (RATE, "cpu_gateway", "cpu_service", "failures")]
            for (title, keys), row in sorted(by_keys(results).rows.items(), key=lambda item: item[0][1])
        ]
        parts.append(table(["system", "keys", "requests/s", "CPU µs gateway", "service", "failures"], rows))
    if results.get("open"):
        parts.append("## An open loop: requests at random times\n")
        rows = []
        for name, title in results["systems"].items():
            for share in sorted({it["share"] for it in results["open"]}):
                these = [it for it in results["open"] if (it["system"], it["share"]) == (name, share)]
                if these:
                    middle = {key: median(it[key] for it in these) for key in these[0] if key != "system"}
                    rows.append(
                        [title, f"{share:.0%}", number(middle["rate"]), number(middle["reached"])]
                        + [number(middle[key] if kept_up(middle) else None, 2) for key in OPEN]
                    )
        parts.append(table(["system", "load", "requests/s", "reached", "p50 ms", "p99 ms", "p99.9 ms"], rows))
    if flatness.rows:
        parts.append("## PostgreSQL's load while clients grow\n")
        names = ["connected", "requests_per_second", "queries_per_second", "p99_ms", "failures"]
        rows = [[number(c)] + [number(row[n]) for n in names] for (_, c), row in sorted(flatness.rows.items())]
        parts.append(table(["clients", "connected", "requests/s", "queries/s", "p99 ms", "failures"], rows))
    parts.append(NOTES)
    return "\n".join(parts)


PAGES = [Path(__file__).parents[1] / "README.md", Path(__file__).parent / "README.md"]
CLIENTS = 64  # of the picture and of the text


def sentences(results: Results) -> str:
    """What the pages say about the measurements; clauses about what was not measured are left out."""
    summary = summarise(results["measurements"])

    def times(other: str, clients: int, *names: str) -> str:
        return f"{summary.ratio(other, clients, *names):.1f} times"

    def stale(system: str) -> str:
        return "{:,} of {:,}".format(*staleness(results, system))

    clauses: list[Callable[[], str]] = [
        lambda: (
            f"With {CLIENTS} clients, this system serves {times('bare-json-uvloop', CLIENTS, RATE)} as many requests "
            "as a bare aiohttp application on uvloop that answers a constant."
        ),
        lambda: (
            f"Against the same services without sharing, this system serves {times('plain', CLIENTS, RATE)} as many "
            f"requests as aiohttp + aiopg, {times('fastify', CLIENTS, RATE)} as many as Fastify, and "
            f"{times('go', CLIENTS, RATE)} as many as Go."
        ),
        lambda: (
            f"Against Go with single-flight, it serves {times('go-single-flight', CLIENTS, RATE)} as many, at "
            f"{times('go-single-flight', CLIENTS, *CPU)} the CPU time. In exchange its answers are fresh: beside a "
            f"writer, {stale(SUBJECT)} were older than their requests; with Go, {stale('go-single-flight')}."
        ),
        lambda: (
            f"A single client, which cannot share, waits {times('plain', 1, WAIT)} as long as with aiohttp + aiopg, "
            f"and {times('go', 1, WAIT)} as long as with Go."
        ),
    ]
    said = []
    for clause in clauses:
        try:
            said.append(clause())
        except KeyError:
            continue
    return textwrap.fill(" ".join(said), 120, break_on_hyphens=False)


def render(page: str, results: Results) -> str:
    """The page with the sentences of these results between its marks."""
    marks = "<!-- benchmark -->\n", "<!-- /benchmark -->"
    return re.sub(f"(?<={marks[0]}).*(?={marks[1]})", lambda _: sentences(results) + "\n", page, flags=re.DOTALL)


def write(results: Results, folder: Path) -> None:
    """Write bench.md and the plots."""
    summary, flatness = summarise(results["measurements"]), summarise(results["flatness"])
    (folder / "bench.md").write_text(markdown(results))
    shown = sorted({connections for _, connections in summary.rows}, key=lambda connections: abs(connections - 64))
    if folder.resolve() == (Path(__file__).parent / "results").resolve():
        for page in PAGES:
            page.write_text(render(page.read_text(), results))
    if shown:
        rows = [
            plot.Row(
                title,
                summary.value(name, shown[0], "requests_per_second"),
                [summary.value(name, shown[0], part) for part in CPU],
                name == SUBJECT,
                not summary.rows[name, shown[0]]["memory_service"],
                results.get("fresh", {}).get(name, True),
            )
            for name, title in results["systems"].items()
        ]
        (folder / "bench.svg").write_text(plot.bars(rows, shown[0]))
    if flatness.rows:
        by_clients = dict(sorted(flatness.rows.items())).values()
        rates = [[row[name] or 0 for row in by_clients] for name in ("requests_per_second", "queries_per_second")]
        lines = [
            plot.Line("requests/s", "--bar", rates[0], above=10),
            plot.Line("queries/s in PostgreSQL", "--accent", rates[1], above=-20),
        ]
        clients = sorted(clients for _, clients in flatness.rows)
        title = "Requests, and what PostgreSQL sees of them"
        (folder / "flat.svg").write_text(plot.growth(title, "clients", clients, lines))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write(json.loads((folder / "bench.json").read_text()), folder)
