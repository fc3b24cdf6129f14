"""aws/template.yaml: linted, validated, and compared with the architecture. No test reaches AWS.

cfn-lint and cloudformation-validate know what CloudFormation and the services accept; the latter also runs the rules in
rules.guard. The tests with the fixture `stack` know what this project needs: they check the resolved template
(resolver.py) against it, and IAM's rules (iam.py). At the end, thousands of faults are put into the template, one at a
time (faults.py): each must be found.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import ipaddress
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cloudformation_validate", reason="the extra `aws` is not installed: make .venv/.aws")

import cloudformation_validate as validator
import faults
from cfnlint.api import ManualArgs, lint
from cfnlint.decode import cfn_yaml
from cfnlint.schema.manager import PROVIDER_SCHEMA_MANAGER
from iam import Call, Part, calls, granted_by, neighbours, parts
from inventory import inventory, paths
from resolver import ACCOUNT, STACK, Stack, TemplateError, parameter_values

REPOSITORY = Path(__file__).parents[2]
TEMPLATE = REPOSITORY / "aws/template.yaml"
RULES = REPOSITORY / "aws/rules.guard"
REGIONS = ["eu-central-1", "us-east-1"]

# Possible deployments: the largest stack, the defaults, the cheapest (from a snapshot), and three zones by name.
REQUIRED = {"PublicAccessCidrs": "203.0.113.7/32"}
VARIANTS: dict[str, dict[str, str]] = {
    "three zones": {
        "ZoneCount": "3",
        "NodeInstanceType": "m7g.large",
        "PublicAccessCidrs": "203.0.113.7/32,198.51.100.0/24",
        "KubernetesVersion": "1.37",
        "DatabaseInstanceClass": "db.m7g.large",
    },
    "defaults": {},
    "test stack": {
        "SingleNatGateway": "true",
        "DatabaseMultiAz": "false",
        "NodeInstanceType": "t3.medium",
        "VpcCidr": "172.20.0.0/16",
        "Zones": "eu-central-1a,eu-central-1c",
        "DatabaseSnapshot": "messages-last",
        "DatabaseVersion": "16",
    },
    "three named zones": {
        "ZoneCount": "3",
        "SingleNatGateway": "true",
        "Zones": "eu-central-1c,eu-central-1a,eu-central-1b",
    },
}


@functools.cache
def _template() -> str:
    # Through JSON: only plain dictionaries and strings, without the linter's notes on line numbers.
    return json.dumps(cfn_yaml.load(str(TEMPLATE)))


@functools.cache
def _engine() -> validator.CompositeEngine:
    rules = [validator.file_to_external_rule_source(str(RULES))]
    return validator.CompositeEngine(validator.CompositeEngineConfig(guard_rules=rules))


def lint_findings(text: str) -> list[str]:
    """cfn-lint's findings, including warnings, for both regions."""
    return [str(match) for match in lint(text, config=ManualArgs(regions=REGIONS))]


def validation_findings(text: str, instance_class: str = "", regions: list[str] = REGIONS) -> list[str]:
    """cloudformation-validate's findings from warnings up, including the rules in aws/rules.guard."""
    if not instance_class:
        instance_class = json.loads(text)["Parameters"]["DatabaseInstanceClass"]["Default"]
    findings = set()
    for region in regions:
        config = validator.ValidateConfig(
            severity_level=validator.Severity.WARN,
            # The validator checks a parameter's value only if it is given. (Those that conditions use are not given:
            # it tries both branches of each.)
            parameter_overrides={"DatabaseInstanceClass": instance_class},
            pseudo_parameter_overrides=validator.PseudoParameterOverrides(region=region),
            # Since Kubernetes 1.28 EKS encrypts more than Secrets anyway and calls the list of what to encrypt
            # deprecated; it is kept, as it is the documented form and other scanners look for it.
            exclude=validator.RuleFilterConfig(
                logical_ids=[validator.LogicalIdFilter(rule_id="W9009", logical_id="Cluster")]
            ),
        )
        report = _engine().validate_template(validator.TemplateContent(text, TEMPLATE.name), config)
        if report.status is not validator.ReportStatus.OK:
            findings.add(f"{report.status.name}")
        for found in report.diagnostics:
            if found.message.startswith("'' is not one of"):
                continue  # it takes AWS::NoValue, the version of a database from a snapshot, for an empty version
            where = found.entity.logical_id if found.entity else "template"
            findings.add(f"{found.rule_id} {where}: {found.message}")
    return sorted(findings)


@pytest.fixture(params=list(VARIANTS))
def stack(request: pytest.FixtureRequest) -> Stack:
    return Stack(json.loads(_template()), {**REQUIRED, **VARIANTS[request.param]}, REGIONS[0])


def _zones(stack: Stack) -> list[int]:
    return [*range(1, int(stack.parameters["ZoneCount"]) + 1)]


def _numbered(name: str, numbers: list[int]) -> list[str]:
    return [f"{name}{number}" for number in numbers]


def _named(name: str, *more: tuple[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in (("Name", name), *more)]


# ------------------------------------------------------------------------------------- the file as a whole


def test_linter_finds_nothing() -> None:
    """cfn-lint has no finding in either region."""
    assert lint_findings(TEMPLATE.read_text()) == []


@pytest.mark.parametrize(
    "instance_class", json.loads(_template())["Parameters"]["DatabaseInstanceClass"]["AllowedValues"]
)
def test_validator_finds_nothing(instance_class: str) -> None:
    """AWS's validator and the project's Guard rules have no finding in either region, for any database class."""
    assert validation_findings(_template(), instance_class) == []


def test_template_needs_no_bucket() -> None:
    """`aws cloudformation deploy` accepts the file: beyond 51,200 bytes it would need an S3 bucket."""
    assert len(TEMPLATE.read_bytes()) <= 51_200


def test_nothing_is_there_that_nobody_looked_at(stack: Stack) -> None:
    """The stack has the inventory's resources with the inventory's properties, and nothing else."""
    gateways = [1] if stack.parameters["SingleNatGateway"] == "true" else _zones(stack)
    expected = {}
    for name, entry in inventory().items():
        numbers = gateways if name.startswith("Nat") else _zones(stack)
        for expanded in _numbered(name[:-1], numbers) if name.endswith("#") else [name]:
            expected[expanded] = entry
    assert stack.resources.keys() == expected.keys()
    of_its_own, restored = {"DBName", "EngineVersion", "MasterUsername"}, {"DBSnapshotIdentifier"}
    absent = of_its_own if stack.parameters["DatabaseSnapshot"] else restored
    for name, (kind, names) in expected.items():
        assert stack.template["Resources"][name]["Type"] == kind
        assert paths(stack.resources[name]) == names - (absent if name == "Database" else set())


def test_parameters_have_safe_defaults(stack: Stack) -> None:
    """Only the administrators' networks are required; every other parameter has a default for production."""
    parameters = stack.template["Parameters"]
    assert {name: parameter.get("Default") for name, parameter in parameters.items()} == {
        "PublicAccessCidrs": None,
        "KubernetesVersion": "1.36",
        "NodeInstanceType": "m7i.large",
        "ZoneCount": 2,
        "Zones": "",
        "SingleNatGateway": "false",
        "VpcCidr": "10.0.0.0/16",
        "DatabaseVersion": "15",
        "DatabaseInstanceClass": "db.t4g.medium",
        "DatabaseMultiAz": "true",
        "DatabaseSnapshot": "",
    }
    types = {"PublicAccessCidrs": "CommaDelimitedList", "Zones": "CommaDelimitedList", "ZoneCount": "Number"}
    for name, parameter in parameters.items():
        assert parameter["Type"] == types.get(name, "String")
        assert parameter["Description"]


def test_choices_are_those_that_were_looked_at(stack: Stack) -> None:
    """The choices are those known to work, and no others."""
    parameters = stack.template["Parameters"]
    choices = {name: item["AllowedValues"] for name, item in parameters.items() if "AllowedValues" in item}
    assert choices == {
        "NodeInstanceType": ["m7i.large", "m7g.large", "t3.medium", "t4g.medium"],
        "ZoneCount": [2, 3],
        "SingleNatGateway": ["true", "false"],
        "DatabaseVersion": ["15", "16", "17", "18"],
        "DatabaseInstanceClass": ["db.t4g.small", "db.t4g.medium", "db.m7g.large", "db.m7g.xlarge"],
        "DatabaseMultiAz": ["true", "false"],
    }


def test_kubernetes_version_is_one_that_the_manifests_are_checked_for(stack: Stack) -> None:
    """The cluster runs a version for which `make check` validates k8s.yaml."""
    checked = re.search(r"^KUBERNETES := (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert checked
    assert stack.template["Parameters"]["KubernetesVersion"]["Default"] in checked[1].split()


REFUSED = {
    "PublicAccessCidrs": [
        "0.0.0.0/0",
        "203.0.113.7/32,0.0.0.0/0",
        "0.0.0.0/1,128.0.0.0/1",
        "10.0.0.0/7",
        "::/0",
        "1.2.3.4",
    ],
    "KubernetesVersion": ["1", "1.9", "2.36", "latest"],
    "NodeInstanceType": ["t2.nano", "m7i.xlarge"],
    "ZoneCount": ["1", "4"],
    "Zones": ["eu-central-1", "euc1-az1,euc1-az2"],
    "SingleNatGateway": ["yes", "maybe"],
    "VpcCidr": ["8.8.0.0/16", "10.0.0.0/8", "10.0.0.0/24", "172.32.0.0/16"],
    "DatabaseVersion": ["14", "15.19", "latest"],
    "DatabaseInstanceClass": ["db.t3.micro"],
    "DatabaseMultiAz": ["maybe"],
    "DatabaseSnapshot": ["last snapshot"],
}


def test_parameters_refuse_what_cannot_work(stack: Stack) -> None:
    """A value that would open the cluster or cannot become a stack is refused before anything is created."""
    assert REFUSED.keys() == stack.template["Parameters"].keys()
    for name, values in REFUSED.items():
        for value in values:
            with pytest.raises(TemplateError, match=name):
                parameter_values(stack.template, {**REQUIRED, name: value})


def test_outputs_are_what_the_next_commands_take(stack: Stack) -> None:
    """The outputs name the network and the registry as the commands expect."""
    assert stack.outputs == {"VpcId": "Vpc", "RepositoryUri": "Repository.RepositoryUri"}


# ------------------------------------------------------------------------------------------------- network


def test_subnets_cover_the_zones(stack: Stack) -> None:
    """Each zone, of the named ones if any, has one public and one private subnet of the VPC."""
    zones = [zone for zone in stack.parameters["Zones"] if zone] or [stack.region + letter for letter in "abc"]
    for kind in ("PublicSubnet", "PrivateSubnet"):
        for number in _zones(stack):
            subnet = stack.resources[f"{kind}{number}"]
            assert (subnet["VpcId"], subnet["AvailabilityZone"]) == ("Vpc", zones[number - 1])


def test_subnets_are_large_and_apart(stack: Stack) -> None:
    """A private subnet has room for thousands of pods, subnets do not overlap, and half of the VPC stays free."""
    assert stack.resources["Vpc"]["CidrBlock"] == stack.parameters["VpcCidr"]
    ranges = [str(network) for network in ipaddress.ip_network(stack.parameters["VpcCidr"]).subnets(new_prefix=20)]
    for number in _zones(stack):
        assert stack.resources[f"PublicSubnet{number}"]["CidrBlock"] == ranges[number - 1]
        assert stack.resources[f"PrivateSubnet{number}"]["CidrBlock"] == ranges[number + 2]


def test_load_balancers_find_their_subnets(stack: Stack) -> None:
    """Public subnets are tagged for load balancers on the Internet, private ones for internal load balancers."""
    for number in _zones(stack):
        public, private = (stack.resources[f"{kind}Subnet{number}"]["Tags"] for kind in ("Public", "Private"))
        assert public == _named(f"{STACK}-public-{number}", ("kubernetes.io/role/elb", "1"))
        assert private == _named(f"{STACK}-private-{number}", ("kubernetes.io/role/internal-elb", "1"))


def test_no_machine_gets_a_public_address(stack: Stack) -> None:
    """No subnet gives its machines a public address."""
    assert not any(subnet["MapPublicIpOnLaunch"] for subnet in stack.of_type("EC2::Subnet").values())


def test_each_zone_leaves_through_its_own_gateway(stack: Stack) -> None:
    """Private subnets reach the Internet through their zone's NAT gateway, or the single one if asked for."""
    single = stack.parameters["SingleNatGateway"] == "true"
    everywhere = {"DestinationCidrBlock": "0.0.0.0/0"}
    public = {"RouteTableId": "PublicRouteTable"}
    assert stack.resources["PublicRoute"] == {**public, **everywhere, "GatewayId": "InternetGateway"}
    for number in _zones(stack):
        table = {"RouteTableId": f"PrivateRouteTable{number}"}
        gateway = f"NatGateway{1 if single else number}"
        assert stack.resources[f"PrivateRoute{number}"] == {**table, **everywhere, "NatGatewayId": gateway}
        for kind, association in (("Public", public), ("Private", table)):
            subnet = {"SubnetId": f"{kind}Subnet{number}"}
            assert stack.resources[f"{kind}RouteTableAssociation{number}"] == {**association, **subnet}
    for name, properties in stack.of_type("EC2::NatGateway").items():
        zone = name[-1]
        assert properties["SubnetId"] == f"PublicSubnet{zone}"
        assert properties["AllocationId"] == f"NatAddress{zone}.AllocationId"
        assert stack.resources[f"NatAddress{zone}"]["Domain"] == "vpc"


def test_internet_gateway_is_attached_first(stack: Stack) -> None:
    """The VPC has its gateway before a route or a public address needs it, so that creation never fails by chance."""
    attachment = {"VpcId": "Vpc", "InternetGatewayId": "InternetGateway"}
    assert stack.resources["InternetGatewayAttachment"] == attachment
    for name in ("PublicRoute", *stack.of_type("EC2::EIP")):
        assert "InternetGatewayAttachment" in stack.waits_for[name]


def test_names_resolve_inside_the_vpc(stack: Stack) -> None:
    """DNS support and host names are on; without them, private endpoints do not resolve."""
    vpc = stack.resources["Vpc"]
    assert (vpc["EnableDnsSupport"], vpc["EnableDnsHostnames"]) == (True, True)


def test_image_layers_avoid_the_nat_gateways(stack: Stack) -> None:
    """Every private subnet has the free route to S3, where ECR keeps images."""
    assert stack.resources["S3Endpoint"] == {
        "VpcEndpointType": "Gateway",
        "VpcId": "Vpc",
        "ServiceName": f"com.amazonaws.{stack.region}.s3",
        "RouteTableIds": _numbered("PrivateRouteTable", _zones(stack)),
    }


def test_traffic_is_logged(stack: Stack) -> None:
    """All traffic in the VPC is logged."""
    assert stack.resources["FlowLog"] == {
        "ResourceType": "VPC",
        "ResourceId": "Vpc",
        "TrafficType": "ALL",
        "LogDestinationType": "cloud-watch-logs",
        "LogGroupName": "FlowLogGroup",
        "DeliverLogsPermissionArn": "FlowLogRole.Arn",
        "Tags": _named(STACK),
    }


def test_logs_end(stack: Stack) -> None:
    """Each log is in a group with limited retention, created first, under the name that the service uses."""
    groups = stack.of_type("Logs::LogGroup")
    assert {name: group.get("LogGroupName") for name, group in groups.items()} == {
        "FlowLogGroup": None,
        "ClusterLogGroup": f"/aws/eks/{STACK}/cluster",
        "DatabaseLogGroup": f"/aws/rds/instance/{STACK}/postgresql",
        "DatabaseUpgradeLogGroup": f"/aws/rds/instance/{STACK}/upgrade",
    }
    assert {group["RetentionInDays"] for group in groups.values()} == {30}
    assert "ClusterLogGroup" in stack.waits_for["Cluster"]
    assert {"DatabaseLogGroup", "DatabaseUpgradeLogGroup"} <= stack.waits_for["Database"]


def test_names_are_consistent(stack: Stack) -> None:
    """Every name in the console begins with the stack's, and no two of a kind are equal."""
    numbered = {"PublicSubnet": "public-", "PrivateSubnet": "private-", "NatAddress": "nat-", "NatGateway": ""}
    numbered |= {"PrivateRouteTable": "private-"}
    single = {"PublicRouteTable": "-public", "DatabaseSecurityGroup": "-database"}
    single |= dict.fromkeys(["Vpc", "InternetGateway", "FlowLog", "Database"], "")
    for name, properties in stack.resources.items():
        kind = name.rstrip("123")
        if "Tags" in properties:
            suffix = f"-{numbered[kind]}{name[-1]}" if kind in numbered else single[name]
            assert properties["Tags"][:1] == _named(STACK + suffix)
            assert len(properties["Tags"]) == (2 if kind.endswith("Subnet") else 1)


# ------------------------------------------------------------------------------------------------- cluster


def test_cluster_is_private_inside_and_limited_outside(stack: Stack) -> None:
    """Nodes reach the control plane inside the VPC; from outside, only the given networks do."""
    network = stack.resources["Cluster"]["ResourcesVpcConfig"]
    assert (network["EndpointPrivateAccess"], network["EndpointPublicAccess"]) == (True, True)
    assert network["PublicAccessCidrs"] == stack.parameters["PublicAccessCidrs"]


def test_a_third_zone_can_join_later(stack: Stack) -> None:
    """The control plane has two zones, whatever the number of zones: EKS refuses to change them."""
    assert stack.resources["Cluster"]["ResourcesVpcConfig"]["SubnetIds"] == ["PrivateSubnet1", "PrivateSubnet2"]


def test_cluster_access_is_by_entries_only(stack: Stack) -> None:
    """Only EKS access entries grant access, and the stack's creator can use the cluster."""
    access = {"AuthenticationMode": "API", "BootstrapClusterCreatorAdminPermissions": True}
    assert stack.resources["Cluster"]["AccessConfig"] == access


def test_cluster_encrypts_secrets_with_a_rotating_key(stack: Stack) -> None:
    """A key of the stack encrypts Kubernetes Secrets; only this account's IAM grants access to it."""
    (encryption,) = stack.resources["Cluster"]["EncryptionConfig"]
    assert encryption == {"Provider": {"KeyArn": "ClusterKey.Arn"}, "Resources": ["secrets"]}
    key = stack.resources["ClusterKey"]
    assert (key["EnableKeyRotation"], key["PendingWindowInDays"]) == (True, 30)
    account = {"AWS": f"arn:aws:iam::{ACCOUNT}:root"}
    statement = {"Effect": "Allow", "Principal": account, "Action": "kms:*", "Resource": "*"}
    assert key["KeyPolicy"] == {"Version": "2012-10-17", "Statement": [statement]}


def test_cluster_logs_are_complete(stack: Stack) -> None:
    """All five control plane logs are kept."""
    types = ["api", "audit", "authenticator", "controllerManager", "scheduler"]
    enabled = stack.resources["Cluster"]["Logging"]["ClusterLogging"]["EnabledTypes"]
    assert [item["Type"] for item in enabled] == types


def test_cluster_refuses_to_be_deleted(stack: Stack) -> None:
    """EKS refuses to delete the cluster until its protection is off."""
    assert stack.resources["Cluster"]["DeletionProtection"] is True


def test_cluster_has_the_version_asked_for(stack: Stack) -> None:
    """The control plane runs the requested version, and never enters extended support."""
    cluster = stack.resources["Cluster"]
    assert cluster["Name"] == STACK
    assert cluster["Version"] == stack.parameters["KubernetesVersion"]
    assert cluster["UpgradePolicy"] == {"SupportType": "STANDARD"}
    assert cluster["RoleArn"] == "ClusterRole.Arn"


def test_nodes_are_private_and_in_every_zone(stack: Stack) -> None:
    """Nodes run in all private subnets and nowhere else, one per zone, and are replaced one at a time."""
    nodes, zones = stack.resources["Nodes"], stack.parameters["ZoneCount"]
    assert nodes["ClusterName"] == STACK
    assert nodes["Subnets"] == _numbered("PrivateSubnet", _zones(stack))
    assert nodes["ScalingConfig"] == {"MinSize": zones, "DesiredSize": zones, "MaxSize": 6}
    assert (nodes["UpdateConfig"], nodes["NodeRepairConfig"]) == ({"MaxUnavailable": 1}, {"Enabled": True})


def test_every_instance_type_fits_its_machine_image(stack: Stack) -> None:
    """With any instance type, nodes boot an image for its processor."""
    types = {
        "m7i.large": "AL2023_x86_64_STANDARD",
        "t3.medium": "AL2023_x86_64_STANDARD",
        "m7g.large": "AL2023_ARM_64_STANDARD",
        "t4g.medium": "AL2023_ARM_64_STANDARD",
    }
    assert stack.template["Mappings"]["Node"] == {name: {"AmiType": image} for name, image in types.items()}
    nodes = stack.resources["Nodes"]
    assert nodes["InstanceTypes"] == [stack.parameters["NodeInstanceType"]]
    assert nodes["AmiType"] == types[stack.parameters["NodeInstanceType"]]


def test_nodes_hide_their_role_from_pods(stack: Stack) -> None:
    """The metadata service gives pods no node credentials; disks are encrypted and deleted with the node."""
    latest = {"Id": "NodeLaunchTemplate", "Version": "NodeLaunchTemplate.LatestVersionNumber"}
    assert stack.resources["Nodes"]["LaunchTemplate"] == latest
    launch = stack.resources["NodeLaunchTemplate"]["LaunchTemplateData"]
    assert launch["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
    disk = {"VolumeType": "gp3", "VolumeSize": 20, "Encrypted": True, "DeleteOnTermination": True}
    # /dev/xvda is the root disk of Amazon Linux 2023.
    assert launch["BlockDeviceMappings"] == [{"DeviceName": "/dev/xvda", "Ebs": disk}]
    tags = _named(f"{STACK}-node")
    assert launch["TagSpecifications"] == [
        {"ResourceType": "instance", "Tags": tags},
        {"ResourceType": "volume", "Tags": tags},
    ]


def test_addons_come_in_an_order_that_works(stack: Stack) -> None:
    """All five add-ons exist; those that make nodes ready come before them, those that need nodes after."""
    assert stack.resources["Cluster"]["BootstrapSelfManagedAddons"] is False  # nothing but these brings a network
    addons = stack.of_type("EKS::Addon")
    assert {addon["ClusterName"] for addon in addons.values()} == {STACK}
    before = {"vpc-cni", "kube-proxy", "eks-pod-identity-agent"}
    after = {"coredns", "metrics-server"}
    names = {addon["AddonName"]: name for name, addon in addons.items()}
    assert names.keys() == before | after
    assert {names[addon] for addon in before} | {"PrivateRoute1", "PrivateRoute2"} <= stack.waits_for["Nodes"]
    assert all("Nodes" in stack.waits_for[names[addon]] for addon in after)


def test_network_policies_are_enforced(stack: Stack) -> None:
    """The network add-on enforces NetworkPolicies, which is not its default."""
    assert json.loads(stack.resources["NetworkAddon"]["ConfigurationValues"]) == {"enableNetworkPolicy": "true"}


# ---------------------------------------------------------------------------------------------- identities


def _trust(service: str, action: Any = "sts:AssumeRole", condition: dict[str, str] | None = None) -> Any:
    """The whole trust policy of a role that only one service may assume."""
    statement = {"Effect": "Allow", "Principal": {"Service": f"{service}.amazonaws.com"}, "Action": action}
    if condition:
        statement["Condition"] = {"StringEquals": condition}
    return {"Version": "2012-10-17", "Statement": [statement]}


def _pod_trust(account: str) -> Any:
    """The trust policy of a role that Pod Identity gives to one service account in this cluster."""
    tags = {"eks-cluster-name": STACK, "kubernetes-namespace": "kube-system", "kubernetes-service-account": account}
    condition = {f"aws:RequestTag/{key}": value for key, value in tags.items()}
    return _trust("pods.eks", ["sts:AssumeRole", "sts:TagSession"], condition)


def test_each_role_is_taken_by_its_owner_alone(stack: Stack) -> None:
    """Each role trusts one service, for one program if it is for pods, and has AWS's policies for its job."""
    arn = "arn:aws:iam::aws:policy/"
    nodes = [f"{arn}AmazonEKSWorkerNodePolicy", f"{arn}AmazonEC2ContainerRegistryPullOnly"]
    expected = {
        "FlowLogRole": (_trust("vpc-flow-logs", condition={"aws:SourceAccount": ACCOUNT}), []),
        "ClusterRole": (_trust("eks"), [f"{arn}AmazonEKSClusterPolicy"]),
        "NodeRole": (_trust("ec2"), nodes),
        "NetworkRole": (_pod_trust("aws-node"), [f"{arn}AmazonEKS_CNI_Policy"]),
        "LoadBalancerControllerRole": (_pod_trust("aws-load-balancer-controller"), []),
    }
    for name, role in stack.of_type("IAM::Role").items():
        assert (role["AssumeRolePolicyDocument"], role.get("ManagedPolicyArns", [])) == expected[name]


def test_programs_get_the_roles_made_for_them(stack: Stack) -> None:
    """Cluster, nodes, network add-on and load balancer controller use their own roles."""
    assert stack.resources["Cluster"]["RoleArn"] == "ClusterRole.Arn"
    assert stack.resources["Nodes"]["NodeRole"] == "NodeRole.Arn"
    assert stack.resources["NetworkAddon"]["PodIdentityAssociations"] == [
        {"ServiceAccount": "aws-node", "RoleArn": "NetworkRole.Arn"}
    ]
    assert stack.resources["LoadBalancerControllerIdentity"] == {
        "ClusterName": STACK,
        "Namespace": "kube-system",
        "ServiceAccount": "aws-load-balancer-controller",
        "RoleArn": "LoadBalancerControllerRole.Arn",
    }


# ARNs of load balancing and of EC2, in the region and account of the stack.
ELB, EC2 = (f"arn:aws:{service}:{REGIONS[0]}:{ACCOUNT}:" for service in ("elasticloadbalancing", "ec2"))
BALANCER, TARGETS = f"{ELB}loadbalancer/app/<name>/<id>", f"{ELB}targetgroup/<name>/<id>"
LISTENER, RULE = f"{ELB}listener/app/<name>/<id>/<id>", f"{ELB}listener-rule/app/<name>/<id>/<id>/<id>"
GROUP = f"{EC2}security-group/<id>"

SERVICE = "elasticloadbalancing.amazonaws.com"
TAG = "elbv2.k8s.aws/cluster"
OWN, NEW = {f"aws:ResourceTag/{TAG}": STACK}, {f"aws:RequestTag/{TAG}": STACK}


def _new(service: str, action: str) -> dict[str, str]:
    return {**NEW, f"{service}:CreateAction": action}


def _elb(actions: str) -> str:
    return " ".join(f"elasticloadbalancing:{action}" for action in actions.split())


def _ec2(actions: str) -> str:
    return " ".join(f"ec2:{action}" for action in actions.split())


# Every call that a role must be able to make. All others must be refused.
CALLS: dict[str, list[Call]] = {
    "FlowLogRole": calls("logs:CreateLogStream logs:DescribeLogStreams logs:PutLogEvents", "FlowLogGroup.Arn"),
    # What the AWS Load Balancer Controller 3.5 calls for an Application Load Balancer whose targets are pods. Some
    # descriptions it never asks for itself: the load balancing service does, in its caller's name.
    "LoadBalancerControllerRole": [
        *calls("acm:DescribeCertificate acm:ListCertificates", "*"),
        *calls(
            _ec2("""DescribeAccountAttributes DescribeAddresses DescribeAvailabilityZones DescribeInstances
                DescribeInternetGateways DescribeNetworkInterfaces DescribeRouteTables DescribeSecurityGroups
                DescribeSubnets DescribeTags DescribeVpcPeeringConnections DescribeVpcs GetSecurityGroupsForVpc"""),
            "*",
        ),
        *calls(
            _elb("""DescribeCapacityReservation DescribeListenerAttributes DescribeListenerCertificates
                DescribeListeners DescribeLoadBalancerAttributes DescribeLoadBalancers DescribeRules
                DescribeSSLPolicies DescribeTags DescribeTargetGroupAttributes DescribeTargetGroups
                DescribeTargetHealth DescribeTrustStores"""),
            "*",
        ),
        Call(
            "iam:CreateServiceLinkedRole",
            f"arn:aws:iam::{ACCOUNT}:role/aws-service-role/{SERVICE}/<name>",
            {"iam:AWSServiceName": SERVICE},
        ),
        # It makes what carries this cluster's tag, and tags what it makes ...
        *calls(_elb("CreateLoadBalancer"), BALANCER, NEW),
        *calls(_elb("CreateTargetGroup"), TARGETS, NEW),
        *calls(_elb("AddTags"), BALANCER, _new("elasticloadbalancing", "CreateLoadBalancer")),
        *calls(_elb("AddTags"), TARGETS, _new("elasticloadbalancing", "CreateTargetGroup")),
        *calls(_elb("AddTags"), LISTENER, _new("elasticloadbalancing", "CreateListener")),
        *calls(_elb("AddTags"), RULE, _new("elasticloadbalancing", "CreateRule")),
        *calls(_ec2("CreateSecurityGroup"), f"{EC2}vpc/Vpc"),
        *calls(_ec2("CreateSecurityGroup"), GROUP, NEW),
        *calls(_ec2("CreateTags"), GROUP, _new("ec2", "CreateSecurityGroup")),
        # ... and changes what carries it, but for the tag itself.
        *calls(
            _elb("""CreateListener DeleteLoadBalancer ModifyCapacityReservation ModifyLoadBalancerAttributes
                SetIpAddressType SetSecurityGroups SetSubnets"""),
            BALANCER,
            OWN,
        ),
        *calls(
            _elb("""DeleteTargetGroup DeregisterTargets ModifyTargetGroup ModifyTargetGroupAttributes
                RegisterTargets"""),
            TARGETS,
            OWN,
        ),
        *calls(
            _elb("""AddListenerCertificates CreateRule DeleteListener ModifyListener ModifyListenerAttributes
                RemoveListenerCertificates"""),
            LISTENER,
            OWN,
        ),
        *calls(_elb("DeleteRule ModifyRule SetRulePriorities"), RULE, OWN),
        *calls(_elb("AddTags RemoveTags"), [BALANCER, TARGETS, LISTENER, RULE], OWN),
        *calls(
            _ec2("""AuthorizeSecurityGroupIngress CreateTags DeleteSecurityGroup DeleteTags
                RevokeSecurityGroupIngress"""),
            GROUP,
            OWN,
        ),
        # Load balancers must reach the pods, whose security group EKS created.
        *calls(
            _ec2("AuthorizeSecurityGroupIngress RevokeSecurityGroupIngress"),
            f"{EC2}security-group/Cluster.ClusterSecurityGroupId",
        ),
    ],
}


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a role's policy decides about its calls."""

    refused: list[Call]  # that must be allowed
    allowed: list[Call]  # that differ from those in one point
    needless: set[Part]  # what allows none of the calls


@functools.cache
def _beside(role: str) -> list[Call]:
    beside = [call for wanted in CALLS[role] for call in neighbours(wanted) if call not in CALLS[role]]
    # The tag that decides stays as it is, even on what is the controller's own.
    retagging = [call for call in CALLS[role] if call.action.endswith("Tags") and call.context]
    return beside + [Call(call.action, call.resource, OWN | NEW) for call in retagging]


@functools.cache
def _judge(role: str, policies: str) -> Judgement:
    (policy,) = json.loads(policies)
    assert policy["PolicyDocument"]["Version"] == "2012-10-17"
    statements = policy["PolicyDocument"]["Statement"]
    wanted = CALLS[role]
    grants = [granted_by(statements, call) for call in wanted]
    return Judgement(
        refused=[call for call, grant in zip(wanted, grants, strict=True) if not grant],
        allowed=[call for call in _beside(role) if granted_by(statements, call)],
        needless=parts(statements) - {part for grant in grants if len(grant) == 1 for part in grant[0]},
    )


def _judgements(stack: Stack) -> list[Judgement]:
    return [_judge(role, json.dumps(stack.resources[role]["Policies"])) for role in CALLS]


def test_roles_may_do_their_work(stack: Stack) -> None:
    """Every call that a program must make is allowed."""
    assert [judgement.refused for judgement in _judgements(stack)] == [[], []]


def test_roles_may_do_nothing_beside_it(stack: Stack) -> None:
    """A similar call for something else, in another region or account, or without the tag, is refused."""
    assert [judgement.allowed for judgement in _judgements(stack)] == [[], []]


def test_policies_say_nothing_without_need(stack: Stack) -> None:
    """Each statement, action, resource and condition allows one of the calls, so no policy allows more."""
    assert [judgement.needless for judgement in _judgements(stack)] == [set(), set()]


# ------------------------------------------------------------------------------------------------ database


def test_database_is_reached_from_the_cluster_only(stack: Stack) -> None:
    """The only way to the database is port 5432 from the cluster's security group; it can reach nothing itself."""
    assert stack.resources["Database"]["VPCSecurityGroups"] == ["DatabaseSecurityGroup.GroupId"]
    assert stack.resources["Database"]["Port"] == "5432"
    group = stack.resources["DatabaseSecurityGroup"]
    assert group["VpcId"] == "Vpc"
    ingress, egress = (
        [{key: rule[key] for key in rule if key != "Description"} for rule in group[f"SecurityGroup{direction}"]]
        for direction in ("Ingress", "Egress")
    )
    source = {"SourceSecurityGroupId": "Cluster.ClusterSecurityGroupId"}
    assert ingress == [{"IpProtocol": "tcp", "FromPort": 5432, "ToPort": 5432, **source}]
    assert egress == [{"IpProtocol": "-1", "CidrIp": "127.0.0.1/32"}]


def test_database_is_in_private_subnets(stack: Stack) -> None:
    """The database has no public address, and is in the private subnets of all zones."""
    database = stack.resources["Database"]
    assert database["PubliclyAccessible"] is False
    assert database["DBSubnetGroupName"] == "DatabaseSubnets"
    assert stack.resources["DatabaseSubnets"]["SubnetIds"] == _numbered("PrivateSubnet", _zones(stack))


def test_database_runs_the_major_version_asked_for(stack: Stack) -> None:
    """RDS chooses the minor version; a snapshot keeps its own; a major one never changes without a command."""
    database = stack.resources["Database"]
    assert database["Engine"] == "postgres"
    assert database.get("EngineVersion") == (None if stack.parameters["DatabaseSnapshot"] else "15")
    assert database["DBInstanceClass"] == stack.parameters["DatabaseInstanceClass"]
    assert (database["AutoMinorVersionUpgrade"], database["AllowMajorVersionUpgrade"]) == (True, False)
    assert database["EngineLifecycleSupport"] == "open-source-rds-extended-support-disabled"


def test_database_speaks_tls_only(stack: Stack) -> None:
    """A connection without TLS is refused."""
    assert stack.resources["Database"]["DBParameterGroupName"] == "DatabaseParameters"
    parameters = stack.resources["DatabaseParameters"]
    family = f"postgres{stack.parameters['DatabaseVersion']}"
    assert (parameters["Family"], parameters["Parameters"]) == (family, {"rds.force_ssl": "1"})


def test_database_can_be_restored_from_a_snapshot(stack: Stack) -> None:
    """A new stack starts with an empty database of the right name, or with a snapshot's contents and owner."""
    database, snapshot = stack.resources["Database"], stack.parameters["DatabaseSnapshot"]
    assert database.get("DBSnapshotIdentifier") == (snapshot or None)
    assert database.get("DBName") == (None if snapshot else "mydb")
    assert database.get("MasterUsername") == (None if snapshot else "postgres")


def test_nothing_is_said_that_a_snapshot_decides() -> None:
    """With a snapshot, the template has none of the properties that CloudFormation's documentation then forbids."""
    schema = PROVIDER_SCHEMA_MANAGER.get_resource_schema(REGIONS[0], "AWS::RDS::DBInstance").schema
    (listed,) = re.findall(
        r"then don't specify the following properties:(.*?)\*Amazon Aurora\*",
        schema["properties"]["DBSnapshotIdentifier"]["description"],
        re.DOTALL,
    )
    forbidden = {name for name, only in re.findall(r"``(\w+)``( \(for an unencrypted snapshot\))?", listed) if not only}
    assert {"DBName", "MasterUsername"} <= forbidden
    stack = Stack(json.loads(_template()), {**REQUIRED, "DatabaseSnapshot": "messages-last"}, REGIONS[0])
    assert forbidden.isdisjoint(stack.resources["Database"])


def test_database_has_a_standby_unless_turned_off(stack: Stack) -> None:
    """A standby in a second zone takes over, unless a test stack asks for none."""
    assert stack.resources["Database"]["MultiAZ"] == stack.parameters["DatabaseMultiAz"]


def test_owners_password_is_made_and_kept_by_rds(stack: Stack) -> None:
    """The owner's password is in Secrets Manager, where RDS rotates it; no template or parameter has it."""
    assert stack.resources["Database"]["ManageMasterUserPassword"] is True


def test_database_outlives_the_stack(stack: Stack) -> None:
    """It is encrypted; deletion is refused until protection is off, and then leaves a snapshot and the backups."""
    database = stack.resources["Database"]
    assert database["DBInstanceIdentifier"] == STACK  # CloudFormation never replaces a resource with a fixed name
    wanted = {
        "StorageEncrypted": True,
        "DeletionProtection": True,
        "BackupRetentionPeriod": 14,
        "DeleteAutomatedBackups": False,
        "CopyTagsToSnapshot": True,
    }
    assert {name: database[name] for name in wanted} == wanted
    resource = stack.template["Resources"]["Database"]
    assert (resource["DeletionPolicy"], resource["UpdateReplacePolicy"]) == ("Snapshot", "Snapshot")
    others = [item for name, item in stack.template["Resources"].items() if name != "Database"]
    assert not any("DeletionPolicy" in item or "UpdateReplacePolicy" in item for item in others)


def test_database_grows_by_itself(stack: Stack) -> None:
    """Storage grows before it is full."""
    database = stack.resources["Database"]
    storage = (database["StorageType"], database["AllocatedStorage"], database["MaxAllocatedStorage"])
    assert storage == ("gp3", "20", 100)


def test_database_can_be_looked_into(stack: Stack) -> None:
    """Logs go to CloudWatch, and Performance Insights keeps its free week."""
    database = stack.resources["Database"]
    assert database["EnableCloudwatchLogsExports"] == ["postgresql", "upgrade"]
    assert (database["EnablePerformanceInsights"], database["PerformanceInsightsRetentionPeriod"]) == (True, 7)


# ------------------------------------------------------------------------------------------------ registry


def test_registry_scans_and_never_changes_an_image(stack: Stack) -> None:
    """Images are scanned on push, tags are immutable, and images do not block the stack's deletion."""
    repository = stack.resources["Repository"]
    assert repository["ImageScanningConfiguration"] == {"ScanOnPush": True}
    assert (repository["ImageTagMutability"], repository["EmptyOnDelete"]) == ("IMMUTABLE", True)


def test_registry_keeps_enough_versions_to_roll_back_to(stack: Stack) -> None:
    """The last 50 versions stay: each has one tag, whatever the number of images behind it, and those go with it."""
    rules = json.loads(stack.resources["Repository"]["LifecyclePolicy"]["LifecyclePolicyText"])["rules"]
    assert [(rule["rulePriority"], rule["selection"], rule["action"]) for rule in rules] == [
        (
            1,
            {"tagStatus": "untagged", "countType": "sinceImagePushed", "countUnit": "days", "countNumber": 7},
            {"type": "expire"},
        ),
        (
            2,
            {"tagStatus": "tagged", "tagPatternList": ["*"], "countType": "imageCountMoreThan", "countNumber": 50},
            {"type": "expire"},
        ),
    ]


# ------------------------------------------------------------------------------------------------- the faults


def _architecture_tests() -> Iterator[Callable[[Stack], None]]:
    for name, function in list(globals().items()):
        if name.startswith("test_") and list(inspect.signature(function).parameters) == ["stack"]:
            yield function


def architecture_finding(template: dict[str, Any]) -> str | None:
    """The first architecture test that fails for a template, or CloudFormation's reason to refuse it."""
    for variant in VARIANTS.values():
        try:
            stack = Stack(template, {**REQUIRED, **variant}, REGIONS[0])
            for test in _architecture_tests():
                test(stack)
        except (TemplateError, AssertionError, LookupError, TypeError, ValueError, pytest.fail.Exception) as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
    return None


@pytest.mark.parametrize("kind", faults.KINDS, ids=lambda kind: kind.__name__)
def test_faults_are_found(kind: Callable[[Any], Iterator[faults.Fault]]) -> None:
    """No template with a fault of this kind passes."""
    unseen = [fault for fault in kind(json.loads(_template())) if not architecture_finding(fault.template)]
    # The validator covers what the architecture leaves open, such as a version that does not exist.
    assert [fault.name for fault in unseen if not validation_findings(json.dumps(fault.template))] == []


# Each Guard rule, and the change that it must refuse, whether or not other checks do.
RULE_FAULTS: dict[str, tuple[str, Any]] = {
    "DATABASE_IS_PRIVATE": ("Database PubliclyAccessible", True),
    "DATABASE_IS_ENCRYPTED": ("Database StorageEncrypted", False),
    "DATABASE_PASSWORD_IS_MANAGED": ("Database MasterUserPassword", "correct-horse"),
    "DATABASE_SPEAKS_TLS_ONLY": ("DatabaseParameters Parameters rds.force_ssl", "0"),
    "DATABASE_SURVIVES_THE_STACK": ("Database DeletionProtection", False),
    "CLUSTER_IS_NOT_OPEN": ("Cluster ResourcesVpcConfig PublicAccessCidrs", ["0.0.0.0/0"]),
    "CLUSTER_SECRETS_ARE_ENCRYPTED": ("Cluster EncryptionConfig", []),
    "CLUSTER_LOGS_ARE_KEPT": ("Cluster Logging ClusterLogging EnabledTypes", [{"Type": "api"}]),
    "NODES_HIDE_THEIR_ROLE": ("NodeLaunchTemplate LaunchTemplateData MetadataOptions HttpPutResponseHopLimit", 2),
    "NOTHING_LETS_THE_WORLD_IN": (
        "DatabaseSecurityGroup SecurityGroupIngress",
        [{"IpProtocol": "tcp", "FromPort": 5432, "ToPort": 5432, "CidrIp": "0.0.0.0/0"}],
    ),
    "ROLES_NAME_THEIR_ACTIONS": (
        "NodeRole ManagedPolicyArns",
        [{"Fn::Sub": "arn:${AWS::Partition}:iam::aws:policy/AdministratorAccess"}],
    ),
    "IMAGES_DO_NOT_CHANGE": ("Repository ImageTagMutability", "MUTABLE"),
}


def test_every_guard_rule_fires() -> None:
    """Each rule in aws/rules.guard refuses a template with its fault."""
    assert set(re.findall(r"^rule (\w+)", RULES.read_text(), re.MULTILINE)) == set(RULE_FAULTS)
    for rule, (path, value) in RULE_FAULTS.items():
        template = json.loads(_template())
        resource, *way, last = path.split()
        place = template["Resources"][resource]["Properties"]
        for key in way:
            place = place[key]
        place[last] = value
        assert rule in {found.split()[0] for found in validation_findings(json.dumps(template), regions=REGIONS[:1])}
