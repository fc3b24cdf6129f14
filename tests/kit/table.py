"""The table of faults in docs/faults.md, made from the tests that ran."""

from dataclasses import dataclass

BEGIN, END = "<!-- faults: written by `make faults` -->", "<!-- faults: end -->"
AREAS = ("Database", "Network and downstream", "One of two replicas", "Clients", "Process")


@dataclass
class Row:
    """One fault; `back` is the recovery time, or what the test asserts about it; `test` is the test's file."""

    area: str
    fault: str
    sees: str
    back: str
    test: str


# Faults whose tests are among the ordinary ones: area, fault, what a client sees, recovery, test.
_ELSEWHERE = """
Database | absent at start | 503 | ≤ 1 s | test_lifecycle.py
Database | restarted between requests | 200 | at once | test_database.py
Database | table recreated or altered between requests | 200 | at once | test_database.py
Database | query cancelled or timed out on the server | 503, 504 | at once | test_database.py
Database | a connection dies silently, or its host was restarted | 200 | at once | test_database.py
Database | password rotated | 200 | at once | test_passwords.py
Database | TLS required, refused, or with a wrong certificate | 503 | at once | test_tls.py
Database | its pooler restarts | 503 | at once | test_poolers.py
Network and downstream | name unknown, slow, or moved to another address | 503, 504 | ≤ 1 s | test_names.py
Network and downstream | service absent | 503 | at once | test_lifecycle.py
Network and downstream | a kept connection dies silently | 200 | at once | test_client.py
Network and downstream | service silent, slow, resets, lies (30 ways) | 502, 503, 504 | at once | test_client.py
Network and downstream | service redirects elsewhere | 502, not followed | at once | test_client.py
Clients | leave before their answer | - | at once | test_database.py
Process | SIGTERM or SIGINT while requests never end, and a second one | a close | - | test_lifecycle.py
Process | read-only disk | 200 | - | ../deployment/test_docker.py
"""
REFERENCES = [
    Row(area, fault, sees, back, f"../tests/chassis/{test}")
    for area, fault, sees, back, test in (
        [cell.strip() for cell in line.split(" | ")] for line in _ELSEWHERE.strip().splitlines()
    )
]


def worst(rows: list[Row]) -> list[Row]:
    """One row for each fault, the worse one if both servers have one."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        before = found.setdefault((row.area, row.fault), row)
        if _badness(row.back) > _badness(before.back):
            found[row.area, row.fault] = row
    return list(found.values())


def _badness(back: str) -> tuple[bool, float]:
    number = back.partition(" ")[0]
    return back.startswith("**"), float(number) if number[:1].isdigit() else 0


def render(text: str, rows: list[Row]) -> str:
    """Return `text` with the table between its markers, which are added at the end if they are missing."""
    lines = ["| fault | a client sees | recovery |", "|---|---|---|"]
    for area in AREAS:
        lines.append(f"| **{area}** | | |")
        own = [row for row in worst(rows) if row.area == area]
        lines += [f"| [{row.fault}]({row.test}) | {row.sees} | {row.back} |" for row in own]
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] or "\n"
    return before + "\n".join([BEGIN, "", *lines, "", END]) + after
