"""Settings from environment variables: declared once, checked all at once, printed by `--help`.

A server declares its settings as a frozen dataclass whose fields are made by `setting`; the environment variable
is the field's name in capitals. An empty variable counts as not set, since that is how Compose and Kubernetes
pass a value that somebody left out.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from yarl import URL


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a variable may hold. `parse` raises ValueError or OSError for all else; `expected` says it in words."""

    parse: Callable[[str], Any]
    expected: str


def whole_number(low: int, high: int) -> Kind:
    def parse(text: str) -> int:
        number = int(text)
        if not low <= number <= high:
            raise ValueError
        return number

    return Kind(parse, f"a whole number from {low} to {high}")


def seconds(*, zero: bool = False) -> Kind:
    def parse(text: str) -> float:
        number = float(text)
        if not math.isfinite(number) or number < 0 or (number == 0 and not zero) or number > 3600:
            raise ValueError
        return number

    return Kind(parse, f"seconds, {'from 0' if zero else 'more than 0'} to 3600")


def one_of(*choices: str) -> Kind:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError
        return text

    return Kind(parse, "one of " + ", ".join(choices))


def _base_url(text: str) -> URL:
    url = URL(text)
    if url.scheme not in ("http", "https") or not url.host or url.query_string or url.fragment or url.user:
        raise ValueError
    return url


def _readable_file(text: str) -> str:
    with Path(text).open("rb"):
        return text


PORT = Kind(whole_number(0, 65535).parse, "a port from 0 to 65535; 0: the system chooses")
TEXT = Kind(str, "text")
BASE_URL = Kind(_base_url, "a URL such as http://host:8001, without user, query or fragment")
READABLE_FILE = Kind(_readable_file, "the path of a file that this process can read")


def setting(default: object, kind: Kind, meaning: str, *, secret: bool = False, shown: str | None = None) -> Any:
    """Declare a setting; `shown` is how `--help` prints the default where its value says too little."""
    metadata = {"kind": kind, "meaning": meaning, "secret": secret, "shown": shown}
    return dataclasses.field(default=default, metadata=metadata)


class SettingsError(Exception):
    """At least one setting is wrong. `problems` has a line for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


Settings = TypeVar("Settings")


def read(declaration: type[Settings], environ: Mapping[str, str]) -> Settings:
    """Return the settings that `environ` holds. Raises `SettingsError` that names all the wrong ones."""
    values: dict[str, object] = {}
    problems = []
    for field in dataclasses.fields(declaration):  # type: ignore[arg-type]  # always a dataclass
        name, kind = field.name.upper(), field.metadata["kind"]
        text = environ.get(name, "")
        if text:
            try:
                values[field.name] = kind.parse(text)
            except (ValueError, OSError):
                # A URL may hold a password, too.
                held = "(hidden)" if field.metadata["secret"] or "@" in text else repr(text)
                problems.append(f"{name}: {held} is not {kind.expected}")
    if problems:
        raise SettingsError(problems)
    return declaration(**values)  # may raise `SettingsError` for settings that do not go together


def table(declaration: type[Any]) -> str:
    """The settings as `--help` prints them: variable, default, meaning."""
    rows = []
    for field in dataclasses.fields(declaration):
        shown = field.metadata["shown"]
        default = f"{field.default}" if shown is None else shown
        kind = field.metadata["kind"]
        meaning = field.metadata["meaning"] + ("" if kind is TEXT else f" ({kind.expected})")
        rows.append(f"  {field.name.upper():18} {default:22} {meaning}")
    return "\n".join(rows)
