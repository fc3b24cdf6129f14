"""docs/kubernetes.md and docs/aws.md: every command runs as written, in the page's order, and fits k8s.yaml.

The shell is real; kubectl, aws, helm, docker and curl are stand-ins that record their arguments and print what the page
needs next. The tests then check these arguments: with botocore's models of the services, with kubectl's own command
line if it is installed, and against the needs of k8s.yaml.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("botocore", reason="the extra `aws` is not installed: make .venv/.aws")

import botocore.session
import yaml
from botocore import xform_name
from cfnlint.decode import cfn_yaml
from k8s_rules import Manifest, Object, all_containers, configuration
from kit import ROOT, reserve_port
from resolver import STACK, Stack, parameter_values

jmespath = pytest.importorskip("jmespath")  # it has no type hints

SERVICES = ("gateway", "message-service")
PAGES = ("docs/kubernetes.md", "docs/aws.md")
STAND_INS = ("aws", "curl", "docker", "git", "helm", "kubectl")

# What a command prints if its words match; the first match counts.
ANSWERS = {
    r"OutputKey=='ClusterName'": "messages",
    r"OutputKey=='KubeconfigCommand'": "aws eks update-kubeconfig --region eu-central-1 --name messages",
    r"OutputKey=='VpcId'": "vpc-1",
    r"OutputKey=='RepositoryUri'": "123456789012.dkr.ecr.eu-central-1.amazonaws.com/messages",
    r"OutputKey=='ImagePlatform'": "linux/amd64",
    r"get-secret-value": '{"username": "postgres", "password": "made by RDS"}',
    r"aws .*\.Endpoint\.Address": "messages.abc.eu-central-1.rds.amazonaws.com",
    r"aws .*MasterUserSecret": "arn:aws:secretsmanager:eu-central-1:123456789012:secret:rds",
    r"aws .*--query cluster.version": "1.37",
    r"aws .*(describe-addon-versions|list-nodegroups|db-instances|login-password)": "something",
    r"git rev-parse": "abc1234",
    r"kubectl .*get ingress": "balancer.example",
    r"kubectl .*--dry-run=client": '{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "database"}}',
}

STAND_IN = f"""#!{sys.executable}
import json, os, re, sys
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
given = sys.stdin.read() if words[-1] == "-" or "--password-stdin" in words else ""
with open(os.environ["RECORD"], "a") as record:
    print(json.dumps([words, given]), file=record)
if words[0] == "curl" and "--output" in words:
    open(words[words.index("--output") + 1], "w").write("certificates")
print(next((answer for asked, answer in {ANSWERS!r}.items() if re.search(asked, " ".join(words))), ""))
"""


@dataclass(frozen=True)
class Command:
    """One call of a program: its words, and its standard input."""

    words: list[str]
    given: str

    def option(self, name: str) -> list[str]:
        """The values of a repeatable option, as `--name=value` or `--name value`."""
        joined = [word.partition("=")[2] for word in self.words if word.startswith(f"{name}=")]
        return joined + [value for key, value in zip(self.words, self.words[1:], strict=False) if key == name]


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Command]:
    """A page's commands, after they have run."""
    folder, programs = tmp_path_factory.mktemp("page"), tmp_path_factory.mktemp("programs")
    for name in STAND_INS:
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    shutil.copy(ROOT / "k8s.yaml", folder)
    (folder / "ca.pem").write_text("certificates")
    script = "\n".join(re.findall(r"^```sh\n(.*?)^```", (ROOT / request.param).read_text(), re.MULTILINE | re.DOTALL))
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RECORD": str(folder / "record"),
        "ADMINISTRATOR": "arn:aws:iam::123456789012:role/second",
        "SNAPSHOT": "messages-last",
    }
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", script + "\nwait"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [Command(*json.loads(line)) for line in (folder / "record").read_text().splitlines()]


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
        assert named <= known | {"deployment/postgres"}
        assert {*command.option("-l")} <= labels


def test_stack_is_the_templates() -> None:
    """The page's parameters, outputs and names are the template's, and the template accepts each value."""
    text = (ROOT / "docs/aws.md").read_text()
    template = json.loads(json.dumps(cfn_yaml.load(str(ROOT / "aws/template.yaml"))))
    required = {"PublicAccessCidrs": "203.0.113.7/32"}
    given = re.findall(r"\b([A-Z][a-z]+[A-Za-z]*)=([\w.,/-]+)", text)
    assert len(given) > 5
    for name, value in given:
        parameter_values(template, required | {name: value})
    assert {*re.findall(r"\$\(output (\w+)\)", text)} <= template["Outputs"].keys()
    stack = Stack(template, required, "eu-central-1")
    (name,) = {*re.findall(r"--stack-name (\w+)", text)}
    assert name == STACK == stack.resources["Database"]["DBInstanceIdentifier"]
    assert f"--log-group-name {stack.resources['ClusterLogGroup']['LogGroupName']} " in text


# Commands that the AWS CLI adds to the services' operations, with the options that the page may use.
CUSTOM = {
    ("cloudformation", "deploy"): "stack-name template-file capabilities disable-rollback tags parameter-overrides",
    ("ecr", "get-login-password"): "",
    ("eks", "update-kubeconfig"): "region name",
}


def test_aws_understands_its_commands(page: list[Command]) -> None:
    """Each `aws` command has an existing operation, existing options, and all the required ones."""
    session = botocore.session.get_session()
    for command in (item.words for item in page if item.words[0] == "aws"):
        service, operation, *rest = command[1:]
        options = {word.removeprefix("--").removeprefix("no-") for word in rest if word.startswith("--")}
        for query in (rest[number + 1] for number, word in enumerate(rest) if word == "--query"):
            jmespath.compile(query)
        options -= {"query", "output"}
        if (service, operation) in CUSTOM:
            assert options <= {*CUSTOM[service, operation].split()}
            continue
        model = session.get_service_model(service)
        names = {xform_name(name, "-"): name for name in model.operation_names}
        if operation == "wait":
            waiters = session.get_waiter_model(service)
            waiter = {xform_name(name, "-"): name for name in waiters.waiter_names}[rest[0]]
            operation = xform_name(waiters.get_waiter(waiter).operation, "-")
        shape: Any = model.operation_model(names[operation]).input_shape
        members = {xform_name(name, "-"): name for name in shape.members}
        members |= {"kubernetes-version": "version"} if "version" in members else {}
        assert options <= members.keys(), command
        assert {*shape.required_members} <= {members[option] for option in options}, command


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl here")
def test_kubectl_understands_its_commands(page: list[Command], tmp_path: Path) -> None:
    """kubectl accepts each command, up to the point where it looks for a cluster."""
    shutil.copy(ROOT / "k8s.yaml", tmp_path)
    for name in ("ca.pem", "rds.pem"):
        (tmp_path / name).write_text("certificates")
    with reserve_port() as nobody:
        for command in (item for item in page if item.words[0] == "kubectl"):
            done = subprocess.run(
                [*command.words, f"--server=http://127.0.0.1:{nobody.getsockname()[1]}"],
                cwd=tmp_path,
                input=command.given,
                env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
                capture_output=True,
                text=True,
                timeout=30,
            )
            assert done.returncode == 0 or "refused" in done.stderr, (command.words, done.stderr)
