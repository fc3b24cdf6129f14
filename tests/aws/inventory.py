"""Every resource of aws/template.yaml and every property that it may have; the template must have no other.

For the properties that it omits, AWS's defaults are known to be right. So a name added here needs a test of its value.
A `#` is a placeholder for a zone's number. Documents (policies, tags) are compared whole, in test_aws.py.
"""

from __future__ import annotations

import re
from typing import Any

DOCUMENTS = {"AssumeRolePolicyDocument", "KeyPolicy", "Parameters", "PolicyDocument", "TagSpecifications", "Tags"}

INVENTORY = """
Vpc EC2::VPC: CidrBlock EnableDnsHostnames EnableDnsSupport Tags
InternetGateway EC2::InternetGateway: Tags
InternetGatewayAttachment EC2::VPCGatewayAttachment: InternetGatewayId VpcId
PublicSubnet# EC2::Subnet: AvailabilityZone CidrBlock MapPublicIpOnLaunch Tags VpcId
PrivateSubnet# EC2::Subnet: AvailabilityZone CidrBlock MapPublicIpOnLaunch Tags VpcId
NatAddress# EC2::EIP: Domain Tags
NatGateway# EC2::NatGateway: AllocationId SubnetId Tags
PublicRouteTable EC2::RouteTable: Tags VpcId
PublicRoute EC2::Route: DestinationCidrBlock GatewayId RouteTableId
PublicRouteTableAssociation# EC2::SubnetRouteTableAssociation: RouteTableId SubnetId
PrivateRouteTable# EC2::RouteTable: Tags VpcId
PrivateRoute# EC2::Route: DestinationCidrBlock NatGatewayId RouteTableId
PrivateRouteTableAssociation# EC2::SubnetRouteTableAssociation: RouteTableId SubnetId
S3Endpoint EC2::VPCEndpoint: RouteTableIds ServiceName VpcEndpointType VpcId
FlowLogGroup Logs::LogGroup: RetentionInDays
FlowLogRole IAM::Role: AssumeRolePolicyDocument Policies.PolicyDocument Policies.PolicyName
FlowLog EC2::FlowLog: DeliverLogsPermissionArn LogDestinationType LogGroupName ResourceId ResourceType Tags TrafficType

ClusterKey KMS::Key: Description EnableKeyRotation KeyPolicy PendingWindowInDays
ClusterLogGroup Logs::LogGroup: LogGroupName RetentionInDays
ClusterRole IAM::Role: AssumeRolePolicyDocument ManagedPolicyArns
Cluster EKS::Cluster: Name Version RoleArn BootstrapSelfManagedAddons DeletionProtection UpgradePolicy.SupportType
  AccessConfig.AuthenticationMode AccessConfig.BootstrapClusterCreatorAdminPermissions
  EncryptionConfig.Provider.KeyArn EncryptionConfig.Resources Logging.ClusterLogging.EnabledTypes.Type
  ResourcesVpcConfig.EndpointPrivateAccess ResourcesVpcConfig.EndpointPublicAccess
  ResourcesVpcConfig.PublicAccessCidrs ResourcesVpcConfig.SubnetIds
NodeRole IAM::Role: AssumeRolePolicyDocument ManagedPolicyArns
NodeLaunchTemplate EC2::LaunchTemplate: LaunchTemplateData.TagSpecifications
  LaunchTemplateData.MetadataOptions.HttpTokens LaunchTemplateData.MetadataOptions.HttpPutResponseHopLimit
  LaunchTemplateData.BlockDeviceMappings.DeviceName LaunchTemplateData.BlockDeviceMappings.Ebs.Encrypted
  LaunchTemplateData.BlockDeviceMappings.Ebs.DeleteOnTermination
  LaunchTemplateData.BlockDeviceMappings.Ebs.VolumeSize LaunchTemplateData.BlockDeviceMappings.Ebs.VolumeType
Nodes EKS::Nodegroup: AmiType ClusterName InstanceTypes LaunchTemplate.Id LaunchTemplate.Version
  NodeRepairConfig.Enabled NodeRole ScalingConfig.DesiredSize ScalingConfig.MaxSize ScalingConfig.MinSize Subnets
  UpdateConfig.MaxUnavailable
NetworkAddon EKS::Addon: AddonName ClusterName ConfigurationValues PodIdentityAssociations.RoleArn
  PodIdentityAssociations.ServiceAccount
ProxyAddon EKS::Addon: AddonName ClusterName
PodIdentityAddon EKS::Addon: AddonName ClusterName
DnsAddon EKS::Addon: AddonName ClusterName
MetricsAddon EKS::Addon: AddonName ClusterName
NetworkRole IAM::Role: AssumeRolePolicyDocument ManagedPolicyArns
LoadBalancerControllerRole IAM::Role: AssumeRolePolicyDocument Policies.PolicyDocument Policies.PolicyName
LoadBalancerControllerIdentity EKS::PodIdentityAssociation: ClusterName Namespace RoleArn ServiceAccount

DatabaseSecurityGroup EC2::SecurityGroup: GroupDescription Tags VpcId
  SecurityGroupEgress.CidrIp SecurityGroupEgress.Description SecurityGroupEgress.IpProtocol
  SecurityGroupIngress.Description SecurityGroupIngress.FromPort SecurityGroupIngress.IpProtocol
  SecurityGroupIngress.SourceSecurityGroupId SecurityGroupIngress.ToPort
DatabaseSubnets RDS::DBSubnetGroup: DBSubnetGroupDescription SubnetIds
DatabaseParameters RDS::DBParameterGroup: Description Family Parameters
DatabaseLogGroup Logs::LogGroup: LogGroupName RetentionInDays
DatabaseUpgradeLogGroup Logs::LogGroup: LogGroupName RetentionInDays
Database RDS::DBInstance: AllocatedStorage AllowMajorVersionUpgrade AutoMinorVersionUpgrade BackupRetentionPeriod
  CopyTagsToSnapshot DBInstanceClass DBInstanceIdentifier DBName DBParameterGroupName DBSnapshotIdentifier
  DBSubnetGroupName DeleteAutomatedBackups DeletionProtection EnableCloudwatchLogsExports EnablePerformanceInsights
  Engine EngineLifecycleSupport EngineVersion ManageMasterUserPassword MasterUsername MaxAllocatedStorage MultiAZ
  PerformanceInsightsRetentionPeriod Port PubliclyAccessible StorageEncrypted StorageType Tags VPCSecurityGroups

Repository ECR::Repository: EmptyOnDelete ImageScanningConfiguration.ScanOnPush ImageTagMutability
  LifecyclePolicy.LifecyclePolicyText
"""


def inventory() -> dict[str, tuple[str, set[str]]]:
    """Type and names of properties, by logical ID."""
    entries = re.findall(r"^(\S+) (\S+): ((?:.|\n )+)", INVENTORY, re.MULTILINE)
    return {name: (f"AWS::{kind}", set(names.split())) for name, kind, names in entries}


def paths(value: Any, path: str = "") -> set[str]:
    """The names of all properties in a value, nested ones with dots."""
    if isinstance(value, dict) and path.rpartition(".")[2] not in DOCUMENTS:
        return {name for key in value for name in paths(value[key], f"{path}.{key}".lstrip("."))}
    if isinstance(value, list) and path.rpartition(".")[2] not in DOCUMENTS:
        return {name for item in value for name in paths(item, path)} or {path}
    return {path}
