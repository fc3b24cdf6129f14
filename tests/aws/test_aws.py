"""aws/template.yaml: linted, validated and simulated. Nothing here reaches AWS.

Three checks, because each sees what the others cannot: cfn-lint knows the schemas and the actions of IAM;
cloudformation-validate knows them too and runs the rules of rules.guard; the simulation makes every resource on moto
and the tests with the fixture `stack` ask the services whether the architecture is there. The last test puts one
deliberate fault after the other (faults.py) into the template and expects one of these checks to find it.
"""

from __future__ import annotations

import functools
import inspect
import ipaddress
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("moto", reason="the extra `aws` is not installed: make .venv/.aws")

import botocore.exceptions
import cloudformation_validate as validator
from cfnlint.api import ManualArgs, lint
from cfnlint.decode import cfn_yaml
from faults import FAULTS, Fault
from simulation import Observed, SimulationError, parameter_values, simulate

REPOSITORY = Path(__file__).parents[2]
TEMPLATE = REPOSITORY / "aws/template.yaml"
RULES = REPOSITORY / "aws/rules.guard"
REGIONS = ["eu-central-1", "us-east-1"]
ANYWHERE = {"0.0.0.0/0", "::/0"}

# What a person may deploy: the defaults, the largest stack, and the cheapest for a test.
REQUIRED = {"PublicAccessCidrs": "203.0.113.7/32"}
VARIANTS: dict[str, dict[str, str]] = {
    "three zones": {
        "ZoneCount": "3",
        "NodeInstanceType": "m7g.large",
        "PublicAccessCidrs": "203.0.113.7/32,198.51.100.0/24",
    },
    "defaults": {},
    "test stack": {
        "SingleNatGateway": "true",
        "DatabaseMultiAz": "false",
        "NodeInstanceType": "t3.medium",
        "VpcCidr": "172.20.0.0/16",
        "Zones": "eu-central-1a,eu-central-1c",
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
    """What cfn-lint says, warnings included, for both regions."""
    return [str(match) for match in lint(text, config=ManualArgs(regions=REGIONS))]


def validation_findings(text: str, instance_class: str = "", regions: list[str] = REGIONS) -> list[str]:
    """What cloudformation-validate says from warnings on, the rules of aws/rules.guard included."""
    if not instance_class:
        instance_class = json.loads(text)["Parameters"]["DatabaseInstanceClass"]["Default"]
    findings = set()
    for region in regions:
        config = validator.ValidateConfig(
            severity_level=validator.Severity.WARN,
            # The value of a parameter is looked at only when it is given. (Those that conditions use are not given:
            # the validator tries both sides of each.)
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
            where = found.entity.logical_id if found.entity else "template"
            findings.add(f"{found.rule_id} {where}: {found.message}")
    return sorted(findings)


@functools.cache
def _variant(name: str) -> Observed:
    return simulate(json.loads(_template()), {**REQUIRED, **VARIANTS[name]}, REGIONS[0])


@pytest.fixture(params=list(VARIANTS))
def stack(request: pytest.FixtureRequest) -> Observed:
    return _variant(request.param)


def _tags(item: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in item.get("Tags", [])}


def _routes(stack: Observed, subnet: str) -> dict[str, dict[str, Any]]:
    """Routes of a subnet by destination: of the table that it is associated with, else of the VPC's main table."""
    for main in (False, True):
        for table in stack.route_tables:
            for association in table["Associations"]:
                if association.get("SubnetId") == subnet or (main and association.get("Main")):
                    return {
                        route["DestinationCidrBlock"]: route
                        for route in table["Routes"]
                        if "DestinationCidrBlock" in route
                    }
    raise AssertionError(f"no route table for {subnet}")


def _is_public(stack: Observed, subnet: str) -> bool:
    return str(_routes(stack, subnet).get("0.0.0.0/0", {}).get("GatewayId", "")).startswith("igw-")


def _private_subnets(stack: Observed) -> set[str]:
    return {subnet for subnet in stack.subnets if not _is_public(stack, subnet)}


def _zones(stack: Observed, subnets: set[str]) -> set[str]:
    return {stack.subnets[subnet]["AvailabilityZone"] for subnet in subnets}


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


# ------------------------------------------------------------------------------------- the file as a whole


def test_linter_finds_nothing() -> None:
    """cfn-lint finds nothing to say in either region."""
    assert lint_findings(TEMPLATE.read_text()) == []


def test_validator_finds_nothing() -> None:
    """AWS's validator and the project's own Guard rules find nothing to say in either region."""
    assert validation_findings(_template()) == []


@pytest.mark.parametrize(
    "instance_class", json.loads(_template())["Parameters"]["DatabaseInstanceClass"]["AllowedValues"]
)
def test_every_database_class_exists(instance_class: str) -> None:
    """Whatever class of the database is chosen, RDS has it for this engine version in both regions."""
    assert validation_findings(_template(), instance_class) == []


def test_template_needs_no_bucket() -> None:
    """`aws cloudformation deploy` takes the file as it is: it refuses more than 51,200 bytes without an S3 bucket."""
    assert len(TEMPLATE.read_bytes()) <= 51_200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PublicAccessCidrs", "0.0.0.0/0"),
        ("PublicAccessCidrs", "203.0.113.7/32,0.0.0.0/0"),
        ("PublicAccessCidrs", "0.0.0.0/1,128.0.0.0/1"),
        ("PublicAccessCidrs", "203.0.113.7"),
        ("VpcCidr", "8.8.0.0/16"),
        ("VpcCidr", "10.0.0.0/24"),
        ("ZoneCount", "1"),
        ("ZoneCount", "4"),
        ("NodeInstanceType", "t2.nano"),
        ("DatabaseMultiAz", "maybe"),
    ],
)
def test_parameters_refuse_what_cannot_work(name: str, value: str) -> None:
    """A value that would open the cluster or cannot become a stack is refused before anything is made."""
    template = json.loads(_template())
    parameter_values(template, REQUIRED)
    with pytest.raises(SimulationError, match=name):
        parameter_values(template, {**REQUIRED, name: value})


def test_parameters_are_few_and_explained() -> None:
    """Every parameter says what it is for, and all but the networks of the administrators have a default."""
    parameters = json.loads(_template())["Parameters"]
    assert len(parameters) < 10
    assert all(parameter["Description"] for parameter in parameters.values())
    assert all("AllowedValues" in parameter or "AllowedPattern" in parameter for parameter in parameters.values())
    assert [name for name, parameter in parameters.items() if "Default" not in parameter] == ["PublicAccessCidrs"]


# ------------------------------------------------------------------------------------------------- network


def test_each_zone_has_a_public_and_a_private_subnet(stack: Observed) -> None:
    """The stack spans as many zones as asked for, with one public and one private subnet in each."""
    assert len(stack.subnets) == 2 * int(stack.parameters["ZoneCount"])
    private = _private_subnets(stack)
    public = set(stack.subnets) - private
    assert len(_zones(stack, private)) == len(_zones(stack, public)) == int(stack.parameters["ZoneCount"])
    assert _zones(stack, private) == _zones(stack, public)


def test_chosen_zones_are_used(stack: Observed) -> None:
    """Zones that are named are the ones used."""
    chosen = [zone for zone in stack.parameters["Zones"] if zone]
    assert not chosen or _zones(stack, set(stack.subnets)) == set(chosen)


def test_subnets_are_large_and_apart(stack: Observed) -> None:
    """A private subnet has room for thousands of pods, and no two subnets overlap."""
    vpc = ipaddress.ip_network(stack.vpc["CidrBlock"])
    assert stack.vpc["CidrBlock"] == stack.parameters["VpcCidr"]
    networks = [ipaddress.ip_network(subnet["CidrBlock"]) for subnet in stack.subnets.values()]
    assert all(network.prefixlen <= 20 for network in networks)
    assert sum(network.num_addresses for network in networks) <= vpc.num_addresses / 2  # half is free for later
    assert not any(a.overlaps(b) for i, a in enumerate(networks) for b in networks[:i])


def test_private_subnets_leave_through_their_own_zone(stack: Observed) -> None:
    """A private subnet reaches the Internet through a NAT gateway of its zone, or the single one if asked for."""
    gateways = {item["NatGatewayId"]: item for item in stack.nat_gateways.values()}
    single = stack.parameters["SingleNatGateway"] == "true"
    assert len(gateways) == (1 if single else int(stack.parameters["ZoneCount"]))
    assert all(_is_public(stack, gateway["SubnetId"]) for gateway in gateways.values())
    for subnet in _private_subnets(stack):
        gateway = gateways[_routes(stack, subnet)["0.0.0.0/0"]["NatGatewayId"]]
        if not single:
            assert _zones(stack, {gateway["SubnetId"]}) == _zones(stack, {subnet})


def test_internet_gateway_is_attached_first(stack: Observed) -> None:
    """The VPC has its gateway before a route or a public address needs it, so that creation never fails by chance."""
    assert [item["VpcId"] for gateway in stack.internet_gateways for item in gateway["Attachments"]] == [
        stack.vpc["VpcId"]
    ]
    assert "InternetGatewayAttachment" in stack.waits_for["PublicRoute"]
    for address in stack.of_type("AWS::EC2::EIP"):
        assert "InternetGatewayAttachment" in stack.waits_for[address]


def test_load_balancers_find_their_subnets(stack: Observed) -> None:
    """Public subnets are tagged for load balancers that face the Internet, private ones for internal load balancers."""
    private = _private_subnets(stack)
    for name, subnet in stack.subnets.items():
        expected = "kubernetes.io/role/internal-elb" if name in private else "kubernetes.io/role/elb"
        assert [key for key in _tags(subnet) if key.startswith("kubernetes.io/role/")] == [expected]
        assert _tags(subnet)[expected] == "1"


def test_no_machine_gets_a_public_address(stack: Observed) -> None:
    """No subnet gives an address of the Internet to what starts in it."""
    assert not any(subnet["MapPublicIpOnLaunch"] for subnet in stack.subnets.values())


def test_names_resolve_inside_the_vpc(stack: Observed) -> None:
    """DNS support and host names are on, without which private endpoints do not resolve."""
    assert stack.vpc_attributes == {"enableDnsSupport": True, "enableDnsHostnames": True}


def test_image_layers_avoid_the_nat_gateways(stack: Observed) -> None:
    """Every private subnet has the free way to S3, where ECR keeps images."""
    (endpoint,) = stack.endpoints
    assert endpoint["ServiceName"] == f"com.amazonaws.{stack.region}.s3"
    assert endpoint["VpcEndpointType"] == "Gateway"
    tables = {
        association["SubnetId"]: table["RouteTableId"]
        for table in stack.route_tables
        for association in table["Associations"]
        if "SubnetId" in association
    }
    assert set(endpoint["RouteTableIds"]) == {tables[subnet] for subnet in _private_subnets(stack)}


def test_traffic_is_logged(stack: Observed) -> None:
    """All traffic of the VPC is logged, into a group that forgets after a while, by a role that may do just that."""
    (flow_log,) = stack.flow_logs
    assert flow_log["ResourceId"] == stack.vpc["VpcId"]
    assert flow_log["TrafficType"] == "ALL"
    group = stack.log_groups[flow_log["LogGroupName"]]
    assert 7 <= group["retentionInDays"] <= 365
    (role,) = (role for role in stack.roles.values() if role["arn"] == flow_log["DeliverLogsPermissionArn"])
    (trust,) = role["trust"]["Statement"]
    assert trust["Principal"] == {"Service": "vpc-flow-logs.amazonaws.com"}
    assert trust["Condition"] == {"StringEquals": {"aws:SourceAccount": "123456789012"}}
    (statement,) = role["inline"]
    assert {"logs:CreateLogStream", "logs:PutLogEvents"} <= set(statement["Action"])
    assert statement["Resource"] == group["arn"]


def test_nobody_lets_the_world_in(stack: Observed) -> None:
    """No security group of the stack has a rule that admits all addresses."""
    for group in stack.security_groups.values():
        for rule in group["IpPermissions"]:
            assert not ANYWHERE & {item["CidrIp"] for item in rule.get("IpRanges", [])}
            assert not ANYWHERE & {item["CidrIpv6"] for item in rule.get("Ipv6Ranges", [])}


# ------------------------------------------------------------------------------------------------- cluster


def test_cluster_is_private_inside_and_limited_outside(stack: Observed) -> None:
    """Nodes reach the control plane inside the VPC; from outside only the networks that were named do."""
    network = stack.cluster["resourcesVpcConfig"]
    assert network["endpointPrivateAccess"] is True
    assert network["publicAccessCidrs"] == stack.parameters["PublicAccessCidrs"]
    assert not ANYWHERE & set(network["publicAccessCidrs"])
    assert set(network["subnetIds"]) == _private_subnets(stack)


def test_cluster_access_is_by_entries_only(stack: Observed) -> None:
    """Access is decided by EKS access entries alone, and whoever makes the stack can use the cluster."""
    (request,) = stack.of_type("AWS::EKS::Cluster").values()
    assert request["AccessConfig"] == {
        "AuthenticationMode": "API",
        "BootstrapClusterCreatorAdminPermissions": True,
    }


def test_cluster_encrypts_secrets_with_a_rotating_key(stack: Observed) -> None:
    """Kubernetes Secrets are encrypted with a key of the stack, which KMS renews every year."""
    (encryption,) = stack.cluster["encryptionConfig"]
    assert encryption["resources"] == ["secrets"]
    assert stack.keys[encryption["provider"]["keyArn"]]["rotation"] is True


def test_cluster_logs_are_complete_and_end(stack: Observed) -> None:
    """All five control plane logs are kept, in a group that was there first and so forgets after a while."""
    (logging,) = (item for item in stack.cluster["logging"]["clusterLogging"] if item["enabled"])
    assert set(logging["types"]) == {"api", "audit", "authenticator", "controllerManager", "scheduler"}
    group = f"/aws/eks/{stack.cluster['name']}/cluster"
    assert 7 <= stack.log_groups[group]["retentionInDays"] <= 365
    (cluster,) = stack.of_type("AWS::EKS::Cluster")
    assert {name for name, value in stack.ids.items() if value == group} <= stack.waits_for[cluster]


def test_cluster_and_nodes_have_one_version(stack: Observed) -> None:
    """Control plane and nodes run the version asked for, and never grow into extended support."""
    (request,) = stack.of_type("AWS::EKS::Cluster").values()
    (nodes,) = stack.nodegroups
    assert stack.cluster["version"] == nodes["version"] == stack.parameters["KubernetesVersion"]
    assert request["UpgradePolicy"] == {"SupportType": "STANDARD"}


def test_cluster_role_is_the_services(stack: Observed) -> None:
    """Only EKS takes the cluster's role, with the policy that AWS manages for it."""
    (role,) = (role for role in stack.roles.values() if role["arn"] == stack.cluster["roleArn"])
    (trust,) = role["trust"]["Statement"]
    assert (trust["Principal"], trust["Action"]) == ({"Service": "eks.amazonaws.com"}, "sts:AssumeRole")
    assert (role["managed"], role["inline"]) == (["AmazonEKSClusterPolicy"], [])


def test_nodes_are_private_and_in_every_zone(stack: Observed) -> None:
    """Nodes live in all private subnets and nowhere else, at least one for each zone."""
    (nodes,) = stack.nodegroups
    assert set(nodes["subnets"]) == _private_subnets(stack)
    scaling = nodes["scalingConfig"]
    assert scaling["minSize"] >= int(stack.parameters["ZoneCount"])
    assert scaling["minSize"] <= scaling["desiredSize"] < scaling["maxSize"]


@pytest.mark.parametrize("instance_type", json.loads(_template())["Parameters"]["NodeInstanceType"]["AllowedValues"])
def test_every_instance_type_fits_its_machine_image(instance_type: str) -> None:
    """Whatever instance type is chosen, nodes boot an image for its processor, and the output says what to build."""
    template = json.loads(_template())
    fits(simulate(template, {**REQUIRED, "NodeInstanceType": instance_type}, REGIONS[0]))


def fits(stack: Observed) -> None:
    """The machine image, the instance type and the platform that images are to be built for agree."""
    (nodes,) = stack.nodegroups
    assert nodes["instanceTypes"] == [stack.parameters["NodeInstanceType"]]
    (instance_type,) = stack.instance_types.values()
    (architecture,) = instance_type["ProcessorInfo"]["SupportedArchitectures"]
    assert (nodes["amiType"], stack.outputs["ImagePlatform"]) == {
        "x86_64": ("AL2023_x86_64_STANDARD", "linux/amd64"),
        "arm64": ("AL2023_ARM_64_STANDARD", "linux/arm64"),
    }[architecture]


def test_nodes_fit_their_machine_image(stack: Observed) -> None:
    """Nodes boot an image for their processor."""
    fits(stack)


def test_nodes_hide_their_role_from_pods(stack: Observed) -> None:
    """A pod cannot ask the metadata service for the node's credentials, and disks are encrypted."""
    (nodes,) = stack.nodegroups
    launch = stack.launch_templates[nodes["launchTemplate"]["id"]]
    assert launch["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
    assert [device["Ebs"]["Encrypted"] for device in launch["BlockDeviceMappings"]] == [True]
    assert launch["BlockDeviceMappings"][0]["DeviceName"] == "/dev/xvda"  # the root disk of Amazon Linux 2023


def test_nodes_may_join_and_pull_images_only(stack: Observed) -> None:
    """The nodes' role can join the cluster and pull images; network interfaces belong to the network add-on."""
    (nodes,) = stack.nodegroups
    (role,) = (role for role in stack.roles.values() if role["arn"] == nodes["nodeRole"])
    assert role["trust"]["Statement"][0]["Principal"] == {"Service": "ec2.amazonaws.com"}
    assert sorted(role["managed"]) == ["AmazonEC2ContainerRegistryPullOnly", "AmazonEKSWorkerNodePolicy"]
    assert role["inline"] == []


def test_addons_come_in_an_order_that_works(stack: Observed) -> None:
    """All five add-ons are there; those that make nodes ready come before them, those that need nodes after."""
    (request,) = stack.of_type("AWS::EKS::Cluster").values()
    assert request["BootstrapSelfManagedAddons"] is False  # so that nothing but these add-ons brings a network
    (nodes,) = stack.of_type("AWS::EKS::Nodegroup")
    addons = {addon["AddonName"]: name for name, addon in stack.of_type("AWS::EKS::Addon").items()}
    before = {"vpc-cni", "kube-proxy", "eks-pod-identity-agent"}
    after = {"coredns", "metrics-server"}
    assert set(addons) == before | after
    assert {addons[addon] for addon in before} <= stack.waits_for[nodes]
    assert all(nodes in stack.waits_for[addons[addon]] for addon in after)
    assert {"PrivateRoute1", "PrivateRoute2"} <= stack.waits_for[nodes]


def test_network_policies_are_enforced(stack: Observed) -> None:
    """The network add-on enforces NetworkPolicies, which it does not by default."""
    (addon,) = (addon for addon in stack.of_type("AWS::EKS::Addon").values() if addon["AddonName"] == "vpc-cni")
    assert json.loads(addon["ConfigurationValues"]) == {"enableNetworkPolicy": "true"}


# ---------------------------------------------------------------------------------------------- identities


def _identities(stack: Observed) -> dict[tuple[str, str], dict[str, Any]]:
    """Role by namespace and service account, for all that Pod Identity gives a role to."""
    roles = {role["arn"]: role for role in stack.roles.values()}
    identities = {
        (item["Namespace"], item["ServiceAccount"]): roles[item["RoleArn"]]
        for item in stack.of_type("AWS::EKS::PodIdentityAssociation").values()
    }
    for addon in stack.of_type("AWS::EKS::Addon").values():
        for item in addon.get("PodIdentityAssociations", []):
            identities["kube-system", item["ServiceAccount"]] = roles[item["RoleArn"]]
    return identities


def test_programs_have_identities_of_their_own(stack: Observed) -> None:
    """Each program that calls AWS has a role that Pod Identity gives to it alone, in this cluster alone."""
    identities = _identities(stack)
    assert set(identities) == {
        ("kube-system", "aws-node"),
        ("kube-system", "aws-load-balancer-controller"),
        ("external-secrets", "external-secrets"),
    }
    for (namespace, account), role in identities.items():
        (trust,) = role["trust"]["Statement"]
        assert trust["Principal"] == {"Service": "pods.eks.amazonaws.com"}
        assert sorted(trust["Action"]) == ["sts:AssumeRole", "sts:TagSession"]
        assert trust["Condition"] == {
            "StringEquals": {
                "aws:RequestTag/eks-cluster-name": stack.cluster["name"],
                "aws:RequestTag/kubernetes-namespace": namespace,
                "aws:RequestTag/kubernetes-service-account": account,
            }
        }
    assert identities["kube-system", "aws-node"]["managed"] == ["AmazonEKS_CNI_Policy"]


def test_no_role_may_do_everything(stack: Observed) -> None:
    """Roles name each action; a policy that AWS manages is one of those that EKS documents."""
    for role in stack.roles.values():
        assert not any("*" in action for statement in role["inline"] for action in _listed(statement["Action"]))
        assert all(name.startswith(("AmazonEKS", "AmazonEC2ContainerRegistryPullOnly")) for name in role["managed"])


def test_secret_reader_reads_one_secret(stack: Observed) -> None:
    """The operator that copies the password into the cluster can read that secret and no other."""
    (statement,) = _identities(stack)["external-secrets", "external-secrets"]["inline"]
    assert statement["Action"] == ["secretsmanager:GetSecretValue", "secretsmanager:DescribeSecret"]
    assert statement["Resource"] == stack.databases[0]["MasterUserSecret"]["SecretArn"]


# What the AWS Load Balancer Controller 3.5 calls for an Application Load Balancer whose targets are pods.
CONTROLLER_CALLS = {
    "ec2": """AuthorizeSecurityGroupIngress CreateSecurityGroup CreateTags DeleteSecurityGroup DeleteTags
        DescribeAvailabilityZones DescribeInstances DescribeNetworkInterfaces DescribeRouteTables
        DescribeSecurityGroups DescribeSubnets DescribeVpcs RevokeSecurityGroupIngress""",
    "elasticloadbalancing": """AddListenerCertificates AddTags CreateListener CreateLoadBalancer CreateRule
        CreateTargetGroup DeleteListener DeleteLoadBalancer DeleteRule DeleteTargetGroup DeregisterTargets
        DescribeListenerAttributes DescribeListenerCertificates DescribeListeners DescribeLoadBalancerAttributes
        DescribeLoadBalancers DescribeRules DescribeTags DescribeTargetGroupAttributes DescribeTargetGroups
        DescribeTargetHealth ModifyListener ModifyListenerAttributes ModifyLoadBalancerAttributes ModifyRule
        ModifyTargetGroup ModifyTargetGroupAttributes RegisterTargets RemoveListenerCertificates RemoveTags
        SetIpAddressType SetRulePriorities SetSecurityGroups SetSubnets""",
    "acm": "DescribeCertificate ListCertificates",
    "iam": "CreateServiceLinkedRole",
}


def test_load_balancer_controller_can_work(stack: Observed) -> None:
    """The controller has every action that it calls."""
    allowed = {
        action
        for statement in _identities(stack)["kube-system", "aws-load-balancer-controller"]["inline"]
        for action in _listed(statement["Action"])
    }
    needed = {f"{service}:{action}" for service, actions in CONTROLLER_CALLS.items() for action in actions.split()}
    assert needed - allowed == set()


def test_load_balancer_controller_touches_only_its_own(stack: Observed) -> None:
    """Whatever the controller makes or changes carries this cluster's tag, or is this VPC or this cluster's group."""
    tag = "elbv2.k8s.aws/cluster"
    mine = {f"aws:{kind}/{tag}": stack.cluster["name"] for kind in ("RequestTag", "ResourceTag")}
    account = f"{stack.region}:123456789012"
    for statement in _identities(stack)["kube-system", "aws-load-balancer-controller"]["inline"]:
        actions = {action.split(":")[1] for action in _listed(statement["Action"])}
        if all(re.match("Describe|List|Get", action) for action in actions):
            continue
        resources = _listed(statement["Resource"])
        equal = statement.get("Condition", {}).get("StringEquals", {})
        assert "*" not in resources
        if actions == {"CreateServiceLinkedRole"}:
            assert equal == {"iam:AWSServiceName": "elasticloadbalancing.amazonaws.com"}
        elif not equal:
            assert resources in (
                [f"arn:aws:ec2:{account}:vpc/{stack.vpc['VpcId']}"],
                [f"arn:aws:ec2:{account}:security-group/{stack.cluster_security_group}"],
            )
        else:
            assert equal.items() & mine.items()
        if actions & {"AddTags", "CreateTags"}:
            # The tag that decides can be put on what is being made, never on what others have made.
            creating = any(key.endswith(":CreateAction") for key in equal)
            null = statement["Condition"].get("Null", {})
            assert creating or null == {f"aws:RequestTag/{tag}": "true"}
            assert (f"aws:RequestTag/{tag}" if creating else f"aws:ResourceTag/{tag}") in equal


# ------------------------------------------------------------------------------------------------ database


def test_database_is_reached_from_the_cluster_only(stack: Observed) -> None:
    """The one way to the database is port 5432 from the security group of the cluster; it reaches nobody itself."""
    (database,) = stack.databases
    (member,) = database["VpcSecurityGroups"]
    group = stack.security_groups[member["VpcSecurityGroupId"]]
    (rule,) = group["IpPermissions"]
    assert (rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) == ("tcp", 5432, 5432)
    assert [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == [stack.cluster_security_group]
    assert not rule["IpRanges"]
    assert not rule.get("Ipv6Ranges")
    assert not rule.get("PrefixListIds")
    assert [item["CidrIp"] for rule in group["IpPermissionsEgress"] for item in rule["IpRanges"]] == ["127.0.0.1/32"]
    assert database["Endpoint"]["Port"] == 5432


def test_database_is_in_private_subnets(stack: Observed) -> None:
    """The database has no public address and lies in the private subnets of all zones."""
    (database,) = stack.databases
    assert database["PubliclyAccessible"] is False
    subnets = {item["SubnetIdentifier"] for item in database["DBSubnetGroup"]["Subnets"]}
    assert subnets == _private_subnets(stack)
    assert len(_zones(stack, subnets)) >= 2


def test_database_is_postgresql_15(stack: Observed) -> None:
    """The engine is PostgreSQL 15 with the database and the user that the services expect, its parameters fit it."""
    (database,) = stack.databases
    assert (database["Engine"], database["EngineVersion"].split(".")[0]) == ("postgres", "15")
    assert (database["DBName"], database["MasterUsername"]) == ("mydb", "postgres")
    assert database["AutoMinorVersionUpgrade"] is True
    (request,) = stack.of_type("AWS::RDS::DBInstance").values()
    assert request["AllowMajorVersionUpgrade"] is False
    (group,) = database["DBParameterGroups"]
    assert stack.parameter_group_families[group["DBParameterGroupName"]] == "postgres15"


def test_database_speaks_tls_only(stack: Observed) -> None:
    """A connection without TLS is refused."""
    (group,) = stack.databases[0]["DBParameterGroups"]
    assert stack.database_parameters[group["DBParameterGroupName"]] == {"rds.force_ssl": "1"}


def test_database_has_a_standby_unless_turned_off(stack: Observed) -> None:
    """A standby in a second zone takes over, and it is there unless a test stack asks for none."""
    assert stack.databases[0]["MultiAZ"] is (stack.parameters["DatabaseMultiAz"] == "true")
    assert stack.template["Parameters"]["DatabaseMultiAz"]["Default"] == "true"


def test_database_password_is_made_and_kept_by_rds(stack: Observed) -> None:
    """The password is in Secrets Manager, owned by RDS, which rotates it; template and parameters never see it."""
    (database,) = stack.databases
    secret = stack.secrets[database["MasterUserSecret"]["SecretArn"]]
    assert secret["OwningService"] == "rds"
    assert stack.outputs["DatabaseSecretArn"] == secret["ARN"]
    (request,) = stack.of_type("AWS::RDS::DBInstance").values()
    assert "MasterUserPassword" not in request


def test_database_is_encrypted_and_stays_readable(stack: Observed) -> None:
    """Disk, backups and snapshots are encrypted, with no key that goes away with the stack."""
    (database,) = stack.databases
    assert database["StorageEncrypted"] is True
    (request,) = stack.of_type("AWS::RDS::DBInstance").values()
    resources = stack.template["Resources"]
    for key in ("KmsKeyId", "PerformanceInsightsKMSKeyId"):
        mine = stack.keys.get(request.get(key, ""))
        assert mine is None or resources[mine["name"]]["DeletionPolicy"] == "Retain"


def test_database_outlives_the_stack(stack: Observed) -> None:
    """Deletion is refused until protection is taken off, then leaves a last snapshot and the daily backups."""
    (database,) = stack.databases
    assert database["DeletionProtection"] is True
    assert database["BackupRetentionPeriod"] >= 7
    assert database["CopyTagsToSnapshot"] is True
    ((name, request),) = stack.of_type("AWS::RDS::DBInstance").items()
    assert request["DeleteAutomatedBackups"] is False
    resource = stack.template["Resources"][name]
    assert (resource["DeletionPolicy"], resource["UpdateReplacePolicy"]) == ("Snapshot", "Snapshot")


def test_database_grows_by_itself(stack: Observed) -> None:
    """Storage grows before it is full."""
    (database,) = stack.databases
    assert database["StorageType"] == "gp3"
    assert database["MaxAllocatedStorage"] >= 2 * database["AllocatedStorage"]


def test_database_can_be_looked_into(stack: Observed) -> None:
    """Logs go to CloudWatch and Performance Insights keeps its free week."""
    (database,) = stack.databases
    assert set(database["EnabledCloudwatchLogsExports"]) == {"postgresql", "upgrade"}
    (request,) = stack.of_type("AWS::RDS::DBInstance").values()
    assert (request["EnablePerformanceInsights"], request["PerformanceInsightsRetentionPeriod"]) == (True, 7)


# ------------------------------------------------------------------------------------- registry and outputs


def test_registry_scans_and_never_changes_an_image(stack: Observed) -> None:
    """Images are scanned on push, a tag never moves, old images go, and none of them stops the stack's deletion."""
    (repository,) = stack.repositories
    assert repository["imageScanningConfiguration"] == {"scanOnPush": True}
    assert repository["imageTagMutability"] == "IMMUTABLE"
    rules = stack.lifecycle_policies[repository["repositoryName"]]["rules"]
    assert {rule["selection"]["tagStatus"] for rule in rules} == {"untagged", "any"}
    assert all(rule["action"] == {"type": "expire"} for rule in rules)
    (request,) = stack.of_type("AWS::ECR::Repository").values()
    assert request["EmptyOnDelete"] is True


def test_outputs_are_what_the_next_commands_take(stack: Observed) -> None:
    """The outputs name the cluster, the network, the registry, the database and its secret as they are."""
    assert stack.outputs == {
        "ClusterName": stack.cluster["name"],
        "KubeconfigCommand": f"aws eks update-kubeconfig --region {stack.region} --name {stack.cluster['name']}",
        "VpcId": stack.vpc["VpcId"],
        "RepositoryUri": stack.repositories[0]["repositoryUri"],
        "ImagePlatform": stack.outputs["ImagePlatform"],
        "DatabaseEndpoint": stack.databases[0]["Endpoint"]["Address"],
        "DatabaseSecretArn": stack.databases[0]["MasterUserSecret"]["SecretArn"],
    }


def test_names_are_consistent(stack: Observed) -> None:
    """Whatever shows a name in the console begins with the name of the stack, and no two of a kind share one."""
    for kind in (stack.subnets.values(), stack.nat_gateways.values()):
        names = [_tags(item)["Name"] for item in kind]
        assert all(name.startswith(f"{stack.cluster['name']}-") for name in names)
        assert len(set(names)) == len(names)


# --------------------------------------------------------------------------------------- deliberate faults


def _architecture_tests() -> Iterator[Callable[[Observed], None]]:
    for name, function in list(globals().items()):
        if name.startswith("test_") and list(inspect.signature(function).parameters) == ["stack"]:
            yield function


def simulation_findings(template: dict[str, Any]) -> list[str]:
    """Which tests of the architecture fail for a template, or why there is no stack to ask."""
    for variant in VARIANTS.values():
        try:
            stack = simulate(template, {**REQUIRED, **variant}, REGIONS[0])
        except (SimulationError, botocore.exceptions.ClientError, botocore.exceptions.ParamValidationError) as error:
            return [f"no stack: {error}"]
        findings = []
        for test in _architecture_tests():
            try:
                test(stack)
            except (AssertionError, LookupError, ValueError) as error:
                findings.append(f"{test.__name__}: {type(error).__name__}")
        if findings:
            return findings
    return []


# Each Guard rule and the fault that it is there for, whatever the other checks would say.
RULE_FAULTS = {
    "DATABASE_IS_PRIVATE": "database publicly accessible",
    "DATABASE_IS_ENCRYPTED": "storage in clear",
    "DATABASE_PASSWORD_IS_MANAGED": "password in the template",
    "DATABASE_SPEAKS_TLS_ONLY": "TLS not required",
    "DATABASE_SURVIVES_THE_STACK": "no deletion protection",
    "CLUSTER_IS_NOT_OPEN": "cluster open by default",
    "CLUSTER_SECRETS_ARE_ENCRYPTED": "secrets in clear in etcd",
    "CLUSTER_LOGS_ARE_KEPT": "no audit log",
    "NODES_HIDE_THEIR_ROLE": "pods can take the node's role",
    "NOTHING_LETS_THE_WORLD_IN": "5432 open to the world",
    "ROLES_NAME_THEIR_ACTIONS": "controller may do everything with load balancers",
    "IMAGES_DO_NOT_CHANGE": "tags can move",
}


def _with_fault(fault: Fault) -> dict[str, Any]:
    template: dict[str, Any] = json.loads(_template())
    fault.put_into(template)
    assert template != json.loads(_template())
    return template


def test_every_guard_rule_fires() -> None:
    """Each rule of aws/rules.guard refuses the template once the fault is in that it is there for."""
    assert set(re.findall(r"^rule (\w+)", RULES.read_text(), re.MULTILINE)) == set(RULE_FAULTS)
    faults = {fault.name: fault for fault in FAULTS}
    for rule, name in RULE_FAULTS.items():
        findings = validation_findings(json.dumps(_with_fault(faults[name])))
        assert rule in {finding.split()[0] for finding in findings}


def test_faults_are_many_and_different() -> None:
    """There are at least forty deliberate faults, and no two are the same."""
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40
    assert len({json.dumps(_with_fault(fault)) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_deliberate_fault_is_found(fault: Fault) -> None:
    """A template with this one fault does not pass."""
    template = _with_fault(fault)
    text = json.dumps(template)
    # From the fastest to the slowest, each asked only about what the ones before let pass.
    assert validation_findings(text, regions=REGIONS[:1]) or simulation_findings(template) or lint_findings(text)
