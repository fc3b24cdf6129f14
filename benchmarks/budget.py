"""Where each microsecond of a request goes, hop by hop, with one client and with eight: `make budget`.

Rules: one system runs at a time. Tracing slows what it traces, so each kind of number comes from a run of its own: CPU
time and wake-ups from /proc, system calls from strace, functions from py-spy. Linux only, and only root may trace.
"""

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from bench import Wrk, settle
from report import SUBJECT, number, table
from stack import ROOT, SYSTEMS, Failure, Postgres, Running, System, missing, postgres, start

CLIENTS = (1, 8)
COMPARED = (SUBJECT, "go", "fastify")
PY_SPY = str(Path(sys.executable).with_name("py-spy"))
HOPS = ("gateway", "message service")

OWNERS = (  # by the first pattern found in a frame's file; libc and the interpreter count for their caller
    ("this project", re.escape(f"{ROOT}/") + r"(?:chassis/)?\w+\.py"),
    ("psycopg2, libpq", r"psycopg|libpq"),
    ("uvloop", r"uvloop|libuv"),
    ("aiohttp", r"aiohttp|llhttp|multidict|yarl|frozenlist|propcache|aiosignal|aiohappyeyeballs"),
    ("aiopg", r"/aiopg/|async_timeout"),
    ("other packages", r"site-packages"),
    ("asyncio", r"/asyncio/|_asyncio|/selectors\.py|selectmodule"),
)
FRAME = re.compile(r"(?P<function>.*) \((?P<file>.*?)(:\d+)?\)")
SYSTEM_CALL = re.compile(r"(epoll_p?wait|writev?|readv?|send(to|msg)?|recv(from|msg)?) \(.*libc")
Sample = tuple[str, str]  # whose code, and which function of it
NOTES = """\
The p50 is the client's. An epoll wait is a turn of the event loop, or of Go's network poller. System calls are counted
under strace, which slows the system and so changes how many requests share a run. User time is divided by py-spy's
samples; each counts for the innermost function that has an owner.
"""


@dataclass
class Hop:
    """What one process spends on a client's request; CPU is in µs."""

    p50_ms: float  # as the client sees it, so the same for both processes
    user: float
    system: float
    wake_ups: float
    calls: dict[str, float] = field(default_factory=dict)
    samples: Counter[Sample] = field(default_factory=Counter)


def counters(process: psutil.Popen) -> tuple[float, float, float]:
    """µs in user mode, µs in the kernel, and how often a thread went to sleep, to be woken up."""
    times = process.cpu_times()
    threads = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/status")]
    sleeps = [int(count) for each in threads for count in re.findall(r"\nvoluntary_ctxt_switches:\s+(\d+)", each)]
    return times.user * 1e6, times.system * 1e6, sum(sleeps)


def measure(running: Running, clients: int, seconds: int) -> list[Hop]:
    before = list(map(counters, running.processes()))
    with Wrk(running.url, clients, seconds) as wrk:
        result = wrk.result()
    hops = []
    for earlier, later in zip(before, map(counters, running.processes()), strict=True):
        user, system, wake_ups = ((b - a) / result["requests"] for a, b in zip(earlier, later, strict=True))
        hops.append(Hop(result["p50"] / 1e3, user, system, wake_ups))
    return hops


def count_system_calls(running: Running, clients: int, seconds: int, folder: Path) -> list[dict[str, float]]:
    """System calls of each process, by name. Both are traced at once, so that both are slowed."""
    reports = [folder / f"{process.pid}.calls" for process in running.processes()]
    with ExitStack() as stack:
        for process, report in zip(running.processes(), reports, strict=True):
            command = [*f"strace -c -f -U calls,name -p {process.pid} -o".split(), str(report)]
            tracer = psutil.Popen(command, stderr=subprocess.PIPE, text=True)
            stack.callback(tracer.communicate)
            stack.callback(tracer.send_signal, signal.SIGINT)  # first: it detaches and writes its report
            if "attached" not in (line := tracer.stderr.readline()):
                raise Failure(f"strace cannot trace {running.system.title}: {line}")
        with Wrk(running.url, clients, seconds) as wrk:
            requests = wrk.result()["requests"]
    rows = [re.findall(r"^ *(\d+) (\w+)$", report.read_text(), re.MULTILINE) for report in reports]
    return [{name: int(calls) / requests for calls, name in each if name != "total"} for each in rows]


def owner(frames: list[str]) -> Sample:
    """The innermost function that has an owner."""
    for match in filter(None, map(FRAME.fullmatch, reversed(frames))):
        for name, pattern in OWNERS:
            if re.search(pattern, match["file"]):
                function = re.sub("^0x.*", "…", match["function"])  # a library without symbols
                return name, f"`{function}` ({Path(match['file']).name})"
    return "Python", "-"


def sample(running: Running, process: psutil.Popen, clients: int, seconds: int, folder: Path) -> Counter[Sample]:
    """Where the process is when it holds the interpreter's lock and is not in a system call."""
    output = folder / f"{process.pid}.samples"
    # Each sample stops the process while its C frames are unwound: not more than 200 a second.
    options = f"--native --gil --function --full-filenames --rate 200 --duration {seconds} --pid {process.pid}"
    command = [PY_SPY, "record", *options.split(), "--format", "raw", "--output", str(output)]
    with Wrk(running.url, clients, seconds=seconds + 60):  # leaving stops it
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"py-spy cannot sample {running.system.title}:\n{done.stderr}")
    samples: Counter[Sample] = Counter()
    for stack, count in re.findall(r"^(.*) (\d+)$", output.read_text(), re.MULTILINE):
        if not SYSTEM_CALL.match((frames := stack.split(";"))[-1]):
            samples[owner(frames)] += int(count)
    return samples


def inspect(system: System, database: Postgres, seconds: int, folder: Path) -> dict[int, list[Hop]]:
    measured = {}
    with ExitStack() as stack:
        running = start(system, database, folder, stack)
        measure(running, 64, seconds)  # a warm-up, with clients enough for Node's compiler to finish its work
        for clients in CLIENTS:
            print(f"{system.title}: clients: {clients}", flush=True)
            settle(running, database)
            measured[clients] = measure(running, clients, seconds)
            counted = count_system_calls(running, clients, seconds, folder)
            for hop, process, calls in zip(measured[clients], running.processes(), counted, strict=True):
                hop.calls = calls
                if system.name == SUBJECT:
                    hop.samples = sample(running, process, clients, 3 * seconds, folder)
    return measured


def hop_row(title: str, hop: Hop) -> list[str]:
    turns = hop.calls.get("epoll_wait", 0) + hop.calls.get("epoll_pwait", 0)
    counts = [number(count, 1) for count in (hop.wake_ups, turns, sum(hop.calls.values()))]
    calls = sorted(hop.calls.items(), key=lambda item: -item[1])
    names = ", ".join(f"{name} {count:.1f}" for name, count in calls if count >= 0.05)
    return [title, number(hop.p50_ms, 2), number(hop.user), number(hop.system), *counts, names]


def user_time(hops: list[Hop], key: Callable[[Sample], tuple[str, ...]]) -> list[list[str]]:
    """µs of user time for each key, dearest first, with a column for each hop."""
    costs: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0] * len(hops))
    for column, hop in enumerate(hops):
        for taken, count in hop.samples.items():
            costs[key(taken)][column] += count / hop.samples.total() * hop.user
    dearest = sorted(costs.items(), key=lambda item: -item[1][0])
    return [[*names, *(number(cost, 1) for cost in columns)] for names, columns in dearest]


def markdown(results: dict[str, dict[int, list[Hop]]], seconds: int) -> str:
    titles = {system.name: system.title for system in SYSTEMS}
    header = ["hop", "p50 ms", "CPU µs user", "system", "wake-ups", "epoll waits", "system calls", "by name"]
    parts = ["# Budget of a request\n", f"Per request of a client, in runs of {seconds} s.\n"]
    for clients in CLIENTS:
        rows = []
        for name, measured in results.items():
            rows += [hop_row(f"{titles[name]}: {hop}", each) for hop, each in zip(HOPS, measured[clients], strict=True)]
        parts += [f"## Clients: {clients}\n", table(header, rows)]
    columns = [f"µs, clients: {clients}" for clients in CLIENTS]
    for index, name in enumerate(HOPS):
        hops = [results[SUBJECT][clients][index] for clients in CLIENTS]
        parts.append(f"## User time of this system's {name}\n")
        parts.append(table(["owner", *columns], user_time(hops, lambda taken: taken[:1])))
        parts.append(table(["function", "owner", *columns], user_time(hops, lambda taken: taken[::-1])[:15]))
    return "\n".join([*parts, NOTES])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure where each microsecond of a request goes.")
    parser.add_argument("--seconds", type=int, default=5, help="of a run (default: 5); py-spy's is three times as long")
    seconds = parser.parse_args().seconds
    if lacking := " ".join(name for name in ("wrk", "strace") if not shutil.which(name)):
        sys.exit(f"missing: {lacking} (Debian: apt-get install {lacking})")
    chosen = [system for system in SYSTEMS if system.name in COMPARED]
    print("".join(f"{reason}\n" for reason in map(missing, chosen) if reason), end="")
    try:
        with tempfile.TemporaryDirectory(prefix="budget-") as name, ExitStack() as stack:
            folder = Path(name)
            folder.chmod(0o755)  # PostgreSQL may run as another user
            database = stack.enter_context(postgres(folder / "postgres"))
            results = {each.name: inspect(each, database, seconds, folder) for each in chosen if not missing(each)}
    except Failure as failure:
        sys.exit(str(failure))
    output = ROOT / "benchmarks" / "results" / ("partial" if sys.argv[1:] else "") / "budget.md"
    output.parent.mkdir(exist_ok=True)
    print(report := markdown(results, seconds))
    output.write_text(report)


if __name__ == "__main__":
    main()
