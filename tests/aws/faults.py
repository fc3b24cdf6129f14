"""Faults for aws/template.yaml, made mechanically: each changes the template in one place, and is wrong.

A kind of fault is a function that yields a changed template for every place where it can happen, so it also covers
later additions to the template. Prose (descriptions, names of statements) is left alone.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cfnlint.schema.manager import PROVIDER_SCHEMA_MANAGER

Template = dict[str, Any]
Path = tuple[str | int, ...]

PROSE = {"Description", "ConstraintDescription", "GroupDescription", "DBSubnetGroupDescription", "PolicyName", "Sid"}
GONE: Any = object()
MANAGED = [
    {"Fn::Sub": f"arn:${{AWS::Partition}}:iam::aws:policy/{name}"}
    for name in ("AdministratorAccess", "AmazonEKS_CNI_Policy", "AmazonSSMManagedInstanceCore")
]
EVERYTHING = {"Effect": "Allow", "Action": "*", "Resource": "*"}


@dataclass(frozen=True)
class Fault:
    name: str
    template: Template


def _fault(template: Template, path: Path, value: Any) -> Fault:
    """The template with another value in one place: GONE removes it, the index -1 appends to a list."""
    changed: Any = copy.copy(template)
    place = changed
    for key in path[:-1]:
        place[key] = copy.copy(place[key])
        place = place[key]
    if value is GONE:
        del place[path[-1]]
    elif path[-1] == -1:
        place.append(value)
    else:
        place[path[-1]] = value
    return Fault(f"{'/'.join(map(str, path))}: {'gone' if value is GONE else value}", changed)


def _places(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every place in a value that is not prose, with its value."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if key not in PROSE:
            yield (*path, key), item
            if isinstance(item, dict | list):
                yield from _places(item, (*path, key))


def _sections(template: Template, *names: str) -> Iterator[tuple[Path, Any]]:
    return itertools.chain.from_iterable(_places(template[name], (name,)) for name in names)


def _statements(template: Template) -> Iterator[tuple[Path, Any]]:
    """Every list of statements: of trusts, of roles and of keys."""
    return ((path, item) for path, item in _sections(template, "Resources") if path[-1] == "Statement")


def something_is_gone(template: Template) -> Iterator[Fault]:
    """Without a parameter's limit, a resource, a property, a condition, or an item of a list."""
    for path, _ in _sections(template, "Parameters", "Mappings", "Conditions", "Resources", "Outputs"):
        yield _fault(template, path, GONE)


def a_value_is_wrong(template: Template) -> Iterator[Fault]:
    """Another number, word or boolean, in every place."""
    for path, value in _sections(template, *template.keys() - {"AWSTemplateFormatVersion", "Description"}):
        if isinstance(value, bool):
            yield _fault(template, path, not value)
        elif isinstance(value, int) and path[-2:] != ("Fn::Cidr", 1):  # how many ranges are listed; six are used
            yield _fault(template, path, value + 1)
        elif isinstance(value, str):
            yield _fault(template, path, f"{int(value) + 1}" if value.isdigit() else f"{value}x")


def another_is_meant(template: Template) -> Iterator[Fault]:
    """A reference to another resource or parameter of the same type, or a function's other branch."""
    types = {name: item["Type"] for section in ("Resources", "Parameters") for name, item in template[section].items()}
    for path, value in _sections(template, "Conditions", "Resources", "Outputs"):
        for name in types:
            other: Any
            if isinstance(value, str) and (path[-1] in ("Ref", "DependsOn") or path[-2:-1] == ("DependsOn",)):
                meant, other = value, name
            elif path[-1] == "Fn::GetAtt":
                meant, other = value[0], [name, value[1]]
            else:
                break
            if name != meant and types[name] == types.get(meant):
                yield _fault(template, path, other)
        if path[-1] == "Fn::If":
            yield _fault(template, path, [value[0], value[2], value[1]])


def a_property_more(template: Template) -> Iterator[Fault]:
    """A property that the service accepts and the template does not use, on every level."""
    for name, resource in template["Resources"].items():
        schema = PROVIDER_SCHEMA_MANAGER.get_resource_schema("us-east-1", resource["Type"]).schema
        yield from _more(template, ("Resources", name, "Properties"), resource["Properties"], schema, schema)


def _more(template: Template, path: Path, value: Any, schema: Any, whole: Any) -> Iterator[Fault]:
    while "$ref" in schema:
        schema = whole["definitions"][schema["$ref"].rpartition("/")[2]]
    samples = {"boolean": True, "integer": 1, "number": 1, "array": ["x"], "object": {"x": "x"}}
    if isinstance(value, dict):
        for key, inner in schema.get("properties", {}).items():
            if key in value:
                yield from _more(template, (*path, key), value[key], inner, whole)
            elif f"/properties/{key}" not in whole.get("readOnlyProperties", []):
                yield _fault(template, (*path, key), samples.get(str(inner.get("type")), "x"))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _more(template, (*path, number), item, schema.get("items", {}), whole)


def a_policy_says_more(template: Template) -> Iterator[Fault]:
    """A statement that allows, denies or trusts more than necessary."""
    for path, statements in _statements(template):
        trust = "Principal" in statements[0]
        for more in (EVERYTHING, {**EVERYTHING, "Effect": "Deny"}):
            yield _fault(template, (*path, -1), {**more, "Principal": "*"} if trust else more)
        for number, statement in enumerate(statements):
            here = (*path, number)
            without_condition = {key: value for key, value in statement.items() if key != "Condition"}
            if "Condition" in statement:
                yield _fault(template, here, without_condition)
                yield _fault(template, (*path, -1), without_condition)
            yield _fault(template, (*here, "Effect"), "Deny")
            yield _fault(template, (*path, -1), {**statement, "Effect": "Deny"})
            if trust:
                for principal in ("*", {"AWS": "*"}, {**statement["Principal"], "AWS": "*"}):
                    yield _fault(template, (*here, "Principal"), principal)
            elif statement["Resource"] != "*":
                yield _fault(template, (*here, "Resource"), "*")
                yield _fault(template, (*here, "Resource"), [*_list(statement["Resource"]), "arn:aws:s3:::another"])
            resources = _list(statement.get("Resource", []))
            for resource in resources:
                for wider in _wider(resource):
                    others = [other for other in resources if other != resource]
                    yield _fault(template, (*here, "Resource"), [*others, {"Fn::Sub": wider}])
            actions = _list(statement["Action"])
            services = {action.split(":")[0] for action in actions}
            for action in ("*", "iam:PassRole", "secretsmanager:GetSecretValue", *(f"{name}:*" for name in services)):
                if action not in actions:
                    yield _fault(template, (*here, "Action"), [*actions, action])
            for operator, keys in statement.get("Condition", {}).items():
                for key, value in keys.items():
                    yield _fault(template, (*here, "Condition", operator, key), [*_list(value), "another"])
                    if operator != "Null":
                        yield _fault(template, (*here, "Condition"), {"StringLike": {key: "*"}})
                        yield _fault(template, (*here, "Condition"), {"StringEqualsIfExists": keys})


def _wider(resource: Any) -> set[str]:
    """An ARN, cut off at each of its parts and open from there."""
    arn = resource.get("Fn::Sub", "") if isinstance(resource, dict) else ""
    return {arn[: cut.end()] + "*" for cut in re.finditer("(?<!:)[:/](?!:)", arn)} - {arn}


def a_role_has_more(template: Template) -> Iterator[Fault]:
    """One more policy, of AWS's or the template's own, or another in place of it."""
    for name, resource in template["Resources"].items():
        if resource["Type"] == "AWS::IAM::Role":
            path = ("Resources", name, "Properties")
            managed = resource["Properties"].get("ManagedPolicyArns", [])
            for policy in MANAGED:
                if policy not in managed:
                    yield _fault(template, (*path, "ManagedPolicyArns"), [*managed, policy])
                    yield _fault(template, (*path, "ManagedPolicyArns"), [policy])
            document = {"Version": "2012-10-17", "Statement": [EVERYTHING]}
            inline = resource["Properties"].get("Policies", [])
            yield _fault(template, (*path, "Policies"), [*inline, {"PolicyName": "more", "PolicyDocument": document}])


def a_resource_more(template: Template) -> Iterator[Fault]:
    """A second resource of each type, and some that open a door besides those under test."""
    for name, resource in template["Resources"].items():
        yield _fault(template, ("Resources", f"{name}More"), resource)
    world = {"IpProtocol": "-1", "CidrIp": "0.0.0.0/0"}
    group = {"Fn::GetAtt": ["Cluster", "ClusterSecurityGroupId"]}
    for kind, properties in {
        "EC2::SecurityGroupIngress": {"GroupId": group, **world},
        "EKS::AccessEntry": {"ClusterName": {"Ref": "Cluster"}, "PrincipalArn": "arn:aws:iam::999999999999:root"},
        "IAM::Policy": {"PolicyName": "more", "PolicyDocument": EVERYTHING, "Roles": [{"Ref": "NodeRole"}]},
        "EC2::VPCPeeringConnection": {"VpcId": {"Ref": "Vpc"}, "PeerVpcId": "vpc-1"},
    }.items():
        yield _fault(template, ("Resources", "More"), {"Type": f"AWS::{kind}", "Properties": properties})


def a_parameter_is_lax(template: Template) -> Iterator[Fault]:
    """A parameter that accepts, or has by default, what it must not."""
    for name, parameter in template["Parameters"].items():
        path = ("Parameters", name)
        yield _fault(template, (*path, "Default"), {"PublicAccessCidrs": "0.0.0.0/0"}.get(name, "another"))
        if "AllowedPattern" in parameter:
            yield _fault(template, (*path, "AllowedPattern"), ".*")
        if "AllowedValues" in parameter:
            yield _fault(template, (*path, "AllowedValues", -1), "another")


def what_people_do(template: Template) -> Iterator[Fault]:
    """Faults that are bad ideas, not just slips."""
    subnet = {"Fn::GetAtt": ["Vpc", "CidrBlock"]}
    small = {"Fn::Select": [100, {"Fn::Cidr": [subnet, 128, 8]}]}
    for resource, property_, value in (
        ("Cluster", "ResourcesVpcConfig/SubnetIds/0", {"Ref": "PublicSubnet1"}),
        ("Cluster", "ResourcesVpcConfig/PublicAccessCidrs", ["0.0.0.0/0"]),
        ("Cluster", "KubernetesNetworkConfig", {"ServiceIpv4Cidr": "10.0.0.0/16"}),
        ("Cluster", "Version", "1.99"),
        ("Database", "EngineVersion", "15.99"),
        ("Database", "EngineVersion", "15.4"),
        ("Database", "EngineVersion", "16.9"),
        ("Database", "EngineVersion", {"Ref": "DatabaseVersion"}),
        ("Database", "MasterUsername", "postgres"),
        ("Database", "KmsKeyId", {"Fn::GetAtt": ["ClusterKey", "Arn"]}),
        ("Database", "MasterUserPassword", "correct-horse"),
        ("NodeLaunchTemplate", "LaunchTemplateData/KeyName", "mine"),
        ("NodeLaunchTemplate", "LaunchTemplateData/NetworkInterfaces", [{"AssociatePublicIpAddress": True}]),
        ("Nodes", "RemoteAccess", {"Ec2SshKey": "mine"}),
        ("PrivateSubnet2", "CidrBlock", small),
        ("PrivateSubnet2", "AvailabilityZone", {"Fn::Select": [0, {"Fn::GetAZs": ""}]}),
        ("Repository", "LifecyclePolicy/LifecyclePolicyText", '{"rules": [}'),
    ):
        path = tuple(int(key) if key.isdigit() else key for key in property_.split("/"))
        yield _fault(template, ("Resources", resource, "Properties", *path), value)
    lifecycle = ("Resources", "Repository", "Properties", "LifecyclePolicy", "LifecyclePolicyText")
    text = template["Resources"]["Repository"]["Properties"]["LifecyclePolicy"]["LifecyclePolicyText"]
    yield _fault(template, lifecycle, text.replace('"countNumber": 50', '"countNumber": 1'))
    yield _fault(template, ("Parameters", "KubernetesVersion", "Default"), "1.99")
    yield _fault(template, ("Resources", "ClusterRole", "DependsOn"), "Nodes")
    yield _fault(template, ("Transform",), "AWS::Serverless-2016-10-31")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


KINDS: list[Callable[[Template], Iterator[Fault]]] = [
    something_is_gone,
    a_value_is_wrong,
    another_is_meant,
    a_property_more,
    a_policy_says_more,
    a_role_has_more,
    a_resource_more,
    a_parameter_is_lax,
    what_people_do,
]
