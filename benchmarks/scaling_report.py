"""The numbers in docs/scaling.md, between its markers, and its plot: `python scaling_report.py` rewrites them.

Rule: every number comes from the results, or from the model with their constants.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import plot
from report import number, table
from scaling_model import CONNECTIONS, LEAST, TARGET, Constants, Load, load, plan, requests_for

BEGIN, END = "<!-- scaling: written by `make scaling` -->", "<!-- scaling: end -->"
PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
RESULTS = Path(__file__).parent / "results"
REQUESTS = [10**exponent for exponent in range(3, 8)]
NETWORK = 0.001  # seconds; an assumption
COMPARED = {
    "calls": "calls/s",
    "queries": "queries/s",
    "gateway_cpu": "gateways' CPU",
    "service_cpu": "message services' CPU",
    "postgres_cpu": "PostgreSQL's CPU",
}
MAX_REPLICAS = 10, 4  # of gateways and message services: `maxReplicas` in k8s.yaml

Results = dict[str, Any]


def constants_table(it: Constants) -> str:
    def micro(seconds: float) -> str:
        return f"{seconds * 1e6:,.0f} µs"

    return table(
        ["constant", "measured", "meaning"],
        [
            ["`gateway_request`", micro(it.gateway_request), "a gateway's CPU time for a request"],
            ["`gateway_call`", micro(it.gateway_call), "a gateway's CPU time for a call to the message service"],
            ["`call`", micro(it.call), "from one call to the next, in an otherwise idle gateway"],
            ["`service_call`", micro(it.service_call), "a message service's CPU time for a call"],
            ["`service_query`", micro(it.service_query), "a message service's CPU time for a query"],
            ["`query`", micro(it.query), "from one query to the next, in an otherwise idle message service"],
            ["`postgres_query`", micro(it.postgres_query), "PostgreSQL's CPU time for a query"],
            ["`connection_bytes`", f"{it.connection_bytes / 1e3:,.0f} kB", "a gateway's memory for a connection"],
            ["`transfer_bytes`", f"{it.transfer_bytes:,.0f} bytes", "a request and its answer, without TLS"],
        ],
    ).replace("| ---: | ---: |", "| ---: | --- |")


def plan_table(it: Constants, slower: float) -> str:
    header = ["requests/s", "gateways", "message services", "connections to PostgreSQL", "calls/s", "queries/s"]
    rows = []
    for requests in REQUESTS:
        needed = plan(it, requests, slower)
        cells = [
            requests,
            needed.gateways,
            needed.services,
            needed.services * CONNECTIONS,
            needed.calls,
            needed.queries,
        ]
        gigabits = requests * it.transfer_bytes * 8 / 1e9
        rows.append([*map(number, cells), number(needed.postgres_cpu, 2), number(gigabits, 2)])
    return table([*header, "PostgreSQL's cores", "Gbit/s to clients"], rows)


def predicted(it: Constants, measured: dict[str, float]) -> Load:
    return load(it, measured["requests"], int(measured["gateways"]), int(measured["services"]), measured["slower"])


def errors(it: Constants, measured: dict[str, float]) -> dict[str, float]:
    """By how much the model exceeds each measurement, as a share of the measurement."""
    model = predicted(it, measured)
    compared = list(COMPARED)[:2] if measured["slower"] else COMPARED  # pg_sleep in a view costs CPU time of its own
    return {name: getattr(model, name) / measured[name] - 1 for name in compared}


def comparison_row(it: Constants, measured: dict[str, float]) -> list[str]:
    wrong = errors(it, measured)

    def cell(name: str) -> str:
        cpu = name.endswith("_cpu")
        value = measured[name] / measured["requests"] * 1e6 if cpu else measured[name]
        return f"{number(value)} ({wrong[name]:+.0%})" if name in wrong else "-"

    slower = f", +{measured['slower'] * 1000:.0f} ms" if measured["slower"] else ""
    replicas = f"{measured['gateways']:.0f} x {measured['services']:.0f}{slower}"
    return [replicas, number(measured["requests"]), *map(cell, COMPARED), f"{max(0, measured['others']):.0%}"]


def comparison(it: Constants, layouts: list[dict[str, float]]) -> str:
    header = ["gateways x message services", "requests/s", *COMPARED.values(), "others"]
    return table(header, [comparison_row(it, measured) for measured in layouts])


def summary(it: Constants, layouts: list[dict[str, float]]) -> str:
    """The median and the largest error of each measure."""
    groups: list[tuple[str, Callable[[dict[str, float]], bool]]] = [
        ("several replicas", lambda each: not each["slower"] and each["gateways"] > 1),
        ("slow queries", lambda each: each["slower"] > 0),
    ]
    rows = []
    for name, belongs in groups:
        wrong = [errors(it, each) for each in layouts if belongs(each)]
        sizes = [[abs(each[measure]) for each in wrong if measure in each] for measure in COMPARED]
        rows.append([name, *(f"{median(each):.0%}, {max(each):.0%}" if each else "-" for each in sizes)])
    return table(["error: median, largest", *COMPARED.values()], rows)


def body(results: Results) -> str:
    it, machine = Constants(**results["constants"]), results["machine"]
    saturated = results["calibration"]["saturated"]["requests"]
    gateways, services = MAX_REPLICAS
    most = requests_for(TARGET * gateways, lambda requests: load(it, requests, gateways, services).gateway_cpu)
    full = requests_for(1, lambda requests: load(it, requests, 1, 1).gateway_cpu)
    others = median(max(0, each["others"]) for each in results["layouts"])
    return "\n".join(
        [
            f"Measured on {machine['processor']}, {machine['kernel']}, with Python {machine['Python']} and PostgreSQL "
            f"{machine['PostgreSQL'].split()[0]}, all on one machine; version {machine['commit']}, {machine['date']}. "
            f"Medians of {results['rounds']} rounds of {results['seconds']} s. The load average before was "
            f"{results['load_average']:.1f}; other processes used {others:.0%} of the processors meanwhile.\n",
            "### The constants\n",
            constants_table(it),
            "### What is needed\n",
            f"No process uses more than {TARGET:.0%} of a core, and there are at least {LEAST} of each kind.\n",
            plan_table(it, slower=0),
            f"The same with a network that makes each call and each query {NETWORK * 1000:.0f} ms longer:\n",
            plan_table(it, NETWORK),
            f"Without that latency, the {gateways} gateways that `k8s.yaml` allows carry {number(most)} requests/s.\n",
            "### The model's error\n",
            summary(it, results["layouts"]),
            f"Saturated by wrk, one gateway answers {number(saturated)} requests/s; the model predicts "
            f"{number(full)}.\n",
            "<details><summary>Each measurement, with the model's error in brackets; CPU in µs per request</summary>\n",
            comparison(it, results["layouts"]),
            "</details>\n",
        ]
    )


def drawing(it: Constants) -> str:
    near, far = ([plan(it, requests, slower) for requests in REQUESTS] for slower in (0.0, NETWORK))
    network = f"+{NETWORK * 1000:.0f} ms"
    lines = [
        plot.Line("queries/s, loopback", "--bar", [each.queries for each in near], above=10),
        plot.Line(f"queries/s, {network}", "--accent", [each.queries for each in far], above=-20),
        plot.Line(f"gateways, {network}", "--second", [float(each.gateways) for each in far], above=-20),
        plot.Line(f"message services, {network}", "--third", [float(each.services) for each in far], above=-20),
    ]
    return plot.growth("Queries and replicas by requests per second", "requests/s", REQUESTS, lines)


def render(page: str, results: Results) -> str:
    """The page, with the part between its markers rewritten."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{body(results)}\n{END}{after}"


def write(results: Results) -> None:
    PAGE.write_text(render(PAGE.read_text(), results))
    (RESULTS / "scaling.svg").write_text(drawing(Constants(**results["constants"])))


if __name__ == "__main__":
    write(json.loads((RESULTS / "scaling.json").read_text()))
