"""Checks of k8s.yaml beyond a schema: its parts fit together, and fit the servers that really run.

The servers supply paths, ports, settings and their defaults. At the end, each property is broken once in a copy of the
file, and its test must fail.
"""

import inspect
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2.errors
import pytest
from conftest import Start, close_all
from kit import ROOT, memory
from kit.application import PAIR
from kit.client import get
from kit.kubernetes import (
    Manifest,
    NotStarted,
    Object,
    Peer,
    all_containers,
    amount,
    arrows,
    configuration,
    killed_after,
    selects,
)
from kit.postgres import Database
from kit.processes import Server, run, wait_listening

from chassis import client, connections, server

SERVICES = ("gateway", "message-service")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
ALB = "alb.ingress.kubernetes.io/"
ALB_NOTICES = 15  # seconds at most, as operators report it, until an ALB sends nothing more to a pod that is ending
TO_CLOSE = 5  # seconds for closing connections, and for the interpreter's end


class Servers:
    """Both servers as the image starts them, without their dependencies, and what they report about themselves."""

    def __init__(self) -> None:
        nobody = 1  # a port on which nothing listens
        behind: dict[str, dict[str, Any]] = {
            "gateway": {"DOWNSTREAM_URL": f"http://127.0.0.1:{nobody}"},
            "message-service": {"DB_HOST": "127.0.0.1", "DB_PORT": nobody},
        }
        modules = {name: name.replace("-", "_") for name in SERVICES}
        self.help = {name: run("-m", modules[name], "--help").stdout for name in SERVICES}
        self.running = {name: Server(name, "-m", modules[name], **behind[name]) for name in SERVICES}
        for item in self.running.values():
            wait_listening(item)

    def status(self, name: str, path: str) -> int:
        """The status with which a server answers GET."""
        try:
            with urllib.request.urlopen(self.running[name].url + path, timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    def defaults(self, name: str) -> dict[str, str]:
        """A server's settings, each with the first word of its default, as `--help` prints them."""
        return dict(re.findall(r"^  ([A-Z_]+) +(\S+)", self.help[name], re.MULTILINE))


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    close_all(list(servers.running.values()))


@pytest.fixture(scope="module")
def file() -> Manifest:
    return Manifest.read(ROOT / "k8s.yaml")


@pytest.fixture
def manifest(file: Manifest) -> Manifest:
    return file.copy()


def attributes(ingress: Object, name: str) -> dict[str, str]:
    """A load balancer's attributes, from their annotation."""
    text = ingress["metadata"]["annotations"][f"{ALB}{name}-attributes"]
    return dict(item.split("=", 1) for item in text.split(","))


# ---- the parts fit together ------------------------------------------------------------------------------------


def test_order(manifest: Manifest) -> None:
    """One apply is enough: everything that a pod needs at creation comes before the Deployments, in one namespace."""
    kinds = [item["kind"] for item in manifest.objects]
    wanted = [
        "Namespace",
        "ServiceAccount",
        "ConfigMap",
        "Service",
        "Ingress",
        "NetworkPolicy",
        "Deployment",
        "PodDisruptionBudget",
        "HorizontalPodAutoscaler",
    ]
    assert kinds == sorted(kinds, key=wanted.index)
    assert list(dict.fromkeys(kinds)) == wanted
    namespace = manifest.objects[0]["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert namespace["labels"]["elbv2.k8s.aws/pod-readiness-gate-inject"] == "enabled"
    assert {item["metadata"]["namespace"] for item in manifest.objects[1:]} == {namespace["name"]}


@pytest.mark.parametrize("name", SERVICES)
def test_selectors(manifest: Manifest, name: str) -> None:
    """Objects named after a service select that service's pods, all of them and no others."""
    selectors = [
        manifest.find("Deployment", name)["spec"]["selector"],
        {"matchLabels": manifest.find("Service", name)["spec"]["selector"]},
        manifest.find("NetworkPolicy", name)["spec"]["podSelector"],
        manifest.find("PodDisruptionBudget", name)["spec"]["selector"],
        *(item["labelSelector"] for item in manifest.pod(name)["spec"]["topologySpreadConstraints"]),
    ]
    for selector in selectors:
        chosen = [other for other in SERVICES if selects(selector, manifest.pod(other)["metadata"]["labels"])]
        assert chosen == [name]
    target = manifest.find("HorizontalPodAutoscaler", name)["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    assert manifest.find("ServiceAccount", manifest.pod(name)["spec"]["serviceAccountName"])


@pytest.mark.parametrize("name", SERVICES)
def test_ports(manifest: Manifest, servers: Servers, name: str) -> None:
    """A connection to a Service arrives where the server listens, with the same port number and name throughout."""
    (port,) = manifest.container(name)["ports"]
    assert port["containerPort"] == int(servers.defaults(name)["PORT"])
    (service_port,) = manifest.find("Service", name)["spec"]["ports"]
    assert service_port == {"name": port["name"], "port": port["containerPort"], "targetPort": port["name"]}


def test_downstream_url(manifest: Manifest) -> None:
    """The gateway finds the message service by its Service's name and port."""
    service = manifest.find("Service", "message-service")
    (port,) = service["spec"]["ports"]
    url = f"http://{service['metadata']['name']}:{port['port']}"
    assert manifest.find("ConfigMap", "gateway")["data"]["DOWNSTREAM_URL"] == url


@pytest.mark.parametrize("name", SERVICES)
def test_image(manifest: Manifest, name: str) -> None:
    """There is one image, of this version, and the `sed` line that replaces it finds every mention."""
    image = f"messages:{server.VERSION}"
    assert f"s|{image}|$IMAGE|" in (ROOT / "k8s.yaml").read_text()
    for container in all_containers(manifest.pod(name)):
        assert container["image"] == image
        assert container["imagePullPolicy"] == "IfNotPresent"
    assert manifest.container(name)["args"] == [name.replace("-", "_")]


# ---- they fit the servers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_probes(manifest: Manifest, servers: Servers, name: str) -> None:
    """A pod without its dependencies stays alive; a message service without its database gets no traffic."""
    container = manifest.container(name)
    for kind in PROBES:
        probe = container[kind]
        grace = {"terminationGracePeriodSeconds"} if kind == "livenessProbe" else set()
        assert probe.keys() == {"httpGet", "periodSeconds", "timeoutSeconds", "failureThreshold"} | grace
        assert probe["httpGet"]["port"] == container["ports"][0]["name"]
    answers = [servers.status(name, container[kind]["httpGet"]["path"]) for kind in PROBES]
    assert answers == [200, 200 if name == "gateway" else 503, 200]
    readiness = container["readinessProbe"]
    assert readiness["timeoutSeconds"] > float(servers.defaults(name).get("DB_TIMEOUT", "0"))
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 30


async def test_drain_without_events(manifest: Manifest, start: Start) -> None:
    """A gateway that drains fails no probe, since each failure would be an event; a message service fails few."""
    path = manifest.container("gateway")["readinessProbe"]["httpGet"]["path"]
    gateway = await start("gateway", DRAIN_SECONDS=30)
    gateway.terminate()
    await gateway.wait_for_log(message="draining")
    assert (await get(gateway.url + path)).status == 200
    gateway.kill()
    drain = float(manifest.find("ConfigMap", "message-service")["data"]["DRAIN_SECONDS"])
    assert drain / manifest.container("message-service")["readinessProbe"]["periodSeconds"] <= 6


async def test_a_database_that_is_away_is_told(manifest: Manifest, servers: Servers, start: Start) -> None:
    """Although no message service is ready then, gateways reach one, and clients read `database` at once."""
    container = manifest.container("message-service")
    ready = servers.status("message-service", container["readinessProbe"]["httpGet"]["path"]) == 200
    reachable = ready or manifest.find("Service", "message-service")["spec"].get("publishNotReadyAddresses", False)
    nobody = "http://127.0.0.1:1"
    gateway = await start("gateway", DOWNSTREAM_URL=servers.running["message-service"].url if reachable else nobody)
    answer = await get(gateway.url + "/api/string")
    assert (answer.status, answer.json()["part"]) == (503, "database")


@pytest.mark.parametrize("name", SERVICES)
def test_frozen_server(manifest: Manifest, name: str) -> None:
    """A frozen server is replaced within 25 s; one that is busy for 15 s at a stretch survives."""
    shortest, longest = killed_after(manifest.container(name)["livenessProbe"])
    assert longest < 25
    assert shortest >= 15


@pytest.mark.parametrize("name", SERVICES)
def test_metrics(manifest: Manifest, servers: Servers, name: str) -> None:
    """The annotations give Prometheus the port and path of the server's metrics."""
    told = manifest.pod(name)["metadata"]["annotations"]
    assert told["prometheus.io/scrape"] == "true"
    assert told["prometheus.io/port"] == servers.defaults(name)["PORT"]
    assert servers.status(name, told["prometheus.io/path"]) == 200


@pytest.mark.parametrize("name", SERVICES)
def test_settings(manifest: Manifest, servers: Servers, tmp_path: Path, name: str) -> None:
    """A server reads every variable that it gets, and gets all those whose defaults only suit a single machine."""
    manifest.objects += [secret("database.example"), owner_secret()]
    defaults = servers.defaults(name)
    local = {variable for variable, default in defaults.items() if "localhost" in default}
    for container in all_containers(manifest.pod(name)):
        given = configuration(manifest, manifest.pod(name), container, tmp_path)
        assert given.keys() <= defaults.keys()
        assert given.keys() >= local
        assert "DB_PASSWORD" not in given
        assert ("DB_PASSWORD_FILE" in given) == ("DB_PASSWORD_FILE" in defaults)


@pytest.mark.parametrize("name", SERVICES)
def test_grace_period(manifest: Manifest, servers: Servers, name: str) -> None:
    """A pod that is terminated drains, finishes requests in flight and exits before it is killed."""
    data = manifest.find("ConfigMap", name)["data"]
    shutdown = data.get("SHUTDOWN_SECONDS") or servers.defaults(name)["SHUTDOWN_SECONDS"]
    needed = float(data["DRAIN_SECONDS"]) + float(shutdown) + TO_CLOSE
    assert manifest.pod(name)["spec"]["terminationGracePeriodSeconds"] >= needed
    assert "lifecycle" not in manifest.container(name)  # a preStop hook's time would count, too


@pytest.mark.parametrize("name", SERVICES)
def test_resources(manifest: Manifest, servers: Servers, name: str) -> None:
    """A server can grow before it is killed for its memory, and its autoscaler has a CPU request to measure against."""
    assert manifest.find("HorizontalPodAutoscaler", name)["spec"]["metrics"][0]["resource"]["name"] == "cpu"
    for container in all_containers(manifest.pod(name)):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests.keys() == limits.keys() == {"cpu", "memory"}
        assert all(0 < amount(requests[name]) <= amount(limits[name]) for name in requests)
        assert amount(limits["memory"]) > 1.5 * memory(servers.running[name].pid)


@pytest.mark.parametrize("name", SERVICES)
def test_cpu(manifest: Manifest, name: str) -> None:
    """One pod carries 500 unshared requests per second before its autoscaler adds another."""
    results = ROOT / "benchmarks/results/bench.json"
    if not results.exists():
        pytest.skip("deleted from this copy")
    measurements = json.loads(results.read_text())["measurements"]

    def cost(system: str, part: str) -> float:
        alone = [item for item in measurements if item["system"] == system and item["connections"] == 1]
        return float(statistics.median(item[f"cpu_{part}"] for item in alone))

    speed = 57 / cost("bare-json", "gateway")  # a usual machine needs 57 µs for that; the benchmark's may be slower
    cores = 500 * speed * cost("this", "gateway" if name == "gateway" else "service") / 1e6
    (metric,) = manifest.find("HorizontalPodAutoscaler", name)["spec"]["metrics"]
    share = metric["resource"]["target"]["averageUtilization"] / 100
    assert cores < share * amount(manifest.container(name)["resources"]["requests"]["cpu"])


# ---- nothing is lost in a rollout ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_rollout(manifest: Manifest, name: str) -> None:
    """During a rollout, a node drain or a lull, there are never fewer pods than needed, nor fewer than two."""
    deployment = manifest.find("Deployment", name)["spec"]
    assert "replicas" not in deployment
    assert deployment["strategy"]["type"] == "RollingUpdate"
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert deployment["minReadySeconds"] > 0
    scaler = manifest.find("HorizontalPodAutoscaler", name)["spec"]
    assert scaler["minReplicas"] >= 2
    assert scaler["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 60
    budget = manifest.find("PodDisruptionBudget", name)["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@pytest.mark.parametrize("name", SERVICES)
def test_spread(manifest: Manifest, name: str) -> None:
    """Pods of one version spread over zones and hosts, if there are several."""
    constraints = manifest.pod(name)["spec"]["topologySpreadConstraints"]
    keys = ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    assert [item["topologyKey"] for item in constraints] == keys
    assert all(item["maxSkew"] == 1 and item["whenUnsatisfiable"] == "ScheduleAnyway" for item in constraints)


def test_message_service_drain(manifest: Manifest) -> None:
    """A message service that is ending closes no connection that a gateway might be using."""
    drain = float(manifest.find("ConfigMap", "message-service")["data"]["DRAIN_SECONDS"])
    assert drain > client.KEEPALIVE_TIMEOUT + TO_CLOSE


def test_load_balancer_times(manifest: Manifest, servers: Servers) -> None:
    """A load balancer leaves a gateway before it stops listening, and cuts no request or connection in use."""
    ingress = manifest.find("Ingress", "service1-ingress")
    annotations = ingress["metadata"]["annotations"]
    drain = float(manifest.find("ConfigMap", "gateway")["data"]["DRAIN_SECONDS"])
    delay = int(attributes(ingress, "target-group")["deregistration_delay.timeout_seconds"])
    assert float(servers.defaults("gateway")["DOWNSTREAM_TIMEOUT"]) < delay <= drain - ALB_NOTICES
    idle = int(attributes(ingress, "load-balancer")["idle_timeout.timeout_seconds"])
    assert idle < connections.KEEPALIVE_TIMEOUT
    interval, timeout = (int(annotations[f"{ALB}healthcheck-{key}-seconds"]) for key in ("interval", "timeout"))
    assert timeout < interval  # an ALB refuses any other
    unhealthy = int(annotations[f"{ALB}unhealthy-threshold-count"])
    assert interval * unhealthy + timeout < drain
    assert int(annotations[f"{ALB}healthy-threshold-count"]) == 2  # the least that an ALB accepts


# ---- allowed connections ---------------------------------------------------------------------------------------


def test_ingress(manifest: Manifest, servers: Servers) -> None:
    """From outside, the API, its description and the page can be reached, but no probe and no metrics."""
    ingress = manifest.find("Ingress", "service1-ingress")
    assert ingress["spec"]["ingressClassName"] == "alb"
    (rule,) = ingress["spec"]["rules"]
    routes = {(path["path"], path["pathType"]) for path in rule["http"]["paths"]}
    assert routes == {("/api/", "Prefix"), ("/openapi.yaml", "Exact"), ("/", "Exact")}
    for path in rule["http"]["paths"]:
        backend = path["backend"]["service"]
        (port,) = manifest.find("Service", backend["name"])["spec"]["ports"]
        assert (backend["name"], backend["port"]) == ("gateway", {"name": port["name"]})
    annotations = ingress["metadata"]["annotations"]
    assert annotations[f"{ALB}scheme"] == "internet-facing"
    assert annotations[f"{ALB}target-type"] == "ip"
    assert f"{ALB}listen-ports" not in annotations  # by default, it listens on port 80
    assert annotations[f"{ALB}success-codes"] == "200"
    assert servers.status("gateway", annotations[f"{ALB}healthcheck-path"]) == 200
    assert annotations[f"{ALB}healthcheck-path"] not in {path for path, _ in routes}
    assert attributes(ingress, "load-balancer")["routing.http.drop_invalid_header_fields.enabled"] == "true"
    balancing = attributes(ingress, "target-group")["load_balancing.algorithm.type"]
    assert balancing == "least_outstanding_requests"


def test_tls_to_clients(tmp_path: Path) -> None:
    """Uncommenting the four lines is enough: each annotation is then there once, and port 80 redirects to 443."""
    text, lines = re.subn(rf"^    # (?={re.escape(ALB)})", "    ", (ROOT / "k8s.yaml").read_text(), flags=re.MULTILINE)
    (tmp_path / "k8s.yaml").write_text(text)
    annotations = Manifest.read(tmp_path / "k8s.yaml").find("Ingress", "service1-ingress")["metadata"]["annotations"]
    assert lines == 4
    assert json.loads(annotations[f"{ALB}listen-ports"]) == [{"HTTP": 80}, {"HTTPS": 443}]
    assert annotations[f"{ALB}ssl-redirect"] == "443"
    assert annotations[f"{ALB}certificate-arn"].startswith("arn:aws:acm:")


def test_published_paths(manifest: Manifest, servers: Servers) -> None:
    """The paths that the load balancer routes exist."""
    (rule,) = manifest.find("Ingress", "service1-ingress")["spec"]["rules"]
    paths = [path["path"] for path in rule["http"]["paths"]]
    statuses = {path: servers.status("gateway", path.replace("/api/", PAIR.read_path)) for path in paths}
    assert statuses == {"/api/": 503, "/openapi.yaml": 200, "/": 200}


def test_network_policies(manifest: Manifest) -> None:
    """Exactly the architecture's connections are allowed.

    A load balancer has a private address like any other, so the gateway, which is public anyway, is open to all private
    addresses outside its namespace, and to no others.
    """
    peers = [
        Peer("load balancer", "10.0.1.10"),
        Peer("internet", "198.51.100.7"),
        Peer("gateway", "10.0.2.1", "messages", manifest.pod("gateway")["metadata"]["labels"]),
        Peer("message-service", "10.0.2.2", "messages", manifest.pod("message-service")["metadata"]["labels"]),
        Peer("pod in the namespace", "10.0.2.3", "messages"),
        Peer("Prometheus", "203.0.113.3", "monitoring"),  # an address that is not private: known by its namespace
        Peer("pod elsewhere", "10.0.2.5", "default", manifest.pod("gateway")["metadata"]["labels"]),
        Peer("cluster DNS", "198.51.100.8", "kube-system", {"k8s-app": "kube-dns"}),
        Peer("pod of the system", "198.51.100.9", "kube-system"),
        Peer("NodeLocal DNSCache", "169.254.20.10"),
        Peer("database", "203.0.113.4"),
    ]
    web, message, postgres = ("TCP", 8000), ("TCP", 8001), ("TCP", 5432)
    ports = [web, message, postgres, ("TCP", 80), ("TCP", 443), ("TCP", 53), ("UDP", 53)]
    home = [peer for peer in peers if peer.namespace == "messages"]
    expected = {
        ("load balancer", "gateway", web),
        ("pod elsewhere", "gateway", web),
        ("Prometheus", "gateway", web),
        ("gateway", "message-service", message),
        ("Prometheus", "message-service", message),
        # By port: these policies do not decide who is at the other end.
        *(("gateway", peer.name, message) for peer in peers if peer not in home),
        *(("message-service", peer.name, postgres) for peer in peers if peer not in home),
        *(
            (pod.name, dns, (protocol, 53))
            for pod in home
            for dns in ("cluster DNS", "NodeLocal DNSCache")
            for protocol in ("TCP", "UDP")
        ),
    }
    assert set(arrows(manifest, peers, ports)) == expected
    deny = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert manifest.find("NetworkPolicy", "default-deny")["spec"] == deny
    assert manifest.find("ConfigMap", "message-service")["data"]["DB_PORT"] == str(postgres[1])


@pytest.mark.parametrize("name", SERVICES)
def test_restricted(manifest: Manifest, name: str) -> None:
    """Each container meets the restricted Pod Security Standard, with a read-only root and no token."""
    pod = manifest.pod(name)["spec"]
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "hostUsers"}
    assert all(volume.keys() <= {"name", "secret", "configMap"} for volume in pod.get("volumes", []))
    assert pod["automountServiceAccountToken"] is False
    assert manifest.find("ServiceAccount", name)["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    identity = pod["securityContext"]
    assert identity["runAsNonRoot"] is True
    assert identity["runAsUser"] == identity["runAsGroup"] == identity.get("fsGroup", 65532) == 65532
    assert identity["seccompProfile"] == {"type": "RuntimeDefault"}
    assert identity.keys() <= {"runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "seccompProfile"}
    for container in all_containers(manifest.pod(name)):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not any("hostPort" in port for port in container.get("ports", []))


# ---- the Secret and the database -------------------------------------------------------------------------------


def secret(host: str, password: str = "a password") -> Object:
    """The object that `kubectl create secret generic database` creates."""
    metadata = {"name": "database", "namespace": "messages"}
    return {"kind": "Secret", "metadata": metadata, "stringData": {"DB_HOST": host, "DB_PASSWORD": password}}


def owner_secret(owner: str = "postgres", password: str = "the owner's") -> Object:
    """The object that `kubectl create secret generic database-owner` creates."""
    metadata = {"name": "database-owner", "namespace": "messages"}
    data = {"DB_OWNER": owner, "DB_OWNER_PASSWORD": password}
    return {"kind": "Secret", "metadata": metadata, "stringData": data}


def test_owner(manifest: Manifest, tmp_path: Path) -> None:
    """Only the init container knows the database's owner, and pods also start without that Secret."""
    manifest.objects.append(secret("database.example"))
    pods = [(manifest.pod(name), container) for name in SERVICES for container in all_containers(manifest.pod(name))]
    for pod, container in pods:
        assert not any("OWNER" in name for name in configuration(manifest, pod, container, tmp_path))
    manifest.objects.append(owner_secret())
    knowing = [
        container["name"]
        for pod, container in pods
        if any("OWNER" in name for name in configuration(manifest, pod, container, tmp_path))
    ]
    assert knowing == ["schema"]
    assert manifest.find("ConfigMap", "message-service")["data"]["DB_USER"] != "postgres"
    for name in SERVICES:
        assert "database-owner" not in str(manifest.pod(name)["spec"].get("volumes"))


def test_missing_secret(manifest: Manifest, tmp_path: Path) -> None:
    """If the Secret or one of its keys is missing, an event names it, and no container starts only to fail."""
    pod = manifest.pod("message-service")
    first, *_ = all_containers(pod)
    with pytest.raises(NotStarted, match='"database" not found'):
        configuration(manifest, pod, first, tmp_path)
    manifest.objects.append(secret("database.example"))
    for key in ("DB_HOST", "DB_PASSWORD"):
        broken = manifest.copy()
        del broken.find("Secret", "database")["stringData"][key]
        with pytest.raises(NotStarted, match=key):
            configuration(broken, pod, first, tmp_path)


def test_rotation(manifest: Manifest) -> None:
    """A new password reaches a running pod: as a file in a mounted folder that its group can read."""
    pod = manifest.pod("message-service")["spec"]
    for container in all_containers({"spec": pod}):
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert mounts["database"].keys() == {"name", "mountPath", "readOnly"}
        assert mounts["database"]["readOnly"] is True
    volumes = [volume for volume in pod["volumes"] if "secret" in volume]
    assert [volume["secret"]["defaultMode"] for volume in volumes] == [0o440, 0o440]
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"]


def kubectl(chapter: str, folder: Path) -> Iterator[tuple[list[str], str]]:
    """The calls of kubectl that a chapter of docs/kubernetes.md makes, one by one: words and standard input."""
    page = (ROOT / "docs/kubernetes.md").read_text()
    (body,) = re.findall(rf"^## {chapter}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", body, re.MULTILINE | re.DOTALL)
    (folder / "kubectl").write_text(
        f"#!{sys.executable}\nimport json, sys\nwords = sys.argv[1:]\n"
        "given = sys.stdin.read() if words[-1] == '-' else ''\n"
        f"print(json.dumps([words, given]), file=open({str(folder / 'calls')!r}, 'a'))\n"
    )
    (folder / "kubectl").chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "IMAGE": "registry.example/messages:1"}
    environment |= {"DB_HOST": "database.example", "DB_OWNER": "postgres", "DB_OWNER_PASSWORD": "the owner's"}
    script = "\n".join(textwrap.dedent(block) for block in blocks)
    subprocess.run(["bash", "-euc", "docker() { :; }\n" + script], env=environment, cwd=ROOT, check=True, timeout=30)
    for line in (folder / "calls").read_text().splitlines():
        words, given = json.loads(line)
        yield words, given


def test_a_rollout_is_complete_with_two_pods(tmp_path: Path) -> None:
    """The page waits for the autoscalers between the first apply and `rollout status`."""
    calls = [" ".join(words) for words, _ in kubectl("Install", tmp_path)]
    (applied,) = [index for index, call in enumerate(calls) if call == "apply -f -"]
    assert "wait hpa --all --for=condition=AbleToScale" in calls[applied + 1]
    assert all("rollout status" in call for call in calls[applied + 2 : applied + 4])


def test_trial_database(tmp_path: Path) -> None:
    """Its data are on a volume of the pod, so that a restart of its container keeps them; the service reaches it."""
    (given,) = [
        given for words, given in kubectl("Install", tmp_path) if words[:4] == ["-n", "database", "apply", "-f"]
    ]
    (tmp_path / "database.yaml").write_text(given)
    pod = Manifest.read(tmp_path / "database.yaml").find("Deployment", "postgres")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["volumeMounts"] == [{"name": "data", "mountPath": "/var/lib/postgresql/data"}]
    assert pod["volumes"] == [{"name": "data", "emptyDir": {}}]
    validate = shutil.which("kubernetes-validate", path=Path(sys.executable).parent)
    if validate:
        command = [validate, "--strict", "--quiet", str(tmp_path / "database.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_another_ingress_controller(manifest: Manifest, tmp_path: Path) -> None:
    """The page's command changes the class and the image, and nothing else."""
    calls = [given for _, given in kubectl("A way in without an Application Load Balancer", tmp_path) if given]
    (tmp_path / "applied.yaml").write_text(calls[0])
    applied = Manifest.read(tmp_path / "applied.yaml")
    manifest.find("Ingress", "service1-ingress")["spec"]["ingressClassName"] = "nginx"
    for name in SERVICES:
        for container in all_containers(manifest.pod(name)):
            container["image"] = "registry.example/messages:1"
    assert applied.objects == manifest.objects


@pytest.mark.matrix
async def test_a_password_change_may_pause_anywhere(
    manifest: Manifest, tmp_path: Path, empty_database: Database, reader: str, start: Start
) -> None:
    """After each command of the page, the pod that runs can log in again, and a new pod starts and answers."""
    use(manifest, empty_database, reader)
    pod, container = manifest.pod("message-service"), manifest.container("message-service")
    owner, configured = manifest.find("Secret", "database-owner"), manifest.copy().find("ConfigMap", "message-service")
    assert apply_schema(manifest, tmp_path / "first").returncode == 0
    manifest.objects.remove(owner)
    passwords = {manifest.find("Secret", "database")["stringData"]["DB_PASSWORD"]}

    async def new_pod(folder: Path) -> Server:
        done = apply_schema(manifest, folder)
        assert done.returncode == 0, done.stderr
        return await start(*container["args"], **configuration(manifest, pod, container, folder))

    folder = tmp_path / "0"
    running = await new_pod(folder)
    for number, (words, _) in enumerate(kubectl("Change the password", tmp_path), start=1):
        match words[2:]:
            case ["create", "secret", "generic", "database-owner", *_]:
                manifest.objects.append(owner)
            case ["create", "secret", "generic", name, literal]:
                key, _, value = literal.removeprefix("--from-literal=").partition("=")
                metadata = {"name": name, "namespace": "messages"}
                manifest.objects.append({"kind": "Secret", "metadata": metadata, "stringData": {key: value}})
            case ["patch", "configmap", name, "--patch", patch]:
                changes = json.loads(patch.replace('"messages', f'"{reader}'))["data"]
                manifest.find("ConfigMap", name)["data"].update(changes)
            case ["patch", "secret", name, "--patch", patch]:
                manifest.find("Secret", name)["stringData"].update(json.loads(patch)["stringData"])
                passwords.add(manifest.find("Secret", name)["stringData"]["DB_PASSWORD"])
            case ["rollout", "restart", "deployment/message-service"]:
                running.kill()
                folder = tmp_path / str(number)
                running = await new_pod(folder)
            case ["delete", "secret", name]:
                manifest.objects.remove(manifest.find("Secret", name))
            case other:
                assert other[:3] == ["rollout", "status", "deployment/message-service"], other
        configuration(manifest, pod, container, folder)  # the kubelet keeps the files of a running pod up to date
        empty_database.terminate_backends()
        assert (await get(running.url + "/api/message")).status == 200, words  # before a new pod changes the database
        another = await new_pod(tmp_path / f"another-{number}")
        empty_database.terminate_backends()
        for service in (running, another):
            assert (await get(service.url + "/api/message")).status == 200, words
        another.kill()
    running.kill()
    assert len(passwords) == 2
    assert manifest.find("ConfigMap", "message-service") == configured


def apply_schema(manifest: Manifest, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the init container's command."""
    pod = manifest.pod("message-service")
    (schema,) = pod["spec"]["initContainers"]
    settings: dict[str, Any] = {**configuration(manifest, pod, schema, folder)}
    return run("-m", *schema["args"], **settings)


@pytest.fixture
def reader(empty_database: Database) -> Iterator[str]:
    """The name of a role that does not exist; the role is dropped at the end."""
    name = f"messages_{uuid.uuid4().hex[:12]}"
    yield name
    empty_database.terminate_backends()
    for role in (name, f"{name}_spare"):
        if empty_database.sql("SELECT FROM pg_roles WHERE rolname = %s", role):
            empty_database.sql(f"DROP OWNED BY {role}")
            empty_database.sql(f"DROP ROLE {role}")


async def test_pods_run(
    manifest: Manifest, tmp_path: Path, empty_database: Database, reader: str, start: Start
) -> None:
    """Applied with an empty database without TLS: table and role are created, pods get ready, the read is answered."""
    use(manifest, empty_database, reader)
    done = apply_schema(manifest, tmp_path)
    assert done.returncode == 0, done.stderr
    pod = manifest.pod("message-service")
    container = manifest.container("message-service")
    service = await start(*container["args"], **configuration(manifest, pod, container, tmp_path))
    container = manifest.container("gateway")
    settings = configuration(manifest, manifest.pod("gateway"), container, tmp_path) | {"DOWNSTREAM_URL": service.url}
    front = await start(*container["args"], **settings)
    for name, running in (("message-service", service), ("gateway", front)):
        for probe in PROBES:
            path = manifest.container(name)[probe]["httpGet"]["path"]
            assert (await get(running.url + path)).status == 200
    assert (await get(front.url + PAIR.read_path)).json() == PAIR.result
    for running in (service, front):
        running.kill()  # it would drain for long


def test_reader_may_only_read(manifest: Manifest, tmp_path: Path, empty_database: Database, reader: str) -> None:
    """The services' role can read the table, but can neither change it nor create one."""
    use(manifest, empty_database, reader)
    assert apply_schema(manifest, tmp_path).returncode == 0
    role = Database(empty_database.name, reader, READER_PASSWORD, empty_database.host, empty_database.port)
    assert role.sql(PAIR.statement)
    for statement in (PAIR.write.replace("%s", "NULL"), f"DELETE FROM {PAIR.table}", "CREATE TABLE more ()"):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            role.sql(statement)
    role.close()


def test_later_rollouts_need_no_owner(
    manifest: Manifest, tmp_path: Path, empty_database: Database, reader: str
) -> None:
    """After the first rollout, the init container succeeds with an outdated owner's password, and without any."""
    use(manifest, empty_database, reader)
    assert apply_schema(manifest, tmp_path).returncode == 0
    owner = manifest.find("Secret", "database-owner")
    owner["stringData"]["DB_OWNER_PASSWORD"] = "stale"
    assert apply_schema(manifest, tmp_path).returncode == 0
    manifest.objects.remove(owner)
    assert apply_schema(manifest, tmp_path).returncode == 0


async def test_database_ca(manifest: Manifest, tmp_path: Path, database: Database, start: Start) -> None:
    """With the ConfigMap `database-ca` the message service insists on TLS: it refuses a database without it."""
    use(manifest, database)  # as its owner, so that nothing but TLS is in the way
    pod, container = manifest.pod("message-service"), manifest.container("message-service")
    data = {"ca.pem": "", "DB_SSLMODE": "verify-full", "DB_SSLROOTCERT": "/etc/database-ca/ca.pem"}
    metadata = {"name": "database-ca", "namespace": "messages"}
    manifest.objects.append({"kind": "ConfigMap", "metadata": metadata, "data": data})
    settings = configuration(manifest, pod, container, tmp_path)
    service = await start(*container["args"], **settings)
    assert (await get(service.url + container["readinessProbe"]["httpGet"]["path"])).status == 503
    service.kill()


READER_PASSWORD = "2f5e9c0b8a"


def use(manifest: Manifest, database: Database, reader: str = "") -> None:
    """An operator's steps for a database: create the Secrets, and adapt the ConfigMap if necessary."""
    settings = {name: str(value) for name, value in database.settings().items()}
    owner, password = settings["DB_USER"], settings.pop("DB_PASSWORD", "")
    if reader:
        settings["DB_USER"] = reader
        manifest.objects.append(owner_secret(owner, password))
    manifest.objects.append(secret(settings.pop("DB_HOST"), READER_PASSWORD if reader else password))
    manifest.find("ConfigMap", "message-service")["data"].update(settings)


# ---- and each of these tests can fail --------------------------------------------------------------------------

GONE: Any = object()
POD = "spec template spec"
MAIN = f"{POD} containers 0"
INIT = f"{POD} initContainers 0"
ANNOTATION = f"metadata annotations {ALB}"
LABELS = {"app.kubernetes.io/name": "somebody-else"}

FAULTS: list[tuple[Callable[..., Any], str, str, Any]] = [
    (test_order, "Namespace/messages", "metadata labels pod-security.kubernetes.io/enforce", "baseline"),
    (test_order, "Namespace/messages", "metadata labels elbv2.k8s.aws/pod-readiness-gate-inject", GONE),
    (test_order, "Service/gateway", "metadata namespace", "default"),
    (test_order, "Ingress/service1-ingress", "kind", "Deployment"),
    (test_selectors, "Service/gateway", "spec selector", LABELS),
    (test_selectors, "Service/gateway", "spec selector", {"app.kubernetes.io/part-of": "messages"}),
    (test_selectors, "NetworkPolicy/gateway", "spec podSelector matchLabels", LABELS),
    (test_selectors, "PodDisruptionBudget/gateway", "spec selector matchLabels", LABELS),
    (test_selectors, "Deployment/gateway", "spec template metadata labels", LABELS),
    (test_selectors, "Deployment/gateway", f"{POD} topologySpreadConstraints 0 labelSelector matchLabels", LABELS),
    (test_selectors, "HorizontalPodAutoscaler/gateway", "spec scaleTargetRef name", "message-service"),
    (test_selectors, "Deployment/gateway", f"{POD} serviceAccountName", "default"),
    (test_ports, "Service/gateway", "spec ports 0 targetPort", "web"),
    (test_ports, "Service/gateway", "spec ports 0 port", 80),
    (test_ports, "Deployment/gateway", f"{MAIN} ports 0 containerPort", 8080),
    (test_downstream_url, "Service/message-service", "metadata name", "messages"),
    (test_downstream_url, "ConfigMap/gateway", "data DOWNSTREAM_URL", "http://message-service:80"),
    (test_image, "Deployment/gateway", f"{MAIN} image", "messages:latest"),
    (test_image, "Deployment/message-service", f"{INIT} image", "messages:0.0.1"),
    (test_image, "Deployment/gateway", f"{MAIN} imagePullPolicy", "Always"),
    (test_image, "Deployment/gateway", f"{MAIN} args 0", "message_service"),
    (test_probes, "Deployment/gateway", f"{MAIN} readinessProbe httpGet path", "/ready"),
    (test_probes, "Deployment/message-service", f"{MAIN} livenessProbe httpGet path", "/readyz"),
    (test_probes, "Deployment/message-service", f"{MAIN} startupProbe httpGet path", "/readyz"),
    (test_probes, "Deployment/message-service", f"{MAIN} readinessProbe httpGet path", "/healthz"),
    (test_probes, "Deployment/message-service", f"{MAIN} readinessProbe timeoutSeconds", 1),
    (test_probes, "Deployment/gateway", f"{MAIN} livenessProbe httpGet port", "web"),
    (test_probes, "Deployment/gateway", f"{MAIN} startupProbe failureThreshold", 3),
    (test_drain_without_events, "Deployment/gateway", f"{MAIN} readinessProbe httpGet path", "/readyz"),
    (test_drain_without_events, "Deployment/message-service", f"{MAIN} readinessProbe periodSeconds", 1),
    (test_a_database_that_is_away_is_told, "Service/message-service", "spec publishNotReadyAddresses", GONE),
    (test_a_database_that_is_away_is_told, "Service/message-service", "spec publishNotReadyAddresses", False),
    (test_frozen_server, "Deployment/gateway", f"{MAIN} livenessProbe terminationGracePeriodSeconds", GONE),
    (test_frozen_server, "Deployment/gateway", f"{MAIN} livenessProbe periodSeconds", 10),
    (test_frozen_server, "Deployment/gateway", f"{MAIN} livenessProbe timeoutSeconds", 2),
    (test_frozen_server, "Deployment/message-service", f"{MAIN} livenessProbe failureThreshold", 2),
    (test_frozen_server, "Deployment/message-service", f"{MAIN} livenessProbe failureThreshold", 4),
    (test_metrics, "Deployment/gateway", "spec template metadata annotations prometheus.io/port", "8001"),
    (test_metrics, "Deployment/gateway", "spec template metadata annotations prometheus.io/path", "/metric"),
    (test_settings, "ConfigMap/gateway", "data DOWNSTREAM", "http://message-service:8001"),
    (test_settings, "ConfigMap/gateway", "data DOWNSTREAM_URL", GONE),
    (test_settings, "ConfigMap/message-service", "data DB_DATABASE", "mydb"),
    (test_settings, "ConfigMap/message-service", "data DB_PASSWORD_FILE", GONE),
    (test_settings, "ConfigMap/message-service", "data DB_PASSWORD", "a password"),
    (test_settings, "Deployment/message-service", f"{MAIN} env 0", GONE),
    (test_grace_period, "Deployment/gateway", f"{POD} terminationGracePeriodSeconds", 30),
    (test_grace_period, "ConfigMap/gateway", "data DRAIN_SECONDS", "60"),
    (test_grace_period, "ConfigMap/message-service", "data SHUTDOWN_SECONDS", "60"),
    (test_grace_period, "Deployment/gateway", f"{MAIN} lifecycle", {"preStop": {"sleep": {"seconds": 10}}}),
    (test_resources, "Deployment/gateway", f"{MAIN} resources limits memory", "32Mi"),
    (test_resources, "Deployment/gateway", f"{MAIN} resources requests memory", "512Mi"),
    (test_resources, "Deployment/gateway", f"{MAIN} resources requests cpu", GONE),
    (test_cpu, "Deployment/message-service", f"{MAIN} resources requests cpu", "20m"),
    (test_cpu, "HorizontalPodAutoscaler/gateway", "spec metrics 0 resource target averageUtilization", 10),
    (test_rollout, "Deployment/gateway", "spec replicas", 2),
    (test_rollout, "Deployment/gateway", "spec strategy type", "Recreate"),
    (test_rollout, "Deployment/gateway", "spec strategy rollingUpdate maxUnavailable", "25%"),
    (test_rollout, "Deployment/gateway", "spec minReadySeconds", 0),
    (test_rollout, "HorizontalPodAutoscaler/gateway", "spec minReplicas", 1),
    (test_rollout, "HorizontalPodAutoscaler/gateway", "spec behavior scaleDown stabilizationWindowSeconds", 0),
    (test_rollout, "PodDisruptionBudget/gateway", "spec maxUnavailable", 0),
    (test_rollout, "PodDisruptionBudget/gateway", "spec unhealthyPodEvictionPolicy", "IfHealthyBudget"),
    (test_spread, "Deployment/gateway", f"{POD} topologySpreadConstraints 0", GONE),
    (test_spread, "Deployment/gateway", f"{POD} topologySpreadConstraints 1 whenUnsatisfiable", "DoNotSchedule"),
    (test_message_service_drain, "ConfigMap/message-service", "data DRAIN_SECONDS", "15"),
    (test_load_balancer_times, "ConfigMap/gateway", "data DRAIN_SECONDS", "20"),
    (
        test_load_balancer_times,
        "Ingress/service1-ingress",
        f"{ANNOTATION}target-group-attributes",
        "deregistration_delay.timeout_seconds=300",
    ),
    (
        test_load_balancer_times,
        "Ingress/service1-ingress",
        f"{ANNOTATION}load-balancer-attributes",
        "idle_timeout.timeout_seconds=90",
    ),
    (test_load_balancer_times, "Ingress/service1-ingress", f"{ANNOTATION}healthcheck-interval-seconds", "15"),
    (test_load_balancer_times, "Ingress/service1-ingress", f"{ANNOTATION}healthcheck-timeout-seconds", "5"),
    (test_load_balancer_times, "Ingress/service1-ingress", f"{ANNOTATION}unhealthy-threshold-count", "10"),
    (test_ingress, "Ingress/service1-ingress", "spec ingressClassName", "nginx"),
    (test_ingress, "Ingress/service1-ingress", "spec rules 0 http paths 2 pathType", "Prefix"),
    (test_ingress, "Ingress/service1-ingress", "spec rules 0 http paths 1 path", "/metrics"),
    (test_ingress, "Ingress/service1-ingress", "spec rules 0 http paths 0 backend service name", "message-service"),
    (test_ingress, "Ingress/service1-ingress", "spec rules 0 http paths 0 backend service port name", "web"),
    (test_ingress, "Ingress/service1-ingress", f"{ANNOTATION}target-type", "instance"),
    (test_ingress, "Ingress/service1-ingress", f"{ANNOTATION}scheme", "internal"),
    (test_ingress, "Ingress/service1-ingress", f"{ANNOTATION}healthcheck-path", "/status"),
    (test_published_paths, "Ingress/service1-ingress", "spec rules 0 http paths 1 path", "/openapi.json"),
    (test_network_policies, "NetworkPolicy/default-deny", "spec policyTypes", ["Ingress"]),
    (test_network_policies, "NetworkPolicy/default-deny", "spec policyTypes", ["Egress"]),
    (test_network_policies, "NetworkPolicy/default-deny", "spec podSelector matchLabels", LABELS),
    (test_network_policies, "NetworkPolicy/dns", "spec egress 0 ports 1", GONE),
    (test_network_policies, "NetworkPolicy/dns", "spec egress 0 to 1", GONE),
    (test_network_policies, "NetworkPolicy/dns", "spec egress 0 to 0 podSelector", GONE),
    (test_network_policies, "NetworkPolicy/dns", "spec egress 0 to", GONE),
    (test_network_policies, "NetworkPolicy/gateway", "spec ingress 0 from 0", GONE),
    (test_network_policies, "NetworkPolicy/gateway", "spec ingress 0 from 0 ipBlock cidr", "0.0.0.0/0"),
    (test_network_policies, "NetworkPolicy/gateway", "spec ingress 0 ports", GONE),
    (test_network_policies, "NetworkPolicy/gateway", "spec ingress 1", GONE),
    (test_network_policies, "NetworkPolicy/gateway", "spec egress 0 to", [{"podSelector": {"matchLabels": LABELS}}]),
    (test_network_policies, "NetworkPolicy/gateway", "spec egress 0 ports", GONE),
    (test_network_policies, "NetworkPolicy/gateway", "spec egress 0 ports 0 port", 8000),
    (test_network_policies, "NetworkPolicy/message-service", "spec ingress 0 from 0", GONE),
    (test_network_policies, "NetworkPolicy/message-service", "spec ingress 0 from 0 namespaceSelector", {}),
    (test_network_policies, "NetworkPolicy/message-service", "spec ingress 0 from 1", GONE),
    (test_network_policies, "NetworkPolicy/message-service", "spec ingress 0 from 1 namespaceSelector", {}),
    (test_network_policies, "NetworkPolicy/message-service", "spec egress 0 ports", GONE),
    (test_network_policies, "ConfigMap/message-service", "data DB_PORT", "6432"),
    (test_restricted, "Deployment/gateway", f"{POD} hostNetwork", True),
    (test_restricted, "Deployment/gateway", f"{POD} volumes", [{"name": "root", "hostPath": {"path": "/"}}]),
    (test_restricted, "Deployment/gateway", f"{POD} automountServiceAccountToken", True),
    (test_restricted, "ServiceAccount/gateway", "automountServiceAccountToken", GONE),
    (test_restricted, "Deployment/gateway", f"{POD} enableServiceLinks", GONE),
    (test_restricted, "Deployment/gateway", f"{POD} securityContext runAsNonRoot", False),
    (test_restricted, "Deployment/gateway", f"{POD} securityContext runAsUser", 0),
    (test_restricted, "Deployment/gateway", f"{POD} securityContext seccompProfile type", "Unconfined"),
    (test_restricted, "Deployment/gateway", f"{MAIN} securityContext allowPrivilegeEscalation", GONE),
    (test_restricted, "Deployment/gateway", f"{MAIN} securityContext readOnlyRootFilesystem", False),
    (test_restricted, "Deployment/gateway", f"{MAIN} securityContext capabilities add", ["NET_RAW"]),
    (test_restricted, "Deployment/gateway", f"{MAIN} securityContext privileged", True),
    (test_restricted, "Deployment/message-service", f"{INIT} securityContext", {}),
    (test_restricted, "Deployment/gateway", f"{MAIN} ports 0 hostPort", 80),
    (test_missing_secret, "Deployment/message-service", f"{POD} volumes 0 secret optional", True),
    (test_missing_secret, "Deployment/message-service", f"{POD} volumes 0 secret items", []),
    (test_missing_secret, "Deployment/message-service", f"{INIT} env 0 valueFrom secretKeyRef optional", True),
    (test_owner, "Deployment/message-service", f"{INIT} envFrom 1 secretRef optional", False),
    (test_owner, "Deployment/message-service", f"{INIT} envFrom 1", GONE),
    (
        test_owner,
        "Deployment/message-service",
        f"{MAIN} envFrom",
        [{"secretRef": {"name": "database-owner", "optional": True}}],
    ),
    (test_owner, "ConfigMap/message-service", "data DB_USER", "postgres"),
    (test_rotation, "Deployment/message-service", f"{MAIN} volumeMounts 0 subPath", "DB_PASSWORD"),
    (test_rotation, "Deployment/message-service", f"{POD} volumes 0 secret defaultMode", 0o400),
    (test_rotation, "Deployment/message-service", f"{POD} securityContext fsGroup", 0),
]


@pytest.mark.parametrize(
    ("test", "item", "path", "value"), FAULTS, ids=[" ".join((f[0].__name__, *f[1:3])) for f in FAULTS]
)
async def test_a_fault_is_seen(
    manifest: Manifest,
    servers: Servers,
    tmp_path: Path,
    start: Start,
    test: Callable[..., Any],
    item: str,
    path: str,
    value: Any,
) -> None:
    """A broken file fails a test."""
    *way, last = path.split()
    target: Any = manifest.find(*item.split("/"))
    for step in way:
        target = target[int(step)] if isinstance(target, list) else target.setdefault(step, {})
    key = int(last) if isinstance(target, list) else last
    if value is GONE:
        del target[key]
    else:
        assert isinstance(target, list) or target.get(key) != value
        target[key] = value
    name = "message-service" if "message-service" in item else "gateway"
    fixtures = {"manifest": manifest, "servers": servers, "tmp_path": tmp_path, "name": name, "start": start}
    wanted = inspect.signature(test).parameters

    async def run_test() -> None:
        done = test(**{parameter: fixtures[parameter] for parameter in wanted})
        if inspect.isawaitable(done):
            await done

    with pytest.raises((AssertionError, LookupError, NotStarted, pytest.fail.Exception)):
        await run_test()
