"""What AWS's own documentation, as botocore ships it, says about a command: its limits, and whether it keeps them.

A limit is a sentence that says what must, cannot or may only be. Most are decided here, from the command's words. The
others need somebody who has read them: test_words.py has the answers.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import botocore.session
from botocore import xform_name
from pages import Command

LIMIT = re.compile(
    r"\bonly\b|\b[Mm]ust\b|\b[Cc]an't\b|cannot|\b(is|are|does|do)(n't| not) (supported|apply|permitted)|Valid V"
)
# Titles, and what merely describes.
NO_LIMIT = re.compile(r"Constraints?:$|By default|(?:If not|When|If supplied, must) .* (?:included|isn't publicly)")
# What this project does not use, so that sentences about it do not matter.
ELSEWHERE = re.compile(
    r"Aurora|RDS Custom|SQL Server|Oracle|Db2|MySQL|DB cluster|read replicas?|[Nn]ested stack|shared|PublicAccess"
)
# Commands that the AWS CLI adds to the services' operations.
CUSTOM = {("cloudformation", "deploy"), ("ecr", "get-login-password"), ("eks", "update-kubeconfig")}


@dataclass(frozen=True)
class Limit:
    """A sentence about an operation (its option is ""), or about one of its options."""

    operation: str
    option: str
    sentence: str


@functools.cache
def _model(service: str) -> Any:
    return botocore.session.get_session().get_service_model(service)


def operation(command: Command) -> Any:
    """The operation that an `aws` command calls, or None if the CLI has added the command."""
    service, name = command.words[1:3]
    if (service, name) in CUSTOM:
        return None
    model = _model(service)
    if name == "wait":
        waiters = botocore.session.get_session().get_waiter_model(service)
        waiter = {xform_name(known, "-"): known for known in waiters.waiter_names}[command.words[3]]
        return model.operation_model(waiters.get_waiter(waiter).operation)
    return model.operation_model({xform_name(known, "-"): known for known in model.operation_names}[name])


def options(command: Command) -> set[str]:
    """The options of a command, without their `--` or `--no-`, and without those that every command has."""
    names = {word.removeprefix("--").removeprefix("no-") for word in command.words if word.startswith("--")}
    return names - {"query", "output"}


def members(model: Any) -> dict[str, Any]:
    """The parameters of an operation, by the name of their option."""
    shapes = {xform_name(name, "-"): shape for name, shape in model.input_shape.members.items()}
    return shapes | ({"kubernetes-version": shapes["version"]} if "version" in shapes else {})


def limits(command: Command) -> Iterator[Limit]:
    """The limits of an operation and of those of its options that a command uses."""
    model = operation(command)
    documented = {"": model.documentation} | {name: members(model)[name].documentation for name in options(command)}
    for option, text in documented.items():
        for sentence in _sentences(text):
            if LIMIT.search(sentence) and not NO_LIMIT.search(sentence):
                yield Limit(model.name, option, sentence)


def _sentences(text: str) -> list[str]:
    plain = re.sub(r"<[^>]+>", "", html.unescape(re.sub(r"</(?:p|li|ul|dt|dd)>", ". ", text)))
    plain = re.sub(r"Valid Values:[\s.]*", "Valid Values: ", plain)
    parts = re.split(r"(?<=[.:])\s+(?=[A-Z])(?<!Values: )", re.sub(r"\s+", " ", plain))
    return [part.strip(" .") for part in parts if part.strip(" .")]


# What a value must look like, by what a sentence says of it; `{0}` is the sentence's number.
FORMS = {
    r"to (\d+) (?:letters|numbers)": "[A-Za-z0-9-]{{1,{0}}}",
    r"irst character must be a (l)etter": "[A-Za-z].*",
    r"end with a (h)yphen or contain two": "(?!.*--).*[^-]",
    r"\((UTC)\) format": r"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ",
}


def _engine(sentence: str) -> bool | None:
    """Whether a sentence allows PostgreSQL, or is about something else that this project does not use."""
    named = re.search(
        r"(?:Applies to|supported for) (RDS for .+) only|(?:applies only|only applies|apply only) to (RDS for .+)",
        sentence,
    )
    if named:
        return "PostgreSQL" in (named[1] or named[2])
    return True if ELSEWHERE.search(sentence) and "RDS for PostgreSQL" not in sentence else None


def _form(sentence: str, values: list[str]) -> bool | None:
    """Whether an option's values are as a sentence wants them."""
    if found := re.search(r"from (\d+) to (\d+)$", sentence):
        return bool(values) and all(int(found[1]) <= int(value) <= int(found[2]) for value in values)
    if found := re.search(r"Valid Values: (.+)", sentence):
        return bool(values) and {*values} <= {*re.split(r"[\s|.]+", found[1])}
    for said, form in FORMS.items():
        if found := re.search(said, sentence):
            return bool(values) and all(re.fullmatch(form.format(found[1]), value) for value in values)
    return None


def _company(sentence: str, given: set[str]) -> bool | None:
    """Whether the other options of a command may be there, as far as a sentence names them."""
    if sentence.startswith("Must be specified"):
        return True
    if re.match(r"(?:In this case, you |You )?[Cc]an't (?:be specified|specify|manage .* if)", sentence):
        named = {xform_name(name, "-") for name in re.findall(r"\b[A-Z]\w*[a-z][A-Z]\w+\b", sentence)}
        return not named & given if named else None
    return None


def kept(limit: Limit, command: Command) -> bool | None:
    """Whether a command keeps a limit; None if its words alone do not say."""
    values = command.values(f"--{limit.option}")
    answers = (
        _engine(limit.sentence),
        _form(limit.sentence, values),
        _company(limit.sentence, options(command) - {limit.option}),
    )
    return next((answer for answer in answers if answer is not None), None)
