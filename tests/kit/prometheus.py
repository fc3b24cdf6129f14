"""A real Prometheus with docs/prometheus.yml and docs/alerts.yaml, in a hurry: what are minutes there, is a second or
two here.
"""

import asyncio
import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kit import ROOT, eventually, reserve_port

MINUTE = 500  # milliseconds that stand for a minute of the rules
INTERVAL = "200ms"  # between two scrapes


class Prometheus:
    """It has a port of its own; its targets are `host:port`."""

    def __init__(self, folder: Path, port: int, *targets: str) -> None:
        config = (ROOT / "docs/prometheus.yml").read_text()
        config = re.sub(r"(scrape|evaluation)_interval: \w+", rf"\1_interval: {INTERVAL}", config)
        config = re.sub(r"targets: .*", f"targets: {json.dumps(targets)}", config)
        (folder / "prometheus.yml").write_text(config)
        rules = (ROOT / "docs/alerts.yaml").read_text()
        (folder / "alerts.yaml").write_text(re.sub(r"\b(\d+)m\b", lambda found: f"{int(found[1]) * MINUTE}ms", rules))
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder}/prometheus.yml",
                    f"--storage.tsdb.path={folder}/data",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
            )

    async def api(self, path: str, **query: str) -> Any:
        """What its HTTP API says."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"

        def read() -> Any:
            with urllib.request.urlopen(url, timeout=5) as response:
                return json.load(response)["data"]

        try:
            return await asyncio.to_thread(read)
        except OSError as error:
            raise AssertionError(f"{error}: {self.log.read_text()[-1000:]}") from error

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that a query finds now."""
        found: list[dict[str, Any]] = (await self.api("query", query=expression))["result"]
        return found

    async def firing(self) -> set[str]:
        """The alerts that would call an operator."""
        alerts = (await self.api("alerts"))["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    async def fires(self, *names: str, within: float = 20) -> None:
        """Return when all of these fire."""

        async def fire() -> bool:
            firing = await self.firing()
            assert firing >= set(names), f"{firing} fire, not {names}"
            return True

        await eventually(fire, within, every=0.1)

    async def is_silent(self, within: float = 30) -> None:
        """Return when no alert fires any more."""

        async def silent() -> bool:
            firing = await self.firing()
            assert not firing, f"{firing} fire"
            return True

        await eventually(silent, within, every=0.1)


@asynccontextmanager
async def prometheus(folder: Path, *targets: str) -> AsyncIterator[Prometheus]:
    """A Prometheus that reads these targets."""
    assert shutil.which("prometheus"), "prometheus is not installed"
    with reserve_port() as port:
        running = Prometheus(folder, port.getsockname()[1], *targets)
        try:
            await eventually(lambda: running.api("rules"), within=20)
            yield running
        finally:
            running.process.terminate()
            await asyncio.to_thread(running.process.wait, 20)
