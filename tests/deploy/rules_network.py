"""Rules about what lies between pods: services and network policies."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from urllib.parse import urlsplit

from tests.deploy.render import Object, Pod, Render, selects
from tests.deploy.rules import rule, serving

PUBLIC = "198.51.100.7"
PRIVATE = ("10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1")

LAUNCHED = Pod(
    "a launched job",
    "Job",
    {"app.kubernetes.io/name": "capo", "app.kubernetes.io/component": "training"},
    {"containers": [{}]},
    {},
)
"""What a launcher makes of one (tune/jobs/launchers/kubernetes_job.py), as policies see it."""


def ports_of(pod: Pod) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in pod.container.get("ports", [])}


def policies(render: Render, pod: Pod, way: str) -> Iterator[Object]:
    """The rules of all policies that let this pod talk in one direction."""
    for policy in render.of("NetworkPolicy"):
        spec = policy["spec"]
        if way.capitalize() in spec["policyTypes"] and selects(spec["podSelector"], pod.labels):
            yield from spec.get(way) or []


def reaches(render: Render, source: Pod, target: Pod, port: str | int) -> bool:
    """Whether the policies let ``source`` open a connection to ``target``: both sides must allow it."""
    number = ports_of(target).get(port, port) if isinstance(port, str) else port

    def allows(rules: Iterator[Object], side: str, other: Pod, ports: dict[str, int]) -> bool:
        for entry in rules:
            peers = entry.get(side) or [{}]
            is_peer = any(
                "ipBlock" not in peer
                and "namespaceSelector" not in peer
                and selects(peer.get("podSelector", {}), other.labels)
                for peer in peers
            )
            numbers = {ports.get(p["port"], p["port"]) for p in entry.get("ports") or []}
            if is_peer and (not numbers or number in numbers):
                return True
        return False

    known = ports_of(target)
    return allows(policies(render, source, "egress"), "to", target, known) and allows(
        policies(render, target, "ingress"), "from", source, known
    )


def block_allows(peer: Object, address: str) -> bool:
    block = peer["ipBlock"]
    given = ipaddress.ip_address(address)
    return given in ipaddress.ip_network(block["cidr"]) and not any(
        given in ipaddress.ip_network(excepted) for excepted in block.get("except", [])
    )


# -- services ---------------------------------------------------------------------------------------------------------


@rule
def services_select_pods(render: Render) -> Iterator[str]:
    for service in render.of("Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        chosen = [pod for pod in render.pods() if selects(selector, pod.labels)]
        if len(chosen) != 1:
            yield f"{service['metadata']['name']} selects {[pod.name for pod in chosen]}"


@rule
def services_lead_to_ports_that_pods_open(render: Render) -> Iterator[str]:
    for service in render.of("Service"):
        for pod in render.pods():
            if selects({"matchLabels": service["spec"]["selector"]}, pod.labels):
                for port in service["spec"]["ports"]:
                    if ports_of(pod).get(port["targetPort"]) != port["port"]:
                        yield f"{service['metadata']['name']}: {port['name']}"


@rule
def everything_that_serves_is_behind_a_service(render: Render) -> Iterator[str]:
    for pod in serving(render):
        ports = {
            port["name"]
            for service in render.of("Service")
            if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)
            for port in service["spec"]["ports"]
        }
        if ports != {"http", "grpc", "metrics"}:
            yield f"{pod.name}: {ports}"


@rule
def grpc_is_declared_as_http_2(render: Render) -> Iterator[str]:
    for service in render.of("Service"):
        for port in service["spec"]["ports"]:
            if port["name"] == "grpc" and port.get("appProtocol") != "kubernetes.io/h2c":
                yield service["metadata"]["name"]


@rule
def no_service_is_open_to_the_world(render: Render) -> Iterator[str]:
    for service in render.of("Service"):
        if service["spec"].get("type", "ClusterIP") != "ClusterIP" or "externalIPs" in service["spec"]:
            yield service["metadata"]["name"]


# -- network policies -------------------------------------------------------------------------------------------------


@rule
def everything_is_denied_that_is_not_allowed(render: Render) -> Iterator[str]:
    wanted = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    if not any(policy["spec"] == wanted for policy in render.of("NetworkPolicy")):
        yield "no policy denies by default"


@rule
def policies_name_their_directions(render: Render) -> Iterator[str]:
    for policy in render.of("NetworkPolicy"):
        spec = policy["spec"]
        for way in ("ingress", "egress"):
            if way in spec and way.capitalize() not in spec["policyTypes"]:
                yield policy["metadata"]["name"]


@rule
def policies_select_pods_that_exist(render: Render) -> Iterator[str]:
    for policy in render.of("NetworkPolicy"):
        if not any(selects(policy["spec"]["podSelector"], pod.labels) for pod in render.pods()):
            yield policy["metadata"]["name"]


@rule
def ports_of_policies_are_open_somewhere(render: Render) -> Iterator[str]:
    known = {name for pod in render.pods() for name in ports_of(pod)}
    for policy in render.of("NetworkPolicy"):
        for entry in policy["spec"].get("ingress") or []:
            for port in entry.get("ports") or []:
                if isinstance(port["port"], str) and port["port"] not in known:
                    yield f"{policy['metadata']['name']}: {port['port']}"


@rule
def every_pod_can_ask_for_names(render: Render) -> Iterator[str]:
    for pod in render.pods():
        asked = [
            entry
            for entry in policies(render, pod, "egress")
            if {"protocol": "UDP", "port": 53} in entry.get("ports", [])
        ]
        if not asked:
            yield pod.name


@rule
def names_are_asked_of_the_cluster_alone(render: Render) -> Iterator[str]:
    for policy in render.of("NetworkPolicy"):
        for entry in policy["spec"].get("egress") or []:
            if any(port["port"] == 53 for port in entry.get("ports") or []):
                spaces = [peer.get("namespaceSelector", {}).get("matchLabels") for peer in entry.get("to") or [{}]]
                if spaces != [{"kubernetes.io/metadata.name": "kube-system"}]:
                    yield policy["metadata"]["name"]


@rule
def clients_reach_the_api_and_not_the_metrics(render: Render) -> Iterator[str]:
    for pod in serving(render):
        for_clients = [
            {port["port"] for port in entry["ports"]}
            for entry in policies(render, pod, "ingress")
            for peer in entry["from"]
            if peer.get("namespaceSelector") == {"matchLabels": {"capo-client": "true"}}
        ]
        if for_clients != [{"http", "grpc"}]:
            yield f"{pod.name}: {for_clients}"


@rule
def no_policy_lets_everybody_in(render: Render) -> Iterator[str]:
    for policy in render.of("NetworkPolicy"):
        for entry in policy["spec"].get("ingress") or []:
            peers = entry.get("from")
            if not peers or any(not peer or peer.get("namespaceSelector") == {} or "ipBlock" in peer for peer in peers):
                yield policy["metadata"]["name"]


@rule
def the_world_outside_is_reached_over_tls_only(render: Render) -> Iterator[str]:
    for policy in render.of("NetworkPolicy"):
        for entry in policy["spec"].get("egress") or []:
            if any("ipBlock" in peer for peer in entry.get("to") or [{"ipBlock": {}}]):
                ports = {port["port"] for port in entry.get("ports") or []}
                if not ports or not ports <= {443, 6443}:
                    yield policy["metadata"]["name"]


@rule
def inner_addresses_are_out_of_reach_from_outside_traffic(render: Render) -> Iterator[str]:
    """Webhooks and downloads go to public addresses; only a launcher needs one inside, the API server's."""
    for policy in render.of("NetworkPolicy"):
        if policy["metadata"]["name"] == "reach-kubernetes-api":
            continue
        for entry in policy["spec"].get("egress") or []:
            for peer in entry.get("to") or []:
                if "ipBlock" in peer and any(block_allows(peer, address) for address in PRIVATE):
                    yield policy["metadata"]["name"]


@rule
def who_sends_webhooks_reaches_the_world_outside(render: Render) -> Iterator[str]:
    for pod in serving(render):
        if pod.environment("CAPO_ROLE") != "infer" and not any(
            "ipBlock" in peer and block_allows(peer, PUBLIC) and {"protocol": "TCP", "port": 443} in entry["ports"]
            for entry in policies(render, pod, "egress")
            for peer in entry.get("to") or []
        ):
            yield pod.name


@rule
def spans_reach_their_collector(render: Render) -> Iterator[str]:
    address = render.settings(render.pod("capo-serve")).get("CAPO_OTLP_ENDPOINT")
    if address is None:
        return
    collector = urlsplit(address)
    namespace = {"kubernetes.io/metadata.name": str(collector.hostname).split(".")[1]}
    wanted = ({"namespaceSelector": {"matchLabels": namespace}}, {"protocol": "TCP", "port": collector.port})
    for pod in [*render.capo_pods(), LAUNCHED]:
        given = [(entry.get("to", []), entry["ports"]) for entry in policies(render, pod, "egress") if "ports" in entry]
        if not any(wanted[0] in peers and wanted[1] in ports for peers, ports in given):
            yield pod.name


@rule
def who_needs_the_job_store_reaches_it(render: Render) -> Iterator[str]:
    if render.has("StatefulSet", "capo-postgresql"):
        store = render.pod("capo-postgresql")
        yield from (pod.name for pod in render.capo_pods() if not reaches(render, pod, store, "postgresql"))


@rule
def launched_jobs_reach_the_job_store(render: Render) -> Iterator[str]:
    launches = any(pod.environment("CAPO_LAUNCHER") == "kubernetes" for pod in render.pods())
    if launches and not reaches(render, LAUNCHED, render.pod("capo-postgresql"), "postgresql"):
        yield "a launched job"


@rule
def nobody_reaches_replicas_from_training(render: Render) -> Iterator[str]:
    for source in render.pods():
        if source.component in ("worker", "training", "postgresql"):
            for target in serving(render):
                if any(reaches(render, source, target, port) for port in ("http", "grpc", "metrics")):
                    yield f"{source.name} reaches {target.name}"


@rule
def the_job_store_is_reached_by_capo_alone(render: Render) -> Iterator[str]:
    if render.has("StatefulSet", "capo-postgresql"):
        store = render.pod("capo-postgresql")
        if any("namespaceSelector" in p for e in policies(render, store, "ingress") for p in e.get("from") or [{}]):
            yield "other namespaces"
