"""docs/runbook.md has an entry for each alert, and its commands work: those for the servers and the database are run
here, as they are; kubectl reads the others.
"""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import MakeProxy, Start
from kit import ROOT, eventually, reserve_port
from kit.application import PAIR
from kit.client import get
from kit.load import Clients
from kit.postgres import Cluster
from kit.processes import Server

PAGE = (ROOT / "docs/runbook.md").read_text()
BLOCKS = [
    re.sub(r"(?m)^ {2,3}", "", block) for block in re.findall(r"^ *```sh\n(.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL)
]
KUBERNETES, OUTSIDE = BLOCKS[:2]  # functions `logs`, `ask`, `sql`; the last for any database
RUNNABLE = re.findall(r"^(?:sql|logs|ask) .*|^\w+=\S+$", "\n".join(BLOCKS[3:]), re.MULTILINE)


def test_each_alert_has_an_entry() -> None:
    """Its `runbook_url` leads to its section; each section shows where to look, and what to do."""
    rules = [
        rule for group in yaml.safe_load((ROOT / "docs/alerts.yaml").read_text())["groups"] for rule in group["rules"]
    ]
    alerts = [rule for rule in rules if "alert" in rule]
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
    for alert in alerts:
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert "**Look.**" in sections[alert["alert"]] or "**Look**" in sections[alert["alert"]]
        assert "**Cause and cure" in sections[alert["alert"]]
        assert f"(#{alert['alert'].lower()})" in PAGE.partition("\n## ")[0]


def log_file(folder: Path, name: str, server: Server) -> None:
    """Its log as `kubectl logs --prefix` prints it."""
    lines = [f"[pod/{name}-1/{name}] {json.dumps(line)}\n" for line in server.log]
    (folder / name).write_text("".join(lines))


@pytest.mark.skipif(not shutil.which("psql"), reason="psql is not installed")
async def test_its_commands_find_what_they_look_for(
    start: Start, cluster: Cluster, make_proxy: MakeProxy, tmp_path: Path
) -> None:
    """After an outage and with an empty table, each command that needs no cluster prints something."""
    database = cluster.database()
    before_database = await make_proxy(database.port)
    service = await start(PAIR.service, **database.settings(DB_PORT=before_database.port))
    before_service = await make_proxy(service.port)
    gateway = await start(PAIR.gateway, DOWNSTREAM_URL=before_service.url)
    url = gateway.url + PAIR.read_path

    async with Clients(url, 2, pause=0.05):  # a warning: calls that failed, which no client noticed
        before_service.delay = 0.03
        while not gateway.logged(level="warning"):
            before_service.cut()
            await asyncio.sleep(0.1)
        before_service.delay = 0
    before_database.refuse()
    before_database.cut()
    for name in re.findall(r"^(?:id|shared_with)=(\S+)", PAGE, re.MULTILINE):
        assert (await get(url, headers={"X-Request-ID": name})).status == 503
    await before_database.accept()
    await eventually(lambda: answers(url))
    database.sql(f"DELETE FROM {PAIR.table}")
    assert (await get(url)).status == 404
    await service.wait_for_log(status=503)
    await gateway.wait_for_log(status=404)
    for name, server in (("gateway", gateway), ("message-service", service)):
        log_file(tmp_path, name, server)

    functions = re.sub(r"kubectl -n messages logs .*", f'cat "{tmp_path}/$1"', KUBERNETES)
    functions = functions.replace('kubectl -n messages exec "deployment/$1" -- python', sys.executable)
    functions = functions.replace(
        "int(sys.argv[1])", f'{{"8000": {gateway.port}, "8001": {service.port}}}[sys.argv[1]]'
    )
    environment = {
        "PATH": os.environ["PATH"],
        "DB_HOST": "127.0.0.1",
        "PGPORT": str(database.port),
        "DB_OWNER": database.user,
        "DB_OWNER_PASSWORD": database.password or "",
    }
    assert len(RUNNABLE) > 20
    for command in RUNNABLE:
        if re.fullmatch(r"\w+=\S+", command):
            environment |= [command.split("=")]
            continue
        script = f"set -o pipefail\n{functions}\n{OUTSIDE}\n{command}"
        done = await asyncio.to_thread(
            subprocess.run, ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=20
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert done.stdout, command


async def answers(url: str) -> bool:
    return (await get(url)).status == 200


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kubectl_understands_its_commands(tmp_path: Path) -> None:
    """kubectl accepts each of them, up to the point where it looks for a cluster."""
    text = "\n".join(BLOCKS).replace("\\\n", " ").replace('"$1"', "gateway").replace('"$2"', "1").replace('"$3"', "/")
    text = text.replace("${2:-15m}", "15m")
    text = re.sub(r"python -c '.*?'", "true", text, flags=re.DOTALL)
    found = re.findall(r"^ *(kubectl [^|&<\n}]+(?:}[^|&<\n]*)*)", text, re.MULTILINE)
    assert len(found) > 40
    with reserve_port() as nobody, ThreadPoolExecutor(4) as pool:
        server = f"--server=http://127.0.0.1:{nobody.getsockname()[1]}"

        def read(command: str) -> None:
            words = shlex.split(command)
            done = subprocess.run(
                [words[0], server, *words[1:]],
                env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0 or "refused" in done.stderr, (command, done.stderr)

        list(pool.map(read, found))
