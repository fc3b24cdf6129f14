"""Runs the commands of docs/kubernetes.md and docs/aws.md as written, in the page's order.

Where a page begins with functions for its shell, each chapter runs in a shell of its own after them: it may be the only
one that a reader needs. The shell is real; kubectl, aws, helm, docker and the like are stand-ins that record their
arguments and print what the page needs next.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

from kit import ROOT

PAGES = ("docs/kubernetes.md", "docs/aws.md")
SHELL = "The shell"  # the chapter with the functions that the others use
STAND_INS = ("aws", "curl", "docker", "git", "helm", "kubectl")

# What a reader sets: the page names each, and its commands refuse to run without it.
PLACEHOLDERS = {
    "ADMINISTRATOR": "arn:aws:iam::123456789012:role/second",
    "CHART": "3.6.0",
    "COMMIT": "abc1234",
    "RESTORE_TIME": "2026-11-28T09:30:00Z",
    "SNAPSHOT": "messages-last",
    "TARGET": "16.9",
    "VERSION": "abc1234",
}

# What a command prints if its words match; the first match counts.
ANSWERS = {
    r"OutputKey=='VpcId'": "vpc-1",
    r"OutputKey=='RepositoryUri'": "123456789012.dkr.ecr.eu-central-1.amazonaws.com/messages",
    r"describe-stacks": "None",
    r"describe-stack-resource .*Database(Subnets|Parameters|SecurityGroup)": "messages-database",
    r"get-secret-value": '{"username": "postgres", "password": "made by RDS"}',
    r"aws .*\.Endpoint\.Address": "messages.abc.eu-central-1.rds.amazonaws.com",
    r"aws .*MasterUserSecret\.SecretArn": "arn:aws:secretsmanager:eu-central-1:123456789012:secret:rds",
    r"aws .*DBInstances\[0\]\.EngineVersion": "15.19",
    r"aws .*--query cluster.version": "1.37",
    r"list-change-sets": "arn:aws:cloudformation:eu-central-1:123456789012:changeSet/any/1",
    r"describe-addon-versions": "v1.9.0-eksbuild.1\nv1.22.1-eksbuild.2\nv1.22.1-eksbuild.1",
    r"aws .*(list-nodegroups|db-instances|login-password)": "something",
    r"git rev-parse": "abc1234",
    r"helm show crds": '{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "definition"}}',
    r"kubectl .*get ingress": "balancer.example",
    r"kubectl .*--dry-run=client": '{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "database"}}',
}

STAND_IN = f"""#!{sys.executable} -IS
import json, os, re, sys
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
given = sys.stdin.read() if words[-1] == "-" or "--password-stdin" in words else ""
with open(os.environ["RECORD"], "a") as record:
    print(json.dumps([os.environ["CHAPTER"], words, given]), file=record)
if words[0] == "curl" and "--output" in words:
    open(words[words.index("--output") + 1], "w").write("certificates")
print(next((answer for asked, answer in {ANSWERS!r}.items() if re.search(asked, " ".join(words))), ""))
"""


@dataclass(frozen=True)
class Command:
    """One call of a program: the chapter it is in, its words, and its standard input."""

    chapter: str
    words: list[str]
    given: str

    def option(self, name: str) -> list[str]:
        """The values of a repeatable option, as `--name=value` or `--name value`."""
        joined = [word.partition("=")[2] for word in self.words if word.startswith(f"{name}=")]
        return joined + [value for key, value in zip(self.words, self.words[1:], strict=False) if key == name]

    def values(self, name: str) -> list[str]:
        """The values of an option that takes several: all words up to the next option."""
        if name not in self.words:
            return []
        rest = self.words[self.words.index(name) + 1 :]
        return list(itertools.takewhile(lambda word: not word.startswith("--"), rest))


def text(page: str) -> str:
    """The page, as written."""
    return (ROOT / page).read_text()


def blocks(page: str) -> list[tuple[str, str]]:
    """The blocks of commands, those in lists included, each after the title of its chapter."""
    found = []
    chapter = ""
    for title, _, block in re.findall(r"^#+ ([^\n]+)$|^( *)```sh\n(.*?)^ *```", text(page), re.MULTILINE | re.DOTALL):
        chapter = title or chapter
        if block:
            found.append((chapter, textwrap.dedent(block)))
    return found


@functools.cache
def run(page: str) -> list[Command]:
    """A page's commands, after they have run. A command that fails, or a variable that is not set, is an error."""
    with tempfile.TemporaryDirectory() as name:
        folder, programs = Path(name, "page"), Path(name, "programs")
        for path in (folder, programs):
            path.mkdir()
        for program in STAND_INS:
            (programs / program).write_text(STAND_IN)
            (programs / program).chmod(0o755)
        shutil.copy(ROOT / "k8s.yaml", folder)
        (folder / "ca.pem").write_text("certificates")
        script = ""
        alone = SHELL in dict(blocks(page))
        for chapter, parts in itertools.groupby(blocks(page), key=lambda item: item[0]):
            commands = "\n".join([f"export CHAPTER={shlex.quote(chapter)}", *(block for _, block in parts)])
            script += f"(\n{commands}\n)\n" if alone and chapter != SHELL else f"{commands}\n"
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", script + "wait"],
            cwd=folder,
            env={"PATH": f"{programs}:{os.environ['PATH']}", "RECORD": str(folder / "record"), **PLACEHOLDERS},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, ""), (page, done.stderr)
        return [Command(*json.loads(line)) for line in (folder / "record").read_text().splitlines()]


def mentioned(page: str) -> list[Command]:
    """The commands that are named in running text and in tables. Two words are the name of a command, not a command."""
    running = re.sub(r"^ *```.*?^ *```", "", text(page), flags=re.MULTILINE | re.DOTALL)
    found = [shlex.split(code) for code in re.findall(r"`((?:aws|docker|helm|kubectl)\s[^`]+)`", running)]
    return [Command("", words, "") for words in found if len(words) > 2]


def calls(page: str, *words: str) -> list[Command]:
    """The commands of a page that begin with these words."""
    return [command for command in run(page) if tuple(command.words[: len(words)]) == words]
