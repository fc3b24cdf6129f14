"""Answers: with and without their body, and none for a client that has it already."""

import re

import pytest
from conftest import System
from kit.application import PAIR
from kit.client import connection

PATH = {"gateway": PAIR.read_path, "service": PAIR.service_path}
PARTS = pytest.mark.parametrize("part", PATH)


def url(system: System, part: str) -> str:
    """Base URL of one of the servers."""
    return str(getattr(system, part).url)


@PARTS
async def test_head_is_get_without_the_body(system: System, part: str) -> None:
    """Same status and header fields, no body, and the connection stays open."""
    async with connection(url(system, part)) as client:
        for path in (PATH[part], "/healthz", "/readyz"):
            head = await client.get(path, "HEAD")
            whole = await client.get(path)
            assert (head.status, head.body, whole.status) == (200, b"", 200)
            assert head.headers.keys() == whole.headers.keys()
            for name in ("Content-Type", "Content-Length"):
                assert head.headers[name] == whole.headers[name]


@PARTS
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_who_has_the_answer_gets_304(system: System, part: str, method: str) -> None:
    """The ETag is strong and changes with the answer; If-None-Match is a list, compared weakly (RFC 9110, 13.1.2)."""
    async with connection(url(system, part)) as client:  # the same one, which a body after a 304 would break
        first = await client.get(PATH[part], method)
        etag = first.headers["ETag"]
        assert first.headers["Cache-Control"] == "no-cache"
        assert re.fullmatch(r'"[\x21\x23-\x7e]+"', etag)
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            again = await client.get(PATH[part], method, {"If-None-Match": known})
            assert again.status == 304, known
            assert (again.headers["ETag"], again.headers["Cache-Control"]) == (etag, "no-cache")
            assert again.request_id
        system.database.store(PAIR.other)
        for known in (etag, '"other"', "nonsense"):
            changed = await client.get(PATH[part], method, {"If-None-Match": known})
            assert (changed.status, changed.headers["ETag"] != etag) == (200, True), known
