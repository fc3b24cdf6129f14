"""The message that the database holds, as `GET /api/message` and, through the gateway, `GET /api/string` answer it."""

import pytest
from conftest import System
from kit.client import get

CONTENTS = {
    "plain": "Hello from PostgreSQL!",
    "empty": "",
    "emoji": "👋🏽 🏴‍☠️ 𝄞",
    "quotes": """it's "quoted" \\ {"result": "no"} <b>&amp;</b>""",
    "newlines": "one\ntwo\r\nthree\tend\n",
    "right to left": "\u202eمرحبا بالعالم\u202c שלום",  # noqa: RUF001
    "controls": "\x01\x1f\x7f\x85\u2028\u2029\ufeff\uffff",
    "combining": "e\u0301 \u1112\u1161\u11ab",
    "500 kB": "0123456789" * 50_000,
    "500 kB of emoji": "👋" * 125_000,
}
ROUTES = pytest.mark.parametrize(
    ("part", "path"), [("gateway", "/api/string"), ("service", "/api/message")], ids=["gateway", "service"]
)
KEY = {"gateway": "result", "service": "message"}


def url(system: System, part: str) -> str:
    """Base URL of one of the servers."""
    return str(getattr(system, part).url)


@ROUTES
@pytest.mark.parametrize("name", CONTENTS)
async def test_any_unicode_arrives_as_it_is_stored(system: System, part: str, path: str, name: str) -> None:
    """A client reads exactly what PostgreSQL stores."""
    system.database.store(CONTENTS[name])
    answer = await get(url(system, part) + path)
    assert (answer.status, answer.json()) == (200, {KEY[part]: CONTENTS[name]})
    assert answer.headers["Content-Type"].split(";")[0] == "application/json"


@ROUTES
async def test_json_is_utf_8_and_not_escaped(system: System, part: str, path: str) -> None:
    """A person who reads the body sees characters, not escape sequences."""
    system.database.store("naïve 👋")
    assert "naïve 👋".encode() in (await get(url(system, part) + path)).body


@ROUTES
async def test_the_message_is_the_row_with_the_lowest_id(system: System, part: str, path: str) -> None:
    """Not the row that was written first or last."""
    system.database.sql("INSERT INTO messages (id, content) OVERRIDING SYSTEM VALUE VALUES (-7, 'lowest')")
    try:
        assert (await get(url(system, part) + path)).json() == {KEY[part]: "lowest"}
    finally:
        system.database.sql("DELETE FROM messages WHERE id = -7")
