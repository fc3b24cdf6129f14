"""Measure what the model of scaling_model.py needs, and hold the model against several replicas: `make scaling`.

Rules: the constants come from one gateway and one message service, loaded each by itself; the model is then held
against other numbers of replicas, which had no say in the constants. Everything shares one machine, so each
measurement records how much of it others used. Each message service belongs to every so many gateways: gateways keep
their connections, so in the long run a balancer does the same.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from bench import Wrk, busy_seconds, cpu_seconds, describe_machine
from open_loop import REQUEST, ask, connect
from scaling_model import Constants, fit, interval
from stack import SYSTEMS, Failure, Postgres, check, postgres, serve

HERE = Path(__file__).parent
LAYOUTS = [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)]  # gateways, message services
CALIBRATION = [1000, 2000, 4000, 8000]  # requests per second
RATES = [1000, 2000, 4000, 8000]  # the same, all gateways together
SLOW_QUERIES = [0.008, 0.016]  # seconds
SLOW_RATE = 2000  # requests per second
SATURATING_CLIENTS = 256
IDLE_CONNECTIONS = 4000
WARM_UP_SECONDS = 0.5
SYSTEM = SYSTEMS[0]

Measurement = dict[str, float]
Server = tuple[psutil.Popen, int]  # and its port


@dataclass
class Cluster:
    gateways: list[Server]
    services: list[Server]
    database: Postgres

    def counters(self) -> Measurement:
        """What only grows: CPU seconds of each part and of everybody else, calls, queries."""
        gateways, services = (sum(cpu_seconds(each) for each, _ in tier) for tier in (self.gateways, self.services))
        cpu = {"gateway_cpu": gateways, "service_cpu": services, "postgres_cpu": self.database.cpu_seconds()}
        others = busy_seconds() - sum(cpu.values()) - time.process_time()
        runs = sum(map(runs_so_far, (port for _, port in self.gateways)))
        return cpu | {"others": others, "calls": runs, "queries": self.database.queries()}

    def measure(self, rate: float, seconds: float, path: str = "api/string") -> Measurement:
        """Per second, while the gateways are asked so often, or the message services if that is their path.

        `call` and `query` are the mean seconds of one.
        """
        ports = [port for _, port in (self.gateways if path == "api/string" else self.services)]
        ask(ports, path, rate, WARM_UP_SECONDS)
        before = self.counters()
        answers = ask(ports, path, rate, seconds)
        return self.per_second(before, answers.seconds) | {
            "requests": answers.count / answers.seconds,
            "call": statistics.fmean(answers.calls.values()),
            "query": statistics.fmean(answers.queries.values()),
            "answer_bytes": answers.size,
        }

    def per_second(self, before: Measurement, seconds: float) -> Measurement:
        measured = {name: (value - before[name]) / seconds for name, value in self.counters().items()}
        return measured | {"others": measured["others"] / (os.cpu_count() or 1)}


def runs_so_far(port: int) -> float:
    """Runs of a server's coalescer that have ended, as its metrics say."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        text = response.read().decode()
    return sum(map(float, re.findall(r"^coalescing_run_callers_count\{.*\} (\S+)$", text, re.MULTILINE)))


@contextmanager
def cluster(gateways: int, services: int, database: Postgres, folder: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        made = Cluster([], [], database)
        for number in range(services):
            log = folder / f"service-{number}.log"
            made.services.append(serve(SYSTEM.service or [], "a message service", database.environment, log, stack))
        for number in range(gateways):
            log, (_, port) = folder / f"gateway-{number}.log", made.services[number % services]
            environment = {"DOWNSTREAM_URL": f"http://127.0.0.1:{port}"}
            made.gateways.append(serve(SYSTEM.gateway, "a gateway", environment, log, stack))
            check(f"http://127.0.0.1:{made.gateways[-1][1]}/api/string", made.gateways[-1][0], log, "a gateway")
        yield made


def medians(rounds: list[Measurement]) -> Measurement:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def measure_connections(cluster: Cluster) -> float:
    """Bytes of a gateway's memory for a connection that has had an answer and is kept."""
    process, port = cluster.gateways[0]
    before = process.memory_info().rss
    with ExitStack() as stack:
        for _ in range(IDLE_CONNECTIONS):
            connection = stack.enter_context(connect(port))
            connection.send(REQUEST % b"api/string")
            connection.recv(65536)
        return float(process.memory_info().rss - before) / IDLE_CONNECTIONS


def measure_saturation(cluster: Cluster, seconds: int) -> Measurement:
    """What one gateway answers when wrk's clients ask again at once."""
    url = f"http://127.0.0.1:{cluster.gateways[0][1]}/api/string"
    before = cluster.counters()
    with Wrk(url, SATURATING_CLIENTS, seconds) as wrk:
        result = wrk.result()
    measured = cluster.per_second(before, result["duration"] / 1e6)
    return measured | {"requests": (result["requests"] - result["bad_status"]) / (result["duration"] / 1e6)}


@contextmanager
def slow_queries(database: Postgres, seconds: float) -> Iterator[None]:
    """Let each query for the message take so long."""
    with database.connection.cursor() as cursor:
        cursor.execute("ALTER TABLE messages RENAME TO stored")
        cursor.execute(f"CREATE VIEW messages AS SELECT id, content FROM stored, pg_sleep({seconds})")
        try:
            yield
        finally:
            cursor.execute("DROP VIEW messages")
            cursor.execute("ALTER TABLE stored RENAME TO messages")


def measure_round(database: Postgres, folder: Path, seconds: int) -> dict[str, Measurement]:
    """Everything once, by name."""
    measured = {}

    def note(name: str, it: Measurement) -> None:
        measured[name] = it
        shown = ", ".join(f"{key} {value:,.4g}" for key, value in it.items())
        print(f"{name}: {shown}", flush=True)

    for gateways, services in LAYOUTS:
        with cluster(gateways, services, database, folder) as it:
            if (gateways, services) == (1, 1):
                note("connection", {"bytes": measure_connections(it)})
                note("saturated", measure_saturation(it, seconds))
                for rate in CALIBRATION:
                    note(f"gateway {rate}", it.measure(rate, seconds))
                    note(f"service {rate}", it.measure(rate, seconds, "api/message"))
                for query in SLOW_QUERIES:
                    with slow_queries(database, query):
                        note(f"slow {query * 1000:.0f}", it.measure(SLOW_RATE, seconds))
            else:
                for rate in RATES:
                    note(f"{gateways} x {services} {rate}", it.measure(rate, seconds))
    return measured


def constants(measured: dict[str, Measurement]) -> Constants:
    """From one gateway and one message service, each asked by itself."""
    gateway, service = ([measured[f"{tier} {rate}"] for rate in CALIBRATION] for tier in ("gateway", "service"))
    gateway_request, gateway_run = fit([(it["requests"], it["calls"], it["gateway_cpu"]) for it in gateway])
    service_call, service_query = fit([(it["requests"], it["queries"], it["service_cpu"]) for it in service])
    return Constants(
        gateway_request,
        gateway_run,
        service_call,
        service_query,
        sum(it["postgres_cpu"] for it in service) / sum(it["queries"] for it in service),
        statistics.median(it["call"] for it in gateway),
        statistics.median(interval(it["requests"], it["calls"]) - it["call"] for it in gateway),
        statistics.median(it["query"] for it in service),
        statistics.median(interval(it["requests"], it["queries"]) - it["query"] for it in service),
        measured["connection"]["bytes"],
        len(REQUEST) + gateway[0]["answer_bytes"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how cost grows with load.")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default: 3)")
    parser.add_argument("--seconds", type=int, default=2, help="length of one measurement (default: 2)")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk is missing: install it (Debian: apt-get install wrk)")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    load_average = os.getloadavg()[0]
    try:
        with tempfile.TemporaryDirectory(prefix="scaling-") as name, ExitStack() as stack:
            folder = Path(name)
            folder.chmod(0o755)  # PostgreSQL may run as another user
            database = stack.enter_context(postgres(folder / "postgres"))
            rounds = [measure_round(database, folder, options.seconds) for _ in range(options.rounds)]
            machine = describe_machine(database)
    except (Failure, OSError) as failure:
        sys.exit(str(failure))
    measured = {name: medians([each[name] for each in rounds]) for name in rounds[0]}
    results = {
        "machine": {name: machine[name] for name in ("processor", "kernel", "Python", "PostgreSQL", "commit", "date")},
        "load_average": load_average,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "constants": asdict(constants(measured)),
        "measured": measured,
    }
    output = HERE / "results" / ("partial" if sys.argv[1:] else "") / "scaling.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
