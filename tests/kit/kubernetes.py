"""How a cluster reads k8s.yaml: objects by name, selectors, network policies, and a container's environment.

It covers only the part of the Kubernetes API that the file uses. Anything else in the file raises KeyError or
AssertionError here, so that no rule is silently skipped.
"""

import copy
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that appears twice in a mapping; YAML libraries silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key stands twice{node.start_mark}"
        return super().construct_mapping(node, deep)


@dataclass
class Manifest:
    """The objects of a file, in its order."""

    objects: list[Object]

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        return cls([*yaml.load_all(path.read_text(), _UniqueKeys)])

    def copy(self) -> "Manifest":
        """A deep copy, without the sharing that YAML aliases cause."""
        return Manifest([_unshared(item) for item in self.objects])

    def of_kind(self, kind: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] == kind]

    def find(self, kind: str, name: str) -> Object:
        """The only object of this kind and name; AssertionError if there is none, or more than one."""
        found = [item for item in self.of_kind(kind) if item["metadata"]["name"] == name]
        assert len(found) == 1, f"{len(found)} objects {kind}/{name}"
        return found[0]

    def pod(self, name: str) -> Object:
        """The pod that the Deployment `name` creates: metadata and spec."""
        template: Object = self.find("Deployment", name)["spec"]["template"]
        return template

    def container(self, name: str) -> Object:
        """The serving container of the Deployment `name`."""
        (container,) = self.pod(name)["spec"]["containers"]
        assert isinstance(container, dict)
        return container


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else copy.copy(value)


def all_containers(pod: Object) -> list[Object]:
    """A pod's containers, beginning with its init containers."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def amount(quantity: str) -> float:
    """A resource quantity as a number: cores, or bytes."""
    for suffix, factor in (("m", 0.001), ("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30)):
        if quantity.endswith(suffix):
            return float(quantity.removesuffix(suffix)) * factor
    return float(quantity)


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector matches; an empty one matches everything."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    wanted: dict[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()


def killed_after(probe: Object) -> tuple[float, float]:
    """How many seconds a server can be silent without being killed, and after how many it is certainly dead.

    The kubelet probes every `periodSeconds`, or later if a probe takes longer, and counts a probe as failed after
    `timeoutSeconds`. After `failureThreshold` failures in a row it sends SIGTERM, then SIGKILL. A server that falls
    silent just as a probe begins is killed soonest; one that does so just after answering a probe, latest.
    """
    pace = max(probe["periodSeconds"], probe["timeoutSeconds"])
    shortest = (probe["failureThreshold"] - 1) * pace + probe["timeoutSeconds"]
    return shortest, probe["periodSeconds"] + shortest + probe["terminationGracePeriodSeconds"]


# ---- network policies ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A peer on the network; outside the cluster if it has no namespace."""

    name: str
    address: str
    namespace: str | None = None
    labels: dict[str, str] = field(default_factory=dict, compare=False)


Port = tuple[str, int]


def arrows(manifest: Manifest, peers: list[Peer], ports: list[Port]) -> Iterator[tuple[str, str, Port]]:
    """Every (source, destination, port) that the policies allow, among those that they select."""
    home = manifest.of_kind("Namespace")[0]["metadata"]["name"]
    for source in peers:
        for destination in peers:
            if source is destination or home not in (source.namespace, destination.namespace):
                continue
            for port in ports:
                leaves = source.namespace != home or _lets(manifest, "egress", source, destination, port)
                enters = destination.namespace != home or _lets(manifest, "ingress", destination, source, port)
                if leaves and enters:
                    yield source.name, destination.name, port


def _lets(manifest: Manifest, direction: str, pod: Peer, other: Peer, port: Port) -> bool:
    """Kubernetes' rule: a selected pod may do what at least one of its policies allows; any other pod, everything."""
    policies = [
        policy["spec"]
        for policy in manifest.of_kind("NetworkPolicy")
        if policy["metadata"]["namespace"] == pod.namespace
        and selects(policy["spec"]["podSelector"], pod.labels)
        and direction.capitalize() in policy["spec"]["policyTypes"]
    ]
    peers_key = "to" if direction == "egress" else "from"
    rules = [rule for policy in policies for rule in policy.get(direction, [])]
    return not policies or any(
        _port_matches(rule, port)
        and (peers_key not in rule or any(_peer_matches(peer, pod, other) for peer in rule[peers_key]))
        for rule in rules
    )


def _port_matches(rule: Object, port: Port) -> bool:
    return "ports" not in rule or any((entry["protocol"], entry["port"]) == port for entry in rule["ports"])


def _peer_matches(peer: Object, pod: Peer, other: Peer) -> bool:
    if block := peer.get("ipBlock"):
        assert block.keys() == {"cidr"}
        return ipaddress.ip_address(other.address) in ipaddress.ip_network(block["cidr"])
    assert peer.keys() <= {"namespaceSelector", "podSelector"}
    if other.namespace is None:
        return False
    namespace_labels = {"kubernetes.io/metadata.name": other.namespace}
    in_namespace = (
        selects(peer["namespaceSelector"], namespace_labels)
        if "namespaceSelector" in peer
        else other.namespace == pod.namespace
    )
    return in_namespace and selects(peer.get("podSelector", {}), other.labels)


# ---- what the kubelet gives a container ------------------------------------------------------------------------


class NotStarted(Exception):
    """The kubelet does not start the container; an event says why."""


def configuration(manifest: Manifest, pod: Object, container: Object, folder: Path) -> dict[str, str]:
    """Mount the container's files below `folder`, and return its environment, with paths that lead there.

    Raises NotStarted if a required object or key is missing.
    """
    environment: dict[str, str] = {}
    for source in container.get("envFrom", []):
        (reference,) = source.values()
        environment |= _data(manifest, source, reference) or {}
    for variable in container.get("env", []):
        if "value" in variable:
            environment[variable["name"]] = variable["value"]
            continue
        (reference,) = variable["valueFrom"].values()
        data = _data(manifest, variable["valueFrom"], reference)
        if data is not None and (value := _item(data, reference)) is not None:
            environment[variable["name"]] = value
    volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
    for mount in container.get("volumeMounts", []):
        _mount(manifest, volumes[mount["name"]], folder / mount["mountPath"].lstrip("/"))
        for name, value in environment.items():
            if value.startswith(mount["mountPath"] + "/"):
                environment[name] = str(folder / value.lstrip("/"))
    return environment


def _mount(manifest: Manifest, volume: Object, target: Path) -> None:
    kind = "secret" if "secret" in volume else "configMap"
    reference = volume[kind] | {"name": volume[kind].get("secretName") or volume[kind].get("name")}
    target.mkdir(parents=True, exist_ok=True)
    data = _data(manifest, {kind: reference}, reference)
    for item in reference["items"] if data is not None else []:
        if (value := _item(data or {}, reference | item)) is not None:
            (target / item["path"]).write_text(value)


def _data(manifest: Manifest, source: Object, reference: Object) -> dict[str, str] | None:
    kind = "Secret" if next(iter(source)).startswith("secret") else "ConfigMap"
    for item in manifest.of_kind(kind):
        if item["metadata"]["name"] == reference["name"]:
            data: dict[str, str] = item["stringData" if kind == "Secret" else "data"]
            return data
    if reference.get("optional"):
        return None
    raise NotStarted(f'{kind.lower()} "{reference["name"]}" not found')


def _item(data: dict[str, str], reference: Object) -> str | None:
    if reference["key"] in data:
        return data[reference["key"]]
    if reference.get("optional"):
        return None
    raise NotStarted(f"couldn't find key {reference['key']} in {reference['name']}")
