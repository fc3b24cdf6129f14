"""Makes the resources of a CloudFormation template on moto, as CloudFormation would on AWS, and says what is there.

moto's own CloudFormation engine is not used: it leaves out properties that it does not know, security settings among
them. Here each resource is one or more calls of boto3 with every property that the template gives, so that botocore
refuses a name or a type that the service does not have. Rules:

- An intrinsic function, a resource type or an attribute that is not known here is an error, never skipped.
- A resource is made after what it refers to and what it depends on; a circle is an error.
- What moto does not have (EKS add-ons and Pod Identity associations) is checked by botocore and kept as requested.
- What EKS does on its own (the cluster's security group) is done here, as its documentation says.
- `Observed` is a snapshot of what the services answer, with the requests beside it for what moto does not keep.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import boto3
from moto import mock_aws

ACCOUNT = "123456789012"  # the account that moto simulates
STACK = "messages"
PARTITION = "aws"

# boto3 signs even what never leaves the process; whatever the caller's real credentials are, they are not used.
CREDENTIALS = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}

Properties = dict[str, Any]


class SimulationError(Exception):
    """The template cannot become a stack: what CloudFormation or a service would refuse, or what is not known here."""


class _NoValue:
    """The value of AWS::NoValue: a property or list item that has it is left out."""


NO_VALUE = _NoValue()


@dataclass
class Observed:
    """What the services answer once the stack stands, and what was asked of them."""

    template: Properties
    parameters: dict[str, Any]
    region: str
    ids: dict[str, str]  # logical ID -> what Ref gives
    requests: dict[str, Properties]  # logical ID -> resolved properties
    waits_for: dict[str, set[str]]  # logical ID -> all that is made before it because it has to be
    outputs: dict[str, str]
    vpc: Properties
    vpc_attributes: dict[str, bool]
    subnets: dict[str, Properties]
    route_tables: list[Properties]
    internet_gateways: list[Properties]
    nat_gateways: dict[str, Properties]
    security_groups: dict[str, Properties]
    endpoints: list[Properties]
    flow_logs: list[Properties]
    log_groups: dict[str, Properties]
    launch_templates: dict[str, Properties]
    instance_types: dict[str, Properties]
    roles: dict[str, Properties]  # logical ID -> {"trust", "inline", "managed"}
    keys: dict[str, Properties]
    cluster: Properties
    cluster_security_group: str
    nodegroups: list[Properties]
    databases: list[Properties]
    subnet_groups: dict[str, Properties]
    database_parameters: dict[str, dict[str, str]]
    parameter_group_families: dict[str, str]
    secrets: dict[str, Properties]
    repositories: list[Properties]
    lifecycle_policies: dict[str, Properties]

    def of_type(self, resource_type: str) -> dict[str, Properties]:
        """Resolved properties of the resources of one type that the stack has, by logical ID."""
        return {
            name: properties
            for name, properties in self.requests.items()
            if self.template["Resources"][name]["Type"] == resource_type
        }


def parameter_values(template: Properties, given: dict[str, str]) -> dict[str, Any]:
    """Parameters as CloudFormation takes them: defaults filled in, constraints checked.

    Raises SimulationError for one that is missing, unknown or against its constraints.
    """
    declared = template["Parameters"]
    if unknown := given.keys() - declared.keys():
        raise SimulationError(f"no such parameters: {unknown}")
    values: dict[str, Any] = {}
    for name, declaration in declared.items():
        if name not in given and "Default" not in declaration:
            raise SimulationError(f"parameter {name} has no value")
        text = str(given.get(name, declaration.get("Default")))
        items = text.split(",") if declaration["Type"] == "CommaDelimitedList" else [text]
        for item in items:
            if "AllowedPattern" in declaration and not re.fullmatch(declaration["AllowedPattern"], item):
                raise SimulationError(f"parameter {name} must not be {item!r}")
            if "AllowedValues" in declaration and item not in map(str, declaration["AllowedValues"]):
                raise SimulationError(f"parameter {name} must not be {item!r}")
        values[name] = items if declaration["Type"] == "CommaDelimitedList" else text
    return values


@functools.cache
def _session() -> boto3.Session:
    return boto3.Session(**CREDENTIALS)


@functools.cache
def _client(service: str, region: str) -> Any:
    # Making a client takes longer than all the calls of a simulation.
    client = _session().client(service, region_name=region)
    if service == "eks":
        for operation in ("CreateAddon", "CreatePodIdentityAssociation"):
            # moto does not have these: botocore checks the request, and nothing is sent.
            client.meta.events.register(f"before-call.eks.{operation}", _accept)
    return client


class _Accepted:
    status_code = 200


def _accept(**_: Any) -> tuple[_Accepted, Properties]:
    return _Accepted(), {}


@functools.cache
def managed_policies() -> frozenset[str]:
    """Names of the policies that AWS manages. Loaded once, as moto takes most of a second for it."""
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        pages = _client("iam", "us-east-1").get_paginator("list_policies").paginate()
        return frozenset(policy["PolicyName"] for page in pages for policy in page["Policies"])


def _coerce(shape: Any, value: Any) -> Any:
    """Numbers and booleans may be strings in a template; boto3 wants what the service's model says."""
    if shape.type_name == "structure" and isinstance(value, dict):
        return {key: _coerce(shape.members[key], item) if key in shape.members else item for key, item in value.items()}
    if shape.type_name == "list" and isinstance(value, list):
        return [_coerce(shape.member, item) for item in value]
    if shape.type_name in ("integer", "long") and isinstance(value, str) and value.isdigit():
        return int(value)
    if shape.type_name == "boolean" and value in ("true", "false"):
        return value == "true"
    if shape.type_name == "string" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


def _lower_camel(value: Any) -> Any:
    """The API of EKS writes names with a small first letter, CloudFormation with a capital."""
    if isinstance(value, dict):
        return {key[0].lower() + key[1:]: _lower_camel(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_lower_camel(item) for item in value]
    return value


def _tag_specification(resource_type: str, properties: Properties) -> Properties:
    tags = properties.pop("Tags", None)
    return {"TagSpecifications": [{"ResourceType": resource_type, "Tags": tags}]} if tags else {}


@dataclass
class _Stack:
    template: Properties
    parameters: dict[str, Any]
    region: str
    ids: dict[str, str] = field(default_factory=dict)
    attributes: dict[tuple[str, str], str] = field(default_factory=dict)
    requests: dict[str, Properties] = field(default_factory=dict)
    waits_for: dict[str, set[str]] = field(default_factory=dict)
    managed: dict[str, list[str]] = field(default_factory=dict)
    cluster_security_group: str = ""
    _making: list[str] = field(default_factory=list)

    # ------------------------------------------------------------------------------ intrinsic functions

    def condition(self, name: str) -> bool:
        try:
            return bool(self.resolve(self.template["Conditions"][name]))
        except KeyError:
            raise SimulationError(f"no such condition: {name}") from None

    def exists(self, name: str) -> bool:
        resource = self.template["Resources"][name]
        return "Condition" not in resource or self.condition(resource["Condition"])

    def resolve(self, value: Any) -> Any:
        if isinstance(value, list):
            return [item for item in map(self.resolve, value) if item is not NO_VALUE]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            ((key, argument),) = value.items()
            if key == "Ref":
                return self.ref(argument)
            if key == "Condition" and isinstance(argument, str):
                return self.condition(argument)
            if key.startswith("Fn::"):
                return self.function(key[4:], argument)
        resolved = {key: self.resolve(item) for key, item in value.items()}
        return {key: item for key, item in resolved.items() if item is not NO_VALUE}

    def ref(self, name: str) -> Any:
        if name == "AWS::NoValue":
            return NO_VALUE
        pseudo = {
            "AWS::StackName": STACK,
            "AWS::Region": self.region,
            "AWS::AccountId": ACCOUNT,
            "AWS::Partition": PARTITION,
        }
        if name in pseudo:
            return pseudo[name]
        if name in self.parameters:
            return self.parameters[name]
        self.make(name)
        return self.ids[name]

    def attribute(self, name: str, attribute: str) -> str:
        self.make(name)
        try:
            return self.attributes[name, attribute]
        except KeyError:
            raise SimulationError(f"{name} has no attribute {attribute}") from None

    def function(self, name: str, argument: Any) -> Any:
        match name, argument:
            case "If", [condition, then, otherwise]:
                return self.resolve(then if self.condition(condition) else otherwise)
            case "GetAtt", [logical, attribute]:
                return self.attribute(logical, attribute)
            case "GetAtt", str(path):
                return self.attribute(*path.split(".", 1))
            case "Sub", str(text):
                return re.sub(r"\$\{([^}]+)\}", lambda found: str(self.substitute(found[1])), text)
        match name, self.resolve(argument):
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
                    raise SimulationError(f"Fn::Select of item {index} of {items}")
                return items[int(index)]
            case "GetAZs", region:
                zones = _client("ec2", region or self.region).describe_availability_zones()["AvailabilityZones"]
                return [zone["ZoneName"] for zone in zones]
            case "Cidr", [str(block), count, bits]:
                subnets = ipaddress.ip_network(block).subnets(new_prefix=32 - int(bits))
                return [str(subnet) for subnet, _ in zip(subnets, range(int(count)), strict=False)]
            case "FindInMap", [mapping, first, second]:
                try:
                    return self.template["Mappings"][mapping][first][second]
                except KeyError as missing:
                    raise SimulationError(f"Fn::FindInMap finds no {missing} in {mapping}") from None
        raise SimulationError(f"not known here: Fn::{name} of {argument}")

    def substitute(self, name: str) -> Any:
        if name not in self.template["Resources"] and "." in name:
            return self.attribute(*name.split(".", 1))
        return self.ref(name)

    # ----------------------------------------------------------------------------------------- resources

    def make(self, name: str) -> None:
        """Make one resource, after all that it needs, unless it is there already."""
        for waiting in self._making:
            self.waits_for[waiting].add(name)
        if name in self.ids:
            for waiting in self._making:
                self.waits_for[waiting] |= self.waits_for[name]
            return
        if name in self._making:
            raise SimulationError(f"a circle: {self._making} and back to {name}")
        resource = self.template["Resources"].get(name)
        if resource is None or not self.exists(name):
            raise SimulationError(f"{name} is referred to, but not made")
        self.waits_for[name] = set()
        self._making.append(name)
        dependencies = resource.get("DependsOn", [])
        for dependency in [dependencies] if isinstance(dependencies, str) else dependencies:
            self.make(dependency)
        properties = self.resolve(resource.get("Properties", {}))
        self.requests[name] = properties
        service, kind = resource["Type"].split("::")[1:]
        maker = getattr(self, f"make_{service.lower()}_{kind.lower()}", None)
        if maker is None:
            raise SimulationError(f"not known here: {resource['Type']}")
        self.ids[name] = maker(name, json.loads(json.dumps(properties)))
        self._making.pop()

    def call(self, service: str, operation: str, **request: Any) -> Any:
        client = _client(service, self.region)
        model = client.meta.service_model.operation_model(client.meta.method_to_api_mapping[operation])
        return getattr(client, operation)(**_coerce(model.input_shape, request))

    def make_ec2_vpc(self, name: str, properties: Properties) -> str:
        tags = _tag_specification("vpc", properties)
        attributes = {
            key: properties.pop(key) for key in ("EnableDnsSupport", "EnableDnsHostnames") if key in properties
        }
        vpc = self.call("ec2", "create_vpc", **properties, **tags)["Vpc"]
        for key, value in attributes.items():
            self.call("ec2", "modify_vpc_attribute", VpcId=vpc["VpcId"], **{key: {"Value": value}})
        self.attributes[name, "CidrBlock"] = vpc["CidrBlock"]
        return str(vpc["VpcId"])

    def make_ec2_internetgateway(self, _name: str, properties: Properties) -> str:
        tags = _tag_specification("internet-gateway", properties)
        gateway = self.call("ec2", "create_internet_gateway", **properties, **tags)["InternetGateway"]
        return str(gateway["InternetGatewayId"])

    def make_ec2_vpcgatewayattachment(self, name: str, properties: Properties) -> str:
        self.call("ec2", "attach_internet_gateway", **properties)
        return name

    def make_ec2_subnet(self, _name: str, properties: Properties) -> str:
        tags = _tag_specification("subnet", properties)
        maps = properties.pop("MapPublicIpOnLaunch", False)
        subnet = self.call("ec2", "create_subnet", **properties, **tags)["Subnet"]["SubnetId"]
        self.call("ec2", "modify_subnet_attribute", SubnetId=subnet, MapPublicIpOnLaunch={"Value": maps})
        return str(subnet)

    def make_ec2_eip(self, name: str, properties: Properties) -> str:
        tags = _tag_specification("elastic-ip", properties)
        address = self.call("ec2", "allocate_address", **properties, **tags)
        self.attributes[name, "AllocationId"] = address["AllocationId"]
        return str(address["PublicIp"])

    def make_ec2_natgateway(self, _name: str, properties: Properties) -> str:
        tags = _tag_specification("natgateway", properties)
        return str(self.call("ec2", "create_nat_gateway", **properties, **tags)["NatGateway"]["NatGatewayId"])

    def make_ec2_routetable(self, _name: str, properties: Properties) -> str:
        tags = _tag_specification("route-table", properties)
        return str(self.call("ec2", "create_route_table", **properties, **tags)["RouteTable"]["RouteTableId"])

    def make_ec2_route(self, name: str, properties: Properties) -> str:
        self.call("ec2", "create_route", **properties)
        return name

    def make_ec2_subnetroutetableassociation(self, _name: str, properties: Properties) -> str:
        return str(self.call("ec2", "associate_route_table", **properties)["AssociationId"])

    def make_ec2_vpcendpoint(self, _name: str, properties: Properties) -> str:
        return str(self.call("ec2", "create_vpc_endpoint", **properties)["VpcEndpoint"]["VpcEndpointId"])

    def make_ec2_flowlog(self, name: str, properties: Properties) -> str:
        tags = _tag_specification("vpc-flow-log", properties)
        resource = properties.pop("ResourceId")
        answer = self.call("ec2", "create_flow_logs", ResourceIds=[resource], **properties, **tags)
        if answer.get("Unsuccessful"):
            raise SimulationError(f"{name}: {answer['Unsuccessful']}")
        return str(answer["FlowLogIds"][0])

    def make_ec2_securitygroup(self, name: str, properties: Properties) -> str:
        tags = _tag_specification("security-group", properties)
        ingress = properties.pop("SecurityGroupIngress", [])
        egress = properties.pop("SecurityGroupEgress", None)
        description = properties.pop("GroupDescription")
        group = self.call(
            "ec2", "create_security_group", GroupName=f"{STACK}-{name}", Description=description, **properties, **tags
        )["GroupId"]
        for rule in ingress:
            self.call("ec2", "authorize_security_group_ingress", GroupId=group, IpPermissions=[_permission(rule)])
        if egress is not None:
            everything = {"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
            self.call("ec2", "revoke_security_group_egress", GroupId=group, IpPermissions=[everything])
            for rule in egress:
                self.call("ec2", "authorize_security_group_egress", GroupId=group, IpPermissions=[_permission(rule)])
        self.attributes[name, "GroupId"] = group
        return str(group)

    def make_ec2_launchtemplate(self, name: str, properties: Properties) -> str:
        template = self.call("ec2", "create_launch_template", LaunchTemplateName=f"{STACK}-{name}", **properties)
        self.attributes[name, "LatestVersionNumber"] = str(template["LaunchTemplate"]["LatestVersionNumber"])
        return str(template["LaunchTemplate"]["LaunchTemplateId"])

    def make_logs_loggroup(self, name: str, properties: Properties) -> str:
        group = properties.pop("LogGroupName", f"{STACK}-{name}")
        retention = properties.pop("RetentionInDays", None)
        self.call("logs", "create_log_group", logGroupName=group, **_lower_camel(properties))
        if retention is not None:
            self.call("logs", "put_retention_policy", logGroupName=group, retentionInDays=retention)
        self.attributes[name, "Arn"] = f"arn:{PARTITION}:logs:{self.region}:{ACCOUNT}:log-group:{group}:*"
        return str(group)

    def make_iam_role(self, name: str, properties: Properties) -> str:
        trust = json.dumps(properties.pop("AssumeRolePolicyDocument"))
        managed = properties.pop("ManagedPolicyArns", [])
        inline = properties.pop("Policies", [])
        role = self.call(
            "iam", "create_role", RoleName=f"{STACK}-{name}", AssumeRolePolicyDocument=trust, **properties
        )["Role"]
        for policy in inline:
            self.call(
                "iam",
                "put_role_policy",
                RoleName=role["RoleName"],
                PolicyName=policy["PolicyName"],
                PolicyDocument=json.dumps(policy["PolicyDocument"]),
            )
        for arn in managed:
            prefix = f"arn:{PARTITION}:iam::aws:policy/"
            if not arn.startswith(prefix) or arn.removeprefix(prefix).split("/")[-1] not in managed_policies():
                raise SimulationError(f"{name}: AWS manages no policy {arn}")
        self.managed[name] = [arn.split("/")[-1] for arn in managed]
        self.attributes[name, "Arn"] = role["Arn"]
        return str(role["RoleName"])

    def make_kms_key(self, name: str, properties: Properties) -> str:
        policy = json.dumps(properties.pop("KeyPolicy"))
        rotation = properties.pop("EnableKeyRotation", False)
        properties.pop("PendingWindowInDays", None)  # how long KMS waits on deletion; creation does not know it
        key = self.call("kms", "create_key", Policy=policy, **properties)["KeyMetadata"]
        if rotation:
            self.call("kms", "enable_key_rotation", KeyId=key["KeyId"])
        self.attributes[name, "Arn"] = key["Arn"]
        return str(key["KeyId"])

    def make_eks_cluster(self, name: str, properties: Properties) -> str:
        request = _lower_camel(properties)
        # The one place where CloudFormation and the API differ in shape, not only in spelling.
        if "logging" in request:
            types = [item["type"] for item in request["logging"]["clusterLogging"]["enabledTypes"]]
            request["logging"] = {"clusterLogging": [{"types": types, "enabled": True}]}
        cluster = self.call("eks", "create_cluster", **request)["cluster"]
        subnet = request["resourcesVpcConfig"]["subnetIds"][0]
        vpc = self.call("ec2", "describe_subnets", SubnetIds=[subnet])["Subnets"][0]["VpcId"]
        # EKS makes this group and puts control plane, managed nodes and, through them, pods into it.
        self.cluster_security_group = self.call(
            "ec2",
            "create_security_group",
            GroupName=f"eks-cluster-sg-{cluster['name']}",
            Description="EKS created security group",
            VpcId=vpc,
        )["GroupId"]
        itself = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": self.cluster_security_group}]}
        self.call(
            "ec2",
            "authorize_security_group_ingress",
            GroupId=self.cluster_security_group,
            IpPermissions=[itself],
        )
        self.attributes[name, "ClusterSecurityGroupId"] = self.cluster_security_group
        self.attributes[name, "Arn"] = cluster["arn"]
        return str(cluster["name"])

    def make_eks_nodegroup(self, name: str, properties: Properties) -> str:
        self.call("eks", "create_nodegroup", nodegroupName=f"{STACK}-{name}", **_lower_camel(properties))
        return f"{STACK}-{name}"

    def make_eks_addon(self, _name: str, properties: Properties) -> str:
        self.call("eks", "create_addon", **_lower_camel(properties))
        return str(properties["AddonName"])

    def make_eks_podidentityassociation(self, name: str, properties: Properties) -> str:
        self.call("eks", "create_pod_identity_association", **_lower_camel(properties))
        return name

    def make_rds_dbsubnetgroup(self, name: str, properties: Properties) -> str:
        group = f"{STACK}-{name}".lower()
        self.call("rds", "create_db_subnet_group", DBSubnetGroupName=group, **properties)
        return group

    def make_rds_dbparametergroup(self, name: str, properties: Properties) -> str:
        group = f"{STACK}-{name}".lower()
        parameters = properties.pop("Parameters", {})
        family = properties.pop("Family")
        self.call(
            "rds",
            "create_db_parameter_group",
            DBParameterGroupName=group,
            DBParameterGroupFamily=family,
            **properties,
        )
        changes = [
            {"ParameterName": key, "ParameterValue": value, "ApplyMethod": "pending-reboot"}
            for key, value in parameters.items()
        ]
        if changes:
            self.call("rds", "modify_db_parameter_group", DBParameterGroupName=group, Parameters=changes)
        return group

    def make_rds_dbinstance(self, name: str, properties: Properties) -> str:
        identifier = f"{STACK}-{name}".lower()
        properties["VpcSecurityGroupIds"] = properties.pop("VPCSecurityGroups", [])
        # Says what becomes of backups on deletion, which the API is told only then.
        properties.pop("DeleteAutomatedBackups", None)
        # Used by CloudFormation for changes of the engine's version only.
        properties.pop("AllowMajorVersionUpgrade", None)
        database = self.call("rds", "create_db_instance", DBInstanceIdentifier=identifier, **properties)["DBInstance"]
        self.attributes[name, "Endpoint.Address"] = database["Endpoint"]["Address"]
        if "MasterUserSecret" in database:
            self.attributes[name, "MasterUserSecret.SecretArn"] = database["MasterUserSecret"]["SecretArn"]
        return identifier

    def make_ecr_repository(self, name: str, properties: Properties) -> str:
        repository = f"{STACK}-{name}".lower()
        lifecycle = properties.pop("LifecyclePolicy", None)
        properties.pop("EmptyOnDelete", None)  # what deletion does; creation does not know it
        made = self.call("ecr", "create_repository", repositoryName=repository, **_lower_camel(properties))[
            "repository"
        ]
        if lifecycle:
            text = lifecycle["LifecyclePolicyText"]
            self.call("ecr", "put_lifecycle_policy", repositoryName=repository, lifecyclePolicyText=text)
        self.attributes[name, "RepositoryUri"] = made["repositoryUri"]
        return repository

    # ---------------------------------------------------------------------------------------- observation

    def observe(self) -> Observed:
        """Ask every service what it has now."""
        vpcs = [self.ids[name] for name in self.ids if self.template["Resources"][name]["Type"] == "AWS::EC2::VPC"]
        if len(vpcs) != 1:
            raise SimulationError(f"{len(vpcs)} VPCs")
        (vpc,) = vpcs
        here = [{"Name": "vpc-id", "Values": [vpc]}]

        def ask(operation: str, key: str, **request: Any) -> list[Properties]:
            answer: list[Properties] = self.call("ec2", operation, **request)[key]
            return answer

        def dns(attribute: str) -> bool:
            answer = self.call("ec2", "describe_vpc_attribute", VpcId=vpc, Attribute=attribute)
            return bool(answer[attribute[0].upper() + attribute[1:]]["Value"])

        requested = {name: self.template["Resources"][name]["Type"] for name in self.ids}

        def made(resource_type: str) -> list[str]:
            return [name for name, kind in requested.items() if kind == resource_type]

        versions = {}
        for name in made("AWS::EC2::LaunchTemplate"):
            answer = ask("describe_launch_template_versions", "LaunchTemplateVersions", LaunchTemplateId=self.ids[name])
            versions[self.ids[name]] = answer[0]["LaunchTemplateData"]
        roles = {}
        for name in made("AWS::IAM::Role"):
            role = self.ids[name]
            policies = self.call("iam", "list_role_policies", RoleName=role)["PolicyNames"]
            roles[name] = {
                "arn": self.attributes[name, "Arn"],
                "trust": self.call("iam", "get_role", RoleName=role)["Role"]["AssumeRolePolicyDocument"],
                "managed": self.managed[name],
                "inline": [
                    statement
                    for policy in policies
                    for statement in self.call("iam", "get_role_policy", RoleName=role, PolicyName=policy)[
                        "PolicyDocument"
                    ]["Statement"]
                ],
            }
        keys = {}
        for name in made("AWS::KMS::Key"):
            metadata = self.call("kms", "describe_key", KeyId=self.ids[name])["KeyMetadata"]
            rotation = self.call("kms", "get_key_rotation_status", KeyId=self.ids[name])["KeyRotationEnabled"]
            keys[metadata["Arn"]] = {"name": name, "rotation": rotation}
        cluster = self.call("eks", "describe_cluster", name=STACK)["cluster"]
        nodegroups = [
            self.call("eks", "describe_nodegroup", clusterName=STACK, nodegroupName=nodegroup)["nodegroup"]
            for nodegroup in self.call("eks", "list_nodegroups", clusterName=STACK)["nodegroups"]
        ]
        types = sorted({kind for nodegroup in nodegroups for kind in nodegroup.get("instanceTypes", [])})
        repositories = self.call("ecr", "describe_repositories")["repositories"]
        lifecycle = {}
        for name in made("AWS::ECR::Repository"):
            if "LifecyclePolicy" in self.requests[name]:
                text = self.call("ecr", "get_lifecycle_policy", repositoryName=self.ids[name])["lifecyclePolicyText"]
                lifecycle[self.ids[name]] = json.loads(text)
        groups = [self.ids[name] for name in made("AWS::RDS::DBParameterGroup")]
        return Observed(
            template=self.template,
            parameters=self.parameters,
            region=self.region,
            ids=self.ids,
            requests=self.requests,
            waits_for=self.waits_for,
            outputs={name: self.resolve(output["Value"]) for name, output in self.template["Outputs"].items()},
            vpc=ask("describe_vpcs", "Vpcs", VpcIds=[vpc])[0],
            vpc_attributes={name: dns(name) for name in ("enableDnsSupport", "enableDnsHostnames")},
            subnets={item["SubnetId"]: item for item in ask("describe_subnets", "Subnets", Filters=here)},
            route_tables=ask("describe_route_tables", "RouteTables", Filters=here),
            internet_gateways=ask("describe_internet_gateways", "InternetGateways"),
            nat_gateways={
                item["NatGatewayId"]: item for item in ask("describe_nat_gateways", "NatGateways", Filter=here)
            },
            security_groups={
                item["GroupId"]: item for item in ask("describe_security_groups", "SecurityGroups", Filters=here)
            },
            endpoints=ask("describe_vpc_endpoints", "VpcEndpoints", Filters=here),
            flow_logs=ask("describe_flow_logs", "FlowLogs"),
            log_groups={item["logGroupName"]: item for item in self.call("logs", "describe_log_groups")["logGroups"]},
            launch_templates=versions,
            instance_types={
                item["InstanceType"]: item
                for item in (ask("describe_instance_types", "InstanceTypes", InstanceTypes=types) if types else [])
            },
            roles=roles,
            keys=keys,
            cluster=cluster,
            cluster_security_group=self.cluster_security_group,
            nodegroups=nodegroups,
            databases=self.call("rds", "describe_db_instances")["DBInstances"],
            subnet_groups={
                item["DBSubnetGroupName"]: item
                for item in self.call("rds", "describe_db_subnet_groups")["DBSubnetGroups"]
            },
            database_parameters={
                group: {
                    item["ParameterName"]: item["ParameterValue"]
                    for item in self.call("rds", "describe_db_parameters", DBParameterGroupName=group)["Parameters"]
                    if "ParameterValue" in item
                }
                for group in groups
            },
            parameter_group_families={
                item["DBParameterGroupName"]: item["DBParameterGroupFamily"]
                for item in self.call("rds", "describe_db_parameter_groups")["DBParameterGroups"]
            },
            secrets={item["ARN"]: item for item in self.call("secretsmanager", "list_secrets")["SecretList"]},
            repositories=repositories,
            lifecycle_policies=lifecycle,
        )


def _permission(rule: Properties) -> Properties:
    """One rule of a security group, as the API of EC2 takes it."""
    rule = dict(rule)
    description = {"Description": rule.pop("Description")} if "Description" in rule else {}
    permission: Properties = {key: rule.pop(key) for key in ("IpProtocol", "FromPort", "ToPort") if key in rule}
    if "CidrIp" in rule:
        permission["IpRanges"] = [{"CidrIp": rule.pop("CidrIp"), **description}]
    if "CidrIpv6" in rule:
        permission["Ipv6Ranges"] = [{"CidrIpv6": rule.pop("CidrIpv6"), **description}]
    if "SourceSecurityGroupId" in rule:
        permission["UserIdGroupPairs"] = [{"GroupId": rule.pop("SourceSecurityGroupId"), **description}]
    if rule:
        raise SimulationError(f"not known here: {rule} in a security group's rule")
    return permission


def simulate(template: Properties, given: dict[str, str], region: str) -> Observed:
    """The stack that the template makes in a region with these parameters.

    Raises SimulationError, or botocore's ClientError and ParamValidationError where a service refuses.
    """
    managed_policies()
    with (
        # No instance is started, and reading moto's list of machine images takes longer than all the rest.
        mock.patch.dict(os.environ, MOTO_EC2_LOAD_DEFAULT_AMIS="false"),
        # moto opens a new session for each role that EKS is given, which takes half of the time that is left.
        mock.patch("moto.eks.utils.Session", _session),
        mock_aws(),
    ):
        stack = _Stack(template, parameter_values(template, given), region)
        for name in template["Resources"]:
            if stack.exists(name):
                stack.make(name)
        return stack.observe()
