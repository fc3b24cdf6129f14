"""docs/aws.md against AWS's words: each command of the page keeps each limit that the API's documentation names.

words.py finds the limits in botocore's models and decides most of them. ANSWERS has the rest: sentences that somebody
has read, and why the page's commands keep to them. A sentence that AWS adds or changes is red until it is read, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("botocore", reason="the extra `aws` is not installed: make .venv/.aws")

import words
from pages import Command, calls, mentioned

PAGE = "docs/aws.md"
ADDON = "update_addons asks DescribeAddonVersions, and names the template's add-ons"
DATABASES = "test_databases_end_as_they_began follows the names"
RESOURCE = "`resource` asks the stack for it"
PROTECTED = "the page turns it off first where it deletes"
SUBNETS = "the page changes nothing but the protection"

# (operation, option; "" is the operation itself) -> the beginning of a sentence -> why it does not matter.
ANSWERS = {
    ("CancelUpdateStack", ""): {"You can cancel only stacks": "the page's table names that state"},
    ("ContinueUpdateRollback", ""): {"A stack enters the UPDATE_ROLLBACK_FAILED": "the page's table names that state"},
    ("UpdateAddon", "addon-name"): {"The name must match": ADDON},
    ("UpdateAddon", "addon-version"): {"The version must match": ADDON},
    ("CreateAccessEntry", "principal-arn"): {
        "You can't specify the same ARN": "the page creates one for a new administrator",
        "This value can't be changed": "nobody changes it",
        "For nodes": "administrators are not nodes",
        "You can't use the STS session": "the page asks for the ARN of a user or role",
    },
    ("UpdateNodegroupVersion", ""): {
        "You can update a node group using a launch template": "the template gives it one from the beginning",
        "Additionally, the launch template": "the command names none, so it stays the same",
        "You cannot roll back": "EKS's guide to the rollback says how; the page names the contradiction",
    },
    ("ModifyDBInstance", "db-instance-identifier"): {"Must match": DATABASES},
    ("ModifyDBInstance", "db-parameter-group-name"): {"Must be in the same": "the version changes in the same command"},
    ("ModifyDBInstance", "engine-version"): {
        "For major version upgrades": "the command names the default group of the new family",
        "If you specify only a major version": "the page's example is a full version",
        "If you are upgrading": "the class stays",
    },
    ("ModifyDBInstance", "allow-major-version-upgrade"): {
        "Major version upgrades must": "it is the option that allows"
    },
    ("ModifyDBInstance", "manage-master-user-password"): {"If the DB instance already": "the page only turns it on"},
    ("ModifyDBInstance", "deletion-protection"): {"The database can't be deleted": PROTECTED},
    ("RestoreDBInstanceToPointInTime", "db-parameter-group-name"): {"If supplied, must match": RESOURCE},
    ("RestoreDBInstanceToPointInTime", "db-subnet-group-name"): {"If supplied, must match": RESOURCE},
    ("RestoreDBInstanceToPointInTime", "deletion-protection"): {"The database can't be deleted": PROTECTED},
    ("RestoreDBInstanceToPointInTime", "restore-time"): {"Must be before": "the page says how to ask for the latest"},
    ("RestoreDBInstanceToPointInTime", "source-db-instance-identifier"): {"Must match": DATABASES},
    ("RestoreDBInstanceFromDBSnapshot", ""): {
        "To restore from a DB snapshot with": "the stack's own have a supported one"
    },
    ("RestoreDBInstanceFromDBSnapshot", "db-parameter-group-name"): {"If supplied, must match": RESOURCE},
    ("RestoreDBInstanceFromDBSnapshot", "db-snapshot-identifier"): {"Must match": "the page says how to list them"},
    ("RestoreDBInstanceFromDBSnapshot", "db-subnet-group-name"): {"If supplied, must match": RESOURCE},
    ("RestoreDBInstanceFromDBSnapshot", "deletion-protection"): {"The database can't be deleted": PROTECTED},
    ("RestoreDBInstanceFromDBSnapshot", "publicly-accessible"): {"That public access": "public access is off"},
    ("DeleteDBInstance", ""): {
        "When you delete a DB instance, all": "--no-delete-automated-backups keeps them, and a last snapshot is taken",
        "This operation can't be canceled": "the page deletes only what nobody needs any more",
        "When a DB instance is in a failure state": "messages-old was in use until it was renamed",
    },
    ("DeleteDBInstance", "db-instance-identifier"): {"Must match": DATABASES},
    ("RebootDBInstance", ""): {"For example": "the reboot rehearses a failover; no change waits for it"},
    ("RebootDBInstance", "db-instance-identifier"): {"Must match": DATABASES},
    ("RebootDBInstance", "force-failover"): {
        "You can't enable force failover": "the page says that it needs the standby"
    },
    ("UpdateClusterConfig", ""): {"You must specify at least two": SUBNETS, "You can't change which VPC": SUBNETS},
    ("UpdateClusterConfig", "deletion-protection"): {"When enabled (true)": PROTECTED},
}


def _changing() -> Iterator[Command]:
    """The commands that change something; a question that is wrong only gets no answer."""
    for command in calls(PAGE, "aws") + [item for item in mentioned(PAGE) if item.words[0] == "aws"]:
        model = words.operation(command)
        if model is not None and command.words[2] != "wait" and not re.match("Describe|List|Get", model.name):
            yield command


def test_each_limit_is_kept() -> None:
    """No command of the page breaks a limit that AWS documents, and none has a limit that nobody has read."""
    broken = []
    for command in _changing():
        for limit in words.limits(command):
            answers = ANSWERS.get((limit.operation, limit.option), {})
            kept = words.kept(limit, command)
            if kept is False or (kept is None and not any(map(limit.sentence.startswith, answers))):
                broken.append(f"{limit.operation} {limit.option}: {limit.sentence}")
    assert broken == []


def test_each_answer_is_to_a_sentence_of_aws() -> None:
    """The table answers only what AWS still says about commands that the page still has."""
    open_ = [limit for command in _changing() for limit in words.limits(command) if words.kept(limit, command) is None]
    unasked = [
        (*place, start)
        for place, answers in ANSWERS.items()
        for start in answers
        if not any((item.operation, item.option) == place and item.sentence.startswith(start) for item in open_)
    ]
    assert unasked == []


@pytest.mark.parametrize(
    ("operation", "option", "value"),
    [
        ("restore-db-instance-from-db-snapshot", "--manage-master-user-password", ""),
        ("restore-db-instance-from-db-snapshot", "--db-name", "mydb"),
        ("restore-db-instance-from-db-snapshot", "--backup-retention-period", "36"),
        ("restore-db-instance-from-db-snapshot", "--engine-lifecycle-support", "open-source-rds-extended"),
        ("restore-db-instance-to-point-in-time", "--use-latest-restorable-time", ""),
        ("restore-db-instance-to-point-in-time", "--target-db-instance-identifier", "messages--new"),
        ("restore-db-instance-to-point-in-time", "--restore-time", "2026-11-28 09:30"),
        ("restore-db-instance-to-point-in-time", "--availability-zone", "eu-central-1a"),
        ("modify-db-instance", "--master-user-password", "correct-horse"),
        ("delete-db-instance", "--final-db-snapshot-identifier", "2026-11-28"),
    ],
)
def test_a_broken_limit_is_seen(operation: str, option: str, value: str) -> None:
    """One wrong option or value more in a command of the page is found."""
    found = []
    for command in calls(PAGE, "aws", "rds", operation):
        changed = list(command.words)
        if option in changed and value:
            changed[changed.index(option) + 1] = value
        else:
            changed += [option, value] if value else [option]
        wrong = Command(command.chapter, changed, "")
        found += [limit for limit in words.limits(wrong) if words.kept(limit, wrong) is False]
    assert found
