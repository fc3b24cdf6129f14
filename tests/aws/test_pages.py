"""docs/kubernetes.md and docs/aws.md: every command runs as written, in the page's order, and fits k8s.yaml.

pages.py runs them, with stand-ins for the programs. The tests check the recorded arguments: with the AWS CLI, against
what the other clients take (clients.py), with helm, docker and kubectl themselves where they are installed, against the
needs of k8s.yaml, and against what each procedure of docs/aws.md has to do, in which order.

No emulator of AWS stands behind the commands. moto 5.2 was tried as one and left out: its CloudFormation knows neither
`Fn::Cidr` nor EKS, so that the template needs shims, and it ignores what it does not know, such as a wrong property or
`--manage-master-user-password` at a restore. A rehearsal there succeeds with the very faults that it should find.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("awscli", reason="the extra `aws` is not installed: make .venv/.aws")

import yaml
from awscli.clidriver import create_clidriver
from botocore.exceptions import EndpointConnectionError
from botocore.httpsession import URLLib3Session
from cfnlint.decode import cfn_yaml
from clients import CHART_VALUES, mistakes
from inventory import inventory
from kit import ROOT, reserve_port
from kit.kubernetes import Manifest, Object, all_containers, configuration
from pages import PAGES, PLACEHOLDERS, Command, blocks, calls, mentioned, run, text
from resolver import STACK, Stack, parameter_values

jmespath = pytest.importorskip("jmespath")  # it has no type hints

SERVICES = ("gateway", "message-service")
AWS = "docs/aws.md"
REQUIRED = {"PublicAccessCidrs": "203.0.113.7/32"}


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest) -> list[Command]:
    """A page's commands, after they have run."""
    return run(request.param)


@pytest.fixture(params=PAGES)
def every(request: pytest.FixtureRequest) -> list[list[str]]:
    """The words of all of a page's commands, those in its running text included, each once."""
    return [*map(list, dict.fromkeys(tuple(item.words) for item in run(request.param) + mentioned(request.param)))]


@pytest.fixture(scope="module")
def template() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(cfn_yaml.load(str(ROOT / "aws/template.yaml"))))
    return loaded


KINDS = {"secret": ("Secret", "stringData"), "configmap": ("ConfigMap", "data"), "deployment": ("Deployment", "spec")}


def test_each_pod_finds_what_it_needs(page: list[Command], tmp_path: Path) -> None:
    """Nothing is created twice or used before it exists, and the page creates what k8s.yaml reads."""
    namespaces: list[str] = []
    objects: dict[tuple[str, str, str], Object] = {}
    for command in page:
        match command.words:
            case ["kubectl", "create", "namespace", name, *_]:
                assert name not in namespaces
                namespaces.append(name)
            case ["kubectl", "-n", space, "create", kind, *more]:
                assert space in namespaces
                name = more[kind == "secret"]  # after its type
                assert ((space, kind, name) in objects) == ("--dry-run=client" in more)
                data = dict(item.split("=", 1) for item in command.option("--from-literal"))
                data |= {item.split("=")[0]: "" for item in command.option("--from-file")}
                objects[space, kind, name] = {
                    "kind": KINDS[kind][0],
                    "metadata": {"name": name},
                    KINDS[kind][1]: data,
                }
            case ["kubectl", "-n", space, "delete", kind, name]:
                del objects[space, kind, name]
            case ["kubectl", "apply", "-f", "-"]:
                check_pods(Manifest([*yaml.safe_load_all(command.given), *objects.values()]), tmp_path)
                assert command.given.count("image: ") == 3
                assert command.given.count(f"image: {image(page)}\n") == 3
    assert ("messages", "secret", "database-owner") not in objects


def check_pods(manifest: Manifest, folder: Path) -> None:
    """Each container of the message service starts: with the owner's password if it needs it, else without."""
    pod = manifest.pod("message-service")
    secrets = {item["metadata"]["name"] for item in manifest.of_kind("Secret")}
    authorities = [item for item in manifest.of_kind("ConfigMap") if item["metadata"]["name"] == "database-ca"]
    for container in all_containers(pod):
        given = configuration(manifest, pod, container, folder)
        owner = "database-owner" in secrets and container["name"] == "schema"
        assert ("DB_OWNER_PASSWORD" in given) == owner
        assert Path(given["DB_PASSWORD_FILE"]).read_text()
        assert given.get("DB_SSLMODE") == ("verify-full" if authorities else None)


def image(page: list[Command]) -> str:
    """The image that the page builds."""
    (build,) = (command for command in page if {"docker", "build"} <= {*command.words[:3]})
    (name,) = build.option("-t") + build.option("--tag")
    return name


def test_what_is_asked_for_exists(page: list[Command]) -> None:
    """The page's Deployments, Services, labels and paths are those of k8s.yaml and of the trial database."""
    manifest = Manifest.read(ROOT / "k8s.yaml")
    known = {f"{item['kind']}/{item['metadata']['name']}".lower() for item in manifest.objects}
    labels = {"=".join(label) for name in SERVICES for label in manifest.pod(name)["metadata"]["labels"].items()}
    for command in (item for item in page if item.words[0] == "kubectl"):
        named = {word for word in command.words if re.fullmatch("(deployment|service|ingress)/[a-z0-9-]+", word)}
        assert named <= known | {"deployment/postgres", "deployment/aws-load-balancer-controller"}
        assert {*command.option("-l")} <= labels


def test_stack_is_the_templates(template: dict[str, Any]) -> None:
    """The page's parameters, outputs, resources and names are the template's, and the template accepts each value."""
    page = text(AWS)
    given = re.findall(r"\b([A-Z][a-z]+[A-Za-z]*)=([\w.,/-]+)", page)
    assert len(given) > 5
    for name, value in given:
        parameter_values(template, REQUIRED | {name: value})
    assert {*re.findall(r"\(output (\w+)\)", page)} == template["Outputs"].keys()
    assert {*re.findall(r"\(resource (\w+)\)", page)} <= template["Resources"].keys()
    stack = Stack(template, REQUIRED, "eu-central-1")
    names = re.findall(r"--(?:stack-name|cluster-name|name) (\w+) ", page)
    assert (
        {*names} == {STACK} == {stack.resources["Database"]["DBInstanceIdentifier"], stack.resources["Cluster"]["Name"]}
    )
    assert f"--log-group-name {stack.resources['ClusterLogGroup']['LogGroupName']} " in page


def test_the_aws_cli_understands_its_commands(
    every: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The AWS CLI accepts each command and its query, up to the request that it would send to AWS."""
    requests = []

    def send(_: URLLib3Session, request: Any) -> None:
        requests.append(request)
        raise EndpointConnectionError(endpoint_url=request.url)

    monkeypatch.setattr(URLLib3Session, "send", send)
    nothing = str(tmp_path / "nothing")
    for name, value in {
        "AWS_REGION": "eu-central-1",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_CONFIG_FILE": nothing,
        "AWS_SHARED_CREDENTIALS_FILE": nothing,
        "AWS_MAX_ATTEMPTS": "1",
        "HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    driver = create_clidriver()
    for words in (item for item in every if item[0] == "aws"):
        for query in Command("", words, "").option("--query"):
            jmespath.compile(query)
        requests.clear()
        driver.main(words[1:])
        assert requests, (words, capfd.readouterr().err)


def test_the_other_clients_take_their_commands(every: list[list[str]]) -> None:
    """No command has a flag that its client does not know, and none lacks a value or an argument."""
    assert [(words, found) for words in every if words[0] != "aws" and (found := mistakes(words))] == []


@pytest.mark.parametrize(
    "wrong",
    [
        "helm upgrade --instal messages chart",
        "helm upgrade --install messages",
        "helm upgrade --install messages chart --set",
        "helm show chart messages --repo https://example",
        "docker buildx build --push",
        "docker buildx build --platforms linux/amd64 .",
        "docker login --username= registry.example",
        "kubectl -n messages rollout status",
        "kubectl -n messages patch configmap message-service --patch",
        "kubectl -n messages logs --previous=yes deployment/gateway",
        "curl --fail",
    ],
)
def test_a_mistake_in_a_command_is_seen(wrong: str) -> None:
    """A misspelt flag or command, a missing value and a missing argument are found."""
    assert mistakes(wrong.split())


@pytest.mark.parametrize("client", ["docker", "helm", "kubectl"])
def test_a_client_understands_its_commands(client: str, every: list[list[str]], tmp_path: Path) -> None:
    """An installed client accepts each of its commands, up to the point where it looks for a server."""
    if shutil.which(client) is None:
        pytest.skip(f"there is no {client} here; clients.py says what it takes")
    shutil.copy(ROOT / "k8s.yaml", tmp_path)
    for name in ("ca.pem", "rds.pem"):
        (tmp_path / name).write_text("certificates")
    with reserve_port() as nobody:
        nowhere = f"127.0.0.1:{nobody.getsockname()[1]}"
        for words in (item for item in every if item[0] == client):
            done = subprocess.run(
                [*words, f"--server=http://{nowhere}"] if client == "kubectl" else words,
                cwd=tmp_path,
                input=KUBERNETES_OBJECT,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": str(tmp_path),
                    "DOCKER_HOST": f"tcp://{nowhere}",
                    "HELM_KUBEAPISERVER": f"http://{nowhere}",
                    "HTTPS_PROXY": f"http://{nowhere}",
                },
                capture_output=True,
                text=True,
                timeout=30,
            )
            assert done.returncode == 0 or NOBODY.search(done.stderr), (words, done.stderr)


KUBERNETES_OBJECT = '{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "any"}}'
# What a client says that has understood its command, and then finds no server.
NOBODY = re.compile(r"connection refused|was refused|onnect to the [Dd]ocker|no builder \"messages\" found")


@pytest.mark.parametrize("name", PLACEHOLDERS)
def test_placeholders_are_named(name: str) -> None:
    """A command whose variable the reader has not set stops and says so, and the page says what to set it to."""
    used = [block for _, block in blocks(AWS) if re.search(rf"\$\{{?{name}\b", block)]
    assert re.search(rf"\$\{{{name}:[?-]", used[0])
    assert re.search(rf"`{name}`|\$\{{{name}:\?[^}}]", text(AWS))


# ------------------------------------------------------------------------------------- the procedures on AWS


def _words(chapter: str) -> list[str]:
    """The commands of a chapter, each as one line."""
    return [" ".join(command.words) for command in run(AWS) if command.chapter == chapter]


def _order(lines: list[str], *patterns: str) -> None:
    """Each pattern is in a line of its own, and they come in this order."""
    found = [[number for number, line in enumerate(lines) if re.search(pattern, line)] for pattern in patterns]
    assert all(found), (patterns, lines)
    assert all(earlier[-1] < later[0] for earlier, later in itertools.pairwise(found)), (patterns, lines)


EMERGENCIES = {
    "Restore the database": 6,
    "Roll the services back": 3,
    "Roll the stack back": 4,
    "Roll Kubernetes back": 4,
    "Change the password": 5,
    "Delete everything but the data": 5,
}


@pytest.mark.parametrize("chapter", EMERGENCIES)
def test_an_emergency_is_one_list(chapter: str) -> None:
    """In an incident, each procedure is one numbered list, and each step says what is seen after it."""
    (body,) = re.findall(rf"^#+ {chapter}\n(.*?)(?=^#|\Z)", text(AWS), re.MULTILINE | re.DOTALL)
    steps = re.split(r"^\d\. ", body, flags=re.MULTILINE)[1:]
    assert [*re.findall(r"^(\d)\. ", body, re.MULTILINE)] == [str(number + 1) for number in range(EMERGENCIES[chapter])]
    for step in steps:
        prose = re.sub(r"```.*?```", "", step, flags=re.DOTALL)
        assert re.search(r"[Yy]ou see|shows", prose), step
    assert f"](#{chapter.lower().replace(' ', '-')})" in text(AWS).partition("## ")[0]


def test_databases_end_as_they_began() -> None:
    """Each database that a command names exists by then, no two have one name, and only the stack's own one stays."""
    exist, leaving, restored = {STACK}, set[str](), ""
    for command in calls(AWS, "aws", "rds"):
        (name,) = command.option("--db-instance-identifier") or [""]
        match command.words[2]:
            case "restore-db-instance-to-point-in-time" | "restore-db-instance-from-db-snapshot":
                (target,) = command.option("--target-db-instance-identifier") or [name]
                assert {*command.option("--source-db-instance-identifier")} <= exist
                assert target not in exist or target == restored  # the other way to the same database
                exist.add(target)
                restored = target
                continue
            case "modify-db-instance" if command.option("--new-db-instance-identifier"):
                (new,) = command.option("--new-db-instance-identifier")
                assert new not in exist
                exist = (exist - {name}) | {new}
            case "delete-db-instance":
                assert name in exist - {STACK}
                exist.remove(name)
                leaving.add(name)
            case "wait" if command.words[3] == "db-instance-deleted":
                # For one that is renamed or restarted, this waiter fails: words of botocore's model of waiters.
                assert name in leaving
            case _:
                assert not name or name in exist
        restored = ""
    assert exist == {STACK}


def test_a_moment_can_be_restored() -> None:
    """The page restores to a moment as well as from a snapshot, and swaps the names only when the new one is whole."""
    for restore in ("to-point-in-time", "from-db-snapshot"):
        _order(
            _words("Restore the database"),
            f"restore-db-instance-{restore} ",
            "--manage-master-user-password",
            "identifier messages --new-db-instance-identifier messages-old",
            "identifier messages-new --new-db-instance-identifier messages",
            "curl",
            "delete-db-instance ",
        )


# What a restored database has without being told, of all that the template says about the database.
INHERITED = {
    "AllocatedStorage": "the source's",
    "AllowMajorVersionUpgrade": "a permission for one call",
    "DBInstanceClass": "the source's, by default",
    "DBInstanceIdentifier": "the name that it gets by the swap",
    "DBName": "the source's",
    "DBSnapshotIdentifier": "for new stacks",
    "DeleteAutomatedBackups": "CloudFormation's own, for the deletion",
    "Engine": "the source's",
    "EngineVersion": "the source's",
    "MasterUsername": "the source's",
    "PerformanceInsightsRetentionPeriod": "a week, by default",
    "Port": "the source's, by default",
    "StorageEncrypted": "the source's",
    "StorageType": "the source's",
    "Tags": "the source's",
}


@pytest.mark.parametrize("restore", ["restore-db-instance-to-point-in-time", "restore-db-instance-from-db-snapshot"])
def test_a_restored_database_is_like_the_templates(restore: str, template: dict[str, Any]) -> None:
    """A restored database has every setting that the template gives the stack's own."""
    (first,) = calls(AWS, "aws", "rds", restore)
    (second,) = (
        item for item in calls(AWS, "aws", "rds", "modify-db-instance") if "--manage-master-user-password" in item.words
    )
    said = [*first.words, *second.words]
    wanted = Stack(template, REQUIRED, "eu-central-1").resources["Database"]
    _, names = inventory()["Database"]
    for name in names - INHERITED.keys():
        option = {"VPCSecurityGroups": "vpc-security-group-ids", "MultiAZ": "multi-az"}.get(name)
        option = option or re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=DB)(?=[A-Z])", "-", name).lower()
        value = wanted[name]
        if value is False:
            assert f"--no-{option}" in said
        elif value in (True, "true"):
            assert f"--{option}" in said
        else:
            values = first.values(f"--{option}") + second.values(f"--{option}")
            expected = [str(item) for item in value] if isinstance(value, list) else [str(value)]
            assert values == (expected if not expected[0].startswith("Database") else ["messages-database"]), name


def test_protection_is_on_from_the_first_command_to_the_last_chapter(template: dict[str, Any]) -> None:
    """After its creation only the last chapter can delete the stack, and it turns each protection off first."""
    protection = "update-termination-protection .*--{}enable-termination-protection"
    _order(_words("The stack"), "cloudformation deploy", protection.format(""))
    _order(
        _words("Delete everything but the data"),
        "kubectl delete .*-f k8s.yaml",
        protection.format("no-"),
        "eks update-cluster-config .*--no-deletion-protection",
        "rds modify-db-instance .*--no-deletion-protection",
        "delete-stack",
        "wait stack-delete-complete",
        "delete-log-group",
    )
    stack = Stack(template, REQUIRED, "eu-central-1")
    left = {"Database", *stack.waits_for["Database"]}
    assert f"deletes {len(stack.resources) - len(left)} of {len(stack.resources)} resources" in text(AWS).replace(
        "\n", " "
    )
    assert {"Nodes", "Repository", "NatGateway1"}.isdisjoint(left)


def test_the_stack_goes_back_after_a_look() -> None:
    """The former template is there and its changes are shown before the stack goes back to it."""
    _order(
        _words("Roll the stack back"),
        "git log",
        "git restore .* aws/template.yaml$",
        "cloudformation deploy .*--no-execute-changeset",
        "describe-change-set .*--change-set-name arn:",
        "cloudformation deploy .*--tags project=messages$",
    )


def test_kubernetes_goes_back_in_order() -> None:
    """Add-ons go back first, then nodes, then the control plane, by one version from the one that was upgraded to."""
    _order(
        _words("Kubernetes"),
        "deploy .* KubernetesVersion=1.37$",
        "describe-addon-versions --kubernetes-version 1.37",
        "update-nodegroup-version",
    )
    _order(
        _words("Roll Kubernetes back"),
        "describe-addon-versions --kubernetes-version 1.36",
        "update-nodegroup-version .*--kubernetes-version 1.36$",
        "list-insights .*ROLLBACK_READINESS",
        "deploy .* KubernetesVersion=1.36$",
    )


def test_the_newest_addons_are_installed() -> None:
    """Of an add-on's versions, in whatever order EKS lists them, the newest is installed."""
    updates = calls(AWS, "aws", "eks", "update-addon")
    assert {version for command in updates for version in command.option("--addon-version")} == {"v1.22.1-eksbuild.2"}


def test_every_change_of_the_stack_keeps_its_tags() -> None:
    """Each change passes the same tags: without them, CloudFormation takes them off every resource."""
    deploys = calls(AWS, "aws", "cloudformation", "deploy")
    assert len(deploys) >= 4
    assert [command.option("--tags") for command in deploys] == [["project=messages"]] * len(deploys)


def test_images_run_on_every_node(template: dict[str, Any]) -> None:
    """The image is built for the processor of each node that the template offers."""
    processors = {"AL2023_x86_64_STANDARD": "linux/amd64", "AL2023_ARM_64_STANDARD": "linux/arm64"}
    needed = {processors[node["AmiType"]] for node in template["Mappings"]["Node"].values()}
    (build,) = calls(AWS, "docker", "buildx", "build")
    (platforms,) = build.option("--platform")
    assert {*platforms.split(",")} == needed
    (builder,) = calls(AWS, "docker", "buildx", "create")
    assert builder.option("--name") == build.option("--builder")
    assert builder.option("--driver") == ["docker-container"]  # Docker's own builds for one processor only


def test_a_major_version_has_a_way(template: dict[str, Any]) -> None:
    """The database is upgraded by a command that says so, to the default parameters, and then the stack follows."""
    lines = _words("A new major version of PostgreSQL")
    _order(
        lines,
        "describe-db-engine-versions .*--engine-version 15.19 ",
        "modify-db-instance .*--engine-version 16.9 --allow-major-version-upgrade .*default.postgres16 ",
        "deploy .* DatabaseVersion=16$",
    )
    stack = Stack(template, REQUIRED | {"DatabaseVersion": "16"}, "eu-central-1")
    assert stack.resources["DatabaseParameters"]["Family"] == "postgres16"


def test_the_controller_is_upgraded_with_its_definitions() -> None:
    """The custom resource definitions of the new chart come first, because Helm does not upgrade them."""
    _order(_words("The load balancer controller"), "helm show crds .*--version 3.6.0", "kubectl apply --server-side")


def test_the_chart_knows_its_values() -> None:
    """Each value that the page sets is one of the chart: helm would take a misspelt one, and nothing would change."""
    (helm,) = calls(AWS, "helm", "upgrade")
    assert {value.partition("=")[0] for value in helm.option("--set")} <= CHART_VALUES


def test_one_controller_stays() -> None:
    """Where pods wait for a controller's webhook, draining nodes leaves one, and an upgrade keeps its certificate."""
    (helm,) = calls(AWS, "helm", "upgrade")
    assert {
        "podMutatorWebhookConfig.failurePolicy=Fail",
        "podDisruptionBudget.maxUnavailable=1",
        "keepTLSSecret=true",
    } <= {*helm.option("--set")}


def test_a_missing_output_is_nothing(tmp_path: Path) -> None:
    """Where AWS has no value, the page's functions print nothing, and not the word None."""
    (tmp_path / "aws").write_text("#!/bin/sh\necho None\n")
    (tmp_path / "aws").chmod(0o755)
    (_, shell) = blocks(AWS)[0]
    done = subprocess.run(
        ["bash", "-c", shell + "output VpcId; database messages Endpoint.Address"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_kubectl_fits_the_cluster(template: dict[str, Any]) -> None:
    """The page asks for a kubectl within one minor version of the template's default."""
    _, minor = map(int, template["Parameters"]["KubernetesVersion"]["Default"].split("."))
    assert f"1.{minor - 1} to 1.{minor + 1} for 1.{minor}" in text(AWS).replace("\n", " ")


def test_nobody_is_sent_to_a_closed_console() -> None:
    """Performance Insights has lost its console: the page names it for that reason only."""
    assert len(re.findall("Performance Insights", text(AWS))) == 1
    assert re.search(r"\(Performance Insights, its former name, has had no console\s+since July 2026", text(AWS))


def test_the_page_says_where_logs_of_pods_go(template: dict[str, Any]) -> None:
    """As long as the template has no add-on that collects the logs of pods, the page says that nothing does."""
    addons = {item["Properties"]["AddonName"] for item in template["Resources"].values() if "Addon" in item["Type"]}
    collected = "amazon-cloudwatch-observability" in addons
    assert collected != bool(re.search(r"Logs of pods die with\s+their node", text(AWS)))


def test_the_table_of_costs_adds_up(template: dict[str, Any]) -> None:
    """Each sum is right, each part follows from the prices below it, and the text repeats what the table says."""
    rows = re.findall(
        r"^\| (.+?) \| \**(\d+)\** \| \**(\d+)\** \| \**(\d+)\** \| \**(\d+)\** \|$", text(AWS), re.MULTILINE
    )
    *parts, total = [[int(value) for value in values] for _, *values in rows]
    assert [sum(column) for column in zip(*parts, strict=True)] == total
    by_name = {name.split()[0]: [int(value) for value in values] for name, *values in rows}
    assert f"costs {by_name['RDS'][0]} or {by_name['RDS'][2]} a month" in text(AWS).replace("\n  ", " ")

    prices = re.findall(r"^\| ([^|]+), an? .+ \| (0\.\d+) \| (0\.\d+) \|$", text(AWS), re.MULTILINE)
    stack = Stack(template, REQUIRED, "eu-central-1")
    (disk,) = stack.resources["NodeLaunchTemplate"]["LaunchTemplateData"]["BlockDeviceMappings"]
    for number, test in itertools.product((0, 1), (False, True)):
        price = {name: float(regions[number]) for name, *regions in prices}
        hour = {
            "EKS": price["EKS control plane"],
            "two": 2 * price["t3.medium" if test else "m7i.large"],
            "NAT": (1 if test else 2) * (price["NAT gateway"] + price["public address"]),
            "RDS": price["db.t4g.small without" if test else "db.t4g.medium with standby"],
            "load": price["load balancer"] + 2 * price["public address"],
        }
        month = {
            "two": 2 * disk["Ebs"]["VolumeSize"] * price["disk of a node"],
            "RDS": (1 if test else 2) * 20 * price["disk of RDS"],
            "logs:": (5 if test else 20) * price["logs"],
        }
        for name in hour.keys() | month.keys():
            exact = 730 * hour.get(name, 0) + month.get(name, 0)
            assert abs(by_name[name][2 * number + test] - exact) <= 0.51, (name, exact)
