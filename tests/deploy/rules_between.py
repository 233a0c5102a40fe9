"""Rules about what lies between pods: services, network policies, rights, autoscaling, monitoring."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

import yaml

from tests.deploy.render import Object, Pod, Render, selects
from tests.deploy.rules import RULES, rule, serving

__all__ = ["RULES"]

PRIVATE = ("10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1")


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
def who_needs_the_job_store_reaches_it(render: Render) -> Iterator[str]:
    if render.has("StatefulSet", "capo-postgresql"):
        store = render.pod("capo-postgresql")
        yield from (pod.name for pod in render.capo_pods() if not reaches(render, pod, store, "postgresql"))


@rule
def launched_jobs_reach_the_job_store(render: Render) -> Iterator[str]:
    if any(pod.environment("CAPO_LAUNCHER") == "kubernetes" for pod in render.pods()):
        labels = {"app.kubernetes.io/name": "capo", "app.kubernetes.io/component": "training"}
        launched = Pod("launched", "Job", labels, {"containers": [{}]}, {})
        if not reaches(render, launched, render.pod("capo-postgresql"), "postgresql"):
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


# -- rights ---------------------------------------------------------------------------------------------------------


@rule
def rights_end_at_the_namespace(render: Render) -> Iterator[str]:
    yield from (o["metadata"]["name"] for kind in ("ClusterRole", "ClusterRoleBinding") for o in render.of(kind))


@rule
def the_launcher_has_the_rights_it_uses_and_no_others(render: Render) -> Iterator[str]:
    """Those of tune/jobs/launchers/kubernetes_api.py: POST, GET of a list and DELETE of Jobs, GET of a list of pods."""
    wanted = {("batch", "jobs"): {"create", "list", "delete"}, ("", "pods"): {"list"}}
    launches = any(pod.environment("CAPO_LAUNCHER") == "kubernetes" for pod in render.pods())
    given: dict[tuple[str, str], set[str]] = {}
    for role in render.of("Role"):
        for entry in role["rules"]:
            for group in entry["apiGroups"]:
                for resource in entry["resources"]:
                    given.setdefault((group, resource), set()).update(entry["verbs"])
    if given != (wanted if launches else {}):
        yield f"{given}"


@rule
def rights_are_bound_to_the_launcher_alone(render: Render) -> Iterator[str]:
    for binding in render.of("RoleBinding"):
        subjects = [(s["kind"], s["name"]) for s in binding["subjects"]]
        known = {role["metadata"]["name"] for role in render.of("Role")}
        if subjects != [("ServiceAccount", "capo-control")] or binding["roleRef"]["name"] not in known:
            yield binding["metadata"]["name"]


@rule
def launched_jobs_run_the_image_that_launches_them(render: Render) -> Iterator[str]:
    for pod in render.pods():
        image = pod.environment("CAPO_KUBERNETES_IMAGE")
        if image is not None and image != pod.container["image"]:
            yield image


@rule
def launchers_are_told_what_they_need(render: Render) -> Iterator[str]:
    needed = {
        "kubernetes": ("CAPO_KUBERNETES_IMAGE", "CAPO_KUBERNETES_VOLUME_CLAIM", "CAPO_KUBERNETES_SECRET"),
        "ray": ("CAPO_RAY_ADDRESS",),
    }
    for pod in render.pods():
        for name in needed.get(pod.environment("CAPO_LAUNCHER") or "", ()):
            if not pod.environment(name):
                yield f"{pod.name}: {name}"


@rule
def training_happens_in_one_way(render: Render) -> Iterator[str]:
    launcher = next((found for pod in render.pods() if (found := pod.environment("CAPO_LAUNCHER"))), None)
    has_workers = render.has("Deployment", "capo-worker")
    is_split = render.has("Deployment", "capo-control")
    if is_split and has_workers is (launcher is not None):
        yield f"launcher {launcher}, workers {has_workers}"


@rule
def launched_jobs_have_a_bound(render: Render) -> Iterator[str]:
    if render.of("Role") and not render.of("ResourceQuota"):
        yield "no quota"


# -- autoscaling ----------------------------------------------------------------------------------------------------


def autoscalers(render: Render) -> list[Object]:
    return [*render.of("HorizontalPodAutoscaler"), *render.of("ScaledObject")]


@rule
def one_autoscaler_at_most_and_only_of_replicas(render: Render) -> Iterator[str]:
    targets = [o["spec"]["scaleTargetRef"]["name"] for o in autoscalers(render)]
    if len(targets) > 1 or any(name != "capo-serve" for name in targets):
        yield f"{targets}"
    if targets and render.get("Deployment", "capo-serve")["spec"].get("replicas") is not None:
        yield "a fixed number would undo the autoscaler's"
    if targets and render.pod("capo-serve").environment("CAPO_ROLE") != "infer":
        yield "a pod with the job store cannot be several"


@rule
def there_are_always_two_replicas_where_there_may_be_many(render: Render) -> Iterator[str]:
    for item in autoscalers(render):
        least = item["spec"].get("minReplicas", item["spec"].get("minReplicaCount", 0))
        if least < 2:
            yield item["metadata"]["name"]


@rule
def replicas_go_slowly(render: Render) -> Iterator[str]:
    for item in autoscalers(render):
        spec = item["spec"]
        behavior = spec.get("behavior") or spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        if behavior.get("scaleDown", {}).get("stabilizationWindowSeconds", 0) < 300:
            yield item["metadata"]["name"]


@rule
def replicas_come_by_waiting_requests_and_by_the_wait(render: Render) -> Iterator[str]:
    for item in render.of("ScaledObject"):
        asked = " ".join(trigger["metadata"]["query"] for trigger in item["spec"]["triggers"])
        if "num_requests_waiting" not in asked or "capo:request_queue_seconds:p95_5m" not in asked:
            yield item["metadata"]["name"]
        if "fallback" not in item["spec"]:
            yield "nothing is said for a Prometheus that is away"
    for item in render.of("HorizontalPodAutoscaler"):
        names = {metric["external"]["metric"]["name"] for metric in item["spec"]["metrics"]}
        rules = yaml.safe_load(render.get("ConfigMap", "capo-adapter-rules")["data"]["config.yaml"])["externalRules"]
        if names != {entry["name"]["as"] for entry in rules}:
            yield f"{names}"


# -- monitoring -----------------------------------------------------------------------------------------------------


@rule
def prometheus_scrapes_everything_that_serves(render: Render) -> Iterator[str]:
    for monitor in render.of("ServiceMonitor"):
        for pod in serving(render):
            services = [
                service
                for service in render.of("Service")
                if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)
                and selects(monitor["spec"]["selector"], service["metadata"]["labels"])
            ]
            ports = {port["name"] for service in services for port in service["spec"]["ports"]}
            if not {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports or not services:
                yield pod.name


@rule
def prometheus_gets_through(render: Render) -> Iterator[str]:
    for monitor in render.of("ServiceMonitor"):
        wanted = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
        for pod in serving(render):
            allowed = {
                port["port"]
                for entry in policies(render, pod, "ingress")
                for peer in entry["from"]
                if peer.get("namespaceSelector") == {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
                for port in entry["ports"]
            }
            if allowed != wanted:
                yield f"{pod.name}: {allowed}"


@rule
def prometheus_shows_a_key(render: Render) -> Iterator[str]:
    for monitor in render.of("ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            if endpoint.get("authorization", {}).get("credentials", {}).get("name") != "capo-metrics-key":
                yield monitor["metadata"]["name"]


@rule
def a_scrape_is_bounded_and_ends_before_the_next(render: Render) -> Iterator[str]:
    for monitor in render.of("ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            interval, timeout = (int(endpoint[name].removesuffix("s")) for name in ("interval", "scrapeTimeout"))
            if timeout >= interval or not 0 < monitor["spec"].get("sampleLimit", 0) <= 50000:
                yield monitor["metadata"]["name"]


@rule
def alerts_find_the_job_label_that_they_ask_for(render: Render) -> Iterator[str]:
    for monitor in render.of("ServiceMonitor"):
        label = monitor["spec"].get("jobLabel")
        if any(service["metadata"]["labels"].get(label) != "capo" for service in render.of("Service")):
            yield monitor["metadata"]["name"]


@rule
def alerts_come_with_the_monitor(render: Render) -> Iterator[str]:
    has_alerts = any("alert" in r for o in render.of("PrometheusRule") for g in o["spec"]["groups"] for r in g["rules"])
    if bool(render.of("ServiceMonitor")) is not has_alerts:
        yield "one without the other"


@rule
def dashboards_are_found_by_the_sidecar(render: Render) -> Iterator[str]:
    boards = [o for o in render.of("ConfigMap") if "dashboard" in o["metadata"]["name"]]
    if render.of("ServiceMonitor") and len(boards) != 6:
        yield f"{len(boards)} dashboards"
    for board in boards:
        if board["metadata"]["labels"].get("grafana_dashboard") != "1":
            yield board["metadata"]["name"]


# -- Ray --------------------------------------------------------------------------------------------------------------


@rule
def a_ray_cluster_is_reached_by_the_control_process_at_one_port(render: Render) -> Iterator[str]:
    if not render.of("RayCluster"):
        return
    head, control = render.pod("ray head"), render.pod("capo-control")
    if not reaches(render, control, head, "dashboard"):
        yield "the control process does not reach the jobs API"
    if any(reaches(render, control, head, port) for port in ("gcs", "client")):
        yield "the control process reaches more than the jobs API"
    if reaches(render, render.pod("capo-serve"), head, "dashboard"):
        yield "replicas reach it"
    for peer in (p for e in policies(render, head, "ingress") for p in e.get("from") or [{}]):
        if "podSelector" not in peer or "namespaceSelector" in peer:
            yield "others reach it"


@rule
def a_ray_heads_service_is_the_one_that_is_asked(render: Render) -> Iterator[str]:
    """KubeRay calls it <cluster>-head-svc; the jobs API is at the dashboard's port."""
    for cluster in render.of("RayCluster"):
        wanted = f"http://{cluster['metadata']['name']}-head-svc:{ports_of(render.pod('ray head'))['dashboard']}"
        if render.pod("capo-control").environment("CAPO_RAY_ADDRESS") != wanted:
            yield wanted
