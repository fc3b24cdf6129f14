"""Settings from environment variables: declared once, checked all at once, printed by `--help`.

A server declares its settings as a frozen dataclass with fields made by `setting`; the environment variable is the
field's name in capitals. An empty variable counts as unset, since Compose and Kubernetes pass omitted values that way.
"""

import dataclasses
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from yarl import URL

_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclasses.dataclass(frozen=True)
class Accepted:
    """The values a variable may hold: those that `accepts` allows after `parse`. Both may raise ValueError, OSError."""

    expected: str
    parse: Callable[[str], Any]
    accepts: Callable[[Any], bool] = lambda _: True


def _is_host(text: str) -> bool:
    if text.startswith("/"):
        return "," not in text  # a comma would separate several
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return bool(_HOST_NAME.fullmatch(text.encode("idna").decode()))


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):  # `int` also takes signs, underscores and digits of other scripts
        raise ValueError(text)
    return int(text)


def whole_number(low: int, high: int) -> Accepted:
    return Accepted(f"a whole number from {low} to {high}", _whole, lambda number: low <= number <= high)


def seconds(*, zero: bool = False) -> Accepted:
    expected = f"seconds, {'from 0' if zero else 'more than 0'} to 3600"
    return Accepted(expected, float, lambda number: 0 < number <= 3600 or (zero and number == 0))


def one_of(*choices: str) -> Accepted:
    return Accepted("one of " + ", ".join(choices), str, choices.__contains__)


def _base_url(text: str) -> URL:
    if "@" in text.partition("//")[2].partition("/")[0]:  # `URL` does not tell an empty user from none
        raise ValueError(text)
    return URL(text)


def _is_base_url(url: URL) -> bool:
    more = url.query_string or url.fragment
    return url.scheme in ("http", "https") and _is_host(url.host or "") and url.port != 0 and not more


def _is_readable_file(text: str) -> bool:
    return Path(text).is_file() and os.access(text, os.R_OK)


PORT = dataclasses.replace(whole_number(0, 65535), expected="a port from 0 to 65535; 0 lets the system choose")
PEER_PORT = dataclasses.replace(whole_number(1, 65535), expected="a port from 1 to 65535")
TEXT = Accepted("printable UTF-8 text without white space at either end", str)
HOST = Accepted("a host name or address without port, or a folder's path", str, _is_host)
BASE_URL = Accepted("a URL such as http://host:8001, without user, query or fragment", _base_url, _is_base_url)
READABLE_FILE = Accepted("the path of a regular file that this process can read", str, _is_readable_file)


def setting(
    default: object, accepted: Accepted, meaning: str, *, secret: bool = False, shown: str | None = None
) -> Any:
    """Declare a setting; `shown` is the default as `--help` prints it, if the value alone says too little."""
    metadata = {"accepted": accepted, "meaning": meaning, "secret": secret, "shown": shown}
    return dataclasses.field(default=default, metadata=metadata)


class SettingsError(Exception):
    """At least one setting is wrong. `problems` has a line for each wrong one."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


Settings = TypeVar("Settings")


def read(declaration: type[Settings], environ: Mapping[str, str]) -> Settings:
    """Return the settings in `environ`. Raises `SettingsError`, which names all the wrong ones."""
    values: dict[str, object] = {}
    problems = []
    for field in dataclasses.fields(declaration):  # type: ignore[arg-type]  # always a dataclass
        name, accepted = field.name.upper(), field.metadata["accepted"]
        text = environ.get(name, "")
        if not text:
            continue
        try:
            values[field.name] = accepted.parse(text)
            if text != text.strip() or not text.isprintable() or not accepted.accepts(values[field.name]):
                raise ValueError(text)
        except (ValueError, OSError):
            # A URL or connection string may also hold a password.
            secret = field.metadata["secret"] or "@" in text or "password=" in text
            held = "(hidden)" if secret else repr(text)
            problems.append(f"{name}: {held} is not {accepted.expected}")
    if problems:
        raise SettingsError(problems)
    return declaration(**values)  # may raise `SettingsError` for settings that conflict


def table(declaration: type[Any]) -> str:
    """The settings as `--help` prints them: variable, default, meaning."""
    rows = []
    for field in dataclasses.fields(declaration):
        accepted, meaning, shown = (field.metadata[name] for name in ("accepted", "meaning", "shown"))
        default = str(field.default) if shown is None else shown
        expected = "" if accepted is TEXT else f" ({accepted.expected})"
        rows.append((field.name.upper(), default, meaning + expected))
    names, defaults = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"  {name:{names}}  {default:{defaults}}  {meaning}" for name, default, meaning in rows)
