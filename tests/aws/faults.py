"""Deliberate faults for aws/template.yaml: each is one change that a person could make and a reviewer could miss.

A fault says where in the template it goes (a path of keys, `/` between them, numbers for items of a list) and what the
value becomes; `GONE` takes the key or the item away. The names of resources are the template's: a path that leads
nowhere is an error, so that no fault is silently without effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class _Gone:
    pass


GONE = _Gone()


@dataclass(frozen=True)
class Fault:
    """One or more changes that together make one fault."""

    name: str
    changes: tuple[tuple[str, Any], ...]

    def put_into(self, template: dict[str, Any]) -> None:
        """Change the template in place. Raises KeyError or IndexError where a path leads nowhere."""
        for path, value in self.changes:
            *parents, last = path.split("/")
            place: Any = template
            for key in parents:
                place = place[int(key)] if isinstance(place, list) else place[key]
            if value is GONE:
                del place[int(last) if isinstance(place, list) else last]
            elif isinstance(place, list):
                place[int(last) : int(last) + 1] = [value]
            else:
                place[last] = value


def _fault(name: str, *changes: Any) -> Fault:
    return Fault(name, tuple(zip(changes[::2], changes[1::2], strict=True)))


def _of(resource: str, path: str) -> str:
    return f"Resources/{resource}/Properties/{path.replace('.', '/')}"


_CONTROLLER = _of("LoadBalancerControllerRole", "Policies.0.PolicyDocument.Statement")
_CHANGE_OWN, _TAG, _RETAG = f"{_CONTROLLER}/4", f"{_CONTROLLER}/3", f"{_CONTROLLER}/5"
_TRUST = "AssumeRolePolicyDocument.Statement.0"
_FIRST_ZONE = {"Fn::Select": [0, {"Fn::GetAZs": ""}]}
_WORLD = {"IpProtocol": "tcp", "FromPort": 5432, "ToPort": 5432, "CidrIp": "0.0.0.0/0"}

FAULTS = [
    # network
    _fault(
        "one zone only",
        _of("PublicSubnet2", "AvailabilityZone"),
        _FIRST_ZONE,
        _of("PrivateSubnet2", "AvailabilityZone"),
        _FIRST_ZONE,
    ),
    _fault(
        "private subnet in another zone than its public one", _of("PrivateSubnet2", "AvailabilityZone"), _FIRST_ZONE
    ),
    _fault(
        "named zones ignored",
        _of("PublicSubnet2", "AvailabilityZone"),
        {"Fn::Select": [1, {"Fn::GetAZs": ""}]},
        _of("PrivateSubnet2", "AvailabilityZone"),
        {"Fn::Select": [1, {"Fn::GetAZs": ""}]},
    ),
    _fault("ELB tag missing", _of("PublicSubnet1", "Tags.1"), GONE),
    _fault("ELB tag misspelt", _of("PublicSubnet3", "Tags.1.Key"), "kubernetes.io/role/elbs"),
    _fault(
        "internal ELB tag on a public subnet", _of("PublicSubnet2", "Tags.1.Key"), "kubernetes.io/role/internal-elb"
    ),
    _fault("NAT gateway in a private subnet", _of("NatGateway1", "SubnetId"), {"Ref": "PrivateSubnet1"}),
    _fault("NAT gateways share an address", _of("NatGateway2", "SubnetId"), {"Ref": "PublicSubnet1"}),
    _fault("zone leaves through another zone's NAT", _of("PrivateRoute3", "NatGatewayId"), {"Ref": "NatGateway1"}),
    _fault("private subnet without a way out", "Resources/PrivateRoute2", GONE),
    _fault(
        "private subnet with the public routes",
        _of("PrivateRouteTableAssociation1", "RouteTableId"),
        {"Ref": "PublicRouteTable"},
    ),
    _fault("public subnet on the main route table", "Resources/PublicRouteTableAssociation2", GONE),
    _fault(
        "subnets overlap",
        _of("PrivateSubnet2", "CidrBlock"),
        {"Fn::Select": [3, {"Fn::Cidr": [{"Fn::GetAtt": ["Vpc", "CidrBlock"]}, 16, 12]}]},
    ),
    _fault(
        "private subnet too small for its pods",
        _of("PrivateSubnet2", "CidrBlock"),
        {"Fn::Select": [100, {"Fn::Cidr": [{"Fn::GetAtt": ["Vpc", "CidrBlock"]}, 128, 8]}]},
    ),
    _fault(
        "two subnets of one name", _of("PrivateSubnet2", "Tags.0.Value"), {"Fn::Sub": "${AWS::StackName}-private-1"}
    ),
    _fault("public addresses by default", _of("PublicSubnet1", "MapPublicIpOnLaunch"), True),
    _fault("no DNS host names", _of("Vpc", "EnableDnsHostnames"), False),
    _fault("flow logs of accepted traffic only", _of("FlowLog", "TrafficType"), "ACCEPT"),
    _fault("flow logs gone", "Resources/FlowLog", GONE),
    _fault("flow logs kept for ever", _of("FlowLogGroup", "RetentionInDays"), GONE),
    _fault(
        "flow log role trusts another service", _of("FlowLogRole", f"{_TRUST}.Principal.Service"), "ec2.amazonaws.com"
    ),
    _fault("address before the gateway", "Resources/NatAddress1/DependsOn", GONE),
    _fault("S3 endpoint without a private table", _of("S3Endpoint", "RouteTableIds.1"), GONE),
    # cluster
    _fault(
        "cluster open by default",
        "Parameters/PublicAccessCidrs/Default",
        "0.0.0.0/0",
        "Parameters/PublicAccessCidrs/AllowedPattern",
        GONE,
    ),
    _fault(
        "cluster open whatever the parameter", _of("Cluster", "ResourcesVpcConfig.PublicAccessCidrs"), ["0.0.0.0/0"]
    ),
    _fault("no private endpoint", _of("Cluster", "ResourcesVpcConfig.EndpointPrivateAccess"), False),
    _fault(
        "control plane in public subnets", _of("Cluster", "ResourcesVpcConfig.SubnetIds.0"), {"Ref": "PublicSubnet1"}
    ),
    _fault("aws-auth ConfigMap accepted", _of("Cluster", "AccessConfig.AuthenticationMode"), "API_AND_CONFIG_MAP"),
    _fault(
        "nobody can enter the cluster", _of("Cluster", "AccessConfig.BootstrapClusterCreatorAdminPermissions"), False
    ),
    _fault("secrets in clear in etcd", _of("Cluster", "EncryptionConfig"), GONE),
    _fault("key never rotates", _of("ClusterKey", "EnableKeyRotation"), False),
    _fault("no audit log", _of("Cluster", "Logging.ClusterLogging.EnabledTypes.1"), GONE),
    _fault("log group made by EKS", "Resources/Cluster/DependsOn", GONE),
    _fault("extended support at six times the price", _of("Cluster", "UpgradePolicy.SupportType"), "EXTENDED"),
    _fault("nodes stay behind at the next upgrade", _of("Nodes", "Version"), GONE),
    _fault("wrong trust of the cluster role", _of("ClusterRole", f"{_TRUST}.Principal.Service"), "ec2.amazonaws.com"),
    _fault("AMI of the wrong architecture", "Mappings/Node/m7g.large/AmiType", "AL2023_x86_64_STANDARD"),
    _fault("AMI type fixed", _of("Nodes", "AmiType"), "AL2023_ARM_64_STANDARD"),
    _fault("retired AMI type", "Mappings/Node/m7i.large/AmiType", "AL1_x86_64"),
    _fault("nodes in a public subnet", _of("Nodes", "Subnets.0"), {"Ref": "PublicSubnet1"}),
    _fault("nodes not in every zone", _of("Nodes", "Subnets.2"), GONE),
    _fault("a single node", _of("Nodes", "ScalingConfig.MinSize"), 1),
    _fault(
        "pods can take the node's role",
        _of("NodeLaunchTemplate", "LaunchTemplateData.MetadataOptions.HttpPutResponseHopLimit"),
        2,
    ),
    _fault(
        "metadata without a token",
        _of("NodeLaunchTemplate", "LaunchTemplateData.MetadataOptions.HttpTokens"),
        "optional",
    ),
    _fault(
        "disk of the nodes in clear",
        _of("NodeLaunchTemplate", "LaunchTemplateData.BlockDeviceMappings.0.Ebs.Encrypted"),
        False,
    ),
    _fault("nodes before their network", "Resources/Nodes/DependsOn/0", GONE),
    _fault("CoreDNS before nodes", "Resources/DnsAddon/DependsOn", GONE),
    _fault("network policies not enforced", _of("NetworkAddon", "ConfigurationValues"), GONE),
    _fault("no metrics for the autoscalers", "Resources/MetricsAddon", GONE),
    _fault("no Pod Identity agent", "Resources/PodIdentityAddon", GONE, "Resources/Nodes/DependsOn/2", GONE),
    # identities
    _fault("sts:TagSession missing", _of("LoadBalancerControllerRole", f"{_TRUST}.Action"), ["sts:AssumeRole"]),
    _fault("any pod may be the controller", _of("LoadBalancerControllerRole", f"{_TRUST}.Condition"), GONE),
    _fault("misspelt IAM action", f"{_CHANGE_OWN}/Action/15", "elasticloadbalancing:RegisterTarget"),
    _fault("IAM action missing", f"{_CHANGE_OWN}/Action/15", GONE),
    _fault("IAM action misspelt that others need", f"{_CONTROLLER}/0/Action/2", "ec2:DescribeAccountAttribute"),
    _fault("controller may do everything with load balancers", f"{_CHANGE_OWN}/Action", "elasticloadbalancing:*"),
    _fault("controller may change any load balancer", f"{_CHANGE_OWN}/Condition", GONE),
    _fault(
        "controller may change any cluster's load balancer",
        f"{_CHANGE_OWN}/Condition/StringEquals",
        {"aws:ResourceTag/elbv2.k8s.aws/cluster": "other"},
    ),
    _fault(
        "controller may make others' load balancers its own",
        f"{_TAG}/Condition/StringEquals/elasticloadbalancing:CreateAction",
        GONE,
    ),
    _fault("controller may take over tags", f"{_RETAG}/Condition/Null", GONE),
    _fault("controller may open any security group", f"{_CONTROLLER}/11/Resource", "*"),
    _fault(
        "identity for a misspelt service account",
        _of("LoadBalancerControllerIdentity", "ServiceAccount"),
        "aws-loadbalancer-controller",
    ),
    _fault(
        "secret reader reads all secrets",
        _of("SecretReaderRole", "Policies.0.PolicyDocument.Statement.0.Resource"),
        "*",
    ),
    _fault(
        "node role is administrator",
        _of("NodeRole", "ManagedPolicyArns.0"),
        {"Fn::Sub": "arn:${AWS::Partition}:iam::aws:policy/AdministratorAccess"},
    ),
    _fault(
        "managed policy that does not exist",
        _of("NodeRole", "ManagedPolicyArns.1"),
        {"Fn::Sub": "arn:${AWS::Partition}:iam::aws:policy/AmazonEC2ContainerRegistryReadOnlyy"},
    ),
    _fault(
        "network permissions on the node role",
        _of("NodeRole", "ManagedPolicyArns.1"),
        {"Fn::Sub": "arn:${AWS::Partition}:iam::aws:policy/AmazonEKS_CNI_Policy"},
    ),
    # database
    _fault("5432 open to the world", _of("DatabaseSecurityGroup", "SecurityGroupIngress.0"), _WORLD),
    _fault(
        "5432 open to the whole VPC",
        _of("DatabaseSecurityGroup", "SecurityGroupIngress.0"),
        {**_WORLD, "CidrIp": {"Fn::GetAtt": ["Vpc", "CidrBlock"]}},
    ),
    _fault("all ports from the cluster", _of("DatabaseSecurityGroup", "SecurityGroupIngress.0.FromPort"), 0),
    _fault(
        "wrong port",
        _of("DatabaseSecurityGroup", "SecurityGroupIngress.0.FromPort"),
        3306,
        _of("DatabaseSecurityGroup", "SecurityGroupIngress.0.ToPort"),
        3306,
    ),
    _fault("database may call out", _of("DatabaseSecurityGroup", "SecurityGroupEgress"), GONE),
    _fault("database in the default security group", _of("Database", "VPCSecurityGroups"), GONE),
    _fault(
        "database in public subnets",
        _of("DatabaseSubnets", "SubnetIds"),
        [{"Ref": "PublicSubnet1"}, {"Ref": "PublicSubnet2"}],
    ),
    _fault("database in one zone", _of("DatabaseSubnets", "SubnetIds"), [{"Ref": "PrivateSubnet1"}]),
    _fault("database publicly accessible", _of("Database", "PubliclyAccessible"), True),
    _fault("storage in clear", _of("Database", "StorageEncrypted"), False),
    _fault(
        "encrypted with a key that goes with the stack",
        _of("Database", "KmsKeyId"),
        {"Fn::GetAtt": ["ClusterKey", "Arn"]},
    ),
    _fault("parameter family of another version", _of("DatabaseParameters", "Family"), "postgres14"),
    _fault("engine version that does not exist", _of("Database", "EngineVersion"), "15.99"),
    _fault("engine of another major version", _of("Database", "EngineVersion"), "16.9"),
    _fault("retired engine version", _of("Database", "EngineVersion"), "15.4"),
    _fault("another engine", _of("Database", "Engine"), "mysql"),
    _fault("TLS not required", _of("DatabaseParameters", "Parameters"), {"rds.force_ssl": "0"}),
    _fault(
        "password in the template",
        _of("Database", "ManageMasterUserPassword"),
        GONE,
        _of("Database", "MasterUserPassword"),
        "correct-horse",
    ),
    _fault("no standby by default", "Parameters/DatabaseMultiAz/Default", "false"),
    _fault("no standby whatever the parameter", _of("Database", "MultiAZ"), False),
    _fault("no deletion policy", "Resources/Database/DeletionPolicy", GONE),
    _fault("lost on replacement", "Resources/Database/UpdateReplacePolicy", "Delete"),
    _fault("no deletion protection", _of("Database", "DeletionProtection"), False),
    _fault("backups of one day", _of("Database", "BackupRetentionPeriod"), 1),
    _fault("backups deleted with the database", _of("Database", "DeleteAutomatedBackups"), True),
    _fault("storage does not grow", _of("Database", "MaxAllocatedStorage"), GONE),
    _fault("major upgrades by themselves", _of("Database", "AllowMajorVersionUpgrade"), True),
    _fault("logs stay on the instance", _of("Database", "EnableCloudwatchLogsExports"), GONE),
    _fault("log of another engine", _of("Database", "EnableCloudwatchLogsExports.0"), "slowquery"),
    _fault("no Performance Insights", _of("Database", "EnablePerformanceInsights"), False),
    _fault("another database name", _of("Database", "DBName"), "messages"),
    _fault(
        "instance class that does not exist",
        "Parameters/DatabaseInstanceClass/Default",
        "db.t4g.mediun",
        "Parameters/DatabaseInstanceClass/AllowedValues/1",
        "db.t4g.mediun",
    ),
    # registry, outputs, the file
    _fault("tags can move", _of("Repository", "ImageTagMutability"), "MUTABLE"),
    _fault("images not scanned", _of("Repository", "ImageScanningConfiguration.ScanOnPush"), False),
    _fault("images kept for ever", _of("Repository", "LifecyclePolicy"), GONE),
    _fault("lifecycle policy is no JSON", _of("Repository", "LifecyclePolicy.LifecyclePolicyText"), '{"rules": [}'),
    _fault("misspelt property", _of("Database", "MultiAz"), True),
    _fault("property of the wrong type", _of("Nodes", "ScalingConfig.MaxSize"), "many"),
    _fault("reference to nothing", _of("Nodes", "NodeRole"), {"Fn::GetAtt": ["NodesRole", "Arn"]}),
    _fault("circle", "Resources/ClusterRole/DependsOn", "Nodes"),
    _fault("third zone without its condition", "Resources/PrivateSubnet3/Condition", GONE),
    _fault("output of another endpoint", "Outputs/DatabaseEndpoint/Value", {"Fn::GetAtt": ["Cluster", "Endpoint"]}),
    _fault("output gone", "Outputs/DatabaseSecretArn", GONE),
]
