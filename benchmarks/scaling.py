"""Measure the constants of scaling_model.py, and hold the model against several replicas: `make scaling`.

Rules: the constants come from one gateway and one message service, each loaded by itself; the model is then held
against other numbers of replicas, which have no say in the constants. All share one machine, so their load is chosen
as a share of what the machine can do, and each measurement records what others used meanwhile. Gateways are spread
over the message services evenly, as a balancer of connections does in the long run.
"""

import argparse
import json
import os
import re
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import scaling_report
from bench import Wrk, busy_seconds, cpu_seconds, describe_machine, interrupt
from open_loop import REQUEST, ask, connect, receive
from scaling_model import Constants, fit_costs, fit_seconds, load, requests_for
from stack import SAMPLE, SYSTEMS, Failure, Postgres, check, postgres, serve

SYSTEM = SYSTEMS[0]
LAYOUTS = [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)]  # gateways, message services
CALIBRATION = [0.06, 0.12, 0.25, 0.5]  # of the requests that one gateway can answer with a core of its own
CASES = [(0.0, 0.2), (0.0, 0.35), (0.0, 0.5), (0.008, 0.2), (0.016, 0.2)]  # seconds more a query; of all processors
SATURATING_CLIENTS = 256
IDLE_CONNECTIONS = 4000
WARM_UP_SECONDS = 0.5
DISTURBED = 0.05  # share of all processors that others used
TRIES = 6
QUIET_SECONDS = 10.0  # to wait at most, before each try, for others to have finished
GATEWAY, SERVICE = "api/string", "api/message"

Measurement = dict[str, float]
Server = tuple[psutil.Popen, int]  # and its port


@dataclass
class Cluster:
    gateways: list[Server]
    services: list[Server]
    database: Postgres

    def counters(self) -> Measurement:
        """What only grows: CPU seconds of each part, of the load, and of everybody else; calls; queries."""
        gateway, service = (sum(cpu_seconds(each) for each, _ in tier) for tier in (self.gateways, self.services))
        cpu = {"gateway_cpu": gateway, "service_cpu": service, "postgres_cpu": self.database.cpu_seconds()}
        cpu["load_cpu"] = time.process_time()
        others = {"others": (busy_seconds() - sum(cpu.values())) / (os.cpu_count() or 1)}
        calls = sum(runs_so_far(port) for _, port in self.gateways)
        return cpu | others | {"calls": calls, "queries": self.database.queries()}

    def since(self, before: Measurement, requests: int, seconds: float) -> Measurement:
        """Everything per second."""
        measured = {name: (value - before[name]) / seconds for name, value in self.counters().items()}
        return measured | {"requests": requests / seconds}

    def measure(self, rate: float, seconds: float, path: str = GATEWAY) -> Measurement:
        """Ask the gateways, or the message services if the path is theirs, so many times a second."""
        ports = [port for _, port in (self.gateways if path == GATEWAY else self.services)]

        def once() -> Measurement:
            ask(ports, path, rate, WARM_UP_SECONDS)
            before = self.counters()
            return self.since(before, *ask(ports, path, rate, seconds))

        return least_disturbed(once)

    def saturate(self, seconds: int) -> Measurement:
        """Let wrk ask the first gateway again at once after each answer."""

        def once() -> Measurement:
            before = self.counters()
            with Wrk(f"http://127.0.0.1:{self.gateways[0][1]}/{GATEWAY}", SATURATING_CLIENTS, seconds) as wrk:
                result = wrk.result()
            return self.since(before, result["requests"] - result["bad_status"], result["duration"] / 1e6)

        return least_disturbed(once)

    def connections(self) -> Measurement:
        """Bytes: the first gateway's memory for a connection that is kept after an answer; a request and its answer."""
        process, port = self.gateways[0]
        before = process.memory_info().rss
        with ExitStack() as stack:
            for _ in range(IDLE_CONNECTIONS):
                connection = stack.enter_context(connect(port))
                connection.send(REQUEST % GATEWAY.encode())
                size = receive(connection)
            memory = (process.memory_info().rss - before) / IDLE_CONNECTIONS
        return {"connection_bytes": memory, "transfer_bytes": len(REQUEST % GATEWAY.encode()) + size}


def least_disturbed(once: Callable[[], Measurement]) -> Measurement:
    """Measure in a quiet moment, and again if others disturbed it; the try that was disturbed least."""
    tries: list[Measurement] = []
    while not tries or (tries[-1]["others"] > DISTURBED and len(tries) < TRIES):
        deadline = time.monotonic() + QUIET_SECONDS
        while psutil.cpu_percent(0.5) > 100 * DISTURBED and time.monotonic() < deadline:
            pass
        tries.append(once())
    return min(tries, key=lambda it: it["others"])


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
            check(
                f"http://127.0.0.1:{made.gateways[-1][1]}/{GATEWAY}",
                {"result": SAMPLE},
                made.gateways[-1][0],
                log,
                "a gateway",
            )
        yield made


def medians(rounds: list[Measurement]) -> Measurement:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def calibrate(database: Postgres, folder: Path, rounds: int, seconds: int) -> tuple[Constants, dict[str, Measurement]]:
    """The constants, and what they come from."""
    with cluster(1, 1, database, folder) as it:
        it.measure(100, 1)  # connections and caches
        memory = it.connections()
        saturated = medians([it.saturate(seconds) for _ in range(rounds)])
        most = saturated["requests"] / saturated["gateway_cpu"]
        gateway, service = (
            [[it.measure(share * most, seconds, path) for share in CALIBRATION] for _ in range(rounds)]
            for path in (GATEWAY, SERVICE)
        )
    gateway_points, service_points = (
        list(map(medians, map(list, zip(*each, strict=True)))) for each in (gateway, service)
    )
    request, call = fit_costs([(p["requests"], p["calls"], p["gateway_cpu"]) for p in gateway_points])
    service_call, query = fit_costs([(p["requests"], p["queries"], p["service_cpu"]) for p in service_points])
    constants = Constants(
        gateway_request=request,
        gateway_call=call,
        call=fit_seconds([(p["requests"], p["calls"]) for p in gateway_points], request),
        service_call=service_call,
        service_query=query,
        query=fit_seconds([(p["requests"], p["queries"]) for p in service_points], service_call),
        postgres_query=sum(p["postgres_cpu"] for p in service_points) / sum(p["queries"] for p in service_points),
        **memory,
    )
    points = {f"gateway {share}": point for share, point in zip(CALIBRATION, gateway_points, strict=True)}
    points |= {f"service {share}": point for share, point in zip(CALIBRATION, service_points, strict=True)}
    return constants, points | {"saturated": saturated}


def affordable(constants: Constants, load_cpu: float, share: float, *layout: Any) -> float:
    """Requests per second that take this share of all processors; making and reading each takes `load_cpu` seconds."""

    def cores(requests: float) -> float:
        return load(constants, requests, *layout).cpu + requests * load_cpu

    return requests_for(share * (os.cpu_count() or 1), cores)


def compare(
    constants: Constants, load_cpu: float, database: Postgres, folder: Path, rounds: int, seconds: int
) -> list[Measurement]:
    """Measure each layout in each case."""
    found: dict[tuple[Any, ...], list[Measurement]] = {}
    for _ in range(rounds):
        for gateways, services in LAYOUTS:
            with cluster(gateways, services, database, folder) as it:
                for slower, share in CASES:
                    rate = affordable(constants, load_cpu, share, gateways, services, slower)
                    with database.slower(slower):
                        measured = it.measure(rate, seconds)
                    measured |= {"gateways": gateways, "services": services, "slower": slower}
                    found.setdefault((gateways, services, slower, share), []).append(measured)
                    print(measured, flush=True)
    return list(map(medians, found.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how cost grows with load.")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default: 3)")
    parser.add_argument("--seconds", type=int, default=2, help="length of one measurement (default: 2)")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk is missing: install it (Debian: apt-get install wrk)")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a descriptor for each connection; children inherit it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    load_average = os.getloadavg()[0]
    try:
        with tempfile.TemporaryDirectory(prefix="scaling-") as name, ExitStack() as stack:
            folder = Path(name)
            folder.chmod(0o755)  # PostgreSQL may run as another user
            database = stack.enter_context(postgres(folder / "postgres"))
            constants, points = calibrate(database, folder, options.rounds, options.seconds)
            print(constants, points, flush=True)
            heaviest = points[f"gateway {CALIBRATION[-1]}"]
            load_cpu = heaviest["load_cpu"] / heaviest["requests"]
            layouts = compare(constants, load_cpu, database, folder, options.rounds, options.seconds)
            machine = describe_machine(database)
    except (Failure, OSError) as failure:
        sys.exit(str(failure))
    except KeyboardInterrupt:
        sys.exit("interrupted: everything is stopped, nothing is written")
    results = {
        "machine": {name: machine[name] for name in ("processor", "kernel", "Python", "PostgreSQL", "commit", "date")},
        "load_average": load_average,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "constants": asdict(constants),
        "calibration": points,
        "layouts": layouts,
    }
    output = scaling_report.RESULTS / ("partial" if sys.argv[1:] else "")
    output.mkdir(exist_ok=True)
    (output / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
    print(scaling_report.body(results))
    if output == scaling_report.RESULTS:
        scaling_report.write(results)


if __name__ == "__main__":
    main()
