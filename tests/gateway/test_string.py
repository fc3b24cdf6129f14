"""`GET /api/string`, beside the message itself, for which see tests/message_service."""

import re

from conftest import System
from kit.client import get


async def test_server_timing_tells_where_the_time_went(system: System) -> None:
    """Milliseconds for gateway, message service and database, each part of the one before it."""
    answer = await get(system.gateway.url + "/api/string")
    entries = {part.split(";")[0].strip(): part for part in answer.headers["Server-Timing"].split(",")}
    durations = [
        float(re.search(r"dur=([0-9.]+)", entries[name])[1])  # type: ignore[index]
        for name in ("gateway", "service", "database")
    ]
    assert durations[0] >= durations[1] >= durations[2] > 0
    answer = await get(system.service.url + "/api/message")
    assert "gateway" not in answer.headers["Server-Timing"]
