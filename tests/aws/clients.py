"""What the clients of the pages take: for each command, how many arguments, and which flags, with a value or without.

The facts are those of the clients' own help: helm 4.3.1, kubectl 1.37.1, docker 28.2.2 with buildx 0.13.1, curl 7.88
and git 2.39. Only what the pages use is here: whoever adds a flag to a page looks it up, and adds it. Where a client is
installed, test_pages.py asks the client itself, too.
"""

from __future__ import annotations

ANY = 99  # arguments

# The command -> its arguments, at least and at most; its flags, those that need a value with a "=".
COMMANDS = {
    "curl": (
        (1, 1),
        "--fail --include --output= --retry= --retry-all-errors --retry-connrefused --retry-delay= --show-error "
        "--silent",
    ),
    "docker build": ((1, 1), "-t="),
    "docker buildx build": ((1, 1), "--builder= --platform= --push --tag="),
    "docker buildx create": ((0, 1), "--driver= --name="),
    "docker login": ((0, 1), "--password-stdin --username="),
    "docker push": ((1, 1), ""),
    "docker run": ((1, ANY), "--privileged --rm"),
    "git log": ((0, ANY), "--oneline"),
    "git restore": ((1, ANY), "--source="),
    "git rev-parse": ((1, ANY), "--short"),
    "helm show crds": ((1, 1), "--repo= --version="),
    "helm upgrade": ((2, 2), "--install --namespace= --repo= --set= --version= --wait"),
    "kubectl apply": ((0, 0), "--force-conflicts --server-side -f="),
    "kubectl create configmap": ((1, 1), "--from-file= --from-literal="),
    "kubectl create namespace": ((1, 1), "--save-config"),
    "kubectl create secret generic": ((1, 1), "--from-file= --from-literal="),
    "kubectl delete": ((0, ANY), "--ignore-not-found -f="),
    "kubectl expose": ((1, 2), "--name= --port= --target-port= --type="),
    "kubectl get": ((1, ANY), "--all-namespaces --field-selector= --sort-by= -o="),
    "kubectl label": ((3, ANY), ""),
    "kubectl logs": ((0, 1), "--prefix --since= --tail= -c= -l="),
    "kubectl patch": ((2, 2), "--patch="),
    "kubectl port-forward": ((2, ANY), ""),
    "kubectl rollout restart": ((1, ANY), ""),
    "kubectl rollout status": ((1, ANY), "--timeout="),
    "kubectl rollout undo": ((1, ANY), ""),
    "kubectl top pod": ((0, 1), ""),
    "kubectl wait": ((1, ANY), "--all --for= --timeout="),
}
# What the chart of the load balancer controller, 3.5.0, calls the values that docs/aws.md sets: helm takes any name.
CHART_VALUES = {
    "clusterName",
    "enableServiceMutatorWebhook",
    "enableShield",
    "enableWaf",
    "enableWafv2",
    "keepTLSSecret",
    "podDisruptionBudget.maxUnavailable",
    "podMutatorWebhookConfig.failurePolicy",
    "region",
    "serviceAccount.name",
    "vpcId",
}
STOPS = {"docker run"}  # what follows the first argument is not the client's


def mistakes(words: list[str]) -> list[str]:
    """What the client would refuse about a command: a flag that it does not have, a missing value or argument."""
    program, *rest = words
    if program == "kubectl" and rest[0] == "-n":
        rest = rest[2:]
    line = " ".join([program, *rest]) + " "
    command = max((known for known in COMMANDS if line.startswith(f"{known} ")), key=len, default="")
    if not command:
        return [f"unknown command: {line}"]
    (least, most), flags = COMMANDS[command]
    rest = rest[command.count(" ") :]
    found, arguments = [], 0
    while rest:
        word = rest.pop(0)
        if word == "--":
            break
        flag, joined, value = word.partition("=")
        if not word.startswith("-") or word == "-":
            arguments += 1
            if command in STOPS:
                break
        elif f"{flag}=" in flags.split():
            if not (value if joined else rest and rest.pop(0)):
                found.append(f"{flag} needs a value")
        elif flag not in flags.split():
            found.append(f"unknown flag: {flag}")
    if not least <= arguments <= most:
        found.append(f"{command} takes {least} to {most} arguments, not {arguments}")
    return found
