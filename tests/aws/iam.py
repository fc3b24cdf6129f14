"""How IAM decides on one call to AWS, for the policies of aws/template.yaml.

IAM's rules: a call without a matching Allow is refused, and a matching Deny refuses it whatever allows it. Actions
match regardless of case, `*` and `?` are wildcards, and a condition on a key that the call lacks fails. An unknown kind
of statement or condition is an error here, never skipped.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass, field
from typing import Any

from resolver import listed

Part = tuple[int, str, Any]  # the number of its statement, the field, and one of the field's values


@dataclass(frozen=True)
class Call:
    """One call: the action, the ARN of its resource, and the keys that conditions can test, tags among them."""

    action: str
    resource: str
    context: dict[str, str] = field(default_factory=dict)


def parts(statements: list[dict[str, Any]]) -> set[Part]:
    """All the parts of a policy."""
    found: set[Part] = set()
    for number, statement in enumerate(statements):
        assert statement.keys() <= {"Sid", "Effect", "Action", "Resource", "Condition"}, statement.keys()
        found |= {(number, "Effect", statement["Effect"])}
        found |= {(number, key, value) for key in ("Action", "Resource") for value in listed(statement[key])}
        for operator, keys in statement.get("Condition", {}).items():
            assert operator in {"StringEquals", "Null"}, operator
            found |= {(number, f"{operator} {key}", value) for key in keys for value in listed(keys[key])}
    return found


def granted_by(statements: list[dict[str, Any]], call: Call) -> list[set[Part]]:
    """For each statement that allows the call, the parts that do so; nothing if the call is refused."""
    grants = []
    for number, statement in enumerate(statements):
        actions = _matching(tuple(listed(statement["Action"])), call.action, re.IGNORECASE)
        resources = _matching(tuple(listed(statement["Resource"])), call.resource) if actions else []
        conditions = _holding(statement.get("Condition", {}), call) if resources else None
        if conditions is None:
            continue
        if statement["Effect"] != "Allow":
            return []
        grant: set[Part] = {(number, "Effect", "Allow"), *((number, key, value) for key, value in conditions)}
        # If two actions, or two resources, match, neither is necessary.
        for key, matching in (("Action", actions), ("Resource", resources)):
            grant |= {(number, key, matching[0])} if len(matching) == 1 else set()
        grants.append(grant)
    return grants


def neighbours(call: Call) -> list[Call]:
    """Calls that differ in one point: another region, account or resource, a missing tag or a different one.

    A part of a resource's name in angle brackets, `security-group/<id>`, is a placeholder, and stays unchanged.
    """
    *arn, name = call.resource.split(":", 5)
    path = name.split("/")
    names = [[*path[:i], "another", *path[i + 1 :]] for i, part in enumerate(path) if part[0] not in "<*"]
    resources = [":".join([*arn, "/".join(changed)]) for changed in names]
    resources += [":".join([*arn[:i], "another", *arn[i + 1 :], name]) for i in (3, 4) if arn]
    contexts = [{key: call.context[key] for key in call.context if key != missing} for missing in call.context]
    contexts += [{**call.context, key: "another"} for key in call.context]
    return [
        *(Call(call.action, resource, call.context) for resource in resources),
        *(Call(call.action, call.resource, context) for context in contexts),
    ]


def calls(actions: str, resources: str | list[str], context: dict[str, str] | None = None) -> list[Call]:
    """One call for each of the actions (`service:Action …`) on each of the resources."""
    return [Call(action, name, context or {}) for action, name in itertools.product(actions.split(), listed(resources))]


@functools.cache
def _pattern(text: str, flags: re.RegexFlag) -> re.Pattern[str]:
    return re.compile("".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in text), flags)


@functools.cache
def _matching(patterns: tuple[str, ...], text: str, flags: re.RegexFlag = re.NOFLAG) -> list[str]:
    return [pattern for pattern in patterns if _pattern(pattern, flags).fullmatch(text)]


def _holding(conditions: dict[str, dict[str, Any]], call: Call) -> list[tuple[str, Any]] | None:
    """The values that make the conditions true, or None if one is false."""
    holding: list[tuple[str, Any]] = []
    for operator, keys in conditions.items():
        for key, wanted in keys.items():
            has = call.context.get(key)
            if operator == "Null":
                has = "true" if has is None else "false"
            if has not in listed(wanted):
                return None
            holding.append((f"{operator} {key}", has))
    return holding
