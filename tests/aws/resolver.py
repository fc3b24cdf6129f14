"""What a CloudFormation template creates for given parameters: with conditions decided and functions resolved.

Nothing is really created, so a test run can examine thousands of variations of a template. Rules:

- `Ref` returns a resource's own name if the template sets one, else its logical ID; `Fn::GetAtt` returns
  `LogicalId.Attribute`. So a property reads like the architecture: `SubnetId` is `PublicSubnet1`.
- A function, section or resource attribute that is unknown here is an error, never skipped.
- So is a reference to a resource that does not exist under these parameters, or a cycle of references.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Any

Properties = dict[str, Any]

STACK, ACCOUNT = "messages", "123456789012"
NAMES = ("Name", "LogGroupName", "DBInstanceIdentifier")  # properties that are a resource's own name
# The keys that a template may have, and each entry of its sections.
SECTIONS = {"AWSTemplateFormatVersion", "Description", "Parameters", "Mappings", "Conditions", "Resources", "Outputs"}
ENTRIES = {
    "Parameters": {"Type", "Description", "Default", "AllowedPattern", "AllowedValues", "ConstraintDescription"},
    "Resources": {"Type", "Properties", "Condition", "DependsOn", "DeletionPolicy", "UpdateReplacePolicy"},
    "Outputs": {"Description", "Value"},
}


class TemplateError(Exception):
    """CloudFormation would refuse this, or this module does not know it."""


NO_VALUE: Any = object()  # AWS::NoValue: the property or the list's item is omitted


@dataclass
class Stack:
    """A template with values for its parameters, in a region. Raises TemplateError."""

    template: Properties
    given: dict[str, str]
    region: str
    parameters: Properties = field(init=False)
    resources: dict[str, Properties] = field(default_factory=dict)  # logical ID -> resolved properties
    waits_for: dict[str, set[str]] = field(default_factory=dict)  # logical ID -> everything created before it
    outputs: dict[str, Any] = field(init=False)
    _under_way: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown = self.template.keys() - SECTIONS
        for section, known in ENTRIES.items():
            unknown = unknown.union(*(entry.keys() - known for entry in self.template[section].values()))
        if unknown:
            raise TemplateError(f"not known here: {unknown}")
        self.parameters = parameter_values(self.template, self.given)
        for name, resource in self.template["Resources"].items():
            if "Condition" not in resource or self._condition(resource["Condition"]):
                self._create(name)
        self.outputs = {name: self._resolve(output["Value"]) for name, output in self.template["Outputs"].items()}

    def of_type(self, kind: str) -> dict[str, Properties]:
        """The properties of all resources of a type, such as `EC2::Subnet`, by logical ID."""
        types = {name: self.template["Resources"][name]["Type"] for name in self.resources}
        return {name: item for name, item in self.resources.items() if types[name] == f"AWS::{kind}"}

    def _create(self, name: str) -> str:
        """Resolve a resource after everything that it refers to or depends on, unless that is done; return its Ref."""
        for waiting in self._under_way:
            self.waits_for[waiting] |= {name, *self.waits_for.get(name, ())}
        if name not in self.resources:
            resource = self.template["Resources"].get(name)
            if name in self._under_way:
                raise TemplateError(f"a circle: {self._under_way} and back to {name}")
            if resource is None or ("Condition" in resource and not self._condition(resource["Condition"])):
                raise TemplateError(f"{name} is referred to, but does not exist")
            self.waits_for[name] = set()
            self._under_way.append(name)
            for dependency in listed(resource.get("DependsOn", [])):
                self._create(dependency)
            self.resources[name] = self._resolve(resource.get("Properties", {}))
            self._under_way.pop()
        return str(next((self.resources[name][key] for key in NAMES if key in self.resources[name]), name))

    def _condition(self, name: str) -> bool:
        if name not in self.template["Conditions"]:
            raise TemplateError(f"no such condition: {name}")
        return bool(self._resolve(self.template["Conditions"][name]))

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, list):
            return [item for item in map(self._resolve, value) if item is not NO_VALUE]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            ((key, argument),) = value.items()
            if key == "Ref":
                return self._ref(argument)
            if key == "Condition" and isinstance(argument, str):
                return self._condition(argument)
            if key.startswith("Fn::"):
                return self._function(key.removeprefix("Fn::"), argument)
        resolved = {key: self._resolve(item) for key, item in value.items()}
        return {key: item for key, item in resolved.items() if item is not NO_VALUE}

    def _ref(self, name: str) -> Any:
        pseudo = {
            "AWS::StackName": STACK,
            "AWS::Region": self.region,
            "AWS::AccountId": ACCOUNT,
            "AWS::Partition": "aws",
            "AWS::NoValue": NO_VALUE,
        }
        if name in pseudo:
            return pseudo[name]
        return self.parameters[name] if name in self.parameters else self._create(name)

    def _attribute(self, path: str) -> Any:
        name, attribute = path.split(".", 1)
        self._create(name)
        return self.resources[name]["CidrBlock"] if attribute == "CidrBlock" else path

    def _function(self, name: str, argument: Any) -> Any:
        match name, argument:
            case "If", [condition, then, otherwise]:
                return self._resolve(then if self._condition(condition) else otherwise)
            case "GetAtt", [str(logical_id), str(attribute)]:
                return self._attribute(f"{logical_id}.{attribute}")
            case "Sub", str(text):
                return re.sub(r"\$\{([^}]+)\}", lambda found: str(self._substitute(found[1])), text)
        match name, self._resolve(argument):
            case "Equals", [first, second]:
                return str(first) == str(second)
            case "And", list(conditions):
                return all(conditions)
            case "Not", [condition]:
                return not condition
            case "Join", [str(separator), list(items)]:
                return separator.join(items)
            case "Select", [index, list(items)]:
                if int(index) >= len(items):
                    raise TemplateError(f"Fn::Select of item {index} of {items}")
                return items[int(index)]
            case "GetAZs", "":
                return [f"{self.region}{letter}" for letter in "abc"]
            case "Cidr", [str(block), int(count), int(bits)]:
                return [str(net) for net in ipaddress.ip_network(block).subnets(new_prefix=32 - bits)][:count]
            case "FindInMap", [str(mapping), str(first), str(second)]:
                try:
                    return self.template["Mappings"][mapping][first][second]
                except KeyError as missing:
                    raise TemplateError(f"Fn::FindInMap finds no {missing} in {mapping}") from None
        raise TemplateError(f"not known here: Fn::{name} of {argument}")

    def _substitute(self, name: str) -> Any:
        return self._attribute(name) if "." in name else self._ref(name)


def listed(value: Any) -> list[Any]:
    """The value as a list: many fields take one value or a list."""
    return value if isinstance(value, list) else [value]


def parameter_values(template: Properties, given: dict[str, str]) -> Properties:
    """Parameters as CloudFormation takes them: defaults filled in, constraints checked. Raises TemplateError."""
    declared = template["Parameters"]
    if given.keys() - declared.keys():
        raise TemplateError(f"no such parameters: {given.keys() - declared.keys()}")
    values: Properties = {}
    for name, declaration in declared.items():
        if name not in given and "Default" not in declaration:
            raise TemplateError(f"parameter {name} has no value")
        text = str(given.get(name, declaration.get("Default")))
        is_list = declaration["Type"] == "CommaDelimitedList"
        for item in text.split(",") if is_list else [text]:
            if not re.fullmatch(declaration.get("AllowedPattern", ".*"), item) or (
                "AllowedValues" in declaration and item not in map(str, declaration["AllowedValues"])
            ):
                raise TemplateError(f"parameter {name} must not be {item!r}")
        values[name] = text.split(",") if is_list else text
    return values
