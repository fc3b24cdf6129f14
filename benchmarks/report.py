"""What the measurements say: medians, ratios against the peers, the targets. `python report.py FOLDER` writes it anew.

Rules: every number is the median over the rounds; a ratio is one of medians; a target is shown whether it is reached
or not.
"""

import json
import sys
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
                row[name] = None if value is None else median(each[name] for each in group)
        speeds = [each["requests_per_second"] for each in group]
        row["slowest"], row["fastest"] = min(speeds), max(speeds)
        row["failures"] = sum(each["bad_status"] + each["socket_errors"] for each in group)
        rows[key] = row
    return Summary(rows)


# Targets

CPU = ("cpu_gateway", "cpu_service", "cpu_postgres")


def peers_cpu(summary: Summary) -> float:
    """CPU of all parts of this system, PostgreSQL included, against the services alone of Fastify."""
    return summary.value(SUBJECT, 64, *CPU) / summary.value("fastify", 64, "cpu_gateway", "cpu_service")


def deviation(flatness: Summary) -> float:
    """How far queries per second leave the middle between their extremes, from 64 clients on; 0.2 is ± 20 %."""
    rates = [row["queries_per_second"] or 0 for (_, clients), row in flatness.rows.items() if clients >= 64]
    if len(rates) < 2:
        raise KeyError("flatness")
    return (max(rates) - min(rates)) / (max(rates) + min(rates))


def growth(flatness: Summary) -> float:
    """The most queries per second with more than 64 clients against those with 64."""
    more = [row["queries_per_second"] or 0 for (_, clients), row in flatness.rows.items() if clients > 64]
    if not more:
        raise KeyError("flatness")
    return max(more) / flatness.value(SUBJECT, 64, "queries_per_second")


def targets(results: Results) -> list[tuple[str, str, float | None, float, bool]]:
    """Each target as text, comparison, what was measured (None: it was not), the limit, whether it is reached."""
    summary, flatness = summarise(results["measurements"]), summarise(results["flatness"])

    after_flatness = results["memory_after_flatness"]
    rps = "requests_per_second"
    wanted: list[tuple[str, str, float, Callable[[], float]]] = [
        ("requests/s at 64 against json_response", "≥", 1.0, lambda: summary.ratio("bare-json", 64, rps)),
        ("requests/s at 256 against json_response", "≥", 1.05, lambda: summary.ratio("bare-json", 256, rps)),
        ("gateway CPU at 64 against json_response", "≤", 1.0, lambda: summary.ratio("bare-json", 64, "cpu_gateway")),
        ("gateway CPU at 256 against json_response", "≤", 1.0, lambda: summary.ratio("bare-json", 256, "cpu_gateway")),
        ("requests/s at 64 against FastAPI + httpx", "≥", 50, lambda: summary.ratio("fastapi-httpx", 64, rps)),
        ("requests/s at 64 against FastAPI + aiohttp", "≥", 6, lambda: summary.ratio("fastapi-aiohttp", 64, rps)),
        ("requests/s at 64 against aiohttp + aiopg", "≥", 4, lambda: summary.ratio("plain", 64, rps)),
        ("requests/s at 64 against Fastify", "≥", 2.5, lambda: summary.ratio("fastify", 64, rps)),
        ("requests/s at 64 against Go", "≥", 2.5, lambda: summary.ratio("go", 64, rps)),
        ("requests/s at 256 against Go", "≥", 2.5, lambda: summary.ratio("go", 256, rps)),
        ("requests/s at 8 against Go", "≥", 1.0, lambda: summary.ratio("go", 8, rps)),
        ("requests/s at 8 against Fastify", "≥", 1.0, lambda: summary.ratio("fastify", 8, rps)),
        ("CPU at 64, PostgreSQL included, against Fastify's services", "≤", 0.2, lambda: peers_cpu(summary)),
        ("p99 at 256 against Fastify", "≤", 0.5, lambda: summary.ratio("fastify", 256, "p99_ms")),
        ("p50 at 1 against Go", "≤", 1.3, lambda: summary.ratio("go", 1, "p50_ms")),
        ("p50 at 1 against Fastify", "≤", 0.7, lambda: summary.ratio("fastify", 1, "p50_ms")),
        ("p50 at 1 against Fastify", "≤", 1.5, lambda: summary.ratio("fastify", 1, "p50_ms")),
        ("p50 at 1 against aiohttp + aiopg", "≤", 0.6, lambda: summary.ratio("plain", 1, "p50_ms")),
        ("queries/s from 64 to 10,000 clients, deviation", "≤", 0.2, lambda: deviation(flatness)),
        ("queries/s at most, against those at 64 clients", "≤", 1.2, lambda: growth(flatness)),
        (
            "memory of the larger service after the rounds, MB",
            "≤",
            60,
            lambda: max(results["memory_after_rounds"][SUBJECT]),
        ),
        ("memory of the larger service after 10,000 clients, MB", "≤", 60, lambda: max(after_flatness)),
    ]
    judged: list[tuple[str, str, float | None, float, bool]] = []
    for text, comparison, limit, measure in wanted:
        try:
            value = measure()
        except (KeyError, ValueError, ZeroDivisionError):  # it was not measured
            judged.append((text, comparison, None, limit, False))
            continue
        judged.append((text, comparison, value, limit, value >= limit if comparison == "≥" else value <= limit))
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
    parts.append("## Targets\n")
    parts.append(
        table(
            ["measure", "target", "measured", ""],
            [
                [
                    text,
                    f"{sign} {limit:g}",
                    number(value, 2),
                    "" if value is None else "reached" if ok else "NOT reached",
                ]
                for text, sign, value, limit, ok in targets(results)
            ],
        )
    )
    header = ["system", "requests/s", "in the rounds", "p50 ms", "p99 ms", "CPU µs gateway", "service", "PostgreSQL"]
    header += ["queries/request", "memory MB", "failures"]
    for connections in sorted({connections for _, connections in summary.rows}):
        parts.append(f"## {connections} client{'s' if connections > 1 else ''}\n")
        parts.append(table(header, system_rows(results, summary, connections)))
    if flatness.rows:
        parts.append("## PostgreSQL's load while clients grow\n")
        names = ["connected", "requests_per_second", "queries_per_second", "p99_ms", "failures"]
        rows = [[number(c)] + [number(row[n]) for n in names] for (_, c), row in sorted(flatness.rows.items())]
        parts.append(table(["clients", "connected", "requests/s", "queries/s", "p99 ms", "failures"], rows))
    parts.append(
        "CPU is µs per request, user and system together. Queries count SELECTs of the message. Memory is resident,\n"
        "in 10^6 bytes, gateway + message service, after each measurement. Failures are answers other than 2xx and\n"
        "socket errors, summed over the rounds; they are not counted as requests. Work on requests that are still\n"
        "unanswered when a measurement ends is in the CPU time, but they are not among the requests.\n"
    )
    return "\n".join(parts)


def write(results: Results, folder: Path) -> None:
    """Write bench.md and the plots."""
    summary, flatness = summarise(results["measurements"]), summarise(results["flatness"])
    (folder / "bench.md").write_text(markdown(results))
    shown = sorted({connections for _, connections in summary.rows}, key=lambda connections: abs(connections - 64))
    if shown:
        rows = [
            plot.Row(
                title,
                summary.value(name, shown[0], "requests_per_second"),
                [summary.value(name, shown[0], part) for part in CPU],
                name == SUBJECT,
                not summary.rows[name, shown[0]]["memory_service"],
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
